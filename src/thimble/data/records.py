"""The user's examples: found, read, checked and split. Knows no model and no tokens."""

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thimble.data.rows import Parsed, Record, parse_row, said
from thimble.data.sources import find_files, kind_of, read_rows
from thimble.errors import DataError, Problems, listing, plural

__all__ = ["Dataset", "Record", "general_records", "raise_problems", "read_dataset", "split_rows"]

MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Dataset:
    """All examples of a file or folder, checked."""

    name: str  # of the file or folder, without suffix
    format: str  # "messages with tools", "Alpaca"; with counts if rows differ
    train: tuple[Record, ...]
    valid: tuple[Record, ...] | None  # None: the data has no file of its own for this
    test: tuple[Record, ...] | None
    notes: tuple[str, ...]  # what the user should know: columns and files not used
    files: tuple[Path, ...]

    @property
    def is_text(self) -> bool:
        """Whether all examples are plain text."""
        return all(record.text is not None for record in self.train)


def read_dataset(path: str | Path) -> Dataset:
    """Read examples from a file or folder and check every row.

    Args:
        path: A .jsonl, .json, .csv, .parquet, .txt or .md file, may be gzipped, or a folder: with files named train,
            valid and test, or with data files, or with texts in it or below it.

    Returns:
        The examples, in the order of the files.

    Raises:
        DataError: With everything that is wrong, each with file and line; the first 20 are told and the rest counted.
        MissingPackageError: If a .parquet file is given and pyarrow is not installed.
    """
    path = Path(path).expanduser()
    found = find_files(path)
    problems = Problems()
    notes = list(found.notes)
    parsed = {split: _read_split(files, path, problems, notes) for split, files in found.files.items()}
    raise_problems(problems)
    everything = [row for rows in parsed.values() for row in rows]
    unused = sorted(set().union(*(row.unused for row in everything)))
    notes += [f"columns not used: {listing(unused)}"] if unused else []
    records = {split: tuple(row.record for row in rows) for split, rows in parsed.items()}
    return Dataset(
        name=_name(path),
        format=said(row.form for row in everything),
        train=records["train"],
        valid=records.get("valid"),
        test=records.get("test"),
        notes=tuple(notes),
        files=tuple(file for files in found.files.values() for file in files),
    )


def split_rows(
    records: Sequence[Record], valid_fraction: float, seed: int
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Hold some examples out, so that what was learned can be measured on others.

    A record's side depends on its content, the seed and the other contents, not on its place in the file; records of
    the same content land on the same side, or the measure would reward learning by heart.

    Args:
        records: Examples.
        valid_fraction: Share to hold out, from 0 up to 1.
        seed: Another seed holds out others.

    Returns:
        Examples to learn from and examples held out, each in the given order. At least one is held out if there are
        two different ones and the share is above 0.
    """
    groups: dict[bytes, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_digest(record, seed), []).append(index)
    if valid_fraction <= 0 or len(groups) < 2:
        return tuple(records), ()
    shuffled = [indices for _, indices in sorted(groups.items())]
    wanted = min(max(1, round(valid_fraction * len(records))), len(records) - 1)
    held: list[int] = []
    for indices in shuffled:
        if len(held) + len(indices) <= wanted:
            held += indices
    held = held or min(shuffled, key=len)
    chosen = set(held)
    train = tuple(record for index, record in enumerate(records) if index not in chosen)
    return train, tuple(records[index] for index in sorted(chosen))


def general_records() -> tuple[Record, ...]:
    """Short general passages and questions that come with Thimble, to measure what training makes a model forget."""
    file = importlib.resources.files("thimble.data") / "general.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(
        parse_row(json.loads(line), f"general.jsonl line {number}").record for number, line in enumerate(lines, start=1)
    )


def raise_problems(problems: Problems) -> None:
    """Raise one DataError with the first problems and the count of the others; nothing if there are none."""
    found = list(dict.fromkeys(problems.found))
    if not found:
        return
    more = len(found) - MOST_PROBLEMS
    if more > 0:
        found = [*found[:MOST_PROBLEMS], f"and {plural(more, 'more problem')} of this kind or another."]
    raise DataError(*found)


def _read_split(files: Sequence[Path], root: Path, problems: Problems, notes: list[str]) -> list[Parsed]:
    rows: list[Parsed] = []
    before = len(problems.found)
    for file in files:
        name = str(file.relative_to(root)) if root.is_dir() else file.name
        raw = read_rows(file, name, problems)
        if not raw and len(problems.found) == before:
            notes.append(f"{name} is empty")
        for row in raw:
            parsed = _parse(row.value, row.source, problems)
            rows += [parsed] if parsed else []
    if not rows and len(problems.found) == before:
        problems.add(f"{listing(file.name for file in files)} has no text: expected at least one example.")
    return rows


def _parse(value: object, source: str, problems: Problems) -> Parsed | None:
    try:
        return parse_row(value, source)
    except DataError as error:
        problems.add(*(f"{source}: {problem}" for problem in error.problems))
        return None


def _name(path: Path) -> str:
    name = path.resolve().name
    return name[: name.lower().rindex(kind)] if (kind := kind_of(path)) and path.is_file() else name


def _digest(record: Record, seed: int) -> bytes:
    """A number that belongs to this content and this seed; sorted by it, contents are shuffled."""
    content = [seed, record.messages, record.text, record.tools]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
