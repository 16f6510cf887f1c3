"""Rows of CSV files, in the dialect that `thimble.data.sources.dialect` finds."""

import csv
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from thimble.data.sources.dialect import LARGEST_CELL, Dialect, cells_of, find_dialect, separator_line
from thimble.data.sources.raw import RawRow, Told, check_columns
from thimble.data.sources.text import Open, checked, strict_lines
from thimble.errors import DataError, listing, plural

SAMPLE_LINES, SAMPLE_CHARS = 500, 1 << 17  # by which the dialect is found
LONGEST_NAME = 300  # characters of a column's name
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)*")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(open_file: Open, name: str, told: Told) -> Iterator[RawRow]:
    """The rows below the header; empty cells are missing values."""
    lines = strict_lines(open_file, name, told)
    first, line = _filled(lines)
    delimiter = separator_line(line)
    if delimiter:
        first, line = _filled(lines)
    if not line:
        return
    below = (f"{checked(line, f'{name} line {number}')}\n" for number, line in lines)
    sample, size = [f"{checked(line, f'{name} line {first}')}\n"], len(line)
    for line in itertools.islice(below, SAMPLE_LINES):
        sample.append(line)
        size += len(line)
        if size > SAMPLE_CHARS:
            break
    is_whole = len(sample) <= SAMPLE_LINES and size <= SAMPLE_CHARS
    with _large_cells():
        dialect = find_dialect(sample, delimiter, is_whole)
        _tell(dialect, name, told)
        yield from _rows(itertools.chain(sample, below), dialect, name, first, told)


def _filled(lines: Iterator[tuple[int, str]]) -> tuple[int, str]:
    """The next line with anything in it, and its number; an empty one if there is none."""
    return next(((number, line) for number, line in lines if line and not line.isspace()), (0, ""))


@contextmanager
def _large_cells() -> Iterator[None]:
    limit = csv.field_size_limit(LARGEST_CELL)  # the default refuses documents of 128 KiB
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _tell(dialect: Dialect, name: str, told: Told) -> None:
    told.delimiters.append(dialect.delimiter)
    ways = [f"with {_NAMES.get(dialect.delimiter, repr(dialect.delimiter))} between cells"]
    ways = [] if dialect.delimiter == "," else ways
    ways += [f"without the spaces behind {_NAMES.get(dialect.delimiter, 'delimiters')}"] if dialect.skips_spaces else []
    ways += ['with quotes in cells written \\"'] if dialect.has_escapes else []
    ways += ["with single quotes around cells"] if dialect.quote == "'" else []
    ways += ["with quotes as part of the text"] if not dialect.quote else []
    if ways:
        told.note(f"{name} is read {' and '.join(ways)}")


def _rows(lines: Iterator[str], dialect: Dialect, name: str, first: int, told: Told) -> Iterator[RawRow]:
    rows = _numbered_cells(lines, dialect, name, first)
    top, cells = next(rows)
    header = _header(cells, f"{name} line {top}")
    named = max((place for place, title in enumerate(header, start=1) if title), default=0)
    titles = [title or f"Unnamed: {place}" for place, title in enumerate(header)]  # as pandas calls them
    count, repeated = 0, []
    for line, cells in rows:
        if not any(cells):
            continue
        if named > 1 and cells[0].strip() in header and _is_header(cells, header, f"{name} line {line}", top):
            repeated.append(line)
            continue
        count += 1
        source = f"{name} line {line}"
        if len(cells) < named or any(cells[len(header) :]):
            yield RawRow(None, source, _misfit(source, cells, header[:named], dialect))
        elif any("\0" in cell for cell in cells):
            yield RawRow(None, source, f"{source} holds a NUL character, which no text has: take it away.")
        else:
            empty = tuple(title for title, cell in zip(header, cells, strict=False) if title and not cell)
            row = {title: cell for title, cell in zip(titles, cells, strict=False) if cell}
            yield RawRow(row, source, empty=empty)
    if repeated:  # as programs leave it that append to a table
        times = plural(len(repeated), "time")
        told.note(f"{name} repeats its header {times}, first in line {repeated[0]}: these lines are no rows")
    if not count:
        raise DataError(
            f"{name} has a header and no rows: expected at least one row below {listing(filter(None, header))}."
        )


def _header(cells: list[str], source: str) -> list[str]:
    header = [cell.strip().strip("\ufeff") for cell in cells]
    check_columns(header, source)
    odd = [title for title in header if _NUMBER.fullmatch(title) or title[:1] in "[{" and title[1:]]
    odd += [title for title in header if len(title) > LONGEST_NAME]
    if odd and 2 * len(odd) >= len(list(filter(None, header))):  # a year may well be the name of a column
        raise DataError(
            f'{source} has "{odd[0][:40]}" where the name of a column should be: expected a header. Put one on top, '
            "such as prompt,completion"
        )
    return header


def _is_header(cells: list[str], header: list[str], source: str, top: int) -> bool:
    """Whether a row is the header once more; a DataError if it has the same columns in another order."""
    titles = [cell.strip() for cell in cells]
    if titles != header and sorted(titles) == sorted(header):
        raise DataError(
            f"{source} is a header with the columns in another order than line {top}: expected one table. Write the "
            "rows below it to a file of their own."
        )
    return titles == header


def _misfit(source: str, cells: list[str], header: list[str], dialect: Dialect) -> str:
    mark = _NAMES.get(dialect.delimiter, f"the character {dialect.delimiter!r}")
    return (
        f"{source} has {len(cells)} cells: expected {len(header)}, as in the header ({listing(header)}). "
        f"Put cells that hold {mark} or line breaks in double quotes."
    )


def _numbered_cells(lines: Iterator[str], dialect: Dialect, name: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row; where quotes do not fit, nothing behind them can be told apart either."""
    reader: Any = cells_of(lines, dialect)
    begin = first
    try:
        for cells in reader:
            yield begin, cells
            begin = reader.line_num + first
    except csv.Error as error:
        raise DataError(
            f"{name} line {begin} is not valid CSV: {error} (line {reader.line_num + first - 1}). Expected cells with "
            "commas or line breaks in double quotes, and quotes in them doubled."
        ) from None
