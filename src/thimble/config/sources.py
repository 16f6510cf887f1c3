"""Where options come from: flags or keywords, over a YAML file, over the run folder that is resumed."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from thimble.config.groups import RunOptions
from thimble.config.options import Given, Options
from thimble.config.paths import expand_paths, expanded, relocated
from thimble.config.train import TrainConfig, layered, of_run, take_up
from thimble.config.values import parse_bool
from thimble.errors import ConfigError, escaped

CONFIG_FILE = "config.yaml"  # of a run folder
RUN_SIGNS = ("checkpoints", "metrics.jsonl")  # what a folder holds beside it, if it is a run folder

AnyOptions = TypeVar("AnyOptions", bound=Options)


def build_config(
    options: type[AnyOptions], values: Mapping[str, Any], config_file: str | None = None, problems: Iterable[str] = ()
) -> AnyOptions:
    """Build a config from flags or keywords, over a YAML file, over the run folder that is resumed.

    What is wrong is in its `problems`, after those given here. A YAML file that cannot be read is a ConfigError, and so
    is a path with a variable that is not set, since no command could say anything of a file of that name but that it is
    missing.
    """
    given, unknown = options.sort(values)
    try:
        config_file = expanded(str(config_file)) if config_file else None
    except ValueError as error:
        raise ConfigError(f"config file {config_file}: {error}") from None
    filed, unknown_there, lost_there = _filed(options, config_file) if config_file else ({}, [], [])
    given, lost = expand_paths(options, given)
    lost = [*lost_there, *lost]
    given, found = layered(filed, given), [*problems, *unknown_there, *unknown, *lost]
    if issubclass(options, RunOptions) and _is_true(given.get("resume")):
        given, differing = _resumed(given, config_file)
        found += differing
    config = options.make(given, found)
    if lost:
        raise ConfigError(*config.problems)
    return config


def _filed(options: type[Options], config_file: str) -> tuple[dict[str, Given], list[str], list[str]]:
    """The options in a YAML file, or in that of a run folder, whose base and data may lie elsewhere now.

    With what is wrong with their names, and with their paths.
    """
    path = Path(config_file)
    given, unknown = options.sort(_read_yaml(path), config_file)
    if _is_of_run(path):
        given = of_run(given) if issubclass(options, TrainConfig) else given
        return relocated(options, given, path.parent, by_name=False), unknown, []
    given, lost = expand_paths(options, given)
    return given, unknown, lost


def _is_of_run(path: Path) -> bool:
    return path.name == CONFIG_FILE and any((path.parent / sign).exists() for sign in RUN_SIGNS)


def _is_true(given: Given | None) -> bool:
    """Whether a switch is on; what is neither true nor false is refused with the rest."""
    with contextlib.suppress(ValueError):
        return given is not None and parse_bool(given.value)
    return False


def _resumed(given: Mapping[str, Given], config_file: str | None) -> tuple[dict[str, Given], list[str]]:
    """Lay the options over those of the run folder that is resumed, and say which of them may not differ."""
    folder = _run_folder(given, config_file)
    if folder is None:
        return dict(given), []
    given = {**given, "out": Given(str(folder), "out")}
    path = folder / CONFIG_FILE
    if not path.exists():
        near = f"--resume: there is no run in {escaped(str(folder))}: name the folder of the run to continue with --out"
        return given, [] if "data" in given else [near]
    saved, unknown = TrainConfig.sort(_read_yaml(path), str(path))
    given = {name: value for name, value in given.items() if not value.file or Path(value.file) != path}
    joined, differing = take_up(relocated(TrainConfig, of_run(saved), folder, by_name=True), given)
    return joined, [*unknown, *differing]


def _run_folder(given: Mapping[str, Given], config_file: str | None) -> Path | None:
    """The run folder to resume: --out, else the folder around the config file, else the `out` inside that file.

    A run folder may have been moved since its config.yaml was written: where it lies now counts, not what is inside.
    """
    out = given.get("out")
    if config_file and (out is None or out.file):
        path = Path(config_file)
        if _is_of_run(path):
            return path.parent
    return Path(str(out.value)) if out and out.value else None


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options; those without a value are left out."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        twice, value = _given_twice(yaml.compose(text, yaml.SafeLoader)), yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or error
        raise ConfigError(f"config file {path}{where} is not YAML: {what}; expected lines such as `rank: 16`") from None
    if twice:
        raise ConfigError(f"config file {path} line {twice[1]}: {twice[0]} stands there twice: leave one of them out")
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"config file {path} holds no options: expected lines such as `rank: 16`")
    return {name: option for name, option in value.items() if option is not None}


def _given_twice(node: Any) -> tuple[str, int] | None:
    """A key that stands twice among the options of a YAML file, or within one of them, and the line of the second; YAML
    would take the last without a word.
    """
    options = node.value if getattr(node, "id", "") == "mapping" else []
    for pairs in (options, *(value.value for _, value in options if value.id == "mapping")):
        seen: set[str] = set()
        for key, _ in pairs:
            if str(key.value) in seen:
                return str(key.value), key.start_mark.line + 1
            seen.add(str(key.value))
    return None
