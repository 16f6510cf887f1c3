"""The card of a data set from the hub: README.md, whose front matter may say which files belong to which split."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from thimble.data.sources.raw import Told
from thimble.errors import DataError, as_word, listing

CARD = "README.md"
WHOLE = ""  # in place of a split: all files of a folder, whose names say the splits
MOST_CARD_BYTES = 1 << 22
MOST_VALUES = 100_000  # in the configs of a card
_YES = ("true", "True", "TRUE", "yes", "on")
_FRONT = re.compile(r"\ufeff?---[ \t]*\n(.*?\n)---[ \t]*(\n|$)", re.DOTALL)


class Config(NamedTuple):
    """One of the data sets that a card describes."""

    name: str
    patterns: dict[str, list[str]]  # of files, by split
    is_default: bool


def is_card(path: Path) -> bool:
    """Whether a file begins with front matter, as the cards of data sets do."""
    return path.name.lower() == CARD.lower() and _front_matter(path) is not None


def files_by_card(folder: Path, told: Told) -> dict[str, list[Path]] | None:
    """The files of each split as the card says; None if it does not say; a DataError if only the user can tell."""
    front = _front_matter(folder / CARD)
    configs = list(_configs(front, folder)) if front else []
    if not configs:
        return None
    config = configs[0] if len(configs) == 1 else next((one for one in configs if one.is_default), None)
    if len(configs) == 1 and WHOLE in configs[0].patterns:
        return None
    if config is None or WHOLE in config.patterns:
        ways = (f"{one.name} ({_way(folder, one, configs)})" for one in configs)
        raise DataError(
            f"{folder / CARD} describes several data sets: {listing(ways, 12)}. Name the folder or file of one, as in: "
            f"thimble train {as_word(str(_way(folder, configs[0], configs)))}"
        )
    others = [one.name for one in configs if one is not config]
    if others:
        told.note(f"{CARD} describes several data sets: {config.name} is read, not {listing(others)}")
    found = {split: _matching(folder, patterns) for split, patterns in config.patterns.items()}
    missing = [f"{split} ({listing(config.patterns[split])})" for split, files in found.items() if not files]
    found = {split: files for split, files in found.items() if files}
    if not found:
        raise DataError(
            f"{folder} does not hold the files of {listing(missing)}, which its {CARD} lists: the download is not "
            "complete; fetch the whole data set again."
        )
    if missing:
        told.warn(f"{CARD} lists files that are not there: {listing(missing)}")
    return found


def _front_matter(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_CARD_BYTES).decode(errors="replace").replace("\r\n", "\n")
    except OSError:
        return None
    found = _FRONT.match(text)
    return found[1] if found else None


def _configs(front: str, folder: Path) -> Iterator[Config]:
    import yaml

    try:
        root = yaml.compose(front, yaml.SafeLoader)
        pairs = root.value if isinstance(root, yaml.MappingNode) else ()
        configs = next((_content(value, [MOST_VALUES]) for key, value in pairs if key.value == "configs"), None)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{folder / CARD} begins with front matter that is not YAML ({' '.join(str(error).split())[:200]}), so it "
            "cannot say which files are the data: name the file or folder to read instead."
        ) from None
    for config in configs if isinstance(configs, list) else ():
        if not isinstance(config, dict):
            continue
        name, root = str(config.get("config_name", "default")), config.get("data_dir")
        patterns = _patterns(config.get("data_files"), f"{root}/" if isinstance(root, str) else "")
        if not patterns and isinstance(root, str):
            patterns = {WHOLE: [f"{root}/**/*"]}
        if patterns:
            yield Config(name, patterns, name == "default" or config.get("default") in _YES)


def _content(node: Any, left: list[int]) -> Any:
    """What a node of YAML holds: lists, objects, texts and None, which is all that a card needs.

    PyYAML's own constructors would do whatever tags and aliases say, and a few lines of aliases may stand for more than
    any memory holds. `left` counts down how many values may still come; a ValueError if there are more.
    """
    import yaml

    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"configs holds more than {MOST_VALUES:,} values")
    if isinstance(node, yaml.SequenceNode):
        return [_content(inner, left) for inner in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _content(inner, left) for key, inner in node.value if isinstance(key, yaml.ScalarNode)}
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _patterns(files: Any, root: str) -> dict[str, list[str]]:
    """The patterns of each split; without splits all files are for training."""
    if isinstance(files, dict):
        pairs: Any = files.items()
    elif isinstance(files, list) and all(isinstance(file, dict) for file in files):
        pairs = ((file.get("split", "train"), file.get("path")) for file in files)
    else:
        pairs = [("train", files)]
    found: dict[str, list[str]] = {}
    for split, paths in pairs:
        texts = [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]
        found.setdefault(str(split), []).extend(root + text.removeprefix("./") for text in texts)
    return {split: texts for split, texts in found.items() if texts}


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    """The files that patterns name, none outside of the folder."""
    found: list[Path] = []
    for pattern in patterns:
        if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts or ":" in pattern:
            raise DataError(
                f"{folder / CARD} names {pattern!r} as data, which lies outside of its folder: expected files inside. "
                "Name the file to read instead."
            )
        try:
            matching = sorted(folder.glob(pattern)) if pattern.strip("/ .") else []
        except (ValueError, NotImplementedError):
            raise DataError(
                f"{folder / CARD} names {pattern!r} as data, a pattern that is not understood: name the file or folder "
                "to read instead."
            ) from None
        found += [path for path in matching if path.is_file() and not path.name.startswith(".") and path not in found]
    return found


def _way(folder: Path, config: Config, configs: list[Config]) -> Path:
    """What to name to read one data set of several: its folder if it is its alone, else its first file."""
    own = {pattern.partition("*")[0].rpartition("/")[0] for pattern in itertools.chain(*config.patterns.values())}
    others = {
        pattern.partition("*")[0].rpartition("/")[0]
        for other in configs
        if other is not config
        for pattern in itertools.chain(*other.patterns.values())
    }
    if len(own) == 1 and not own & others and own != {""}:
        return folder / own.pop()
    first = next(itertools.chain(*config.patterns.values()))
    return next(iter(_matching(folder, [first])), folder / first)
