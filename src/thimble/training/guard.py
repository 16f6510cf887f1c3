"""What keeps a run valid: it rolls back when the loss leaves its road, and ends when there is nothing more to gain.

All are functions of the losses alone, and their state is plain data that a checkpoint keeps.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from thimble.core.metrics import LossSum
from thimble.core.significance import CHANCE, t_quantile

DIVERGED_FACTOR = 2.0  # a loss above this many times the first one, plus the margin, is no longer a model's
DIVERGED_MARGIN_NATS = 4.0
SPIKE_DEVIATIONS = 6.0  # a loss so many deviations above its running mean is a spike
SPIKE_LEAST_NATS = 0.5  # unless it is that close to it
MEMORY = 0.95  # of the running mean and variance
LEAST_STEPS = 20  # before spikes can be told from noise
IN_A_ROW = 2  # steps that no model makes, until the run rolls back
SPIKES_IN_A_ROW = 4  # spikes, likewise
MAX_ROLLBACKS = 3  # before it is given up
LEAST_TO_STOP = 10  # rows to stop by: of fewer, only rises far above the spread of their losses are clear
MEMORISED_NATS = 0.05  # mean loss of an epoch, in nats per target token: its rows are known by heart
EPOCHS_IN_A_ROW = 2  # below it, until the run ends
SLOWER = 0.5  # what the learning rate is multiplied by at each rollback


class Verdict(Enum):
    """What to do with a step whose loss and gradient are known."""

    TAKE = "take"
    SKIP = "skip"  # leave the adapter as it is
    ROLLBACK = "rollback"  # go back to the last valid state, and on more slowly
    GIVE_UP = "give up"


@dataclass
class Guard:
    """Judges every step before it is taken."""

    first: float = math.nan  # loss of the first step
    mean: float = 0.0  # running mean of the loss
    square: float = 0.0  # running mean of its squared deviation
    steps: int = 0  # steps taken
    bad: int = 0  # bad steps in a row
    rollbacks: int = 0  # how often the run rolled back
    rate: float = 1.0  # what the learning rate is multiplied by
    why: str = ""  # what was wrong with the last bad step

    def judge(self, loss: float, norm: float) -> Verdict:
        """Say what to do with a step, by its loss (nats); one that is taken counts towards what is normal."""
        self.first = loss if math.isnan(self.first) and math.isfinite(loss) else self.first
        why, most, verdict = self._fault(loss, norm), IN_A_ROW, Verdict.SKIP
        if not why:  # a single spike is a hard row, to be trained on; several in a row are a model that was spoilt
            why, most, verdict = self._spike(loss), SPIKES_IN_A_ROW, Verdict.TAKE
        if not why:
            self.bad = 0
            return Verdict.TAKE
        self.why, self.bad = why, self.bad + 1
        if self.bad < most:
            return verdict
        self.bad, self.steps, self.rollbacks = 0, 0, self.rollbacks + 1
        self.rate *= SLOWER
        return Verdict.ROLLBACK if self.rollbacks <= MAX_ROLLBACKS else Verdict.GIVE_UP

    def _fault(self, loss: float, norm: float) -> str:
        """What shows that no valid model gives these values."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if loss > self.first * DIVERGED_FACTOR + DIVERGED_MARGIN_NATS:
            return f"the loss rose from {self.first:.2f} to {loss:.2f}"
        return ""

    def _spike(self, loss: float) -> str:
        """Whether a loss is far above what is normal; it counts towards that, as far as it could be normal."""
        allowed = self.mean + max(SPIKE_LEAST_NATS, SPIKE_DEVIATIONS * math.sqrt(self.square))
        is_spike = self.steps >= LEAST_STEPS and loss > allowed
        why = f"the loss jumped from about {self.mean:.2f} to {loss:.2f}" if is_spike else ""
        loss = min(loss, allowed) if is_spike else loss
        self.steps += 1
        keep = min(MEMORY, 1 - 1 / self.steps)
        self.square = keep * (self.square + (1 - keep) * (loss - self.mean) ** 2)
        self.mean = keep * self.mean + (1 - keep) * loss
        return why

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; NaN becomes None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Guard":
        """What `state` was taken of."""
        return cls(**{name: math.nan if value is None else value for name, value in state.items()})


def has_clearly_risen(then: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the losses of the same rows rose by more than chance: Student's paired t, one-sided, at 2.5 %.

    Losses that are not finite show nothing: the step that made them is judged by its gradient.
    """
    rises = [new - old for old, new in zip(then, now, strict=True)]
    if len(rises) < 2 or not all(map(math.isfinite, rises)):
        return math.inf > sum(rises) > 0
    error = statistics.stdev(rises) / math.sqrt(len(rises))
    return statistics.fmean(rises) > t_quantile(CHANCE, len(rises) - 1) * error


@dataclass
class Plateau:
    """Follows the loss of some validation rows, and ends the run when it has clearly risen.

    A few rows are noisy, and under a falling learning rate the loss may rest before it falls again: only a rise that is
    clear row by row, beside the best measurement, counts against a run.
    """

    patience: int = 0  # clear rises in a row before the end; 0: never. An option of the run, not kept with the rest
    best: float = math.inf  # lowest mean loss so far
    best_rows: list[float] = field(default_factory=list)  # loss of each row then
    best_step: int = 0  # when it was measured
    since: int = 0  # clear rises in a row since then
    step: int = 0  # when the last measurement was made

    def add(self, step: int, rows: Sequence[float]) -> bool:
        """Note a measurement, the loss of each row; returns whether it is the best so far."""
        self.step, mean = step, statistics.fmean(rows)
        if not math.isfinite(mean):  # of an adapter that the next step finds spoilt
            return False
        if mean < self.best or len(rows) != len(self.best_rows):  # an older release may have watched other rows
            self.best, self.best_rows, self.best_step, self.since = mean, list(rows), step, 0
            return True
        self.since = self.since + 1 if has_clearly_risen(self.best_rows, rows) else 0
        return False

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.patience <= self.since

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint; infinity becomes None."""
        kept = {name: value for name, value in asdict(self).items() if name != "patience"}
        return {name: None if value == math.inf else value for name, value in kept.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name, value in state.items():
            setattr(self, name, math.inf if value is None else value)


@dataclass
class Memorisation:
    """Follows the loss of training rows, and ends the run when they are known by heart.

    A few rows in many epochs come to that long before the last step, and every step after it only costs what the base
    knew: the loss is nearly zero, but AdamW goes on at its full rate.
    """

    most_nats: float = 0.0  # mean loss of an epoch that counts as known; 0: never. Of the run, not kept with the rest
    nats: float = 0.0  # of the epoch so far, summed
    tokens: int = 0  # it was summed over
    epochs: int | None = 0  # below the limit in a row; None in a run that began without this rule

    def add(self, loss: LossSum, ends_epoch: bool) -> None:
        """Note the loss of a step that was taken, and whether an epoch ends with it."""
        self.nats, self.tokens = self.nats + loss.nats, self.tokens + loss.tokens
        if ends_epoch and self.epochs is not None:
            is_known = LossSum(self.nats, self.tokens).mean < self.most_nats
            self.epochs = self.epochs + 1 if is_known else 0
        if ends_epoch:
            self.nats, self.tokens = 0.0, 0

    @property
    def is_over(self) -> bool:
        """Whether enough epochs in a row were known by heart."""
        return self.epochs is not None and self.epochs >= EPOCHS_IN_A_ROW

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {name: value for name, value in asdict(self).items() if name != "most_nats"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; a run of an earlier release kept nothing, and goes on without an end."""
        for name, value in {"epochs": None, **state}.items():
            setattr(self, name, value)
