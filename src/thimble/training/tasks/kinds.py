"""The tasks there are beside text: how each finds its rows, what it is trained on, and what is usual for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from thimble.config.train import TrainConfig
from thimble.training.tasks.clips import measured_clips, open_clips
from thimble.training.tasks.labels import measured_pictures, open_pictures
from thimble.training.tasks.reading import Classes, TaskRows
from thimble.training.tasks.sentences import measured_pairs, measured_texts, open_pairs, open_texts
from thimble.training.tasks.transcripts import measured_transcripts, open_transcripts


@dataclass(frozen=True)
class TaskKind:
    """One task."""

    open_rows: Callable[[TrainConfig], TaskRows]  # raises DataError
    # The rows that a finished adapter with these classes is asked about, with answers if they are needed.
    measured_rows: Callable[[TrainConfig, Classes, bool], TaskRows]
    loss: str  # `labels`, `pairs` or `tokens`
    step_rows: int  # rows of a step
    rate: float = 2e-3  # peak learning rate of adapter and head (docs/tasks.md)
    epochs: float = 10.0
    peft_type: str | None = None  # what PEFT calls the task, where it opens the adapter in a class made for it

    @property
    def has_head(self) -> bool:
        """Whether a head for classes is fitted and trained."""
        return self.loss == "labels"


KINDS: Mapping[str, TaskKind] = {
    "classify-image": TaskKind(open_pictures, measured_pictures, "labels", 32),
    "classify-audio": TaskKind(open_clips, measured_clips, "labels", 16),
    "transcribe": TaskKind(open_transcripts, measured_transcripts, "tokens", 16, rate=1e-3),
    "classify-text": TaskKind(open_texts, measured_texts, "labels", 32, 5e-4, 5.0, "SEQ_CLS"),
    "embed": TaskKind(open_pairs, measured_pairs, "pairs", 32, 1e-3, 4.0, "FEATURE_EXTRACTION"),
}
