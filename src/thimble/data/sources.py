"""From files to rows as they stand in them, each with the place it came from; what a row means is not known here."""

import codecs
import csv
import difflib
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from thimble.errors import DataError, MissingPackageError, listing

TABLES = (".jsonl", ".json", ".csv", ".parquet")
TEXTS = (".txt", ".md")
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
MOST_LINE_BYTES = 1 << 28  # a file without line ends is no file of rows
MOST_WHOLE_BYTES = 1 << 29  # of a kind that is not read line by line
MOST_VALUES = 20_000_000  # of a line, about: parsed, each takes far more memory than its text
PARQUET_ROWS = 1000  # read at a time
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})([-_.]\d+(-of-\d+)?)?", re.IGNORECASE)


class RawRow(NamedTuple):
    """One row before it is checked."""

    value: Any
    source: str  # "train.jsonl line 12"
    problem: str = ""  # why it cannot be read; then there is no value


class Found(NamedTuple):
    """The files of a data set by split, and what is worth telling about the choice."""

    files: dict[str, list[Path]]
    notes: list[str]


def find_files(path: Path) -> Found:
    """The files of a data set, by split; a DataError, with near names, if there is nothing to read."""
    try:
        if path.is_dir():
            return _in_folder(path)
        if not path.exists():
            raise DataError(f"{path} does not exist{_near(path)}: expected a {_KINDS} file, or a folder of such files.")
        if not path.is_file():  # a pipe or a device would be waited for
            raise DataError(f"{path} is no regular file: expected a {_KINDS} file, or a folder of such files.")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}. Expected a file or a folder.") from error
    if kind_of(path) is None:
        raise DataError(
            f"{path} is not a kind of file Thimble reads: expected {_KINDS} (each may be gzipped, such as .jsonl.gz)."
        )
    return Found({"train": [path]}, [])


_KINDS = ", ".join(TABLES + TEXTS[:-1]) + " or " + TEXTS[-1]


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, without .gz; None if it cannot be read."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in TABLES + TEXTS if name.endswith(suffix)), None)


def read_rows(path: Path, name: str) -> Iterator[RawRow]:
    """The rows of one file, one after the other: a file of lines is never held in memory whole, a text is one row.

    Rows that cannot be read come with the problem; a DataError if the file itself cannot, or has no rows.
    """
    kind = kind_of(path) or ""
    count = 0
    try:
        with path.open("rb") as whole:
            file = gzip.GzipFile(fileobj=whole) if path.name.lower().endswith(".gz") else whole
            if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{name} is UTF-16: expected UTF-8. Save it again with that encoding.")
            for row in _PARSERS[kind](cast(IO[bytes], file), name):
                count += 1
                yield row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be unpacked: {error}. Expected a whole gzip file; fetch it again.") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error
    if not count and kind in TABLES:
        raise DataError(f"{name} is empty: expected rows.")


def _near(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not names and not path.parent.is_dir():
        return f" (there is no folder {path.parent} either)"
    return f" (near it: {listing(near)})" if near else ""


def _in_folder(folder: Path) -> Found:
    top = sorted(entry for entry in folder.iterdir() if entry.is_file() and kind_of(entry) and entry.name[0] != ".")
    splits: dict[str, list[Path]] = {}
    for entry in top:
        if match := _SPLIT_NAME.fullmatch(entry.name[: entry.name.lower().rindex(kind_of(entry) or "")]):
            splits.setdefault(SPLITS[match[1].lower()], []).append(entry)
    if splits:
        if "train" not in splits:
            found = listing(entry.name for files in splits.values() for entry in files)
            raise DataError(
                f"{folder} has {found} but no train file: expected train.jsonl or the like beside it. "
                "To use one file alone, name the file instead of the folder."
            )
        return Found(splits, _left_out(top, splits))
    tables = [entry for entry in top if kind_of(entry) in TABLES]
    if tables:
        return Found({"train": tables}, _left_out(top, {"train": tables}))
    texts = [entry for entry in sorted(folder.rglob("*")) if _is_text(entry, folder)]
    if not texts:
        found = [entry.name for entry in sorted(folder.iterdir())]
        raise DataError(
            f"{folder} holds no data: expected {_KINDS} files, found {listing(found) if found else 'nothing'}."
        )
    return Found({"train": texts}, [])


def _is_text(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and kind_of(path) in TEXTS and not hidden


def _left_out(top: Iterable[Path], splits: dict[str, list[Path]]) -> list[str]:
    used = {entry for files in splits.values() for entry in files}
    others = [entry.name for entry in top if entry not in used]
    return [f"files not used: {listing(others)}"] if others else []


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends, without a byte order mark."""
    # Not splitlines(): JSON text may hold U+2028, which that takes for the end of a line.
    for number in itertools.count(1):
        line = file.readline(MOST_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MOST_LINE_BYTES:
            raise DataError(
                f"{name} line {number} is longer than {MOST_LINE_BYTES:,} bytes: expected one example a line."
            )
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _decoded(line: bytes, source: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1:,}. "
            "Save the file again with UTF-8 encoding."
        ) from None


def _whole(file: IO[bytes], name: str) -> str:
    """The text of a file, its line ends as on Unix."""
    lines, size = [], 0
    for number, line in _lines(file, name):
        lines.append(_decoded(line, f"{name} line {number}"))
        size += len(line) + 1
        if size > MOST_WHOLE_BYTES:
            raise DataError(
                f"{name} is larger than {MOST_WHOLE_BYTES:,} bytes, and its kind is read as a whole: write it as "
                ".jsonl, which is read line by line."
            )
    return "\n".join(lines)


def _text(file: IO[bytes], name: str) -> Iterator[RawRow]:
    text = _whole(file, name)
    if text.strip():
        yield RawRow({"text": text}, name)


def _json_lines(file: IO[bytes], name: str) -> Iterator[RawRow]:
    for number, line in _lines(file, name):
        if line.strip():
            yield _json_line(line, f"{name} line {number}")


def _json_line(line: bytes, source: str) -> RawRow:
    if sum(map(line.count, (b"[", b"{", b","))) > MOST_VALUES:
        return RawRow(None, source, f"{source} holds more than {MOST_VALUES:,} values: expected one example a line.")
    try:
        return RawRow(json.loads(_decoded(line, source)), source)
    except DataError as error:
        return RawRow(None, source, error.problems[0])
    except (ValueError, RecursionError) as error:
        return RawRow(None, source, f"{source} is not valid JSON: {_reason(error)}. Expected one JSON object a line.")


def _json(file: IO[bytes], name: str) -> Iterator[RawRow]:
    text = _whole(file, name)
    try:
        value = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # many .json files hold one object a line
            yield from _json_lines(io.BytesIO(text.encode()), name)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line} is not valid JSON: {_reason(error)}. Expected an array of objects.") from None
    if isinstance(value, dict):
        arrays = [key for key, inner in value.items() if isinstance(inner, list) and _holds_objects(inner)]
        is_row = not arrays or bool({"messages", "conversations"} & set(arrays))
        value = [value] if is_row else value[arrays[0]] if len(arrays) == 1 else value
    if not isinstance(value, list):
        found = f"an object with the arrays {listing(arrays)}" if isinstance(value, dict) else _kind(value)
        raise DataError(f"{name} is {found}: expected an array of objects, or an object with one such array inside.")
    for number, row in enumerate(value, start=1):
        yield RawRow(row, f"{name} row {number}")


def _holds_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _csv(file: IO[bytes], name: str) -> Iterator[RawRow]:
    limit = csv.field_size_limit((1 << 31) - 1)  # the default refuses documents of 128 KiB
    try:
        yield from _csv_rows((f"{_decoded(line, f'{name} line {n}')}\n" for n, line in _lines(file, name)), name)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(lines: Iterator[str], name: str) -> Iterator[RawRow]:
    first = next(lines, "")
    if not first.strip():
        return
    delimiter = next((mark for mark in "\t;" if mark in first and "," not in first), ",")
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    rows = _cells(reader, name)
    header = [cell.strip() for cell in next(rows)]
    line, count = reader.line_num + 1, 0
    for cells in rows:
        source, line = f"{name} line {line}", reader.line_num + 1
        if not any(cells):
            continue
        count += 1
        if len(cells) == len(header):
            yield RawRow({key: cell for key, cell in zip(header, cells, strict=True) if cell}, source)
            continue
        problem = (
            f"{source} has {len(cells)} cells: expected {len(header)}, as in the header ({listing(header)}). "
            "Put cells that hold commas or line breaks in double quotes."
        )
        yield RawRow(None, source, problem)
    if not count:
        raise DataError(f"{name} has a header and no rows: expected at least one row below {listing(header)}.")


def _cells(reader: Any, name: str) -> Iterator[list[str]]:
    """The cells of each row; where quotes do not fit, nothing behind them can be told apart either."""
    begin = reader.line_num + 1
    try:
        for cells in reader:
            yield cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name} line {begin} is not valid CSV: {error} (line {reader.line_num}). Expected cells with commas or "
            "line breaks in double quotes, and quotes in them doubled."
        ) from None


def _parquet(file: IO[bytes], name: str) -> Iterator[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            f'{name} is a Parquet file: reading it needs pyarrow. Install it with: pip install "thimble-lora[parquet]"'
        ) from error
    try:
        groups = pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_ROWS)
        rows = (row for group in groups for row in group.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield RawRow(row, f"{name} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a whole Parquet file: {error}. Fetch it again.") from error


_PARSERS: dict[str, Callable[[IO[bytes], str], Iterator[RawRow]]] = {
    ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _text, ".md": _text,
}  # fmt: skip
