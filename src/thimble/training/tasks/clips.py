"""Clips of sound: features made once and kept, and the classes of clips."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import StepKey
from thimble.config.train import TrainConfig
from thimble.data.media.decoded import lost
from thimble.data.media.find import find_media
from thimble.data.media.items import Item
from thimble.data.media.sound import read_sound
from thimble.data.spool import Spool
from thimble.errors import BaseModelError, DataError, DoesNotFitError
from thimble.models.module_base import AS_BASE, ModuleBase
from thimble.report.words import FRAMES
from thimble.training.tasks.labels import LabelAnswers, labelled_rows, measured_rows, targets
from thimble.training.tasks.reading import TRAIN, Classes, TaskRows

if TYPE_CHECKING:
    from thimble.backends.torch.clip_inputs import ClipInputs

Features = Mapping[str, NDArray[Any]]


class KeptClips:
    """The features of clips, made when they are first asked for and kept in a file without a name from then on."""

    def __init__(self, items: Sequence[Item], inputs: "ClipInputs", most_seconds: float) -> None:
        """Clips that are heard up to `most_seconds`."""
        self._items, self._inputs = items, inputs
        self._most = min(most_seconds, inputs.most_seconds)
        self._kept: Spool[Features] | None = Spool(_pack, _unpack)
        self._places: dict[int, int] = {}
        self.costs = [inputs.frames(min(item.seconds, self._most)) for item in items]  # frames of each clip's window

    def batch(self, rows: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The features of some clips with windows of one length, (rows, ...)."""
        found = [self[row] for row in rows]
        return {name: np.stack([features[name] for features in found]) for name in found[0]}

    def __getitem__(self, row: int) -> Features:
        if self._kept is not None and row in self._places:
            return self._kept[self._places[row]]
        item = self._items[row]
        seconds = min(item.seconds, self._most)
        try:
            samples = read_sound(item.path, self._inputs.rate, seconds)
        except DataError as error:
            raise lost(item.path, error) from error
        found: Features = self._inputs.features(samples, self.costs[row])
        if self._kept is not None:
            try:
                self._kept.append(found)
                self._places[row] = len(self._kept) - 1
            except DoesNotFitError:  # no room: they are made again each time
                self._kept = None
        return found


def _pack(features: Features) -> bytes:
    file = io.BytesIO()
    np.savez(file, **features)
    return file.getvalue()


def _unpack(content: bytes) -> Features:
    with np.load(io.BytesIO(content)) as arrays:
        return dict(arrays)


def clip_inputs(base: ModuleBase) -> "ClipInputs":
    """What a base takes of a clip; a BaseModelError if it does not say."""
    from thimble.backends.torch.clip_inputs import ClipInputs

    if base.function:
        raise BaseModelError(
            f"base {base.name} is a function: how sound is made ready stands in preprocessor_config.json, so take a "
            "Hugging Face folder"
        )
    return ClipInputs(base.path, base.name, bool(base.preprocessing.get(AS_BASE)))


@dataclass(frozen=True)
class ClipRows:
    """Clips of the training and the validation rows."""

    items: tuple[Sequence[Item], Sequence[Item]]  # to learn from, held out
    clips: tuple[KeptClips, KeptClips]
    preprocessing: Mapping[str, Any]

    unit = FRAMES

    @property
    def valid(self) -> Sequence[Item]:
        """The validation rows."""
        return self.items[1]

    @property
    def costs(self) -> Sequence[int]:
        """Frames of each training clip."""
        return self.clips[0].costs

    @property
    def valid_costs(self) -> Sequence[int]:
        """Frames of each validation clip."""
        return self.clips[1].costs


@dataclass(frozen=True)
class ClipReading(ClipRows, LabelAnswers):
    """The same, whose class is to be found."""

    labels: Sequence[str]  # the classes: their places are the numbers that the head gives

    loss = "labels"

    def batch(self, part: str, rows: Sequence[int], key: StepKey | None) -> ModuleBatch:
        """Features of clips, and their classes int64 (rows,)."""
        side = 0 if part == TRAIN else 1
        items = [self.items[side][row] for row in rows]
        return ModuleBatch(self.clips[side].batch(rows), targets(items, self.labels), rows)


def open_clips(config: TrainConfig) -> TaskRows:
    """Find the clips of a run and hold some out; raises DataError with every problem."""
    found = find_media(
        Path(config.data), "audio", config.prompt_column, config.completion_column, is_strict=config.strict,
        most_seconds=config.max_seconds,
    )  # fmt: skip
    return labelled_rows(found, config, _clip_reading)


def measured_clips(config: TrainConfig, classes: Classes, needs_answers: bool) -> TaskRows:
    """Find clips to be told by a finished adapter, with their labels if they are needed."""
    found = find_media(
        Path(config.data), "audio", config.prompt_column, config.completion_column,
        "label" if needs_answers else "", config.strict, config.max_seconds, is_learned=False,
    )  # fmt: skip
    return measured_rows(found, found.test or found.valid or found.train, classes, config.data, _clip_reading)


def _clip_reading(
    train: Sequence[Item], valid: Sequence[Item], labels: Sequence[str], base: ModuleBase, config: TrainConfig
) -> ClipReading:
    inputs = clip_inputs(base)
    clips = KeptClips(train, inputs, config.max_seconds), KeptClips(valid, inputs, config.max_seconds)
    return ClipReading((train, valid), clips, {"max_seconds": config.max_seconds}, labels)
