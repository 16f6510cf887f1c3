"""Rows of JSON files: an object a line, arrays, columns, splits, and what tables and servers write."""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

from thimble.data.sources.raw import RawRow, Told
from thimble.data.sources.text import Open, checked, numbered_lines, unicode_of, whole_text
from thimble.errors import DataError, as_word, listing

MOST_VALUES = 20_000_000  # of a line, about: parsed, each takes far more memory than its text
CONVERSATIONS = {"messages", "conversations"}  # arrays of objects that are one row
LEAST_NAMED = 10  # rows of an object that names each; fewer may be the columns of one row
_BETWEEN = re.compile(r"[\s,]*")  # values

Lines = Iterator[tuple[int, str]]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that stands there twice would otherwise lose its first value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = listing(sorted({repr(name) for name in names if names.count(name) > 1}), 3)
        raise ValueError(f"{twice} stands twice in one object: leave one of them out")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def read_json_lines(open_file: Open, name: str, told: Told) -> Iterator[RawRow]:
    """The rows of a file with one object a line; if objects take several lines, the file is read as a whole."""
    if _spans_lines(_lines(open_file, name)):
        told.note(f"{name} does not hold one object a line: it is read as a whole")
        yield from read_json(open_file, name, told)
        return
    for number, line in _lines(open_file, name):
        if line and not line.isspace():
            row = _line_row(line, f"{name} line {number}")
            yield from _each(row) if isinstance(row.value, list) else (row,)


def read_json(open_file: Open, name: str, told: Told, part: str = "") -> Iterator[RawRow]:
    """The rows of a file that is one JSON value, or several, one behind the other."""
    text = whole_text(_lines(open_file, name), name)
    value, rest = _first_value(text, name)
    if text[rest:].strip():
        yield from _several_values(text, name)
        return
    rows = _rows_of(value[part] if part else value, name)
    has_nan = _has_nan(text)
    for number, row in enumerate(rows, start=1):
        yield _row(row, f"{name} {f'{part} ' if part else ''}row {number}", has_nan)


def split_arrays(open_file: Open, name: str) -> list[str]:
    """The keys of a file that is an object of several arrays of rows, as of splits; none if it is anything else."""
    with open_file() as file:
        begin = next(numbered_lines(file, unicode_of(file), name), (1, ""))[1]
    if not begin.lstrip().startswith("{"):
        return []
    try:
        value, _ = _first_value(whole_text(_lines(open_file, name), name), name)
    except DataError:  # told when it is read
        return []
    return list(value) if len(value) > 1 and all(map(_holds_objects, value.values())) else []


def _lines(open_file: Open, name: str) -> Lines:
    with open_file() as file:
        yield from numbered_lines(file, unicode_of(file), name)


def _spans_lines(lines: Lines) -> bool:
    """Whether the first line with anything in it ends inside a value that goes on below."""
    filled = (line.strip() for _, line in lines if line and not line.isspace())
    first = next(filled, "")
    return first[:1] in ("{", "[") and first[-1:] in (",", "{", "[") and next(filled, "") != ""


def _line_row(line: str, source: str) -> RawRow:
    if len(line) > MOST_VALUES and sum(map(line.count, "[{,")) > MOST_VALUES:
        return RawRow(None, source, f"{source} holds more than {MOST_VALUES:,} values: expected one example a line.")
    try:
        return _row(_DECODER.decode(checked(line, source)), source, _has_nan(line))
    except DataError as error:
        return RawRow(None, source, error.problems[0])
    except (ValueError, RecursionError) as error:
        reason = _reason(error, line)
        return RawRow(None, source, f"{source} is not valid JSON: {reason}. Expected one JSON object a line.")


def _each(row: RawRow) -> Iterator[RawRow]:
    """The rows of an array that stands in one line; a list of messages is one row."""
    holds_lists = bool(row.value) and all(isinstance(value, list) for value in row.value)
    if not holds_lists and (not _holds_objects(row.value) or _is_chat(row.value)):
        yield row
        return
    for number, value in enumerate(row.value, start=1):
        yield RawRow(value, f"{row.source} row {number}")


def _first_value(text: str, name: str) -> tuple[Any, int]:
    begin = len(text) - len(text.lstrip())
    if begin == len(text):
        return [], begin
    try:
        return _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError) as error:
        raise _invalid(error, text, name) from None


def _several_values(text: str, name: str) -> Iterator[RawRow]:
    """Objects or arrays one behind the other: a line each if the first two are, else of any form."""
    filled = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if all(_is_value(line) for _, line in filled[:2]):
        for number, line in filled:
            yield _line_row(line, f"{name} line {number}")
        return
    place, number, has_nan = 0, 0, _has_nan(text)
    while (place := _BETWEEN.match(text, place).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _invalid(error, text, name) from None
        for row in value if isinstance(value, list) else [value]:
            number += 1
            yield _row(row, f"{name} row {number}", has_nan)


def _is_value(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _rows_of(value: Any, name: str) -> list[Any]:
    """The rows of a JSON value: an array, the array in an object, columns side by side, or an object that is a row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(
            f"{name} is {_kind(value)}: expected an array of objects, or an object with one such array inside."
        )
    arrays = [key for key, inner in value.items() if isinstance(inner, list) and _holds_objects(inner)]
    if any(key in CONVERSATIONS or _is_chat(value[key]) for key in arrays):
        return [value]
    if _is_server_answer(value):
        return [row["row"] for row in value["rows"]]
    if not arrays:
        return _columns(value) or _named_rows(value) or [value]
    if len(arrays) == 1:
        return list(value[arrays[0]])
    raise DataError(
        f"{name} is an object with the arrays {listing(arrays)}: expected an array of objects, or an object with one "
        f"such array inside. Keep one of them, as in: {_jq(arrays[0], name)}"
    )


def _jq(key: str, name: str) -> str:
    """The command that writes one array of a file as lines."""
    path = f".{key}[]" if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) else f".[{json.dumps(key)}][]"
    return f"jq -c {shlex.quote(path)} {as_word(name)} > {as_word(f'{key}.jsonl'.replace('/', '-'))}"


def _is_server_answer(value: dict[str, Any]) -> bool:
    """Whether this is what the hub's data set server says: {"features": ..., "rows": [{"row_idx": 0, "row": {}}]}."""
    rows = value.get("rows")
    return isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("row"), dict) for row in rows)


def _columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table that was written column by column, as pandas and datasets do; none if it is no such table."""
    columns = list(value.values())
    if set(value) == {"columns", "index", "data"} and _is_split_table(value["columns"], value["data"]):
        return [dict(zip(value["columns"], cells, strict=False)) for cells in value["data"]]
    if columns and all(
        isinstance(column, dict) and column and column.keys() == columns[0].keys() for column in columns
    ):
        columns = [list(column.values()) for column in columns]
        is_table = all(key.isdecimal() for key in next(iter(value.values())))
    else:
        is_table = bool(columns) and all(isinstance(column, list) for column in columns)
    if not is_table or len({len(column) for column in columns}) != 1:
        return []
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _named_rows(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows by number, as pandas writes them with orient="index", or many by name; none if it is neither."""
    rows = list(value.values())
    if len(rows) < 2 or not _holds_objects(rows) or not set.intersection(*map(set, rows)):
        return []
    return rows if len(rows) >= LEAST_NAMED or all(key.isdecimal() for key in value) else []


def _is_split_table(names: Any, rows: Any) -> bool:
    """Whether these are the columns and the data of a table as pandas writes it with orient="split"."""
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        return False
    return isinstance(rows, list) and all(isinstance(cells, list) for cells in rows)


def _has_nan(text: str) -> bool:
    return "NaN" in text or "Infinity" in text


def _row(value: Any, source: str, has_nan: bool) -> RawRow:
    """A row; columns that are NaN are left out, since tables write it for an empty cell; elsewhere it is no JSON."""
    if not has_nan:
        return RawRow(value, source)
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if inner == inner}  # only NaN differs from itself
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return RawRow(None, source, f"{source} holds NaN or Infinity inside a value, which is no JSON: write null.")
    return RawRow(value, source)


def _holds_objects(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def _is_chat(values: list[dict[str, Any]]) -> bool:
    """Whether objects are messages, which are no rows."""
    has_roles = all("role" in value or "from" in value for value in values)
    return has_roles and any(key in values[0] for key in ("content", "value", "parts"))


def _invalid(error: Exception, text: str, name: str) -> DataError:
    line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    return DataError(f"{name}{line} is not valid JSON: {_reason(error, text)}. Expected an array of objects.")


def _reason(error: Exception, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)
    before, behind = text[: error.pos].rstrip()[-1:], text[error.pos :].lstrip()[:1]
    hint = ""
    if before == "," and behind in ("]", "}"):
        hint = f" (take away the comma before {behind})"
    elif behind == "'":
        hint = " (JSON has double quotes; this looks like Python, to be written with json.dumps)"
    return f"{error.msg.removesuffix(' at')} at column {error.colno}{hint}"


def _kind(value: Any) -> str:
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)
