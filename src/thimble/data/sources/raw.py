"""What passes between those who find files, those who read them, and those who know what a row means."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from thimble.errors import DataError, listing


class RawRow(NamedTuple):
    """One row before it is checked."""

    value: Any
    source: str  # "train.jsonl line 12"
    problem: str = ""  # why it cannot be read; then there is no value
    empty: tuple[str, ...] = ()  # columns of its table that are not in the value, as it has nothing there


class Source(NamedTuple):
    """A file to read, or what of it."""

    path: Path
    name: str  # as messages call it: "data/train.jsonl"
    kind: str  # how it is read, see `kinds`
    part: str = ""  # the split to take of a JSON file that holds several


def check_columns(names: Iterable[str], where: str) -> None:
    """Refuse a table with two columns of one name, of which a row would keep the last."""
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise DataError(
            f"{where} names {listing(twice)} more than once: expected columns with different names. Rename one of "
            "them, or take it away."
        )


@dataclass
class Told:
    """What is worth telling about the files, each once."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    delimiters: list[str] = field(default_factory=list)  # between the cells of each CSV file

    def note(self, text: str) -> None:
        """Tell what was done."""
        if text not in self.notes:
            self.notes.append(text)

    def warn(self, text: str) -> None:
        """Tell what may be wrong."""
        if text not in self.warnings:
            self.warnings.append(text)
