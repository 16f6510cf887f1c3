"""The data files of a folder: which of all that lies there is data, taken once, and for which split."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from thimble.data.sources.card import is_card
from thimble.data.sources.kinds import EXPECTED, TABLES, TEXT, kind_of, plain_name, refused_kind, unpacked_name
from thimble.data.sources.raw import Source, Told
from thimble.data.sources.splits import SPLITS, label_of, meaning_of, place, warn_of_missing_parts
from thimble.data.sources.walk import folders_below
from thimble.errors import DataError, as_word, listing

MOST_FILES = 100_000  # below a folder: more are no data set but, say, a home folder
_ABOUT = re.compile(
    r"(read[-_]?me|licen[cs]e|copying|notice|change[-_]?log|contributing|code[-_]of[-_]conduct)\b", re.I
)
_NOT_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|croissant|package(-lock)?|tsconfig)\.json|(cache|tmp).*\.arrow"
)
_FOREIGN_FOLDERS = {"__MACOSX", "__pycache__", "node_modules"}
_LEFT_BY_OTHERS = ("~$", ".")  # lock files of office programs, hidden files


class Found(NamedTuple):
    """A file somewhere below a folder."""

    path: Path
    relative: PurePath
    kind: str

    @property
    def label(self) -> str:
        """What says its split."""
        return label_of(self.relative, plain_name(self.path))

    @property
    def set_folder(self) -> PurePath:
        """Where it lies, without the folders that say a split: two sets of data lie in different ones."""
        return PurePath(*(part for part in self.relative.parent.parts if not meaning_of(part)))

    def source(self) -> Source:
        """The same, to be read."""
        return Source(self.path, self.relative.as_posix(), self.kind)


def files_in(folder: Path, told: Told) -> dict[str, list[Source]]:
    """The data files of a folder, by split: tables in it, else tables below it, else texts in it and below it."""
    files = _without_packed_twins(_walk(folder), told)
    tables = [file for file in files if file.kind != TEXT and not _NOT_DATA.fullmatch(file.path.name)]
    on_top = [file for file in tables if len(file.relative.parts) == 1]
    if on_top:  # and folders called train, test ... beside it; what lies elsewhere is something else
        used = [file for file in tables if not file.set_folder.parts]
    else:
        used = tables
    if used:
        splits = _by_split(_once(used, folder, told), folder, told)
        _tell_unused(files, splits, told)
        return {split: [file.source() for file in chosen] for split, chosen in splits.items()}
    texts = [file for file in files if file.kind == TEXT]
    cards = [file for file in texts if is_card(file.path)]
    if all(file in cards or _ABOUT.match(file.path.name) for file in texts):
        raise _nothing(folder, texts)
    if cards:
        told.note(f"files not used: {listing(file.relative.as_posix() for file in cards)}")
    splits = _splits_of_texts([file for file in texts if file not in cards], folder, told)
    _tell_unused(files, splits, told)
    return {split: [file.source() for file in chosen] for split, chosen in splits.items()}


def _walk(folder: Path) -> list[Found]:
    """All files of known kinds below a folder, in the order of their names; hidden ones are no data."""
    found: list[Found] = []
    for parent, names in folders_below(folder, _is_foreign, MOST_FILES):
        for name in names:
            path = parent / name
            kind = None if name.startswith(_LEFT_BY_OTHERS) else kind_of(path)
            if kind and path.is_symlink() and not path.exists():
                raise DataError(
                    f"{path} is a link to a file that is not there: the download is not complete; fetch it again."
                )
            if kind and path.is_file():
                found.append(Found(path, path.relative_to(folder), kind))
    return sorted(found, key=lambda file: file.relative)


def _is_foreign(name: str) -> bool:
    return name.startswith(".") or name in _FOREIGN_FOLDERS


def _without_packed_twins(files: list[Found], told: Told) -> list[Found]:
    """Files without those that lie there unpacked too, as gunzip -k leaves them."""
    there = {file.relative for file in files}
    twins = [file for file in files if file.relative.with_name(unpacked_name(file.path)) in there - {file.relative}]
    if twins:
        told.note(f"packed twins of files beside them, not used: {listing(file.relative.as_posix() for file in twins)}")
    return [file for file in files if file not in twins]


def _once(tables: list[Found], folder: Path, told: Told) -> list[Found]:
    """Tables without those that hold the same rows in another format: files of one name, or folders named by format."""
    folders = sorted({file.set_folder for file in tables})
    kinds = [{file.kind for file in tables if file.set_folder == one} for one in folders]
    is_by_format = len(folders) > 1 and all(len(of) == 1 for of in kinds) and len(set(map(frozenset, kinds))) > 1
    if len(folders) > 1 and (is_by_format or any(file.label for file in tables)):
        raise DataError(
            f"{folder} holds several data sets, in {listing(one.as_posix() for one in folders)}: name one of them, as "
            f"in: thimble train {as_word(str(folder / folders[0]))}"
        )
    best: dict[tuple[PurePath, str], str] = {}
    for file in tables:
        key = _same(file)
        best[key] = min(best.get(key, file.kind), file.kind, key=TABLES.index)
    kept = [file for file in tables if file.kind == best[_same(file)]]
    left = [file.relative.as_posix() for file in tables if file not in kept]
    if left:
        told.note(f"the same data in another format, not used: {listing(left)}")
    return kept


def _same(file: Found) -> tuple[PurePath, str]:
    """What files of the same rows in several formats have in common."""
    return file.relative.parent, file.label.lower() or plain_name(file.path)


def _by_split(tables: list[Found], folder: Path, told: Told) -> dict[str, list[Found]]:
    labelled: dict[str, list[Found]] = {}
    for file in tables:
        labelled.setdefault(file.label, []).append(file)
    plain = labelled.pop("", [])
    is_exact = any(label.lower() in SPLITS for label in labelled)
    has_train = any(meaning_of(label) == "train" for label in labelled)
    folders = sorted({file.set_folder.as_posix() for file in tables})
    if len(folders) > 1:
        told.note(f"training data: all files in {listing(folders)}")
    if not labelled or (not is_exact and all(meaning_of(label) == "train" for label in labelled)):
        return {"train": tables}
    if plain and not is_exact and not has_train:
        told.note(f"training data: {listing(file.relative.as_posix() for file in plain)}, whose names say no split")
        return {"train": plain} | {meaning_of(label): files for label, files in labelled.items()}
    if not has_train:
        found = listing(file.relative.as_posix() for files in labelled.values() for file in files)
        raise DataError(
            f"{folder} has {found} but no train file: expected train.jsonl or the like beside it. "
            "To use one file alone, name the file instead of the folder."
        )
    splits = place(labelled, folder, {label: files[0].path for label, files in labelled.items()}, told)
    warn_of_missing_parts((plain_name(file.path) for files in splits.values() for file in files), told)
    return splits


def _splits_of_texts(texts: list[Found], folder: Path, told: Told) -> dict[str, list[Found]]:
    """Texts by split if the name of each says one, as of train.txt and valid.txt; else all are training data.

    All of them, since texts have any name: train.md beside predict.md is a page about a command.
    """
    named = [file for file in texts if not _ABOUT.match(file.path.name)]
    labels = {file.label for file in named}
    meanings = {meaning_of(label) for label in labels}
    is_plain = all(label.lower() in SPLITS for label in labels) or len(labels) == len(meanings)
    if is_plain and "train" in meanings and len(meanings) > 1 and "" not in meanings:
        return _by_split(named, folder, told)
    return {"train": texts}


def _tell_unused(files: Iterable[Found], splits: dict[str, list[Found]], told: Told) -> None:
    used = {file for chosen in splits.values() for file in chosen}
    said = " ".join(told.notes)
    others = [file for file in files if file not in used and not _NOT_DATA.fullmatch(file.path.name)]
    left = [file.relative.as_posix() for file in others if file.relative.as_posix() not in said]
    if left:
        told.note(f"files not used: {listing(left)}")


def _nothing(folder: Path, texts: list[Found]) -> DataError:
    names = sorted(path.name for path in folder.iterdir())
    message = f"{folder} holds no data: expected {EXPECTED} files, found {listing(names) if names else 'nothing'}."
    if texts:
        message += f" {listing(file.relative.as_posix() for file in texts)}: about data, and none itself."
    if other := next((name for name in names if refused_kind(Path(name))), None):
        message += f" {other} is {refused_kind(Path(other))}."
    return DataError(message)
