"""From files to rows as they stand in them, each with the place it came from; what a row means is not known here."""

import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from thimble.errors import DataError, MissingPackageError, Problems, listing

TABLES = (".jsonl", ".json", ".csv", ".parquet")
TEXTS = (".txt", ".md")
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})([-_.]\d+(-of-\d+)?)?", re.IGNORECASE)


class RawRow(NamedTuple):
    """One row before it is checked."""

    value: Any
    source: str  # "train.jsonl line 12"


class Found(NamedTuple):
    """The files of a data set by split, and what is worth telling about the choice."""

    files: dict[str, list[Path]]
    notes: list[str]


def find_files(path: Path) -> Found:
    """Say which files belong to a data set.

    Args:
        path: A file, or a folder with train/valid/test files, data files, or texts.

    Returns:
        Files for "train" and, if there are any, "valid" and "test".

    Raises:
        DataError: If there is nothing to read, with near names.
    """
    try:
        if path.is_dir():
            return _in_folder(path)
        if not path.exists():
            raise DataError(f"{path} does not exist{_near(path)}: expected a {_KINDS} file, or a folder of such files.")
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


def read_rows(path: Path, name: str, problems: Problems) -> list[RawRow]:
    """Read all rows of one file.

    Args:
        path: A file of a known kind.
        name: What to call it in messages.
        problems: Takes what is wrong with it.

    Returns:
        The rows that could be read; for a text file the whole text is one row.
    """
    kind = kind_of(path)
    reader = _PARSERS.get(kind or "")
    content = problems.attempt(_bytes_of, path, name)
    if content is None:
        return []
    if kind == ".parquet":
        _require_pyarrow(name)
        return problems.attempt(_parquet, content, name) or []
    text = problems.attempt(_decode, content, name)
    if text is None or reader is None:
        return []
    if not text.strip():
        if kind in TABLES:
            problems.add(f"{name} is empty: expected rows.")
        return []
    return list(reader(text, name, problems))


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


def _bytes_of(path: Path, name: str) -> bytes:
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be unpacked: {error}. Expected a whole gzip file; fetch it again.") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error


def _decode(content: bytes, name: str) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name} is UTF-16: expected UTF-8. Save it again with that encoding.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name} line {line} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start:,}. "
            "Save the file again with UTF-8 encoding."
        ) from error
    return text.replace("\r\n", "\n")


def _text(text: str, name: str, problems: Problems) -> Iterator[RawRow]:
    yield RawRow({"text": text}, name)


def _json_lines(text: str, name: str, problems: Problems) -> Iterator[RawRow]:
    # Not splitlines(): JSON text may hold U+2028, which that takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield RawRow(json.loads(line), f"{name} line {number}")
        except (ValueError, RecursionError) as error:
            problems.add(f"{name} line {number} is not valid JSON: {_reason(error)}. Expected one JSON object a line.")


def _json(text: str, name: str, problems: Problems) -> Iterator[RawRow]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # many .json files hold one object a line
            yield from _json_lines(text, name, problems)
            return
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        problems.add(f"{name}{line} is not valid JSON: {_reason(error)}. Expected an array of objects.")
        return
    if isinstance(value, dict):
        arrays = [key for key, inner in value.items() if isinstance(inner, list) and _holds_objects(inner)]
        is_row = not arrays or bool({"messages", "conversations"} & set(arrays))
        value = [value] if is_row else value[arrays[0]] if len(arrays) == 1 else value
    if not isinstance(value, list):
        found = f"an object with the arrays {listing(arrays)}" if isinstance(value, dict) else _kind(value)
        problems.add(f"{name} is {found}: expected an array of objects, or an object with one such array inside.")
        return
    if not value:
        problems.add(f"{name} is empty: expected rows.")
    for number, row in enumerate(value, start=1):
        yield RawRow(row, f"{name} row {number}")


def _holds_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _csv(text: str, name: str, problems: Problems) -> Iterator[RawRow]:
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses documents of 128 KiB
    try:
        yield from _csv_rows(text, name, problems)
    except csv.Error as error:
        problems.add(f"{name} is not valid CSV: {error}. Expected cells with commas or line breaks in double quotes.")
    finally:
        csv.field_size_limit(limit)


def _csv_rows(text: str, name: str, problems: Problems) -> Iterator[RawRow]:
    first = text[: text.find("\n")] if "\n" in text else text
    delimiter = next((mark for mark in "\t;" if mark in first and "," not in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [cell.strip() for cell in next(reader)]
    line = reader.line_num + 1
    count = 0
    for cells in reader:
        source, line = f"{name} line {line}", reader.line_num + 1
        if not any(cells):
            continue
        count += 1
        if len(cells) != len(header):
            problems.add(
                f"{source} has {len(cells)} cells: expected {len(header)}, as in the header ({listing(header)}). "
                "Put cells that hold commas or line breaks in double quotes."
            )
            continue
        yield RawRow({key: cell for key, cell in zip(header, cells, strict=True) if cell}, source)
    if not count:
        problems.add(f"{name} has a header and no rows: expected at least one row below {listing(header)}.")


def _require_pyarrow(name: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f'{name} is a Parquet file: reading it needs pyarrow. Install it with: pip install "thimble-lora[parquet]"'
        ) from error


def _parquet(content: bytes, name: str) -> list[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a whole Parquet file: {error}. Fetch it again.") from error
    if not rows:
        raise DataError(f"{name} is empty: expected rows.")
    return [RawRow(row, f"{name} row {number}") for number, row in enumerate(rows, start=1)]


_PARSERS: dict[str, Callable[[str, str, Problems], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".md": _text,
}
