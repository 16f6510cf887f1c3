"""Folders of pictures or clips, whose folders are their classes: `cats/1.png`, `train/cats/1.png`."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from thimble.data.media.items import Item
from thimble.data.media.kinds import EXPECTED, NOUNS, is_hidden, is_media
from thimble.data.sources.raw import Told
from thimble.data.sources.splits import SPLITS
from thimble.data.sources.walk import folders_below
from thimble.errors import DataError, escaped, listing, plural

MOST_FILES = 2_000_000  # below a folder: more are no data set but, say, a whole disk


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder in the order of their names, but for hidden ones; links are followed, none twice."""
    for parent, names in folders_below(folder, is_hidden, MOST_FILES):
        yield from (parent / name for name in sorted(names) if not is_hidden(name))


def unpacked_folder(folder: Path, told: Told) -> Path:
    """The folder inside, where a folder holds nothing but one: archives are often packed that way."""
    begin = folder
    while True:
        entries = [entry for entry in os.scandir(folder) if not is_hidden(entry.name)]
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].is_symlink():
            break
        inner = [entry for entry in os.scandir(entries[0]) if not is_hidden(entry.name)]
        if not any(entry.is_dir() for entry in inner):  # a class of its own
            break
        folder = Path(entries[0])
    if folder != begin:
        told.note(f"reading {escaped(folder.relative_to(begin).as_posix())}, the only folder in {escaped(begin.name)}")
    return folder


def items_by_folder(folder: Path, kind: str, told: Told, with_labels: bool) -> dict[str, list[Item]]:
    """The pictures or clips of a folder by split, each of the class that the folder below the split names.

    Splits are folders called train, valid or test, as `thimble.data.sources.splits` knows them, if one is for
    training; any other folder is a class. A DataError if a class is missing; without labels, all files are taken.
    """
    tops = [name for name in sorted(os.listdir(folder)) if (folder / name).is_dir() and not is_hidden(name)]
    splits = {name: SPLITS[name.lower()] for name in tops if name.lower() in SPLITS}
    if with_labels and splits and "train" not in splits.values() and len(splits) == len(tops):
        raise DataError(
            f"{folder} has the folders {listing(tops)} and none called train: name one of them to use it alone."
        )
    if not with_labels or "train" not in splits.values():
        return {"train": _of_split(folder, folder, kind, told, with_labels)}
    if others := sorted(set(tops) - set(splits)):
        told.note(f"folders not used, beside {listing(splits)}: {listing(others)}")
    found: dict[str, list[Item]] = {}
    for name, split in splits.items():
        found.setdefault(split, []).extend(_of_split(folder / name, folder, kind, told, with_labels))
    return {split: items for split, items in found.items() if items or split == "train"}


def _of_split(top: Path, root: Path, kind: str, told: Told, with_labels: bool) -> list[Item]:
    items, loose, unused = [], [], []
    deep: dict[str, str] = {}  # folders inside of a class
    for path in walk(top):
        source, parts = escaped(path.relative_to(root).as_posix()), path.relative_to(top).parts
        if not is_media(path.name, kind):
            unused.append(source)
        elif with_labels and len(parts) == 1:
            loose.append(source)
        else:
            items.append(Item(path, source, _label(parts[0], top) if with_labels else None))
            if len(parts) > 2:
                deep.setdefault(parts[0], "/".join(parts[:-1]))
    _tell(top, items, unused, deep, told, with_labels)
    if loose and (items or not with_labels):
        told.note(f"{plural(len(loose), NOUNS[kind][0])} of no class, not used: {listing(loose, 3)}")
    elif loose and top != root and SPLITS.get(top.name.lower()) == "test":  # as contests have it
        told.warn(f"{escaped(top.name)} has no folders of classes, and is not used: {listing(loose, 3)}")
    elif with_labels and not items:
        raise DataError(_nothing(top, kind, loose, unused))
    return items


def _tell(top: Path, items: list[Item], unused: list[str], deep: dict[str, str], told: Told, with_labels: bool) -> None:
    if unused:
        told.note(f"files not used: {listing(unused, 5)}")
    if not with_labels:
        return
    if deep:
        shown = listing((escaped(f"{inner} is {name}") for name, inner in deep.items()), 3)
        told.note(f"what lies deeper is of the class of the folder on top: {shown}")
    classes = Counter(item.label for item in items)
    folders = (name for name in sorted(os.listdir(top)) if (top / name).is_dir() and not is_hidden(name))
    if empty := [escaped(name) for name in folders if _label(name, top) not in classes]:
        told.warn(
            f"folders of {escaped(top.name)} that hold nothing to learn from, and are no classes: {listing(empty)}"
        )


def _label(name: str, top: Path) -> str:
    """The class that a folder names: systems write the same letters in different ways, of which one is taken."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{escaped(str(top / name))} names a class, and is not UTF-8: rename the folder, as in: mv -i -- "
            f"{escaped(name)!r} NAME"
        ) from None
    return unicodedata.normalize("NFC", name).strip()


def _nothing(top: Path, kind: str, loose: list[str], unused: list[str]) -> str:
    one, many = NOUNS[kind]
    if loose:
        return (
            f"{top} holds {plural(len(loose), one)} and no folder for each class: expected {many} in folders named by "
            f"their class, as in cats/1{'.jpg' if kind == 'image' else '.wav'}, or a table such as metadata.csv with "
            "the columns file_name and label."
        )
    found = f"found {listing(unused, 5)}" if unused else "found nothing"
    return f"{top} holds no {many}: expected {EXPECTED[kind]} files in folders named by their class, {found}."
