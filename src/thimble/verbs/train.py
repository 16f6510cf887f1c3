"""`thimble train`: from examples to an adapter, with proof of what it learned. The one training loop is here."""

import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble import __version__
from thimble.core.adapter import fresh_adapter
from thimble.core.config import TrainConfig
from thimble.core.method import Method
from thimble.core.targets import size_layers
from thimble.data.batches import micro_batches, shares
from thimble.data.encode import Row
from thimble.errors import RunError
from thimble.report import write_report
from thimble.verbs import run_folder
from thimble.verbs.events import OnEvent, ShouldStop, Teller, ignore, never
from thimble.verbs.job import Job, prepare_job
from thimble.verbs.measure import Answer, held_out_loss, measure, scores_of
from thimble.verbs.prepare import open_session

if TYPE_CHECKING:
    from thimble.torch_backend.session import TorchSession

SNAPSHOT_EVERY_STEPS = 10  # how far a diverged run falls back at most
DIVERGED_FACTOR = 2.0  # a loss above this many times the first one, plus the margin, is no longer a model's
DIVERGED_MARGIN_NATS = 4.0
SHOWN_SAMPLES = 6


@dataclass
class TrainReport:
    """What a run did; the JSON report has the same names.

    Attributes:
        status: `done`, `interrupted` or `diverged`.
        out: The run folder.
        adapter: The adapter folder.
        base: Name of the base.
        steps: Optimiser steps taken.
        tokens: Tokens read in training, prompts included.
        label_tokens: Tokens learned from.
        seconds: Time spent training, evaluation not counted.
        total_seconds: Time from the call to the report.
        tokens_per_second: Tokens read in training per second.
        peak_memory_bytes: Largest resident size of the process.
        loss_base: Held-out loss of the bare base, nats per label token; NaN if nothing was held out.
        loss_before: The same with the adapter attached, before step 1.
        loss_after: The same after training.
        general_before: Loss of the base on general text.
        general_after: The same after training: what it forgot.
        metric: Name of the task metric.
        task_before: Task figures of the base over held-out rows, 0 to 1.
        task_after: The same after training.
        task_rows: Rows answered.
        samples: Held-out questions with reference and both answers.
        adapter_parameters: Numbers in the adapter.
        base_parameters: Numbers in the base.
        plan: Expected peak memory by part, bytes.
        planned_seconds_per_step: Expected time of a step.
        told: Decisions, notes and warnings, in order.
        config: Every knob, resolved.
    """

    status: str = "done"
    out: str = ""
    adapter: str = ""
    base: str = ""
    steps: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    loss_base: float = math.nan
    loss_before: float = math.nan
    loss_after: float = math.nan
    general_before: float = math.nan
    general_after: float = math.nan
    metric: str = "none"
    task_before: Mapping[str, float] = field(default_factory=dict)
    task_after: Mapping[str, float] = field(default_factory=dict)
    task_rows: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    adapter_parameters: int = 0
    base_parameters: int = 0
    plan: dict[str, int] = field(default_factory=dict)
    planned_seconds_per_step: float = 0.0
    told: dict[str, list[str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> TrainReport:
    """Train an adapter and measure what it learned.

    Args:
        config: The knobs.
        on_event: Hears of decisions, progress and steps.
        should_stop: Asked between steps; on True the run ends and keeps what was learned.

    Returns:
        The report, which also lies in the run folder as report.json and report.html.

    Raises:
        InputError: If the run is refused; nothing has been written then.
        RunError: If it diverged; the last good adapter is kept.
    """
    started = time.perf_counter()
    finished = _finished_report(config)
    if finished:
        return finished
    tell = Teller(on_event)
    job = prepare_job(config, tell)
    tell.stage("loading the base")
    session = open_session(job.model, job.config.compute, job.way)
    run = _Run(job, session, tell, should_stop)
    run.begin()
    run.measure_before()
    run.learn()
    run.measure_after()
    return run.finish(started)


def _finished_report(config: TrainConfig) -> TrainReport | None:
    """The report of a run that `resume` finds finished."""
    value = run_folder.read_json(Path(config.out) / "report.json") if config.resume and config.out else None
    return TrainReport(**value) if value and value.get("status") == "done" else None


class _Run:
    """One training run; the methods are its phases, called in order."""

    def __init__(self, job: Job, session: "TorchSession", tell: Teller, should_stop: ShouldStop) -> None:
        self.job, self.session, self.tell, self.should_stop = job, session, tell, should_stop
        self.report = TrainReport(
            out=str(job.folder), base=job.model.base.name, base_parameters=job.model.base.num_parameters,
            metric=job.metric_name, plan=job.memory.parts(), planned_seconds_per_step=job.seconds_per_step,
            config=job.config.resolved(), told=tell.told,
        )  # fmt: skip
        self.before: list[Answer] = []
        self.diverged = ""
        self.cut_file: Path | None = None

    # ---- beginning ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the run folder and the adapter, or take up a checkpoint."""
        folder, config = self.job.folder, self.job.config
        run_folder.write_config(folder, config.resolved())
        shapes = self.job.model.base.spec.linear_shapes()
        adapted = {layer: shapes[layer] for layer in self.job.layers}
        fresh = fresh_adapter(
            adapted, config.init, size_layers(self.job.layers, config.rank, config.alpha), config.seed
        )
        adapter = replace(fresh, base=self.job.model.base.name, notes={"thimble_version": __version__})
        self.report.adapter_parameters = adapter.num_parameters
        self.session.train(adapter, Method(weight_decay=config.weight_decay))
        checkpoint = run_folder.latest_checkpoint(folder) if config.resume else None
        if checkpoint:
            self.report.steps, state, progress = checkpoint
            self.session.restore(state)
            for name, value in progress.items():
                setattr(self.report, name, value)
            self.tell.note(f"resumed after step {self.report.steps}")
        elif config.resume:
            self.tell.note(f"{folder} has no valid checkpoint: training starts from the beginning")
        self.log = run_folder.StepLog(folder / "metrics.jsonl", self.report.steps)

    def measure_before(self) -> None:
        """Evaluate the base before training, or read what an interrupted run measured."""
        path, report = self.job.folder / "before.json", self.report
        saved = run_folder.read_json(path) if report.steps else None
        if saved:
            self.before = [Answer(**answer) for answer in saved.pop("answers")]
            for name, value in saved.items():
                setattr(report, name, value)
            return
        self.tell.stage("measuring the base before training")
        self.session.switch(False)
        report.loss_base, self.before = self._measure()
        report.general_before = self._loss(self.job.general, "general text")
        report.task_before, report.task_rows = scores_of(self.before), len(self.before)
        self.session.switch(True)
        report.loss_before = self._loss_at_start()
        names = ("loss_base", "loss_before", "general_before", "task_before", "task_rows")
        values = {name: getattr(report, name) for name in names}
        run_folder.write_json(path, {**values, "answers": [asdict(answer) for answer in self.before]})

    def _loss_at_start(self) -> float:
        """Held-out loss with the adapter on. B is zero, so one batch must be the base's bit for bit; then all are."""
        batches = micro_batches(self.job.examples.valid[:4] or self.job.general[:4], self.job.way.micro_tokens)
        (attached,) = self.session.losses(batches[:1])
        self.session.switch(False)
        (bare,) = self.session.losses(batches[:1])
        self.session.switch(True)
        return self.report.loss_base if attached == bare else self._loss(self.job.examples.valid, "held-out rows")

    def _measure(self) -> tuple[float, list[Answer]]:
        """Held-out loss and answers; the loss is NaN if the user wants to leave."""
        total, answers = measure(self.session, self.job.held_out, self.tell, self.should_stop)
        return math.nan if self.should_stop() else total.mean, answers

    def _loss(self, rows: Sequence[Row], what: str) -> float:
        total = held_out_loss(self.session, rows, self.job.way.micro_tokens, self.tell, self.should_stop, what)
        return math.nan if self.should_stop() else total.mean

    # ---- learning -------------------------------------------------------------------------------------------------

    def learn(self) -> None:
        """The training loop."""
        self.tell.stage("training")
        self.session.release()  # measuring and learning have buffers of other sizes
        course, report, every = self.job.course, self.report, self.job.config.checkpoint_every_steps
        good, first_loss = self.session.state(), math.nan
        began = time.perf_counter() - report.seconds
        while not course.is_done(report.steps, report.seconds) and not self.should_stop():
            self.cut_file = self.job.model.base.cut_file()
            if self.cut_file:
                break
            row = self._step(course.rows(report.steps), course.rate_at(report.steps, report.seconds), began)
            first_loss = row["loss"] if math.isnan(first_loss) else first_loss
            self.diverged = _why_diverged(row, first_loss)
            if self.diverged:
                self.session.restore(good)
                break
            if report.steps % SNAPSHOT_EVERY_STEPS == 1:
                good = self.session.state() if self.session.is_finite() else good
            if every and report.steps % every == 0:
                self._save_checkpoint()
        if self.should_stop() and every:
            self._save_checkpoint()
        self.log.close()

    def _step(self, numbers: list[int], rate: float, began: float) -> dict[str, Any]:
        """Take one optimiser step and log it; a step whose loss or gradient is not finite changes nothing."""
        rows = [self.job.examples.train[number] for number in numbers]
        labels = sum(row.label_tokens for row in rows)
        gradients = self.session.gradients(shares(rows, self.job.way.num_shares, self.job.way.micro_tokens), labels)
        report = self.report
        if math.isfinite(gradients.loss.mean) and math.isfinite(gradients.norm):
            self.session.apply(gradients, rate, self.job.config.max_grad_norm)
        tokens = sum(len(row.ids) for row in rows)
        report.steps += 1
        report.tokens += tokens
        report.label_tokens += labels
        report.seconds = time.perf_counter() - began
        row = {
            "step": report.steps, "loss": gradients.loss.mean, "learning_rate": rate, "grad_norm": gradients.norm,
            "tokens": tokens, "label_tokens": labels, "seconds": round(report.seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }  # fmt: skip
        self.log.add(row)
        self.tell.step({**row, **self._outlook()})
        return row

    def _outlook(self) -> dict[str, Any]:
        """What progress shows beside the step's own figures."""
        report, course = self.report, self.job.course
        left = course.minutes * 60 - report.seconds if course.minutes else None
        if course.total_steps:
            left = (course.total_steps - report.steps) * report.seconds / report.steps
        return {"total": course.total_steps, "tokens_so_far": report.tokens, "seconds_left": max(0.0, left or 0.0)}

    def _save_checkpoint(self) -> None:
        progress = {name: getattr(self.report, name) for name in ("tokens", "label_tokens", "seconds")}
        run_folder.save_checkpoint(self.job.folder, self.report.steps, self.session.state(), progress)

    # ---- ending ---------------------------------------------------------------------------------------------------

    def measure_after(self) -> None:
        """Evaluate the result on the same rows as before, unless the user wants to leave."""
        if self.should_stop() or self.diverged or self.cut_file:
            return
        self.tell.stage("measuring the result")
        report = self.report
        report.loss_after, after = self._measure()
        report.general_after = self._loss(self.job.general, "general text")
        if len(after) == len(self.before):
            report.task_after = scores_of(after)
            report.samples = _samples(self.before, after)
        if report.loss_after > report.loss_before:
            self.tell.warning(
                f"the held-out loss rose from {report.loss_before:.3f} to {report.loss_after:.3f}: the adapter fits "
                "the training rows and not the task; use fewer epochs, a lower learning_rate or more rows"
            )

    def finish(self, started: float) -> TrainReport:
        """Publish the adapter and write the reports.

        Args:
            started: When the run began, by `time.perf_counter`.

        Returns:
            The report.

        Raises:
            RunError: If the run diverged, or its base was cut off.
        """
        report, folder = self.report, self.job.folder
        self.session.release()
        is_cut_short = self.should_stop() or self.cut_file
        report.status = "diverged" if self.diverged else "interrupted" if is_cut_short else "done"
        report.adapter = str(run_folder.publish_adapter(folder, self.session.adapter()))
        report.tokens_per_second = report.tokens / report.seconds if report.seconds else 0.0
        report.peak_memory_bytes = peak_memory_bytes()
        report.total_seconds = time.perf_counter() - started
        base = self.job.model.base
        run_folder.write_manifest(folder, base.fingerprint(), base.name, self.job.examples.dataset.files, __version__)
        run_folder.write_json(folder / "report.json", asdict(report))
        write_report(folder / "report.html", asdict(report), self.log.rows)
        if self.cut_file:
            raise RunError(
                f"{self.cut_file} became shorter while it was read, after step {report.steps}: what was learned until "
                f"then is kept in {report.adapter}; copy the base again"
            )
        if self.diverged:
            raise RunError(
                f"training diverged at step {report.steps}: {self.diverged}. The last good adapter is kept in "
                f"{report.adapter}; try a learning_rate of {self.job.course.rate / 10:g}"
            )
        return report


def _why_diverged(row: Mapping[str, Any], first_loss: float) -> str:
    """What shows that training has left the road, or an empty string."""
    loss, norm, limit = row["loss"], row["grad_norm"], first_loss * DIVERGED_FACTOR + DIVERGED_MARGIN_NATS
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    return f"the loss rose from {first_loss:.2f} to {loss:.2f}" if loss > limit else ""


def _samples(before: list[Answer], after: list[Answer]) -> list[dict[str, str]]:
    """A few held-out rows side by side, those that changed for the better first."""
    pairs = list(zip(before, after, strict=True))
    pairs.sort(key=lambda pair: sum(pair[0].scores.values()) - sum(pair[1].scores.values()))
    chosen = pairs[: SHOWN_SAMPLES // 2] + pairs[-(SHOWN_SAMPLES - SHOWN_SAMPLES // 2) :]
    return [
        {"asked": old.asked, "reference": old.reference, "before": old.written, "after": new.written}
        for old, new in (chosen if len(pairs) > SHOWN_SAMPLES else pairs)
    ]


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, memory-mapped pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
