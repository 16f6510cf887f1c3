"""Any task on a module: rows that a reading knows, measured by loss and by what the module says of them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.module_session import ModuleBatch, ModuleSession
from thimble.backends.session import ActiveAdapter, Objective, StepKey, TrainState, Work
from thimble.core.logistic import cross_entropy
from thimble.core.metrics import LossSum
from thimble.errors import RunError
from thimble.events import EventLog, ignore
from thimble.models.execution import ExecutionPlan
from thimble.report.words import FRAMES
from thimble.training.control import Control
from thimble.training.protocols import OpenFile, Scores
from thimble.training.tasks.reading import TRAIN, VALID, Reading, expect, read_ahead
from thimble.training.watch import Watch

SAMPLE_ROWS = 32  # training rows that are measured too
TOGETHER = 32  # rows measured in one batch where their loss depends on it: whatever the memory, before as after


@dataclass(frozen=True)
class ModuleTask:
    """The rows of a reading to train on and to measure."""

    reading: Reading
    watch_rows: Watch  # what validation rows are for, by their numbers
    base_name: str  # for messages
    rows_of_step: Callable[[int], Sequence[int]] | None = None  # to read ahead
    epochs: float = 0  # how often each row is read, about
    is_augmented: bool = False  # whether training rows are another each time
    counted: str = "rows"  # what they are called, in the plural
    class_weights: Sequence[float] = ()  # what a training row of each class counts; empty: each the same

    @property
    def costs(self) -> Sequence[int]:
        """Pixels, frames or tokens of each training row."""
        return self.reading.costs

    @property
    def unit(self) -> str:
        """What these are."""
        return self.reading.unit

    def work(self, rows: Sequence[int], execution: ExecutionPlan, key: StepKey, features: Any = None) -> Work:
        """The batches of one step; rows of like cost stand together, since the costliest is what all are padded to."""
        order = sorted(rows, key=lambda row: -self.costs[row])
        # What is learned together the session itself cuts.
        parts = [order] if self._is_together else self._cut(TRAIN, order, execution)
        if features is not None:
            batches = [self._weighted(features.batch(part)) for part in parts]
            return Work([batches], sum(count_targets(batch) for batch in batches), features)
        batches = [self._weighted(self.reading.batch(TRAIN, part, key)) for part in parts]
        if self.rows_of_step:
            expect(self.reading, TRAIN, self.rows_of_step(key.step + 1))
        return Work([batches], sum(count_targets(batch) for batch in batches))

    def _weighted(self, batch: ModuleBatch) -> ModuleBatch:
        """A batch to train on, each row with what its class counts."""
        if not self.class_weights:
            return batch
        weights = np.asarray(self.class_weights, np.float32)[batch.targets["labels"]]
        return replace(batch, targets={**batch.targets, "weights": weights})

    def _cut(self, part: str, rows: Sequence[int], execution: ExecutionPlan) -> list[list[int]]:
        """Rows in micro-batches; where a loss is of all rows together, in parts that are always the same."""
        if self._is_together:
            return [list(rows[start : start + TOGETHER]) for start in range(0, len(rows), TOGETHER)]
        costs = self.costs if part == TRAIN else self.reading.valid_costs
        return cut(rows, costs, execution.micro_tokens, are_alike(self.reading))

    @property
    def _is_together(self) -> bool:
        """Whether the loss of a row depends on the others of its batch."""
        return self.reading.loss == "pairs"

    def features(
        self, session: ModuleSession, state: TrainState, execution: ExecutionPlan, open_file: OpenFile, control: Control
    ) -> Any:
        """What the frozen beginning of the module makes of the training rows, where they are read more than once."""
        if self.epochs <= 1 or self._is_together or len(set(self.costs)) > 1:  # of uneven rows nothing has one shape
            return None
        if self.is_augmented:
            control.log.note("the frozen beginning is run in every epoch: --augment changes its inputs each time")
            return None
        rows = range(len(self.costs))
        parts = cut(rows, self.costs, execution.micro_tokens)
        try:
            first = self.reading.batch(TRAIN, parts[0], None)
            features = session.new_features(first, open_file, len(rows))
            if features is None:
                return None
            batches = self._batches(TRAIN, rows, execution, control, "")
            for done in session.add_features(features, batches):
                control.log.progress(f"running training rows through {features.path}, row", done, len(rows))
        except (OSError, MemoryError) as error:
            why = error.strerror or error if isinstance(error, OSError) else "memory ran out"
            control.log.note(f"the frozen beginning is run in every epoch: what it makes cannot be kept ({why})")
            return None
        control.log.decision(
            f"{features.path}: run once over the training rows; what comes of it is kept on disk meanwhile"
        )
        return None if control.should_stop() else features

    def objectives(self, session: ModuleSession, execution: ExecutionPlan, control: Control) -> list[Objective]:
        """The loss of the reading."""
        return [Objective()]

    # ---- measuring ------------------------------------------------------------------------------------------------

    def watch(self, session: ModuleSession, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of each watched row."""
        return self._silent_losses(session, adapter, self.watch_rows.watched, execution)

    def confirm(self, session: ModuleSession, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of each row that confirms."""
        return self._silent_losses(session, adapter, self.watch_rows.confirming, execution)

    def choose(self, session: ModuleSession, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of each row that chooses the strength."""
        return self._silent_losses(session, adapter, self.watch_rows.choosing, execution)

    def _silent_losses(
        self, session: ModuleSession, adapter: ActiveAdapter, rows: Sequence[int], execution: ExecutionPlan
    ) -> list[LossSum]:
        silent = Control(EventLog(ignore))
        return list(self._losses(session, adapter, VALID, rows, execution, silent, "").values())

    def _losses(
        self, session: ModuleSession, adapter: ActiveAdapter, part: str, rows: Sequence[int], execution: ExecutionPlan,
        control: Control, what: str,
    ) -> dict[int, LossSum]:  # fmt: skip
        """The loss of each row by its number; of those that were measured when the user wanted to leave."""
        found: dict[int, LossSum] = {}
        order = self._by_cost(part, rows)
        batches = self._batches(part, order, execution, control, what)
        for losses in session.losses(adapter, batches, execution):
            numbers = order[len(found) : len(found) + len(losses)]
            found |= dict(zip(numbers, losses, strict=True))
        return {row: found[row] for row in rows if row in found}

    def _by_cost(self, part: str, rows: Sequence[int]) -> list[int]:
        """Rows of like cost stand together; the costliest come first, so that memory that runs out does so at once."""
        costs = self.costs if part == TRAIN else self.reading.valid_costs
        return sorted(rows, key=lambda row: -costs[row])

    def _batches(
        self, part: str, rows: Sequence[int], execution: ExecutionPlan, control: Control, what: str
    ) -> Iterator[ModuleBatch]:
        done = 0
        parts = self._cut(part, rows, execution)
        for numbers, batch in zip(parts, read_ahead(self.reading, part, parts), strict=True):
            if control.should_stop():
                return
            yield batch
            done += len(numbers)
            if what:
                control.log.progress(f"measuring {what}, row", done, len(rows))

    def evaluate(
        self, session: ModuleSession, adapter: ActiveAdapter, execution: ExecutionPlan, control: Control
    ) -> Scores:
        """Loss and answers of all validation rows, and the loss of some training rows."""
        rows = range(len(self.reading.valid_costs))
        outputs, labels = self._outputs(session, adapter, rows, execution, control)
        if self.reading.loss == "labels":
            losses = label_losses(outputs, labels)
        else:
            losses = self._losses(session, adapter, VALID, rows, execution, control, "the validation loss")
        count = min(SAMPLE_ROWS, len(self.costs)) if rows else 0
        sample = [int((place + 0.5) * len(self.costs) / count) for place in range(count)]
        train = self._losses(session, adapter, TRAIN, sample, execution, control, "training rows")
        if control.should_stop() or not rows:
            return Scores(math.nan, math.nan)
        answers = self.reading.answers(outputs, rows)
        total, learned = sum(losses.values(), LossSum()), sum(train.values(), LossSum())
        return Scores(total.mean, math.nan, answers, losses, learned.mean, details=self.reading.extra(outputs, rows))

    def _outputs(
        self, session: ModuleSession, adapter: ActiveAdapter, rows: Sequence[int], execution: ExecutionPlan,
        control: Control,
    ) -> tuple[list[NDArray[Any]], list[int]]:  # fmt: skip
        """What the module makes of each validation row, and its class if it has one; not of all if the user leaves."""
        order = self._by_cost(VALID, rows)
        outputs, labels = list[NDArray[Any]](), list[int]()
        batches = self._batches(VALID, order, execution, control, "validation rows")
        for made in session.outputs(adapter, noting_labels(batches, labels), execution):
            outputs += list(made)
        back = sorted(range(len(outputs)), key=lambda place: order[place])
        return [outputs[place] for place in back], [labels[place] for place in back] if labels else []

    def divergence(
        self, session: ModuleSession, adapter: ActiveAdapter, execution: ExecutionPlan, control: Control
    ) -> Mapping[str, Any]:
        """Not told: a module has no texts of its own."""
        return {}

    def initial_loss(
        self, session: ModuleSession, adapter: ActiveAdapter, base: Scores, execution: ExecutionPlan, control: Control
    ) -> float:
        """Validation loss with the adapter. Where a few rows are the base's bit for bit, as with B at zero, all are."""
        silent, rows = Control(EventLog(ignore)), range(len(self.reading.valid_costs))
        attached, bare = (
            self._losses(session, active, VALID, rows[:TOGETHER], execution, silent, "")
            for active in (adapter, session.load(None))
        )
        if attached == bare:
            return base.loss
        losses = self._losses(session, adapter, VALID, rows, execution, control, "validation rows")
        return math.nan if control.should_stop() else sum(losses.values(), LossSum()).mean

    def check_base(self, base: Scores, control: Control) -> None:
        """Refuse a base that gives NaN or Inf."""
        if len(self.reading.valid_costs) and not math.isfinite(base.loss):
            raise RunError(
                f"the base {self.base_name} gives a loss that is NaN or Inf: its weights are damaged, or its inputs "
                "are not made as it was trained with"
            )


def label_losses(outputs: Sequence[NDArray[Any]], labels: Sequence[int]) -> dict[int, LossSum]:
    """The loss of each row from its logits, float32 (classes,), and its class."""
    nats = cross_entropy(np.stack(outputs), np.array(labels, np.int64)) if outputs else ()
    return {row: LossSum(float(loss), 1) for row, loss in enumerate(nats)}


def noting_labels(batches: Iterator[ModuleBatch], labels: list[int]) -> Iterator[ModuleBatch]:
    """The same batches; the classes of their rows are kept."""
    for batch in batches:
        classes = batch.targets.get("labels")
        labels += classes.tolist() if classes is not None and classes.ndim == 1 else []
        yield batch


def are_alike(reading: Reading) -> bool:
    """Whether rows of one cost alone share a batch: the window of a clip is part of what is heard."""
    return reading.unit == FRAMES


def cut(rows: Sequence[int], costs: Sequence[int], most: int, are_alike: bool = False) -> list[list[int]]:
    """Rows in order, in parts whose padded cost, rows times that of the costliest, is at most so much; `are_alike` has
    rows of one cost alone share a part.

    >>> cut([0, 1, 2], [5, 5, 5], 10), cut([0, 1, 2], [4, 5, 5], 10, True)
    ([[0, 1], [2]], [[0], [1, 2]])
    """
    parts: list[list[int]] = []
    highest = 0
    for row in rows:
        highest = max(highest, costs[row])
        is_other = are_alike and parts and costs[row] != costs[parts[-1][-1]]
        if not parts or is_other or (len(parts[-1]) + 1) * highest > most:
            parts.append([])
            highest = costs[row]
        parts[-1].append(row)
    return parts


def count_targets(batch: ModuleBatch) -> int:
    """Targets of a batch: one a row, or the labels that are compared."""
    labels = batch.targets.get("labels")
    return len(batch.numbers) if labels is None else int((labels != -100).sum())
