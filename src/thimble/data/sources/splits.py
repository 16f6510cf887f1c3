"""Which files are for training, validation and test, by what they and their folders are called."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import TypeVar

from thimble.data.sources.raw import Told
from thimble.errors import DataError, as_word, listing

T = TypeVar("T")

SPLITS = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "eval": "valid", "evaluation": "valid", "test": "test", "testing": "test",
}  # fmt: skip
_PART = re.compile(r"[-_.](\d+)(-of-(\d+))?(-[0-9a-f]{8,})?$")  # train-00000-of-00003, with a hash in old sets


def label_of(relative: PurePath, plain_name: str) -> str:
    """What says the split of a file: its own name without the number of its part, else that of a folder; or nothing."""
    for name in (_PART.sub("", plain_name), *reversed(relative.parent.parts)):
        if meaning_of(name):
            return name
    return ""


def meaning_of(label: str) -> str:
    """The split that a label means: `train_sft` and `trainset` are train; nothing if it holds no such word."""
    words = (word.removesuffix("set").removesuffix("data") for word in re.split(r"[^a-z]+", label.lower()))
    return next((SPLITS[word] for word in reversed(list(words)) if word in SPLITS), "")


def place(labelled: Mapping[str, list[T]], root: Path, ways: Mapping[str, Path], told: Told) -> dict[str, list[T]]:
    """Give labelled files to train, valid and test.

    Args:
        labelled: Files by the name of their split.
        root: The folder, for messages.
        ways: What to name to read one split alone.
        told: Takes note of splits that are not used.

    Returns:
        The files of train, and of valid and test if there are any. A DataError if none is for training, or if several
        may be and only the user can tell.
    """
    exact = {label for label in labelled if label.lower() in SPLITS}
    placed: dict[str, list[str]] = {}
    for label in (label for label in labelled if not exact or label in exact):
        placed.setdefault(meaning_of(label) or label, []).append(label)
    if len(labelled) == 1 and "train" not in placed and not exact:
        told.note(f"the only split, {next(iter(labelled))}, is the training data")
        placed = {"train": list(labelled)}
    of_train = placed.get("train", [])
    if not of_train or (not exact and len(of_train) > 1):
        names = listing(sorted(labelled))
        why = f"and {listing(sorted(of_train))} may be for training" if of_train else "and none is called train"
        one = sorted(of_train or labelled)[0]
        raise DataError(
            f"{root} has the splits {names}, {why}: name what to learn from, as in: thimble train "
            + as_word(str(ways.get(one, root)))
        )
    result = {
        split: [file for label in sorted(placed[split]) for file in labelled[label]]
        for split in ("train", "valid", "test")
        if split in placed and (exact or len(placed[split]) == 1)
    }
    unused = sorted(label for label in labelled if not any(label in placed.get(split, ()) for split in result))
    if unused:
        told.note(f"splits not used: {listing(unused)}")
    return result


def warn_of_missing_parts(names: Iterable[str], told: Told) -> None:
    """Warn if a split is there in part: a name that ends in -00000-of-00003 says how many there should be."""
    found: dict[tuple[str, int], int] = {}
    for name in names:
        if (match := _PART.search(name)) and match[3]:
            key = (name[: match.start()], int(match[3]))
            found[key] = found.get(key, 0) + 1
    for (name, total), count in found.items():
        if count < total:
            told.warn(f"{name} is there in part: {count} of {total} files; if that is not meant, fetch the others")
