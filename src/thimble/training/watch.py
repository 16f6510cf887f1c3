"""Which validation rows choose the step that is kept, and which the verdict rests on: others, if there are enough."""

from collections.abc import Sequence
from dataclasses import dataclass

from thimble.config.train import TrainConfig
from thimble.errors import plural
from thimble.events import EventLog
from thimble.training.guard import LEAST_TO_STOP

WATCHED_SHARE = 0.05  # of a run's time, spent on validation rows during training
TRAINED_COST = 2.5  # of a row that is trained on, in rows that are only measured
MOST_WATCHES, LEAST_WATCHES = 9, 3  # measurements during training
LEAST_WATCHED = 16  # rows: fewer say too little to stop by
LEAST_APART, MOST_CHOOSING = 40, 64  # validation rows, of which some choose and the others judge


@dataclass(frozen=True)
class Watch:
    """The parts that validation rows have in a run, by their numbers."""

    watched: Sequence[int] = ()  # measured during training
    every_steps: int = 0  # how often; 0 is never
    confirming: Sequence[int] = ()  # not watched; a rise has to be there too
    choosing: Sequence[int] = ()  # by which the strength is chosen; none if it is not
    judging: Sequence[int] = ()  # that the verdict rests on
    is_apart: bool = False  # whether those choose nothing

    @property
    def untouched_rows(self) -> int:
        """How many rows judge and choose nothing, where others choose."""
        return len(self.judging) if self.is_apart else 0

    @property
    def keeps_best(self) -> bool:
        """Whether the watched rows are enough to stop by, and to return to the step that did best on them."""
        return len(self.watched) >= LEAST_TO_STOP


def choose_watch(
    config: TrainConfig, unseen: Sequence[int], costs: Sequence[int], step_cost: float, steps: float,
    chooses_strength: bool = False,
) -> Watch:  # fmt: skip
    """Give validation rows their parts in a run of so many steps.

    Args:
        config: How often they are measured, if the user says so.
        unseen: Numbers of the rows that are not trained on, each content once.
        costs: Of each validation row, by its number: tokens, pixels or frames.
        step_cost: Of all rows of a step, on average.
        steps: Of the run.
        chooses_strength: Whether some rows choose the strength.

    Returns:
        The parts.
    """
    choosing, judging = part_rows(unseen)
    is_apart = len(choosing) < len(unseen)
    most = len(choosing) // 2 if is_apart else len(choosing)
    watched, every = _choose_watched(config, choosing, most, [costs[number] for number in choosing], step_cost, steps)
    if not (every or chooses_strength):
        return Watch(judging=unseen)
    confirming = [number for number in choosing if number not in watched] if every and is_apart else []
    return Watch(watched, every, confirming, choosing if chooses_strength else (), judging, is_apart)


def part_rows(unseen: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which rows choose, and which judge: a third chooses, evenly spread, at least half of `LEAST_APART` and at most
    `MOST_CHOOSING`. Of fewer than `LEAST_APART` rows all do both.
    """
    if len(unseen) < LEAST_APART:
        return list(unseen), list(unseen)
    count = min(max(LEAST_APART // 2, len(unseen) // 3), MOST_CHOOSING)
    choosing = [unseen[int((place + 0.5) * len(unseen) / count)] for place in range(count)]
    return choosing, sorted(set(unseen) - set(choosing))


def _choose_watched(
    config: TrainConfig, rows: Sequence[int], most: int, costs: Sequence[int], step_cost: float, steps: float
) -> tuple[list[int], int]:
    """At most so many rows to measure during training, and every how many steps.

    All of it takes at most a small share of the run: as many rows as that allows, and at least LEAST_WATCHED, for which
    a short run is measured less often, or not at all.
    """
    if not rows or config.eval_every_steps == 0 or (len(rows) < LEAST_TO_STOP and not config.eval_every_steps):
        return [], 0
    allowed = WATCHED_SHARE * TRAINED_COST * step_cost * steps / (sum(costs) / len(costs))  # rows measured in all
    times = min(MOST_WATCHES, int(allowed / min(most, LEAST_WATCHED)))
    every = config.eval_every_steps or (round(steps / (times + 1)) if times >= LEAST_WATCHES else 0)
    if not every:
        return [], 0
    count = min(most, max(LEAST_WATCHED, int(allowed * every / steps)))
    return [rows[int(number * len(rows) / count)] for number in range(count)], max(1, every)


def log_watch(watch: Watch, patience: int, log: EventLog) -> None:
    """Tell which validation rows are measured during training, and what for."""
    if not watch.every_steps:
        return
    rows, other = plural(len(watch.watched), "row"), len(watch.confirming)
    there = f", if the loss of {plural(other, 'other row')} rose too" if other else ""
    stops = f"; {patience} clearly above the lowest in a row end the run{there}" if patience else ""
    if not watch.keeps_best:
        stops = f"; they are shown, and too few to stop by or to choose a step by (at least {LEAST_TO_STOP})"
    log.decision(f"validation loss: on {rows} every {plural(watch.every_steps, 'step')}{stops}")
