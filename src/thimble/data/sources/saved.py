"""Folders that `save_to_disk` of datasets writes: a data set with state.json, or splits with dataset_dict.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thimble.data.sources.kinds import SAVED
from thimble.data.sources.raw import Source
from thimble.errors import DataError, as_word, listing

STATE, SPLITS = "state.json", "dataset_dict.json"
MOST_JSON_BYTES = 1 << 24

Name = Callable[[Path], str]  # of a file, for messages


def saved_splits(folder: Path, name: Name) -> dict[str, list[Source]] | None:
    """The files of each split of a saved `DatasetDict`, those of a saved `Dataset` as train; None if it is neither."""
    if (folder / STATE).is_file():
        return {"train": _saved_files(folder, name)}
    if not (folder / SPLITS).is_file():
        return None
    splits = read_json(folder / SPLITS).get("splits")
    if (
        not isinstance(splits, list)
        or not splits
        or not all(isinstance(split, str) and split == Path(split).name for split in splits)
    ):
        raise DataError(f"{folder / SPLITS} is damaged: expected the names of splits; copy the folder again.")
    missing = [split for split in splits if not (folder / split / STATE).is_file()]
    if missing:
        raise DataError(
            f"{folder / SPLITS} lists the splits {listing(splits)}, and {listing(missing)} is not there, with its "
            f"{STATE}: copy the whole folder again, or name a split, as in: thimble train "
            + as_word(str(folder / splits[0]))
        )
    return {split: _saved_files(folder / split, name) for split in splits}


def _saved_files(folder: Path, name: Name) -> list[Source]:
    state = read_json(folder / STATE)
    listed = [*_files(state.get("_data_files"), folder), *indices_of(state)]
    for bound in (file.get(name) for file in listed for name in ("skip", "take")):
        if bound is not None and (type(bound) is not int or bound < 0):
            raise DataError(f"{folder / STATE} is damaged: {bound!r} is no number of rows; save the data set again.")
    missing = [file["filename"] for file in listed if not (folder / Path(file["filename"]).name).is_file()]
    if missing:
        raise DataError(f"{folder / STATE} lists {listing(missing)}, not found there: copy the whole folder again.")
    if indices_of(state) or any(file.get("skip") or file.get("take") for file in listed):
        return [Source(folder / STATE, name(folder / STATE), SAVED)]
    paths = [folder / Path(file["filename"]).name for file in listed]
    return [Source(path, name(path), ".arrow") for path in paths]


def _files(listed: Any, folder: Path) -> list[dict[str, Any]]:
    is_valid = isinstance(listed, list) and listed
    if not is_valid or not all(isinstance(file, dict) and isinstance(file.get("filename"), str) for file in listed):
        raise DataError(f"{folder / STATE} lists no data files: expected what save_to_disk writes; save it again.")
    return list(listed)


def indices_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that number the rows to take, which versions of datasets before 2.9 wrote for a selection."""
    listed = state.get("_indices_data_files") or state.get("_indices_files") or []
    listed = listed if isinstance(listed, list) else []
    return [file for file in listed if isinstance(file, dict) and isinstance(file.get("filename"), str)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that datasets has written; a DataError if it is damaged."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MOST_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}. Expected JSON; copy the folder again.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: expected a JSON object; copy the folder again.")
    return value
