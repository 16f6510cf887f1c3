"""The seams of the training loop: what it trains on, who adds up its gradients, and who writes its files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, Gradient, Objective, StepKey, TrainingSession, TrainState, Work
from thimble.core.adapter import Adapter
from thimble.core.metrics import LossSum
from thimble.models.execution import ExecutionPlan
from thimble.training.answers import Answer, mean_scores
from thimble.training.control import Control

S = TypeVar("S", bound=TrainingSession, contravariant=True)
OpenFile = Callable[[], BinaryIO]  # gives a file for the time of training; raises OSError if there is none


@dataclass(frozen=True)
class Scores:
    """How good a model is on the validation rows of a task."""

    loss: float  # nats per target token; NaN if nothing was held out, or the user wants to leave
    general_loss: float  # the same on general text, which training is not to spoil
    answers: Sequence[Answer] = ()  # what the model wrote, with the metrics of each answer
    row_losses: Mapping[int, LossSum] = field(default_factory=dict)  # of some validation rows, by their numbers
    train_loss: float = math.nan  # nats per target token of some training rows
    general_rows: Mapping[int, LossSum] = field(default_factory=dict)  # losses of the rows of general text
    divergence: Mapping[str, Any] = field(default_factory=dict)  # from the base, on texts that it wrote
    details: Mapping[str, Any] = field(default_factory=dict)  # what a task shows beside, as plain data

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric over the answers that have it."""
        return mean_scores(self.answers)


@dataclass(frozen=True)
class Before:
    """What was measured before the first step."""

    base: Scores  # scores of the bare base
    loss: float  # validation loss with the initial adapter


class Task(Protocol[S]):
    """What a run trains on and measures, with the sessions that it knows how to ask: `tasks/` holds them."""

    @property
    def costs(self) -> Sequence[int]:
        """Tokens, pixels or frames of each training row."""

    @property
    def counted(self) -> str:
        """What a speed counts, in the plural: tokens, or the rows of other tasks, such as pictures."""

    @property
    def unit(self) -> str:
        """What costs are counted in, for people: `tokens`, `pixels`, `frames`."""

    def work(self, rows: Sequence[int], execution: ExecutionPlan, key: StepKey, features: Any = None) -> Work:
        """The batches of one step, from the numbers of its rows; what is random in them is drawn from the key.

        Where features of the rows are known, they go along.
        """

    def features(
        self, session: S, state: TrainState, execution: ExecutionPlan, open_file: OpenFile, control: Control
    ) -> Any:
        """What the frozen part below the adapters makes of the rows, kept in a file; None where that saves nothing."""

    def objectives(self, session: S, execution: ExecutionPlan, control: Control) -> Sequence[Objective]:
        """What the steps minimise, taken in turn; at least one."""

    def watch(self, session: S, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of each validation row that is measured during training."""

    def confirm(self, session: S, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of other rows than those watched, on which a rise has to be there too; none if they are too few."""

    def choose(self, session: S, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of the rows by which the strength is chosen."""

    def evaluate(self, session: S, adapter: ActiveAdapter, execution: ExecutionPlan, control: Control) -> Scores:
        """Measure all validation rows; what is interrupted is left out."""

    def divergence(
        self, session: S, adapter: ActiveAdapter, execution: ExecutionPlan, control: Control
    ) -> Mapping[str, Any]:
        """How far the model has moved from its base; empty where that cannot be told."""

    def check_base(self, base: Scores, control: Control) -> None:
        """Refuse a base that cannot be trained on by raising a RunError, and warn of one whose scores are odd."""

    def initial_loss(
        self, session: S, adapter: ActiveAdapter, base: Scores, execution: ExecutionPlan, control: Control
    ) -> float:
        """Validation loss with the initial adapter; not measured again where the adapter changes nothing."""


class Collective(Protocol):
    """The processes that share the work of a run."""

    def sum(self, gradient: Gradient) -> Gradient:
        """The gradient of the whole step, from the part of this process."""


class OneProcess:
    """A run in one process."""

    def sum(self, gradient: Gradient) -> Gradient:
        """The gradient itself."""
        return gradient


class Sink(Protocol):
    """Takes what a run leaves behind; the only part of it that writes files."""

    def saved_before(self) -> Before | None:
        """What an interrupted run measured before its first step, if that was written down."""

    def scratch_file(self) -> BinaryIO:
        """A file without a name, gone when it is closed and when the process ends; raises OSError if there is none."""

    def write_before(self, before: Before) -> None:
        """Keep what was measured before the first step."""

    def write_step(self, row: Mapping[str, Any]) -> None:
        """Append a step to the log of steps."""

    def write_checkpoint(
        self, step: int, arrays: Mapping[str, NDArray[np.float32]], progress: Mapping[str, Any]
    ) -> None:
        """Keep all it takes to continue after a step; raises OSError if there is no room."""

    def end_steps(self) -> None:
        """No further step follows."""

    def write_adapter(self, adapter: Adapter) -> None:
        """Keep the result, before it is measured; raises OSError if there is no room."""
