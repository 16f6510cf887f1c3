"""How rows of one kind of data become batches of a module, and what it makes of them answers for people."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import StepKey
from thimble.config.train import TrainConfig
from thimble.core.labels import AnswerCounts
from thimble.data.media.inside import MediaFile
from thimble.data.records import Skipped
from thimble.models.module_base import ModuleBase
from thimble.training.answers import Answer

TRAIN, VALID = "train", "valid"  # parts of the data


class Reading(Protocol):
    """The rows of a task: what goes into the module, and what comes out of it."""

    @property
    def loss(self) -> str:
        """What the module is trained on: `labels`, `pairs` or `tokens`."""

    @property
    def unit(self) -> str:
        """What costs are counted in, for people: `pixels`, `frames`, `tokens`."""

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """How inputs are made, as plain data that an adapter carries."""

    @property
    def costs(self) -> Sequence[int]:
        """Pixels, frames or tokens of each training row."""

    @property
    def valid_costs(self) -> Sequence[int]:
        """The same of each validation row."""

    def batch(self, part: str, rows: Sequence[int], key: StepKey | None) -> ModuleBatch:
        """Some rows of a part as the module takes them; with a key augmented, drawn from seed, step and row."""

    def answers(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[Answer]:
        """What the module said of validation rows, of which `outputs` has one array each, beside what was expected."""

    def extra(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> Mapping[str, Any]:
        """What the report shows beside, as plain data: calibration, ranks of retrieval."""


@runtime_checkable
class Telling(Protocol):
    """A reading of which something is to be said row by row."""

    def lines(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
        """What `thimble generate` writes of each validation row, as plain data."""


@runtime_checkable
class Ahead(Protocol):
    """A reading whose rows take a while to read, and may be read before they are asked for."""

    def expect(self, part: str, rows: Sequence[int]) -> None:
        """Begin to read rows of a part that will be asked for next."""


@runtime_checkable
class Warned(Protocol):
    """A reading that found something odd in its rows."""

    @property
    def warnings(self) -> Sequence[str]:
        """What may be wrong with the rows as this base takes them."""


def warnings_of(reading: Reading) -> Sequence[str]:
    """What a reading warns of."""
    return reading.warnings if isinstance(reading, Warned) else ()


def expect(reading: Reading, part: str, rows: Sequence[int]) -> None:
    """Let a reading that can begin with rows that will be asked for next."""
    if isinstance(reading, Ahead):
        reading.expect(part, rows)


def read_ahead(reading: Reading, part: str, parts: Sequence[Sequence[int]]) -> Iterator[ModuleBatch]:
    """A batch of each of some parts of rows, not augmented; the next one is begun while one is used."""
    for rows, following in zip(parts, (*parts[1:], ()), strict=False):
        batch = reading.batch(part, rows, None)
        expect(reading, part, following)
        yield batch


class Known(Protocol):
    """A row that is known again."""

    @property
    def digest(self) -> str:
        """Alike for rows that are the same."""


def first_of_each(rows: Iterable[Known]) -> list[int]:
    """Numbers of rows; of those that are the same, that of the first."""
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row.digest, number)
    return list(first.values())


def known_rows(train: Iterable[Known], valid: Iterable[Known]) -> frozenset[int]:
    """Numbers of validation rows that are training rows too."""
    learned = {row.digest for row in train}
    return frozenset(number for number, row in enumerate(valid) if row.digest in learned)


def digest_of(rows: Iterable[tuple[str, Any]]) -> str:
    """Hash of rows, each by what it is and what is to be learned of it, hexadecimal."""
    total = hashlib.sha256()
    for what, learned in rows:
        total.update(f"{what} {learned!r}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Classes:
    """The classes of a finished adapter, by the numbers that its head gives; none for tasks without classes.

    Where `are_known` is false, the adapter says how many there are, and the names are numbers alone: those of the data
    may be meant.
    """

    names: Sequence[str]
    are_known: bool = True


@dataclass(frozen=True)
class TaskRows:
    """The data of a task before its module is opened.

    Attributes:
        labels: The classes, whose places are the numbers that a head gives; none for tasks without classes.
        sources: Where each validation row came from.
        digest: Hash of all rows, hexadecimal.
        reading: Makes the reading, of the opened base and the options.
        files: Whose hashes the manifest of the run holds.
        has_valid_part: Whether the data say which rows are for validation.
        known: Numbers of validation rows that are training rows too.
        unseen: Numbers of validation rows that are none, each content once.
        skipped: What could not be used.
        learned: How many training rows have each label.
        told: What was done.
        warnings: What may be wrong.
        media: Pictures or clips of the validation rows, by their sources.
    """

    labels: Sequence[str]
    sources: Sequence[str]
    digest: str
    reading: Callable[[ModuleBase, TrainConfig], Reading]
    files: tuple[Path, ...] = ()
    has_valid_part: bool = False
    known: frozenset[int] = frozenset()
    unseen: Sequence[int] = ()
    skipped: Skipped = field(default_factory=Skipped)
    learned: AnswerCounts = field(default_factory=AnswerCounts)
    told: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    media: Mapping[str, MediaFile] = field(default_factory=dict)
