"""CSV files in thousands of dialects: read as the csv module does with the right one, or refused by name."""

import csv
import functools
import io
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stress import Line
from stress.files import MEMORY, try_all

SEPARATORS = (",", ";", "\t", "|")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252")
QUOTING: dict[str, dict[str, Any]] = {
    "minimal": {"quoting": csv.QUOTE_MINIMAL},
    "all": {"quoting": csv.QUOTE_ALL},
    "nonnumeric": {"quoting": csv.QUOTE_NONNUMERIC},
    "backslash": {"quoting": csv.QUOTE_ALL, "doublequote": False, "escapechar": "\\"},
    "none": {"quoting": csv.QUOTE_NONE, "escapechar": "\\"},
}
ENDS = ("\r\n", "\n", "\r")
HEADERS = (
    ["prompt", "completion"], ["question", "answer", "id"], ["instruction", "input", "output"], ["text", ""],
    ["", "prompt", "completion"], ["Frage", "Antwort; kurz", "Größe, in cm"],
)  # fmt: skip
PIECES = (
    "Größe", "für", "Straße 7", "3,50 €", "1.234,5", "a, b and c", "x; y", 'he said "yes"', '"', "a\tb", "this | that",
    "line\nbreak", "C:\\dir\\", "\\frac{1}{2}", "it's", "don’t", "”", "sep=;", "  ", "-", "0", "état", "\\n",
    "'quoted'",
)  # fmt: skip


class Table(NamedTuple):
    """A file and how it was written."""

    content: bytes
    dialect: dict[str, Any]
    encoding: str

    def rows(self) -> list[list[str]]:
        """What the csv module reads with the right dialect, line ends within cells as on Unix."""
        text = io.StringIO(self.content.decode(self.encoding), newline="")
        options = {key: value for key, value in self.dialect.items() if key != "lineterminator"}
        if options["quoting"] == csv.QUOTE_NONNUMERIC:  # which makes numbers of cells
            options["quoting"] = csv.QUOTE_MINIMAL
        rows = [[cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row] for row in csv.reader(text, **options)]
        return rows[1:] if rows and rows[0] and rows[0][0].startswith("sep=") else rows


def write_table(rows: list[list[str]], separator: str, encoding: str, quoting: str, end: str, sep_line: bool) -> Table:
    """Write rows as a program with these habits would."""
    dialect = {"delimiter": separator, "lineterminator": end, **QUOTING[quoting]}
    text = io.StringIO(newline="")
    if sep_line:
        text.write(f"sep={separator}{end}")
    csv.writer(text, **dialect).writerows(rows)
    return Table(text.getvalue().encode(encoding), dialect, encoding)


def random_table(dice: random.Random) -> Table:
    """A table of a random dialect, with cells that hold the separators, quotes and line ends of others."""
    header, end, quoting = dice.choice(HEADERS), dice.choice(ENDS), dice.choice(list(QUOTING))
    # Before Python 3.13 the csv module does not quote line ends that are not its own.
    pieces = [piece for piece in PIECES if "\n" not in piece or (end == "\n" or quoting in ("all", "backslash"))]
    rows = [header]
    for _ in range(dice.randint(1, 12)):
        cells = [" ".join(dice.choices(pieces, k=dice.randint(1, 5))) for _ in header]
        rows.append([cell if title else dice.choice(["", "7"]) for cell, title in zip(cells, header, strict=True)])
    if quoting in ("backslash", "none"):  # without such a cell nobody can tell
        rows.append(['he said "yes"' if title else "" for title in header])
    return write_table(rows, dice.choice(SEPARATORS), dice.choice(ENCODINGS), quoting, end, dice.random() < 0.1)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows as Thimble reads them."""
    from thimble.data.sources.find import find_files
    from thimble.data.sources.read import read_rows
    from thimble.errors import DataError

    splits, told = find_files(path)
    rows = list(read_rows(splits["train"][0], told))
    problems = [row.problem for row in rows if row.problem]
    if problems:
        raise DataError(*problems)
    return [row.value for row in rows]


def differences(table: Table, found: list[dict[str, str]]) -> str:
    """What differs from what the csv module reads; nothing if all is the same."""
    header, *rows = table.rows()
    titles = [title.strip() or f"Unnamed: {place}" for place, title in enumerate(header)]
    right = [{title: cell for title, cell in zip(titles, row, strict=False) if cell} for row in rows if any(row)]
    return "" if found == right else f"{table.dialect} {table.encoding}: {found} is not {right}"


def csv_dialects(count: int) -> Line:
    """Read tables of random dialects; what is read must be what was written."""

    def check(path: Path, table: Table) -> None:
        assert not (found := differences(table, read_table(path))), found

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:

        def cases() -> Iterator[Callable[[], object]]:
            dice = random.Random(0)
            for number in range(count):
                table = random_table(dice)
                path = Path(folder) / f"{number}.csv"
                path.write_bytes(table.content)
                yield functools.partial(check, path, table)
                path.unlink()

        return try_all("dialects of CSV", cases())
