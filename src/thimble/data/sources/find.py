"""From what the user names to the files that are read: a file, a folder, or a data set as hub and datasets leave it."""

import difflib
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from thimble.data.sources.card import files_by_card
from thimble.data.sources.json_rows import split_arrays
from thimble.data.sources.kinds import (
    BINARY,
    CONTENTS,
    EXPECTED,
    SAVED,
    kind_by_content,
    kind_of,
    refusal,
    refused_kind,
)
from thimble.data.sources.layout import files_in
from thimble.data.sources.packed import head_of, unpacked
from thimble.data.sources.raw import Source, Told
from thimble.data.sources.saved import saved_splits
from thimble.data.sources.splits import SPLITS, place, warn_of_missing_parts
from thimble.errors import DataError, InputError, listing, plural

# An address, from which a path takes a slash; of a data set of the hub, with its name.
_ADDRESS = re.compile(
    r"(hf|[a-z][a-z0-9+]+):/+((www\.)?(huggingface\.co|hf\.co)/)?(datasets/(?P<name>[\w.-]+/[\w.-]+))?"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/(?!.*\.(jsonl?|[ct]sv|txt|parquet|arrow)(\.|$))[\w.-]+")
_FIRST_KEY = re.compile(rb'\s*\{\s*"(%s)"\s*:\s*\[' % "|".join(SPLITS).encode(), re.IGNORECASE)

# No header of a table begins and ends so; a long line is cut off.
_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*("[^"\n]*"\s*:[^\n]*)?([}\],{\[]\s*(\n|$)|[^\n]{2000})')


class Files(NamedTuple):
    """The files of a data set by split, and what is worth telling about the choice."""

    splits: dict[str, list[Source]]
    told: Told


def find_files(path: Path) -> Files:
    """The files of a data set, by split; a DataError, with near names, if there is nothing to read."""
    told = Told()
    try:
        if path.is_dir():
            return Files(_as_they_are(_folder(path, told), told), told)
        if not path.exists():
            raise DataError(f"{path} {_missing(path)}")
        if not path.is_file():  # a pipe or a device would be waited for
            raise DataError(f"{path} is no regular file: expected a {EXPECTED} file, or a folder of such files.")
        return Files(_as_they_are(_one_file(path), told), told)
    except OSError as error:
        place = error.filename or path  # a folder somewhere below may be the one
        raise DataError(f"{place} cannot be opened: {error.strerror or error}. Expected a file or a folder.") from error


def _one_file(path: Path) -> dict[str, list[Source]]:
    kind = kind_of(path)
    if kind is None and not refused_kind(path):
        kind = kind_by_content(head_of(path, path.name))
    if kind is None:
        raise DataError(refusal(path))
    source = Source(path, path.name, kind)
    return _json_splits(source) if kind == ".json" else {"train": [source]}


def _as_they_are(splits: dict[str, list[Source]], told: Told) -> dict[str, list[Source]]:
    """The files, each to be read as what it is where its name says something else."""
    return {split: [_as_it_is(source, told) for source in sources] for split, sources in splits.items()}


def _as_it_is(source: Source, told: Told) -> Source:
    if source.kind == SAVED or source.part:
        return source
    try:
        head = head_of(source.path, source.name)
    except InputError:
        return source  # told when it is read
    inside = kind_by_content(head)
    is_other = inside in BINARY or source.kind in BINARY or (source.kind == ".csv" and _JSON.match(head))
    if inside is None or inside == source.kind or not is_other:
        return source
    told.note(f"{source.name} holds {CONTENTS[inside]} and is read as that")
    return source._replace(kind=inside)


def _json_splits(source: Source) -> dict[str, list[Source]]:
    """A file that is an object of splits, such as {"train": [...], "test": [...]}, else the file."""
    if not _FIRST_KEY.match(head_of(source.path, source.name).removeprefix(b"\xef\xbb\xbf")):
        return {"train": [source]}
    keys = split_arrays(partial(unpacked, source.path, source.name), source.name)
    splits = {SPLITS.get(key.lower(), ""): [source._replace(part=key)] for key in keys}
    return splits if "train" in splits and len(splits) == len(keys) and "" not in splits else {"train": [source]}


def _folder(path: Path, told: Told) -> dict[str, list[Source]]:
    folder = _snapshot(path, told)
    _warn_of_unfinished(folder, told)
    try:
        return _in_folder(folder, told)
    except DataError as error:
        raise DataError(*error.problems, *told.warnings) from None


def _in_folder(folder: Path, told: Told) -> dict[str, list[Source]]:
    saved = saved_splits(folder, lambda file: file.relative_to(folder).as_posix())
    if saved is not None:
        return _placed(saved, folder, told, {split: folder / split for split in saved})
    by_card = files_by_card(folder, told)
    if by_card is None:
        splits = files_in(folder, told)
        files = splits["train"]
        return _json_splits(files[0]) if len(splits) == len(files) == 1 and files[0].kind == ".json" else splits
    sources = {split: [_source(path, folder) for path in paths] for split, paths in by_card.items()}
    return _placed(sources, folder, told, {split: files[0] for split, files in by_card.items()})


def _placed(
    splits: dict[str, list[Source]], folder: Path, told: Told, ways: Mapping[str, Path]
) -> dict[str, list[Source]]:
    placed = place(splits, folder, ways, told)
    warn_of_missing_parts((_stem(file) for files in placed.values() for file in files), told)
    return placed


def _stem(source: Source) -> str:
    return source.name.partition(".")[0]


def _source(path: Path, folder: Path) -> Source:
    kind = kind_of(path)
    if kind is None:
        raise DataError(refusal(path))
    return Source(path, path.relative_to(folder).as_posix(), kind)


def _snapshot(folder: Path, told: Told) -> Path:
    """The newest snapshot, if the folder is where the hub's client keeps a data set; else the folder."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or not (folder / "refs").is_dir() and not (folder / "blobs").is_dir():
        return folder
    found = {path.name: path for path in sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime)}
    if not found:
        raise DataError(f"{folder} holds no snapshot: the download is not complete; fetch the data set again.")
    main = folder / "refs" / "main"
    name = main.read_text(errors="replace").strip()[:80] if main.is_file() else ""
    chosen = found.get(name) or list(found.values())[-1]
    told.note(f"reading snapshot {chosen.name[:12]} of {folder.name}")
    _warn_of_unfinished(folder, told)
    return chosen


def _warn_of_unfinished(folder: Path, told: Told) -> None:
    places = (folder, folder / "blobs", folder / ".cache" / "huggingface" / "download")
    unfinished = [file for place in places if place.is_dir() for file in place.glob("*.incomplete")]
    unfinished += places[-1].glob("*/*.incomplete")
    if unfinished:
        files = plural(len(unfinished), "unfinished file")
        told.warn(f"a download was cut off ({files}, such as {unfinished[0].name[:80]}): fetch the data set again")


def _missing(path: Path) -> str:
    """What a name is that nothing here has, and what to do."""
    if path.is_symlink():
        return f"is a link to {os.readlink(path)}, which does not exist: link it to a {EXPECTED} file or a folder."
    if str(path) == "-":
        return "is no file, and standard input can be read but once: save it to a file, and name that."
    address = _ADDRESS.match(str(path))
    is_hub_name = bool(_HUB_NAME.fullmatch(str(path))) and not path.parent.exists()
    name = address["name"] if address else str(path) if is_hub_name else None
    if name:
        return (
            "is nothing here, and nothing is fetched: if it is a data set of the hub, run hf download "
            f"{name} --repo-type dataset, and name the folder that it prints."
        )
    if address:
        return "is an address, and nothing is fetched: download the data, and name the file or the folder here."
    if set("*?") & set(str(path)):
        return "does not exist, and a pattern is no name: name the folder that holds the files."
    return f"does not exist{_near(path)}: expected a {EXPECTED} file, or a folder of such files."


def _near(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not names and not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)"
    return f" (near it: {listing(near)})" if near else ""
