"""The proof of a training run: what the base can do before it, and what base and adapter can do after it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from thimble.data.batches import micro_batches
from thimble.data.encode import Row
from thimble.errors import RunError, listing, plural
from thimble.events import EventLog, ShouldStop
from thimble.models.cost import ExecutionPlan
from thimble.report.keys import with_new_keys
from thimble.training import run_folder
from thimble.training.evaluation import Answer, measure, scores_of, validation_loss
from thimble.training.plan import RunPlan
from thimble.training.result import TrainReport

if TYPE_CHECKING:
    from thimble.backends.torch.session import TorchSession

SHOWN_SAMPLES = 6
KNOWN_NATS = 0.01  # a validation loss below: the answers are known before anything is learned
START_NATS = 0.5  # that a start may be away from the base


class Proof:
    """Measures before and after, and says what looks wrong.

    Args:
        run_plan: What is measured.
        session: The model.
        report: Takes the figures.
        log: Hears of progress and warnings.
        should_stop: Asked after every token; what is interrupted is dropped.
    """

    def __init__(
        self, run_plan: RunPlan, session: "TorchSession", report: TrainReport, log: EventLog, should_stop: ShouldStop
    ) -> None:
        self.run_plan, self.session, self.report, self.log, self.should_stop = (
            run_plan,
            session,
            report,
            log,
            should_stop,
        )
        self.answers: list[Answer] = []  # of the base

    def run_in(self, execution: ExecutionPlan) -> None:
        """Measure in smaller parts from now on."""
        validation = self.run_plan.validation
        share = (
            execution.micro_tokens
            * execution.num_shares
            / (self.run_plan.execution.micro_tokens * self.run_plan.execution.num_shares)
        )
        smaller = replace(
            validation, pass_tokens=execution.micro_tokens, cache_tokens=max(1, int(validation.cache_tokens * share))
        )
        self.run_plan = replace(self.run_plan, execution=execution, validation=smaller)

    def before(self) -> None:
        """Measure the base before training, or read what an interrupted run measured.

        Raises:
            RunError: If the base gives no numbers.
        """
        path, report = self.run_plan.folder / "before.json", self.report
        saved = run_folder.read_json(path) if report.steps else None
        if saved:
            self.answers = [Answer(**answer) for answer in saved.pop("answers")]
            for name, value in with_new_keys(saved).items():
                setattr(report, name, value)
            return
        self.log.stage("measuring the base before training")
        self.session.switch(False)
        report.loss_base, self.answers = self._measure()
        report.general_before = self._loss(self.run_plan.general, "general text")
        report.metrics_before, report.metrics_rows = scores_of(self.answers), len(self.answers)
        self.session.switch(True)
        if self.should_stop():
            return
        self._check_base()
        report.loss_before = self._loss_at_start()
        self._check_start()
        names = ("loss_base", "loss_before", "general_before", "metrics_before", "metrics_rows")
        values = {name: getattr(report, name) for name in names}
        run_folder.write_json(path, {**values, "answers": [asdict(answer) for answer in self.answers]})

    def _check_base(self) -> None:
        """Refuse a base that gives no numbers; warn of one that knows less than nothing, or everything."""
        report, chance = self.report, math.log(self.run_plan.model.base.spec.vocab_size)
        validation = report.loss_base if self.run_plan.examples.valid else 0.0
        if not math.isfinite(report.general_before) or not math.isfinite(validation):
            raise RunError(self._why_not_finite())
        # Short answers in a form that the base never gives may honestly be worse than guessing; twice as bad is odd.
        for loss, what, most in ((report.general_before, "general text", 1), (validation, "the validation rows", 2)):
            if loss > most * chance:
                self.log.warning(
                    f"the base has a loss of {loss:.1f} on {what}, worse than guessing ({chance:.1f}): its file may be "
                    "damaged, its tokenizer another's, or the text none that it was made for"
                )
        if 0 < validation < KNOWN_NATS:
            self.log.warning(
                f"the base has a loss of {validation:.4f} on the validation rows before it learns: the answers are "
                "known, or stand in the questions"
            )

    def _why_not_finite(self) -> str:
        """What gives numbers that are NaN or Inf: weights, or the compute type."""
        base, compute = self.run_plan.model.base, self.run_plan.config.compute
        bad = [name for name, weight in base.weights.items() if not np.isfinite(weight.read()).all()]
        if bad:
            return (
                f"the base {base.name} holds numbers that are NaN or Inf in {listing(bad, 3)}: copy or convert it again"
            )
        other = "" if compute == "fp32" else "; try --compute fp32"
        return f"the base {base.name} gives a loss that is NaN or Inf in {compute}, though its weights are{other}"

    def _loss_at_start(self) -> float:
        """Validation loss with the adapter on. Where one batch is the base's bit for bit, as with B at zero, all are."""
        batches = micro_batches(
            self.run_plan.examples.valid[:4] or self.run_plan.general[:4], self.run_plan.execution.micro_tokens
        )
        (attached,) = self.session.losses(batches[:1])
        self.session.switch(False)
        (bare,) = self.session.losses(batches[:1])
        self.session.switch(True)
        return (
            self.report.loss_base if attached == bare else self._loss(self.run_plan.examples.valid, "validation rows")
        )

    def _check_start(self) -> None:
        """Warn of a start that is not the base: adapters are made to begin where it is."""
        report = self.report
        if report.loss_before > report.loss_base + START_NATS:
            self.log.warning(
                f"with its start the adapter has a validation loss of {report.loss_before:.3f}, the base alone "
                f"{report.loss_base:.3f}: lower alpha or rank, or take another init"
            )

    def _measure(self) -> tuple[float, list[Answer]]:
        """Validation loss and answers; the loss is NaN if the user wants to leave."""
        total, answers = measure(self.session, self.run_plan.validation, self.log, self.should_stop)
        return math.nan if self.should_stop() else total.mean, answers

    def _loss(self, rows: Sequence[Row], what: str) -> float:
        total = validation_loss(
            self.session, rows, self.run_plan.execution.micro_tokens, self.log, self.should_stop, what
        )
        return math.nan if self.should_stop() else total.mean

    def after(self) -> None:
        """Measure the result on the same rows as before."""
        self.log.stage("measuring the result")
        report = self.report
        still = self.session.still_layers()
        if still:
            self.log.warning(
                f"nothing moved in {plural(len(still), 'layer')}, which never had a gradient: {listing(still, 3)}"
            )
        report.loss_after, answers = self._measure()
        report.general_after = self._loss(self.run_plan.general, "general text")
        if len(answers) == len(self.answers):
            report.metrics_after = scores_of(answers)
            report.samples = _samples(self.answers, answers)
        if report.loss_after > report.loss_before:
            self.log.warning(
                f"the validation loss rose from {report.loss_before:.3f} to {report.loss_after:.3f}: the adapter fits "
                "the training rows and not the task; use fewer epochs, a lower learning_rate or more rows"
            )


def _samples(before: list[Answer], after: list[Answer]) -> list[dict[str, str]]:
    """A few validation rows side by side, those that changed for the better first."""
    pairs = list(zip(before, after, strict=True))
    pairs.sort(key=lambda pair: sum(pair[0].scores.values()) - sum(pair[1].scores.values()))
    chosen = pairs[: SHOWN_SAMPLES // 2] + pairs[-(SHOWN_SAMPLES - SHOWN_SAMPLES // 2) :]
    return [
        {"asked": old.asked, "reference": old.reference, "before": old.written, "after": new.written}
        for old, new in (chosen if len(pairs) > SHOWN_SAMPLES else pairs)
    ]
