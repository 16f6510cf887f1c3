"""Rows that are given in Python instead of a file: written as one, and so checked, hashed and split like any other.

Prompts, which are read once and not kept, are taken as they are.
"""

import contextlib
import filecmp
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from thimble.data.row_messages import are_messages
from thimble.data.row_values import is_missing
from thimble.data.sources.raw import RawRow, check_columns
from thimble.data.sources.splits import SPLITS
from thimble.data.spool import Room
from thimble.errors import DataError, listing

FOLDER = "rows"  # that they are written to, and kept in, in a run folder
EXPECTED = 'expected a file, a folder, or rows such as [{"prompt": "2 + 2?", "completion": "4"}]'


@contextlib.contextmanager
def written_rows(data: Any) -> Iterator[Path]:
    """Write rows into a temporary folder of files by split, which is there until the end of the block.

    Args:
        data: Mappings or lists of messages, one a row: a list, an iterator, a data set of `datasets` or torch, a table
            of pandas, polars or pyarrow; or a mapping of split names (train, valid, test) to such rows.

    Yields:
        Path: The folder.

    Raises:
        DataError: If they are no rows; what is wrong inside of a row is told when the files are read.
        DoesNotFitError: If they do not end before half of the free disk is taken.
    """
    parent = Path(tempfile.mkdtemp(prefix="thimble-"))
    room = Room(parent)
    try:
        (parent / FOLDER).mkdir()
        for split, rows in _by_split(data).items():
            with (parent / FOLDER / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for line in _lines(rows):
                    room.take(len(line) + 1)
                    file.write(f"{line}\n")
        yield parent / FOLDER
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def are_kept(written: Path, kept: Path) -> bool:
    """Whether a folder of rows is the one kept in a run folder; a DataError if others are kept there."""
    if not kept.is_dir():
        return False
    names = sorted({path.name for folder in (written, kept) for path in folder.iterdir()})
    if filecmp.cmpfiles(written, kept, names, shallow=False)[0] != names:
        raise DataError(
            f"the rows are not those that the run in {kept.parent} began with, which are kept in {kept}: leave them "
            "out to go on with those, or begin another run with another --out"
        )
    return True


def raw_rows(data: Any) -> Iterator[RawRow]:
    """The rows of whatever holds some, each a text or a mapping; a DataError if they are one mapping, or no rows."""
    if isinstance(data, Mapping):
        raise DataError(f"the rows are one object with {listing(data)}: expected a list of rows, such as [{{...}}]")
    return (RawRow(row, f"row {number}") for number, row in enumerate(_rows_of(data), start=1))


def _by_split(data: Any) -> dict[str, Iterable[Any]]:
    if not isinstance(data, Mapping):
        return {"train": _rows_of(data)}
    unknown = [name for name in data if str(name).lower() not in SPLITS]
    if unknown or not data or any(isinstance(rows, str) for rows in data.values()):
        names = listing(data) or "nothing"
        raise DataError(
            f"the data are a mapping of {names}, neither rows nor splits of them (train, valid): {EXPECTED}"
        )
    splits = {SPLITS[str(name).lower()]: _rows_of(rows) for name, rows in data.items()}
    if "train" not in splits:
        raise DataError(f"the data have the splits {listing(splits)} and no train: give the rows of one as a list")
    return splits


def _rows_of(data: Any) -> Iterable[Any]:
    """The rows of whatever holds some: tables give theirs, all else is iterated over."""
    for method in ("to_pylist", "to_dicts"):  # pyarrow, polars
        if callable(getattr(data, method, None)):
            rows: Iterable[Any] = getattr(data, method)()
            return rows
    is_table = hasattr(data, "columns") or hasattr(data, "itertuples")
    if is_table and callable(getattr(data, "to_dict", None)):  # pandas
        check_columns(map(str, getattr(data, "columns", ())), "the table")
        table: Iterable[Any] = data.to_dict("records")
        return table
    if not isinstance(data, Iterable) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # torch
        return (data[number] for number in range(len(data)))
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise DataError(f"the data are of type {type(data).__name__}: {EXPECTED}")
    return data


def _lines(rows: Iterable[Any]) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        is_chat = are_messages(row)
        if not isinstance(row, Mapping) and not is_chat:
            raise DataError(f"row {number} is of type {type(row).__name__}: {EXPECTED}")
        cells = row if is_chat else {str(k): cell for k, cell in row.items() if cell is None or not is_missing(cell)}
        try:
            yield json.dumps(cells, default=_plain, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"row {number} cannot be written as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """What JSON has no form for: numbers and arrays of numpy, mappings and sequences of other types, dates."""
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Iterable) and not isinstance(value, bytes) else str(value)
