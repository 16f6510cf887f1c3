"""Which dialect a CSV file is in: what stands between its cells, and how they are quoted.

Every dialect that may be meant is tried on the first rows, and the one in which most rows have as many cells as the
header is taken. A single line would say little: text is full of commas and semicolons.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

DELIMITERS = (",", ";", "\t", "|")
LARGEST_CELL = (1 << 31) - 1  # characters
_SEPARATOR = re.compile(r'"?sep=(.)"?[,;\t|]*', re.IGNORECASE | re.DOTALL)
_QUOTE = re.compile(r'(?<!\\)(\\\\)*"')  # one that is not escaped
_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)


class Dialect(NamedTuple):
    """How the cells of a file are told apart."""

    delimiter: str = ","
    quote: str = '"'  # around cells; none: quotes are text
    has_escapes: bool = False  # whether a backslash takes the meaning from what follows
    skips_spaces: bool = False  # behind a delimiter


def separator_line(line: str) -> str:
    """The delimiter that a first line `sep=;` tells, as Excel writes and reads it; nothing if it is another line."""
    found = _SEPARATOR.fullmatch(line)
    return found[1] if found and found[1] not in '\n"' else ""


def find_dialect(sample: list[str], delimiter: str, is_whole: bool) -> Dialect:
    """The dialect of lines, of which the first is the header.

    Args:
        sample: Lines with their ends.
        delimiter: What stands between cells, if that is known.
        is_whole: Whether the sample is all of the file, so that it cannot end inside a cell.

    Returns:
        The best of all; where none fits, the usual one, so that what is wrong can be told.
    """
    text = "".join(sample)
    best, best_score = Dialect(delimiter or ","), (False, 0.0, 0.0, 0)
    for dialect in _candidates(text, sample[0].strip(), delimiter):
        score = _score(sample, dialect, is_whole)
        if score[-1] > 1 and score > best_score:  # one column has no delimiter
            best, best_score = dialect, score
    if best_score[-1] > 1:
        return best
    # One column, or nothing fits: what is wrong is told of the plain dialect.
    return next(
        (one for one in _candidates(text, sample[0].strip(), delimiter or ",") if _score(sample, one, is_whole)[0]),
        best,
    )


def _candidates(text: str, header: str, delimiter: str) -> Iterator[Dialect]:
    """Dialects in the order in which they are preferred where they fit equally well."""
    for mark in [delimiter] if delimiter else DELIMITERS:
        if mark not in text and not delimiter:
            continue
        if header[:1] == header[-1:] == "'":
            yield Dialect(mark, "'")
            yield Dialect(mark, "'", has_escapes=True)
        # Nobody gives a column a name that begins with a space.
        skips = mark in header and header.count(f"{mark} ") == header.count(mark) and mark != "\t"
        if skips:
            yield Dialect(mark, skips_spaces=True)
        # Quotes and delimiters that are escaped though nothing is quoted can mean nothing else.
        is_escaped = not _QUOTE.search(text) and ('\\"' in text or f"\\{mark}" in text)
        ways = (is_escaped, not is_escaped) if "\\" in text else (False,)
        yield from (Dialect(mark, has_escapes=way) for way in ways)
        if f"{mark} " in text and mark != "\t" and not skips:
            yield Dialect(mark, skips_spaces=True)
        if mark in "\t|":  # as Common Voice and LJ Speech have it
            yield Dialect(mark, quote="")


def _score(sample: list[str], dialect: Dialect, is_whole: bool) -> tuple[bool, float, float, int]:
    """Whether the sample can be read; the shares of rows that fit the header and that are as long; its length."""
    reader: Any = cells_of(iter(sample), dialect)
    rows: list[list[str]] = []
    can_be_read = True
    try:
        rows.extend(cells for cells in reader if any(cells))
    except csv.Error:
        can_be_read = not is_whole and reader.line_num >= len(sample)
    if not rows:
        return False, 0.0, 0.0, 0
    header, *rows = rows
    rows = rows if is_whole or len(rows) < 2 else rows[:-1]  # which may be cut
    named = len(header)
    while named and not header[named - 1].strip():
        named -= 1
    fitting = sum(len(cells) >= named and not any(cells[len(header) :]) for cells in rows)
    exact = sum(len(cells) == len(header) for cells in rows)
    return can_be_read, fitting / max(1, len(rows)), exact / max(1, len(rows)), len(header)


def cells_of(lines: Iterable[str], dialect: Dialect) -> Iterator[list[str]]:
    """Read cells as the csv module does."""
    options: dict[str, Any] = {"quotechar": dialect.quote} if dialect.quote else {"quoting": csv.QUOTE_NONE}
    if dialect.has_escapes:
        options["escapechar"] = "\\"
        # Only what must be is escaped: a program that writes \" for a quote may write \n as it stands.
        special = {dialect.delimiter, dialect.quote, "\\", "\n", ""}
        lines = (_ESCAPE.sub(lambda m: m[0] if m[1] in special else f"\\{m[0]}", line) for line in lines)
    return csv.reader(
        lines, delimiter=dialect.delimiter, skipinitialspace=dialect.skips_spaces, strict=bool(dialect.quote), **options
    )
