"""What the end of a run asks of its plan, whatever was trained: report, folder and messages are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thimble.config.train import TrainConfig
from thimble.core.labels import AnswerCounts
from thimble.data.media.inside import MediaFile
from thimble.models.frozen_base import FrozenBase
from thimble.training.metric import ChosenMetric


@dataclass(frozen=True)
class RunFacts:
    """A planned run as its report tells of it."""

    task: str
    config: TrainConfig  # resolved
    base: FrozenBase
    folder: Path  # the run folder
    origin: Mapping[str, str]  # what the run is made of, by hash
    metric: ChosenMetric  # what answers are scored with
    training_rows: int
    sources: Sequence[str]  # where each validation row came from
    judging: Sequence[int]  # numbers of the validation rows that the verdict rests on
    untouched_rows: int  # of those, if they choose nothing where others do
    known_rows: int  # validation rows that are training rows too
    skipped_rows: int
    learned: AnswerCounts  # the answers of the training rows, if they are labels
    memory: Mapping[str, int]  # expected peak by part, bytes
    seconds_per_step: float  # expected
    unit: str  # of costs, for people
    safer_rate: float  # to try where the one that was taken diverged
    token_ratio: float = 0.0  # tokens for the words of the data, in those for English ones
    answers_path: str | None = None  # a file for all answers, if the user wants one
    media: Mapping[str, MediaFile] = field(
        default_factory=dict
    )  # pictures or clips of validation rows, by their sources
