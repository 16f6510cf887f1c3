"""The course of a run: which rows each step learns from, at which rate, and when it ends.

A pure function of the row lengths, the options and the seed, so that a resumed run continues where it stopped.
"""

import bisect
import functools
import math
from collections.abc import Callable, Sequence

from thimble.config.train import TrainConfig
from thimble.core.method import method_rates, parse_init
from thimble.core.schedule import default_rate, few_rows_factor, learning_rate
from thimble.data.batches import epoch_steps
from thimble.errors import plural

DEFAULT_EPOCHS = 3.0
LEAST_STEPS = 30
WARMUP_SHARE = 0.03
MOST_WARMUP_STEPS = 10

UsualRate = Callable[[float], tuple[float, dict[str, float]]]


class StepSchedule:
    """Steps in order, for rows of the given lengths of which a step takes at most so much together.

    `target_tokens` are those of all rows together. `usual` gives the learning rate for so many of them a step, where
    the user names none, with the factors in it by what they are for. `epochs` are those of a run without a length.
    """

    def __init__(
        self, config: TrainConfig, lengths: Sequence[int], step_length: int, target_tokens: int, usual: UsualRate,
        epochs: float = DEFAULT_EPOCHS,
    ) -> None:  # fmt: skip
        self._config, self._usual_epochs = config, epochs
        self._begins = [0]  # first step of each epoch looked at so far, and of the one after
        rows_of = functools.partial(epoch_steps, lengths, step_length, config.seed)
        self._epoch = functools.lru_cache(maxsize=2)(rows_of)  # rows of each step of an epoch, by its number
        self.minutes = config.max_minutes
        self.total_steps = None if self.minutes else self._count_steps()
        self.target_tokens = target_tokens / self.steps_per_epoch  # of a step, on average
        usual_rate, self.rate_factors = usual(self.target_tokens)
        self.rate = config.learning_rate or usual_rate
        self.safer_rate = min(self.rate / 10, usual_rate)
        self.is_default_rate = config.learning_rate is None
        usual_warmup = min(MOST_WARMUP_STEPS, max(1, round((self.total_steps or LEAST_STEPS) * WARMUP_SHARE)))
        self.warmup_steps = usual_warmup if config.warmup_steps is None else config.warmup_steps

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """Number of the epoch that a step belongs to, and its place there."""
        while self._begins[-1] <= step:
            self._begins.append(self._begins[-1] + len(self._epoch(len(self._begins) - 1)))
        number = bisect.bisect_right(self._begins, step) - 1
        return number, step - self._begins[number]

    def _count_steps(self) -> int:
        if self._config.max_steps:
            return self._config.max_steps
        epochs = self._config.epochs or self._usual_epochs
        whole = sum(len(self._epoch(number)) for number in range(int(epochs)))
        part = round(len(self._epoch(int(epochs))) * (epochs - int(epochs))) if epochs % 1 else 0
        least = 1 if self._config.epochs else LEAST_STEPS
        return max(whole + part, least)

    def rows(self, step: int) -> list[int]:
        """Numbers of the rows that step `step` (from 0) learns from."""
        number, place = self._epoch_of(step)
        return self._epoch(number)[place]

    def ends_epoch(self, step: int) -> bool:
        """Whether every row has been seen as often as any other after step `step` (from 0)."""
        number, place = self._epoch_of(step)
        return place == len(self._epoch(number)) - 1

    def is_done(self, step: int, seconds: float) -> bool:
        """Whether the run ends before step `step`, `seconds` after training began."""
        if self.minutes:
            return step > 0 and seconds >= self.minutes * 60
        return step >= (self.total_steps or 0)

    def rate_at(self, step: int, seconds: float) -> float:
        """The learning rate of step `step`."""
        if self.minutes:
            named = self._config.warmup_steps
            if named is not None and step < named:
                return self.rate * (step + 0.5) / named
            done, warmup = min(1.0, seconds / (self.minutes * 60)), WARMUP_SHARE if named is None else 0.0
        else:
            total = max(1, self.total_steps or 1)
            done, warmup = (step + 0.5) / total, self.warmup_steps / total
        return learning_rate(self.rate, done, min(warmup, 1.0), self._config.schedule)

    @property
    def resolved_warmup(self) -> int | None:
        """Steps of warm-up that repeat the run; None where its share of the minutes is what the rate rises in."""
        return self._config.warmup_steps if self.minutes else self.warmup_steps

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once."""
        return len(self._epoch(0))

    @property
    def epochs(self) -> float:
        """Passes over the data that `total_steps` make; 0 for a run by the clock."""
        number, place = self._epoch_of(self.total_steps or 0)
        return number + place / len(self._epoch(number))


def text_schedule(
    config: TrainConfig, lengths: Sequence[int], target_tokens: int, family: str, hidden_size: int,
    layers: Sequence[tuple[int, int]],
) -> StepSchedule:  # fmt: skip
    """The steps of a run on rows of text; `layers` are (rank, in) of those that are adapted."""

    def usual(step_tokens: float) -> tuple[float, dict[str, float]]:
        factors = rate_factors(config, len(lengths), layers)
        return default_rate(family, hidden_size, step_tokens, math.prod(factors.values())), factors

    return StepSchedule(config, lengths, config.batch_tokens, target_tokens, usual)


def rate_factors(config: TrainConfig, rows: int, layers: Sequence[tuple[int, int]]) -> dict[str, float]:
    """What the usual learning rate is multiplied by, for the method and for few rows; none of the factors is 1."""
    init = parse_init(config.init)
    factors = method_rates(init, config.use_dora, config.lora_plus, layers, config.use_rslora)
    return factors | ({plural(rows, "row"): few} if (few := few_rows_factor(rows)) < 1 else {})
