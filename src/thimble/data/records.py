"""The user's examples: found, read, checked and split. Knows no model and no tokens."""

import hashlib
import importlib.resources
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from thimble.data.columns import NamedColumns
from thimble.data.rows import Parsed, Record, RowReader, parse_row, said
from thimble.data.sources.find import find_files
from thimble.data.sources.kinds import plain_name
from thimble.data.sources.raw import RawRow, Source, Told
from thimble.data.sources.read import read_rows
from thimble.data.spool import Chosen, Items, Spool
from thimble.data.unused import Unused
from thimble.errors import DataError, Problems, escaped, listing, plural

MOST_TOLD = 20  # problems of rows in one message
# What problems of a kind differ in.
_VALUES = re.compile(r'"[^"]*"|(?<= is )-?\d[\d.e+-]*|(?<= is )(True|False)|(?<= names ).*(?=, which is)')
MOST_KEPT = 10_000  # problems of rows that are remembered; the others are counted
SKIPPED_SHARE = 0.1  # of the rows: more that cannot be used are no dirt but a wrong form
MAX_VALIDATION_ROWS = 2000  # rows: more would say nothing new and take hours to measure

R = TypeVar("R", covariant=True)


class SkippedRow(NamedTuple):
    """A row that cannot be used."""

    source: str  # "train.jsonl line 12"
    problems: tuple[str, ...]  # with the source in front


@dataclass
class Skipped:
    """Rows that cannot be used, and whether the others may be without them."""

    is_strict: bool = False  # whether a single one is too many
    rows: int = 0  # rows read so far, these included
    count: int = 0  # how many cannot be used
    found: list[SkippedRow] = field(default_factory=list)  # the first of them

    def add(self, source: str, *problems: str) -> None:
        """Take note of a row that cannot be used."""
        self.count += 1
        if len(self.found) < MOST_KEPT:
            told = (problem if problem.startswith(source) else f"{source}: {problem}" for problem in problems)
            self.found.append(SkippedRow(source, tuple(told)))

    def check(self) -> None:
        """Raise a DataError with the first problems and the count of the others if too many rows cannot be used."""
        if not self.count or not (self.is_strict or self.count > SKIPPED_SHARE * self.rows):
            return
        told = self.told()
        if not self.is_strict and self.rows > self.count:
            told.append(
                f"{self.count:,} of {plural(self.rows, 'row')} cannot be used: one in ten may be left out, more is "
                "rather a wrong form than a slip."
            )
        raise DataError(*told)

    def pass_over(self, rows: int, count: int, told: Told) -> None:
        """Take back a test part, which began at these numbers, if no row of it can be used, and say so.

        Contests and benchmarks give test files without answers, which are no reason not to train.
        """
        if self.is_strict or self.count == count or self.count - count < self.rows - rows:
            return
        first = "".join(self.found[count].problems[:1]) if count < len(self.found) else "as those before"
        number = plural(self.rows - rows, "row")
        told.warn(f"no row for tests can be used ({number}), and none is: they have no answers, perhaps: {first}")
        self.rows, self.count = rows, count
        del self.found[count:]

    def told(self) -> list[str]:
        """What is wrong, each problem once with the first row that has it."""
        alike: dict[str, tuple[str, list[str]]] = {}  # the first of its kind, and the rows that have one like it
        for row in self.found:
            for problem in row.problems:
                rest = problem.removeprefix(row.source)
                alike.setdefault(_VALUES.sub("", rest), (rest, []))[1].append(row.source)
        told = [_told_once(*first) for first in alike.values()][:MOST_TOLD]
        if len(alike) > MOST_TOLD:
            told.append(f"and {plural(len(alike) - MOST_TOLD, 'more problem')} of other kinds.")
        return told


def _told_once(problem: str, sources: list[str]) -> str:
    """A problem of one row, or of many that have the same."""
    more = len(set(sources)) - 1
    return f"{sources[0]}{problem}" + (f" (likewise {plural(more, 'more row')}, up to {sources[-1]})" if more else "")


@dataclass(frozen=True)
class Dataset:
    """All examples of a file or folder, checked."""

    name: str  # of the file or folder, without suffix
    format: str  # "messages with tools", "Alpaca"; with counts if rows differ
    train: Items[Record]
    valid: Items[Record] | None  # None: the data has no file of its own for this
    test: Items[Record] | None
    notes: tuple[str, ...]  # what the user should know: files not used, columns that say nothing
    warnings: tuple[str, ...]  # what may be wrong with the files, or missing from the rows
    files: tuple[Path, ...]
    is_text: bool  # whether all training examples are plain text
    skipped: Skipped  # what could not be used, so far


class Reader(Protocol[R]):
    """Knows what one row means."""

    def parse(self, row: Any, source: str) -> Parsed[R]:
        """Check a row; a DataError says everything that is wrong with it."""

    def check(self) -> None:
        """Raise a DataError if the rows read so far lack what all of them may not."""


def read_dataset(path: str | Path, is_strict: bool = False, named: NamedColumns | None = None) -> Dataset:
    """Read examples from a file or folder and check every row; they lie in a temporary file, not in memory.

    The path is a .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md file, may be packed, or a folder: one that
    datasets or the hub's client has written, or with files named train, valid and test, or with data files or texts.
    If strict, a single row that cannot be used is too many, else up to a tenth of them is left out. Rows are read from
    the columns that are named, else from those of a known form. A DataError says everything that is wrong, each with
    file and line; the first 20 are told and the rest counted.
    """
    path = Path(path)
    splits, told = find_files(path)
    skipped, unused = Skipped(is_strict), Unused()
    forms: dict[str, Counter[str]] = {split: Counter() for split in splits}
    records: dict[str, Spool[Record]] = {split: Spool(_packed, _unpacked) for split in splits}
    for split, parsed in checked_rows(splits, RowReader(named), told, skipped):
        records[split].append(parsed.record)
        forms[split][parsed.form] += 1
        unused.add(parsed.left)
    return Dataset(
        name=_name(path),
        format=said(sum(forms.values(), Counter())),
        train=records["train"],
        valid=records.get("valid"),
        test=records.get("test"),
        notes=(*told.notes, *unused.notes),
        warnings=(*told.warnings, *unused.warnings),
        files=tuple(dict.fromkeys(file.path for files in splits.values() for file in files)),
        is_text=set(forms["train"]) == {"plain text"},
        skipped=skipped,
    )


def split_rows(records: Items[Record], valid_fraction: float, seed: int) -> tuple[Items[Record], tuple[Record, ...]]:
    """Hold some examples out, so that what was learned can be measured on others.

    A record's side depends on its content, the seed and the other contents, not on its place in the file; records of
    the same content land on the same side, or the measure would reward learning by heart. Both sides keep the given
    order; at least one is held out if two differ and the share is above 0, at most MAX_VALIDATION_ROWS.
    """
    digests = np.fromiter((_digest(record, seed) for record in records), np.uint64, len(records))
    order = np.argsort(digests, kind="stable")  # shuffled, those of the same content side by side
    begins = np.flatnonzero(np.diff(digests[order], prepend=~digests[order[:1]])).tolist()
    if valid_fraction <= 0 or len(begins) < 2:
        return records, ()
    wanted = min(max(1, round(valid_fraction * len(records))), len(records) - 1, MAX_VALIDATION_ROWS)
    ends = [*begins, len(order)]
    held: list[int] = []
    for begin, end in itertools.pairwise(ends):
        if len(held) + end - begin <= wanted:
            held += order[begin:end].tolist()
    held = held or order[slice(*min(itertools.pairwise(ends), key=lambda group: group[1] - group[0]))].tolist()
    chosen = set(held)
    train = Chosen(records, (index for index in range(len(records)) if index not in chosen))
    return train, tuple(records[index] for index in sorted(chosen))


def general_records() -> tuple[Record, ...]:
    """Short general passages and questions that come with Thimble, to measure what training makes a model forget."""
    return tuple(parse_row(row, source).record for source, row in _rows_of("general.jsonl"))


def beginning_records() -> tuple[Record, ...]:
    """Other questions, without answers, and beginnings of texts, for the base to go on from."""
    return tuple(
        Record(text=row["text"], source=source)
        if "text" in row
        else Record(({"role": "user", "content": row["prompt"]},), source=source)
        for source, row in _rows_of("beginnings.jsonl")
    )


def _rows_of(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file that comes with Thimble, each behind its place."""
    lines = (importlib.resources.files("thimble.data") / name).read_text(encoding="utf-8").splitlines()
    return ((f"{name} line {number}", json.loads(line)) for number, line in enumerate(lines, start=1))


def checked_rows(
    splits: Mapping[str, Sequence[Source]], reader: Reader[R], told: Told, skipped: Skipped
) -> Iterator[tuple[str, Parsed[R]]]:
    """The rows of all files with their split; at the end a DataError says everything that is wrong, if too much is."""
    problems = Problems()
    for split, files in splits.items():
        begin = skipped.rows, skipped.count
        yield from ((split, parsed) for parsed in _parsed_rows(files, reader, problems, told, skipped))
        if split == "test" and len(splits) > 1:
            skipped.pass_over(*begin, told)
    reader.check()
    problems.attempt(skipped.check)
    if problems.found:
        raise DataError(*problems.found)


def _parsed_rows(
    files: Sequence[Source], reader: Reader[R], problems: Problems, told: Told, skipped: Skipped
) -> Iterator[Parsed[R]]:
    """The rows of some files, checked; what is wrong with a file or a row is noted, and the others are read."""
    before, count = len(problems.found) + skipped.count, 0
    for file in (each._replace(name=escaped(each.name)) for each in files):  # a name may hold anything
        had = count
        try:
            for raw in read_rows(file, told):
                parsed = _parsed(raw, reader, skipped)
                if parsed:
                    count += 1
                    yield parsed
        except DataError as error:
            problems.add(*error.problems)
        if count == had and len(problems.found) + skipped.count == before:
            told.note(f"{file.name} is empty")
    if not count and len(problems.found) + skipped.count == before:
        problems.add(f"{listing(file.name for file in files)} has no text: expected at least one example.")


def _parsed(raw: RawRow, reader: Reader[R], skipped: Skipped) -> Parsed[R] | None:
    skipped.rows += 1
    try:
        if not raw.problem:
            return reader.parse(raw.value, raw.source)
        skipped.add(raw.source, raw.problem)
    except DataError as error:
        skipped.add(raw.source, *_problems(raw, reader, error))
    return None


def _problems(raw: RawRow, reader: Reader[R], error: DataError) -> Sequence[str]:
    """What is wrong with a row; an empty cell is told as one, and not as a table without its column."""
    with_empty = {**dict.fromkeys(raw.empty), **raw.value} if raw.empty else raw.value
    try:
        reader.parse(with_empty, raw.source)
    except DataError as told:
        return told.problems
    return error.problems


def _packed(record: Record) -> bytes:
    """A record as JSON, without what is empty; values of Parquet files that JSON does not know become text."""
    fields = {name: value for name, value in vars(record).items() if value is not None}
    return json.dumps(fields, default=str).encode()


def _unpacked(packed: bytes) -> Record:
    fields = json.loads(packed)
    lists = {name: tuple(fields[name]) for name in ("messages", "tools") if name in fields}
    return Record(**{**fields, **lists})


def _name(path: Path) -> str:
    path = path.resolve()
    return plain_name(path) if path.is_file() else path.name


def _digest(record: Record, seed: int) -> int:
    """A number of 64 bits that belongs to this content and this seed; sorted by it, contents are shuffled."""
    content = [seed, record.messages, record.text, record.tools]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big")
