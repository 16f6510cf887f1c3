"""The proof of a run: what the base can do before it, and what base and adapter can do after it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from thimble.backends.session import ActiveAdapter, TrainingSession
from thimble.core.metrics import goodness
from thimble.core.significance import Paired, is_clear
from thimble.errors import listing, plural
from thimble.models.execution import ExecutionPlan
from thimble.report.verdict import LOSS_MARGIN_NATS
from thimble.training.answers import Answer, of_every_label
from thimble.training.comparison import compare_losses
from thimble.training.control import Control
from thimble.training.protocols import Before, Scores, Task

SHOWN_SAMPLES, MOST_SAMPLES = 6, 12
INITIAL_NATS = 0.5  # that an initial adapter may be worse than the base


def measure_before(
    task: Task, session: TrainingSession, initial: ActiveAdapter, execution: ExecutionPlan, control: Control
) -> Before:
    """Measure the bare base and the initial adapter; raises RunError if the base cannot be trained on."""
    control.log.stage("measuring the base before training")
    base = task.evaluate(session, session.load(None), execution, control)
    if control.should_stop():
        return Before(base, math.nan)
    task.check_base(base, control)
    loss = task.initial_loss(session, initial, base, execution, control)
    if loss > base.loss + INITIAL_NATS:  # adapters are made to begin where the base is
        control.log.warning(
            f"the initial adapter has a validation loss of {loss:.3f}, the base alone {base.loss:.3f}: lower --alpha "
            "or --rank, or take another --init"
        )
    return Before(base, loss)


def measure_after(
    task: Task, session: TrainingSession, active: ActiveAdapter, unmoved: Sequence[str], before: Before,
    execution: ExecutionPlan, control: Control,
) -> Scores:  # fmt: skip
    """Measure the trained adapter on the same rows as the base, and warn of what looks wrong: of unmoved layers too."""
    control.log.stage("measuring the result")
    if unmoved:
        control.log.warning(
            f"nothing moved in {plural(len(unmoved), 'layer')}, which never had a gradient: {listing(unmoved, 3)}"
        )
    after = task.evaluate(session, active, execution, control)
    after = replace(after, divergence=task.divergence(session, active, execution, control))
    if after.loss > before.loss + LOSS_MARGIN_NATS:
        control.log.warning(_rise(before, after))
    return after


def _rise(before: Before, after: Scores) -> str:
    """What a validation loss that rose says: nothing, where so few rows rise by chance too."""
    told = f"the validation loss rose from {before.loss:.3f} to {after.loss:.3f}"
    rises = Paired(**compare_losses(after.row_losses, before.base.row_losses))  # the other way round: falls are rises
    if rises.rows and not is_clear(rises):
        rows = plural(rises.rows, "row")
        return f"{told}: on {rows} compared one by one that may be chance; hold out more to tell, by --valid-split"
    why = "the adapter fits the training rows and not the task"
    return f"{told}: {why}; use fewer --epochs, a lower --learning-rate or more rows"


def compare_answers(
    before: Sequence[Answer], after: Sequence[Answer], has_labels: bool = False
) -> list[dict[str, str]]:
    """A few validation rows side by side, those that changed for the better first; with labels some of every label."""
    pairs = list(zip(before, after, strict=True))
    if has_labels:
        few = [pairs[number] for number in of_every_label(after, SHOWN_SAMPLES, MOST_SAMPLES)]
    else:
        pairs.sort(key=lambda pair: _worth(pair[0]) - _worth(pair[1]))
        few = pairs[: SHOWN_SAMPLES // 2] + pairs[-(SHOWN_SAMPLES - SHOWN_SAMPLES // 2) :]
        few = few if len(pairs) > SHOWN_SAMPLES else pairs
    return [
        {"asked": old.asked, "reference": old.reference, "before": old.written, "after": new.written}
        for old, new in few
    ]


def _worth(answer: Answer) -> float:
    return sum(goodness(name, value) for name, value in answer.scores.items())


def all_answers(before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, Any]]:
    """Every validation row that was answered, with answers and scores; of a run cut short only those from before."""
    rows = [
        {
            "source": old.source, "asked": old.asked, "reference": old.reference, "before": old.written,
            "scores_before": dict(old.scores), **({"problem_before": old.problem} if old.problem else {}),
        }
        for old in before
    ]  # fmt: skip
    if len(after) != len(before):
        return rows
    ends = (
        {
            "after": new.written, "scores_after": dict(new.scores),
            **({"problem_after": new.problem} if new.problem else {}),
        }
        for new in after
    )  # fmt: skip
    return [row | end for row, end in zip(rows, ends, strict=True)]
