"""Classes: pictures whose label is to be found; what the module says becomes a label with its probability."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import StepKey
from thimble.config.train import TrainConfig
from thimble.core.confidence import probabilities
from thimble.core.cross_fitted import calibration, thresholds
from thimble.core.labels import AnswerCounts, are_amounts
from thimble.data.media.augment import augment
from thimble.data.media.decoded import Decoded
from thimble.data.media.find import find_media
from thimble.data.media.items import Item, MediaData, split_items
from thimble.data.media.pictures import read_picture, to_pixels
from thimble.data.records import Skipped
from thimble.data.spool import Chosen, Items
from thimble.errors import DataError, listing, plural
from thimble.models.module_base import ModuleBase
from thimble.models.picture_inputs import PictureInputs, picture_inputs
from thimble.training.answers import Answer
from thimble.training.tasks.reading import (
    TRAIN,
    Classes,
    Known,
    Reading,
    TaskRows,
    digest_of,
    first_of_each,
    known_rows,
)


class Labelled(Known, Protocol):
    """A row with a label."""

    @property
    def label(self) -> str | None:
        """Its class, if it has one."""

    @property
    def source(self) -> str:
        """Where it stands."""

    @property
    def asked(self) -> str:
        """What people are shown of it."""


class LabelAnswers:
    """What a reading with classes says of its validation rows."""

    valid: Items[Any]  # rows with a label
    labels: Sequence[str]  # the classes: their places are the numbers that the head gives

    def answers(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[Answer]:
        """The likeliest label of each row."""
        return label_answers(outputs, [self.valid[row] for row in rows], self.labels)

    def lines(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
        """The label of each row, and how likely the module finds it."""
        return label_lines(outputs, [self.valid[row] for row in rows], self.labels)

    def extra(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> Mapping[str, Any]:
        """How far probabilities can be believed, and thresholds of two classes."""
        return label_details(outputs, [self.valid[row] for row in rows], self.labels)


@dataclass(frozen=True)
class PictureReading(LabelAnswers):
    """Pictures of the training and the validation rows."""

    train: Items[Item]
    valid: Items[Item]
    labels: Sequence[str]  # the classes: their places are the numbers that the head gives
    inputs: PictureInputs
    pictures: Decoded  # all of them, the training rows first
    changes: Sequence[str] = ()  # random ones, of training pictures

    loss = "labels"
    unit = "pixels"

    @property
    def warnings(self) -> Sequence[str]:
        """What the base does with pictures, and is not done here."""
        return self.inputs.warnings

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """Size, mean and standard deviation of pictures."""
        return self.inputs.as_data()

    @property
    def costs(self) -> Sequence[int]:
        """Pixels of each training picture."""
        return [self.inputs.size**2] * len(self.train)

    @property
    def valid_costs(self) -> Sequence[int]:
        """Pixels of each validation picture."""
        return [self.inputs.size**2] * len(self.valid)

    def batch(self, part: str, rows: Sequence[int], key: StepKey | None) -> ModuleBatch:
        """Pictures float32 (rows, 3, size, size), and their classes int64 (rows,)."""
        items = [(self.train if part == TRAIN else self.valid)[row] for row in rows]
        pictures = self.pictures.arrays(self._numbers(part, rows))
        if key and self.changes:
            changed = zip(pictures, rows, strict=True)
            pictures = [augment(picture, self.changes, (key.seed, key.step, row)) for picture, row in changed]
        pixels = np.stack(
            [to_pixels(picture, self.inputs.mean, self.inputs.std, self.inputs.is_grey) for picture in pictures]
        )
        return ModuleBatch({"pixel_values": pixels}, targets(items, self.labels), rows)

    def expect(self, part: str, rows: Sequence[int]) -> None:
        """Begin to decode pictures that will be asked for next."""
        self.pictures.expect(self._numbers(part, rows))

    def _numbers(self, part: str, rows: Sequence[int]) -> list[int]:
        return [row if part == TRAIN else len(self.train) + row for row in rows]


def open_pictures(config: TrainConfig) -> TaskRows:
    """Find the pictures of a run and hold some out; raises DataError with every problem."""
    found = find_media(
        Path(config.data), "image", config.prompt_column, config.completion_column, is_strict=config.strict
    )
    return labelled_rows(found, config, _picture_reading)


def measured_pictures(config: TrainConfig, classes: Classes, needs_answers: bool) -> TaskRows:
    """Find pictures to be told by a finished adapter, with their labels if they are needed."""
    needed = "label" if needs_answers else ""
    columns = config.prompt_column, config.completion_column
    found = find_media(Path(config.data), "image", *columns, needed=needed, is_strict=config.strict, is_learned=False)
    items = found.test or found.valid or found.train
    return measured_rows(found, items, classes, config.data, _picture_reading)


def _picture_reading(
    train: Items[Item], valid: Items[Item], labels: Sequence[str], base: ModuleBase, config: TrainConfig
) -> PictureReading:
    channels = {name: base.config[name] for name in ("num_channels",) if name in base.config}
    inputs = picture_inputs({**channels, **base.preprocessing}, base.name, config.image_size)
    paths = [item.path for item in (*train, *valid)]
    pictures = Decoded(paths, partial(read_picture, size=inputs.size, resample=inputs.resample))
    return PictureReading(train, valid, labels, inputs, pictures, config.augment)


class Found(Protocol):
    """What was read beside the rows."""

    @property
    def valid(self) -> Any:
        """Rows for validation; None if the data say no split."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Whose hashes the manifest of the run holds."""

    @property
    def skipped(self) -> Skipped:
        """What cannot be used."""

    @property
    def told(self) -> tuple[str, ...]:
        """What was done."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be wrong."""


T = TypeVar("T", bound=Labelled)
MakeReading = Callable[[Items[T], Items[T], Sequence[str], ModuleBase, TrainConfig], Reading]


def labelled_rows(found: MediaData, config: TrainConfig, make: MakeReading[Item]) -> TaskRows:
    """The rows of a task with classes, from files with labels, of which some are held out."""
    train, valid = found.train, found.valid
    if valid is None:
        train, valid = split_items(found.train, config.valid_split, config.seed)
    rows = rows_of_labels(found, train, valid, config, make)
    return replace(rows, media={item.source: item.path for item in valid})


def rows_of_labels(
    found: Found, train: Items[T], valid: Items[T], config: TrainConfig, make: MakeReading[T]
) -> TaskRows:
    """The rows of a task with classes, and those held out: how many there are of each."""
    labels = sorted({str(item.label) for item in train})
    if len(labels) < 2:
        raise DataError(f"{config.data} has the one label {labels[0]!r}: two are the least to tell apart")
    if are_amounts(labels):
        raise DataError(
            f"{config.data} has numbers for labels, {len(labels):,} different ones ({listing(labels, 4)}): expected "
            "classes, since no task estimates amounts; name the ranges that matter, such as low and high, or add "
            "--task embed if the numbers say how alike two texts are"
        )
    places = [number for number, item in enumerate(valid) if item.label in labels]
    unknown = [str(item.label) for item in valid if item.label not in labels]
    held = Chosen(valid, places)
    warnings = [
        f"left out: {plural(len(unknown), 'validation row')} of labels that no training row has "
        f"({listing(sorted(set(unknown)), 6)})"
    ] * bool(unknown)
    known = known_rows(train, held)
    return TaskRows(
        labels=labels, sources=[item.source for item in held],
        digest=digest_of((item.digest, item.label) for item in (*train, *held)),
        reading=partial(make, train, held, labels), files=found.files, has_valid_part=found.valid is not None,
        known=known, unseen=[number for number in first_of_each(held) if number not in known], skipped=found.skipped,
        learned=AnswerCounts(len(train), Counter(str(item.label) for item in train)),
        told=found.told, warnings=(*found.warnings, *warnings),
    )  # fmt: skip


def measured_rows(found: Found, items: Items[T], classes: Classes, source: str, make: MakeReading[T]) -> TaskRows:
    """The rows that a finished adapter with these classes is asked about; a DataError if it knows none of theirs.

    `source` is the data as the user named it.
    """
    labels, told = (classes.names, []) if classes.are_known else _named_by(items, classes.names, source)
    places = [number for number, item in enumerate(items) if item.label is None or item.label in labels]
    left = [str(item.label) for item in items if item.label is not None and item.label not in labels]
    if not places:
        raise DataError(
            f"{source} has no row of a label that the adapter knows ({listing(labels, 6)}), but "
            f"{listing(sorted(set(left)), 6)}"
        )
    warnings = [
        f"left out: {plural(len(left), 'row')} of labels that the adapter does not know "
        f"({listing(sorted(set(left)), 6)})"
    ] * bool(left)
    known = Chosen(items, places)
    return TaskRows(
        labels=labels, sources=[item.source for item in known],
        digest=digest_of((item.digest, item.label) for item in known),
        reading=partial(make, (), known, labels), files=found.files, unseen=first_of_each(known),
        skipped=found.skipped, told=found.told, warnings=(*found.warnings, *told, *warnings),
    )  # fmt: skip


def _named_by(items: Items[T], numbered: Sequence[str], source: str) -> tuple[Sequence[str], list[str]]:
    """Labels of the data for classes that are known by their numbers alone, and how they were taken, for people."""
    found = sorted({item.label for item in items if item.label is not None})
    if not found:
        return numbered, ["the adapter does not name its labels, nor does its base: they are told by their numbers"]
    if {*found} <= {*numbered}:
        return numbered, []
    numbers = [str(number) for number in range(len(numbered))]
    if {*found} <= {*numbers}:
        return numbers, []
    if len(found) != len(numbered):
        raise DataError(
            f"{source} has {plural(len(found), 'label')} ({listing(found, 6)}), and the adapter, which does not name "
            f"its own, tells {len(numbered)} apart: write them into id2label of the base's config.json, by number"
        )
    order = listing((f"{number} {label}" for number, label in enumerate(found)), 12)
    return found, [
        f"the adapter does not name its labels: those of {source} are taken in the order of the alphabet ({order}); "
        "if it was trained with another order, write it into id2label of the base's config.json"
    ]


def targets(items: Sequence[Labelled], labels: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Numbers of the labels, int64 (rows,); none where rows have no label, as those that are only to be told."""
    if any(item.label is None for item in items):
        return {}
    places = {label: number for number, label in enumerate(labels)}
    return {"labels": np.array([places[str(item.label)] for item in items], np.int64)}


def label_answers(outputs: Sequence[NDArray[Any]], items: Sequence[Labelled], labels: Sequence[str]) -> list[Answer]:
    """The likeliest label of each row, from its logits float32 (classes,), beside the right one."""
    return [
        Answer(item.asked, item.label or "", said, {"accuracy": float(said == item.label)}, item.source)
        for item, said in ((item, labels[int(made.argmax())]) for item, made in zip(items, outputs, strict=True))
    ]


def label_details(
    outputs: Sequence[NDArray[Any]], items: Sequence[Labelled], labels: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`calibration` and, of two classes, `thresholds` (see core/cross_fitted), as far as there are rows enough."""
    numbers = targets(items, labels).get("labels")
    if numbers is None or not len(numbers):
        return {}
    logits = np.stack(outputs)
    found = {"calibration": calibration(logits, numbers), "thresholds": thresholds(logits, numbers)}
    if found["thresholds"]:
        found["thresholds"]["name"] = labels[found["thresholds"]["label"]]
    return {name: detail for name, detail in found.items() if detail}


def label_lines(
    outputs: Sequence[NDArray[Any]], items: Sequence[Labelled], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """A line a file: the likeliest label with its probability, all labels with theirs, and the right one if known."""
    found = []
    for item, made in zip(items, outputs, strict=True):
        shares = probabilities(made[None])[0]
        best = int(shares.argmax())
        line = {"file": item.source, "label": labels[best], "probability": round(float(shares[best]), 6)}
        line["probabilities"] = {label: round(float(share), 6) for label, share in zip(labels, shares, strict=True)}
        found.append(line | ({"expected": item.label} if item.label is not None else {}))
    return found
