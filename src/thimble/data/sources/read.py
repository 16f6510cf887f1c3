"""From one file to its rows."""

import json
import re
from collections.abc import Iterator
from functools import partial

from thimble.data.sources.arrow import read_arrow
from thimble.data.sources.csv_rows import read_csv
from thimble.data.sources.json_rows import read_json, read_json_lines
from thimble.data.sources.kinds import TEXT
from thimble.data.sources.packed import unpacked
from thimble.data.sources.raw import RawRow, Source, Told
from thimble.data.sources.text import Open, strict_lines, whole_text
from thimble.errors import DataError

SHOWN_CHARS, SHOWN_LINES = 1 << 16, 20  # of a text, to see whether it is a table
_HEADER = re.compile(r"[^\W\d]\w*(?P<mark>[,;|])\w+((?P=mark)\w+)*")  # names of columns, with no space between


def read_rows(source: Source, told: Told, has_media: bool = False) -> Iterator[RawRow]:
    """The rows of one file, one after the other: a file of lines is never held in memory whole, a text is one row.

    Pictures and clips inside of tables are left out unless the caller says that it `has_media` to read. Rows that
    cannot be read come with the problem; a DataError if the file itself cannot, or has no rows.
    """
    count = 0
    for row in _rows(source, told, has_media):
        count += 1
        yield row
    if not count and source.kind != TEXT:
        raise DataError(f"{source.name} is empty: expected rows.")


def _rows(source: Source, told: Told, has_media: bool) -> Iterator[RawRow]:
    open_file: Open = partial(unpacked, source.path, source.name)
    if source.kind == ".jsonl":
        return read_json_lines(open_file, source.name, told)
    if source.kind == ".json":
        return read_json(open_file, source.name, told, source.part)
    if source.kind == ".csv":
        return read_csv(open_file, source.name, told)
    if source.kind == TEXT:
        return _text(open_file, source.name, told)
    return read_arrow(source, told, has_media)


def _text(open_file: Open, name: str, told: Told) -> Iterator[RawRow]:
    text = whole_text(strict_lines(open_file, name, told), name)
    if "\0" in text:
        raise DataError(f"{name} holds a NUL character: expected text. If it is another kind of file, name it so.")
    looks, kind = _rows_in(text)
    if kind:
        told.warn(f"{name} looks like {looks} and is read as one text: to read rows, call it {kind}")
    if text.strip():
        yield RawRow({"text": text}, name)


def _rows_in(text: str) -> tuple[str, str]:
    """What rows a text holds by its first lines, and the suffix under which they are read; nothing of a plain text."""
    lines = [line for line in text[:SHOWN_CHARS].split("\n") if line.strip()][:SHOWN_LINES]
    tabs = {line.count("\t") for line in lines}
    if len(lines) > 1 and len(tabs) == 1 and tabs != {0} and not lines[0].startswith("\t"):
        return "a table with tabs between cells", ".tsv"  # spreadsheets save "Unicode text" that way
    whole = lines if len(text) <= SHOWN_CHARS or len(lines) == SHOWN_LINES else lines[:-1]
    if whole and all(map(_is_object, whole)):
        return "JSON, one object a line,", ".jsonl"
    if re.match(r"\s*\[\s*\{\s*\"", text):
        return "an array of JSON objects", ".json"
    header = _HEADER.fullmatch(lines[0].strip()) if len(lines) > 1 else None
    if header and all(line.count(header["mark"]) >= lines[0].count(header["mark"]) for line in whole):
        return "a table with a header", ".csv"
    return "", ""


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
