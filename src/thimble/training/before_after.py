"""The proof of a training run: what the base can do before it, and what base and adapter can do after it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from thimble.data.batches import micro_batches
from thimble.data.encode import Row
from thimble.errors import RunError, listing, plural
from thimble.events import ShouldStop, Teller
from thimble.models.cost import Way
from thimble.training import run_folder
from thimble.training.evaluation import Answer, held_out_loss, measure, scores_of
from thimble.training.plan import Job
from thimble.training.result import TrainReport

if TYPE_CHECKING:
    from thimble.backends.torch.session import TorchSession

SHOWN_SAMPLES = 6
KNOWN_NATS = 0.01  # a held-out loss below: the answers are known before anything is learned
START_NATS = 0.5  # that a start may be away from the base


class Proof:
    """Measures before and after, and says what looks wrong.

    Args:
        job: What is measured.
        session: The model.
        report: Takes the figures.
        tell: Hears of progress and warnings.
        should_stop: Asked after every token; what is interrupted is dropped.
    """

    def __init__(
        self, job: Job, session: "TorchSession", report: TrainReport, tell: Teller, should_stop: ShouldStop
    ) -> None:
        self.job, self.session, self.report, self.tell, self.should_stop = job, session, report, tell, should_stop
        self.answers: list[Answer] = []  # of the base

    def run_in(self, way: Way) -> None:
        """Measure in smaller parts from now on."""
        held_out = self.job.held_out
        share = way.micro_tokens * way.num_shares / (self.job.way.micro_tokens * self.job.way.num_shares)
        smaller = replace(
            held_out, pass_tokens=way.micro_tokens, cache_tokens=max(1, int(held_out.cache_tokens * share))
        )
        self.job = replace(self.job, way=way, held_out=smaller)

    def before(self) -> None:
        """Measure the base before training, or read what an interrupted run measured.

        Raises:
            RunError: If the base gives no numbers.
        """
        path, report = self.job.folder / "before.json", self.report
        saved = run_folder.read_json(path) if report.steps else None
        if saved:
            self.answers = [Answer(**answer) for answer in saved.pop("answers")]
            for name, value in saved.items():
                setattr(report, name, value)
            return
        self.tell.stage("measuring the base before training")
        self.session.switch(False)
        report.loss_base, self.answers = self._measure()
        report.general_before = self._loss(self.job.general, "general text")
        report.task_before, report.task_rows = scores_of(self.answers), len(self.answers)
        self.session.switch(True)
        if self.should_stop():
            return
        self._check_base()
        report.loss_before = self._loss_at_start()
        self._check_start()
        names = ("loss_base", "loss_before", "general_before", "task_before", "task_rows")
        values = {name: getattr(report, name) for name in names}
        run_folder.write_json(path, {**values, "answers": [asdict(answer) for answer in self.answers]})

    def _check_base(self) -> None:
        """Refuse a base that gives no numbers; warn of one that knows less than nothing, or everything."""
        report, chance = self.report, math.log(self.job.model.base.spec.vocab_size)
        held_out = report.loss_base if self.job.examples.valid else 0.0
        if not math.isfinite(report.general_before) or not math.isfinite(held_out):
            raise RunError(self._why_not_finite())
        # Short answers in a form that the base never gives may honestly be worse than guessing; twice as bad is odd.
        for loss, what, most in ((report.general_before, "general text", 1), (held_out, "the held-out rows", 2)):
            if loss > most * chance:
                self.tell.warning(
                    f"the base has a loss of {loss:.1f} on {what}, worse than guessing ({chance:.1f}): its file may be "
                    "damaged, its tokenizer another's, or the text none that it was made for"
                )
        if 0 < held_out < KNOWN_NATS:
            self.tell.warning(
                f"the base has a loss of {held_out:.4f} on the held-out rows before it learns: the answers are known, "
                "or stand in the questions"
            )

    def _why_not_finite(self) -> str:
        """What gives numbers that are not finite: weights, or the compute type."""
        base, compute = self.job.model.base, self.job.config.compute
        bad = [name for name, weight in base.weights.items() if not np.isfinite(weight.read()).all()]
        if bad:
            return (
                f"the base {base.name} holds numbers that are not finite in {listing(bad, 3)}: copy or convert it again"
            )
        other = "" if compute == "fp32" else "; try --compute fp32"
        return f"the base {base.name} gives a loss that is not finite in {compute}, though its weights are{other}"

    def _loss_at_start(self) -> float:
        """Held-out loss with the adapter on. Where one batch is the base's bit for bit, as with B at zero, all are."""
        batches = micro_batches(self.job.examples.valid[:4] or self.job.general[:4], self.job.way.micro_tokens)
        (attached,) = self.session.losses(batches[:1])
        self.session.switch(False)
        (bare,) = self.session.losses(batches[:1])
        self.session.switch(True)
        return self.report.loss_base if attached == bare else self._loss(self.job.examples.valid, "held-out rows")

    def _check_start(self) -> None:
        """Warn of a start that is not the base: adapters are made to begin where it is."""
        report = self.report
        if report.loss_before > report.loss_base + START_NATS:
            self.tell.warning(
                f"with its start the adapter has a held-out loss of {report.loss_before:.3f}, the base alone "
                f"{report.loss_base:.3f}: lower alpha or rank, or take another init"
            )

    def _measure(self) -> tuple[float, list[Answer]]:
        """Held-out loss and answers; the loss is NaN if the user wants to leave."""
        total, answers = measure(self.session, self.job.held_out, self.tell, self.should_stop)
        return math.nan if self.should_stop() else total.mean, answers

    def _loss(self, rows: Sequence[Row], what: str) -> float:
        total = held_out_loss(self.session, rows, self.job.way.micro_tokens, self.tell, self.should_stop, what)
        return math.nan if self.should_stop() else total.mean

    def after(self) -> None:
        """Measure the result on the same rows as before."""
        self.tell.stage("measuring the result")
        report = self.report
        still = self.session.still_layers()
        if still:
            self.tell.warning(
                f"nothing moved in {plural(len(still), 'layer')}, which never had a gradient: {listing(still, 3)}"
            )
        report.loss_after, answers = self._measure()
        report.general_after = self._loss(self.job.general, "general text")
        if len(answers) == len(self.answers):
            report.task_after = scores_of(answers)
            report.samples = _samples(self.answers, answers)
        if report.loss_after > report.loss_before:
            self.tell.warning(
                f"the held-out loss rose from {report.loss_before:.3f} to {report.loss_after:.3f}: the adapter fits "
                "the training rows and not the task; use fewer epochs, a lower learning_rate or more rows"
            )


def _samples(before: list[Answer], after: list[Answer]) -> list[dict[str, str]]:
    """A few held-out rows side by side, those that changed for the better first."""
    pairs = list(zip(before, after, strict=True))
    pairs.sort(key=lambda pair: sum(pair[0].scores.values()) - sum(pair[1].scores.values()))
    chosen = pairs[: SHOWN_SAMPLES // 2] + pairs[-(SHOWN_SAMPLES - SHOWN_SAMPLES // 2) :]
    return [
        {"asked": old.asked, "reference": old.reference, "before": old.written, "after": new.written}
        for old, new in (chosen if len(pairs) > SHOWN_SAMPLES else pairs)
    ]
