"""The strength of the trained update: the smallest share of it that loses hardly anything of what was learned.

Weights between the base and the tuned model forget less than they lose of the task (Wortsman et al., WiSE-FT,
arXiv:2109.01903, with full weights); of an adapter such a model is λ · scale · B A.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from thimble.backends.session import TrainingSession, TrainState
from thimble.config.train import TrainConfig
from thimble.core.metrics import LossSum
from thimble.core.significance import t_quantile
from thimble.errors import plural
from thimble.models.execution import ExecutionPlan
from thimble.training.protocols import Task
from thimble.training.watch import LEAST_APART

STRENGTHS = (1.0, 0.9, 0.8, 0.7)
MOST_RISE = 0.01  # of the validation loss, as a share
CHANCE = 0.05  # that the rise is larger


def fixed_strength(config: TrainConfig, rows: int) -> tuple[float | None, str]:
    """The strength of a run with so many validation rows, and why; None if it is chosen after training."""
    if config.strength is not None:
        return config.strength, "as asked for"
    if config.use_dora:
        return 1.0, "DoRA sets the lengths of rows, which shrink with no factor"
    if config.has_own_alpha:
        return 1.0, "--alpha was chosen by hand"
    if rows < LEAST_APART:
        return 1.0, f"{rows} new validation rows are too few to choose another by (at least {LEAST_APART})"
    return None, ""


def find_strength(
    task: Task, session: TrainingSession, state: TrainState, execution: ExecutionPlan
) -> tuple[float, str]:
    """Measure the trained adapter at every strength on the rows that choose; see `choose_strength`."""
    trained, losses = session.adapter(state), {}
    try:
        for strength in STRENGTHS:
            losses[strength] = task.choose(session, session.load(trained.at_strength(strength)), execution)
    except MemoryError as error:  # what was learned is not lost for it
        return 1.0, f"since memory ran out while others were measured ({error})"
    return choose_strength(losses)


def choose_strength(losses: Mapping[float, Sequence[LossSum]]) -> tuple[float, str]:
    """The smallest strength whose loss is less than `MOST_RISE` above that of strength 1, as surely as the rows can
    say, and why; from the losses of the same rows at each strength.
    """
    rises = {strength: highest_rise(losses[1.0], rows) for strength, rows in losses.items()}
    chosen = min((strength for strength, rise in rises.items() if rise < MOST_RISE), default=1.0)
    found = ", ".join(f"{rise:+.1%} at {strength:g}" for strength, rise in rises.items() if strength < 1)
    rows = plural(len(losses[1.0]), "validation row")
    return chosen, f"the least that raises the loss of {rows} by under {MOST_RISE:.0%} (upper 95 % bounds: {found})"


def highest_rise(full: Sequence[LossSum], weaker: Sequence[LossSum]) -> float:
    """The upper 95 % bound of the rise of the loss as a share, by Student's paired t over rows; NaN if not finite."""
    before, after = (np.array([row.nats for row in rows]) for rows in (full, weaker))
    if len(before) < 2 or not before.sum() > 0:
        return math.nan
    rises = (after - before) / before.mean()
    error = float(rises.std(ddof=1)) / math.sqrt(len(rises))
    return float(rises.mean()) + t_quantile(CHANCE, len(rises) - 1) * error
