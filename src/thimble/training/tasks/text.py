"""Text: rows of tokens, measured by loss, by answers, and by the loss on general text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thimble import __version__
from thimble.backends.session import ActiveAdapter, Objective, Session, StepKey, TrainState, Work
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches, shares
from thimble.data.encode import Row
from thimble.data.spool import Items
from thimble.errors import RunError, listing
from thimble.events import EventLog, ignore
from thimble.models.base import Base
from thimble.models.execution import ExecutionPlan
from thimble.training.control import Control
from thimble.training.evaluation import ROWS_ALONE, ValidationSet, losses_alone, measure, row_losses, validation_loss
from thimble.training.kl_reference import KlTerm, kl_term
from thimble.training.metric import ChosenMetric, score_answers
from thimble.training.own_texts import Writer, measure_divergence
from thimble.training.plan import RunPlan
from thimble.training.protocols import OpenFile, Scores

FEATURE_TOKENS = 512  # run together where what comes of them is kept
KNOWN_NATS = 0.01  # a validation loss below it: the answers are known before anything is learned


@dataclass(frozen=True)
class TextTask:
    """Rows of tokens to train on and to measure."""

    rows: Items[Row]  # training rows
    costs: Sequence[int]  # tokens of each
    watched: Sequence[Row]  # validation rows that are measured during training
    confirming: Sequence[Row]  # others, on which a rise has to be there too
    choosing: Sequence[Row]  # those by which the strength is chosen
    validation: ValidationSet  # what base and result are measured on
    metric: ChosenMetric  # scores answers
    train_sample: Sequence[Row]  # training rows that are measured too, to tell recall from generalisation
    general: Sequence[Row]  # rows of general text, for the forgetting check
    kl: KlTerm  # how the answers of the base are kept
    base: Base  # the base, for what is odd about it
    fingerprint: str  # of the base, as it was when it was opened
    compute: str  # the compute type, likewise
    epochs: float = 0  # how often each row is read, if that is known
    shares_prefixes: bool = False  # whether what training rows of a batch have in common is computed once

    unit = counted = "tokens"

    def work(self, rows: Sequence[int], execution: ExecutionPlan, key: StepKey, features: Any = None) -> Work:
        """The batches of one step, from the numbers of its rows."""
        chosen = [self.rows[number] for number in rows]
        batches = shares(chosen, execution.num_shares, execution.micro_tokens, self.shares_prefixes)
        return Work(batches, sum(row.target_tokens for row in chosen), features)

    def features(
        self, session: Session, state: TrainState, execution: ExecutionPlan, open_file: OpenFile, control: Control
    ) -> Any:
        """What the blocks below the lowest adapted one make of the training rows, where they are read more than once.

        Batches are always the same, whatever a step holds and wherever a run is resumed: so are all digits.
        """
        lowest = session.lowest_block(state)
        if not lowest or self.epochs <= 1:
            return None
        what = "frozen block 0" if lowest == 1 else f"frozen blocks 0 to {lowest - 1}"
        batches = micro_batches(self.rows, max(FEATURE_TOKENS, max(self.costs)), None, session.shares_prefixes)
        try:
            features = session.new_features(state, open_file(), sum(self.costs))
            for number, _ in enumerate(session.add_features(features, batches, execution)):
                control.log.progress(f"running training rows through {what}, batch", number + 1, len(batches))
                if control.should_stop():
                    break
        except (OSError, MemoryError) as error:
            why = error.strerror or error if isinstance(error, OSError) else "memory ran out"
            control.log.note(f"{what}: run in every epoch, for what comes of the rows cannot be kept ({why})")
            return None
        control.log.decision(f"{what}: run once over the training rows; what comes of them is kept on disk meanwhile")
        return features

    def objectives(self, session: Session, execution: ExecutionPlan, control: Control) -> Sequence[Objective]:
        """Cross-entropy, and where the answers of the base are to be kept a KL term every few steps."""
        return self.kl.objectives(session, self.writer, execution, control)

    def watch(self, session: Session, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of each watched row."""
        return _silent_losses(session, adapter, self.watched, execution)

    def confirm(self, session: Session, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of each row that confirms."""
        return _silent_losses(session, adapter, self.confirming, execution)

    def choose(self, session: Session, adapter: ActiveAdapter, execution: ExecutionPlan) -> list[LossSum]:
        """The loss of each row that chooses the strength."""
        return _silent_losses(session, adapter, self.choosing, execution)

    def evaluate(self, session: Session, adapter: ActiveAdapter, execution: ExecutionPlan, control: Control) -> Scores:
        """Loss and answers of the validation rows, and the loss on general text and some training rows."""
        alone = losses_alone(session, adapter, self.validation, execution, control)
        total, answers = measure(session, adapter, self.validation, execution, control, alone)
        loss = math.nan if control.should_stop() else total.mean
        answers = score_answers(answers, self.metric, control.log)
        rows = row_losses(session, adapter, self.general, execution, control, "general text")
        general = math.nan if control.should_stop() else sum(rows.values(), LossSum()).mean
        train = _loss(session, adapter, self.train_sample, execution, control, "training rows")
        return Scores(loss, general, answers, alone, train, rows)

    def divergence(
        self, session: Session, adapter: ActiveAdapter, execution: ExecutionPlan, control: Control
    ) -> Mapping[str, Any]:
        """Measured on texts that the base wrote."""
        texts = self.writer.measuring(session, self.general, execution, control)
        path = self.writer.answers_file(self.general, f"{__version__}-{self.compute}-{execution.store}")
        return measure_divergence(session, adapter, texts, execution, control, path)

    @property
    def writer(self) -> Writer:
        """The base as a writer of texts."""
        return Writer(self.base, self.fingerprint, self.validation)

    def initial_loss(
        self, session: Session, adapter: ActiveAdapter, base: Scores, execution: ExecutionPlan, control: Control
    ) -> float:
        """Validation loss with the adapter. Where one batch is the base's bit for bit, as with B at zero, all are."""
        rows = self.validation.rows
        batches = micro_batches(rows[:4] or self.general[:4], execution.micro_tokens)[:1]
        (attached,) = session.losses(adapter, batches, execution)
        (bare,) = session.losses(session.load(None), batches, execution)
        is_same = attached == bare
        return base.loss if is_same else _loss(session, adapter, rows, execution, control, "validation rows")

    def check_base(self, base: Scores, control: Control) -> None:
        """Refuse a base that gives NaN or Inf; warn of one that knows less than nothing, or everything."""
        chance, validation = math.log(self.base.spec.vocab_size), base.loss if self.validation.rows else 0.0
        if not math.isfinite(base.general_loss) or not math.isfinite(validation):
            raise RunError(self._why_nan())
        # Short answers in a form that the base never gives may honestly be worse than guessing; twice as bad is odd.
        for loss, what, most in ((base.general_loss, "general text", 1), (validation, "the validation rows", 2)):
            if loss > most * chance:
                control.log.warning(
                    f"the base has a loss of {loss:.1f} on {what}, worse than guessing ({chance:.1f}): its file may be "
                    "damaged, its tokenizer another's, or the text none that it was made for"
                )
        if 0 < validation < KNOWN_NATS:
            control.log.warning(
                f"the base has a loss of {validation:.4f} on the validation rows before training: the answers are "
                "known, or stand in the questions"
            )

    def _why_nan(self) -> str:
        """Where NaN or Inf comes from: weights, or the compute type."""
        bad = [name for name, weight in self.base.weights.items() if not np.isfinite(weight.read()).all()]
        if bad:
            return f"the base {self.base.name} holds NaN or Inf in {listing(bad, 3)}: copy or convert it again"
        other = "" if self.compute == "fp32" else "; try --compute fp32"
        what = f"the base {self.base.name} gives a loss that is NaN or Inf in {self.compute}"
        return f"{what}, though its weights are not{other}"


def _silent_losses(
    session: Session, adapter: ActiveAdapter, rows: Sequence[Row], execution: ExecutionPlan
) -> list[LossSum]:
    """The loss of each row, without a word: steps report themselves."""
    return [*row_losses(session, adapter, rows, execution, Control(EventLog(ignore)), "validation rows").values()]


def _loss(
    session: Session, adapter: ActiveAdapter, rows: Sequence[Row], execution: ExecutionPlan, control: Control, what: str
) -> float:
    total = validation_loss(session, adapter, rows, execution, control, what)
    return math.nan if control.should_stop() else total.mean


def text_task(run_plan: RunPlan) -> TextTask:
    """The task of a run."""
    kl, general = kl_term(run_plan.config, run_plan.model, run_plan.general)
    train, config, watch = run_plan.examples.train, run_plan.config, run_plan.watch
    watched, confirming, choosing = (
        [run_plan.examples.valid[number] for number in numbers]
        for numbers in (watch.watched, watch.confirming, watch.choosing)
    )
    count = min(ROWS_ALONE, len(train)) if run_plan.validation.rows else 0
    sample = [train[int((place + 0.5) * len(train) / count)] for place in range(count)]
    return TextTask(
        rows=train, costs=run_plan.examples.train_report.lengths, watched=watched,
        confirming=confirming, choosing=choosing,
        validation=run_plan.validation, metric=run_plan.metric, train_sample=sample,
        general=general, kl=kl,
        base=run_plan.model.base, fingerprint=run_plan.origin["base"], compute=config.compute,
        epochs=run_plan.step_schedule.epochs if run_plan.step_schedule.total_steps else 0,
        # What dropout leaves out differs from row to row, in a prefix that they share too.
        shares_prefixes=not config.dropout and run_plan.model.base.spec.shares_prefixes,
    )  # fmt: skip
