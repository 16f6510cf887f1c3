"""`thimble train`: from examples to an adapter, with proof of what it learned. The one training loop is here."""

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble import __version__
from thimble.core.adapter import Adapter, load_adapter
from thimble.core.config import TrainConfig
from thimble.core.method import INITS, Method, init_name
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches, pack, shares
from thimble.data.encode import Row
from thimble.errors import RunError, listing, plural
from thimble.report import write_report
from thimble.verbs import run_folder
from thimble.verbs.checkpoint import Checkpoint, clear_checkpoints, clear_unfinished, locked, save_checkpoint
from thimble.verbs.events import OnEvent, ShouldStop, Teller, ignore, never
from thimble.verbs.guard import Guard, Plateau, Verdict
from thimble.verbs.job import Job, prepare_job
from thimble.verbs.measure import Answer, held_out_loss, measure, scores_of
from thimble.verbs.prepare import open_session, skipped_rows
from thimble.verbs.start import Start, make_start

if TYPE_CHECKING:
    from thimble.torch_backend.session import Anchor, TorchSession

SNAPSHOT_EVERY_STEPS = 2  # how far a run falls back at most: a copy takes a hundredth of a step
GOOD = "good."  # before the names of the last sound state in a checkpoint
ANCHOR_TOKENS = 256  # of general text beside each step, where the base's answers to it are to be kept
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
        skipped_rows: Rows left out, which skipped.jsonl lists with the reasons.
        adapter_parameters: Numbers in the adapter.
        base_parameters: Numbers in the base.
        start: What was measured for the choice of init and ranks, and the seconds it took.
        kept_step: The step whose adapter was kept, the last one unless an earlier one did better on held-out rows.
        returns: How often the loss left the road and the run went back and on at half the rate.
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
    skipped_rows: int = 0
    adapter_parameters: int = 0
    base_parameters: int = 0
    start: dict[str, Any] = field(default_factory=dict)
    kept_step: int = 0
    returns: int = 0
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
    start = _saved_start(job) or make_start(job, session, tell)
    run = _Run(replace(job, config=start.config), session, tell, should_stop)
    job.folder.mkdir(parents=True, exist_ok=True)
    with locked(job.folder):
        run.begin(start)
        run.measure_before()
        run.learn()
        run.measure_after()
        return run.finish(started)


def _finished_report(config: TrainConfig) -> TrainReport | None:
    """The report of a run that `resume` finds finished."""
    value = run_folder.read_json(Path(config.out) / "report.json") if config.resume and config.out else None
    return TrainReport(**value) if value and value.get("status") == "done" else None


def _saved_start(job: Job) -> Start | None:
    """Where a run that is taken up again began, if that was written down."""
    if not job.checkpoint or not (job.folder / run_folder.START).is_dir():
        return None
    saved = load_adapter(job.folder / run_folder.START).layers
    layers = {path: saved[path] for path in job.sizes}  # checkpoints hold numbers in this order
    is_delta = INITS[init_name(job.config.init)].is_delta
    bare = {path: replace(factors, magnitude=None) for path, factors in layers.items()}
    return Start(Adapter(layers, origin=bare if is_delta else {}), job.config)


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
        self.guard, self.plateau = Guard(), Plateau(job.config.patience)
        self.best: NDArray[np.float32] | None = None  # numbers of the adapter that did best on held-out rows
        self.good: dict[str, NDArray[np.float32]] = {}  # the last state known to be sound
        self.saved_at = time.perf_counter()
        self.watching_seconds = 0.0  # spent on held-out rows on the way
        self.diverged = ""
        self.cut_file: Path | None = None

    # ---- beginning ------------------------------------------------------------------------------------------------

    def begin(self, start: Start) -> None:
        """Make the run folder and the adapter, or take up a checkpoint."""
        folder, config = self.job.folder, self.job.config
        checkpoint = self.job.checkpoint
        clear_unfinished(folder)
        run_folder.write_config(folder, config.resolved())
        skipped = skipped_rows(self.job.examples)
        if skipped:
            run_folder.write_text(folder / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped))
        self.report.skipped_rows = len(skipped)
        if INITS[init_name(config.init)].needs != "nothing" and not checkpoint:
            plain = replace(start.adapter, origin={})
            run_folder.publish_adapter(folder, plain, run_folder.START)
        name, notes = self.job.model.base.name, {"thimble_version": __version__, "init": config.init}
        adapter = replace(start.adapter, base=name, notes=notes)
        self.report.adapter_parameters, self.report.start = adapter.num_parameters, start.numbers
        self.session.train(adapter, _method(config))
        if checkpoint:
            self._take_up(checkpoint)
        elif config.resume:
            self.tell.note(f"{folder} has no valid checkpoint: training starts from the beginning")
        self.log = run_folder.StepLog(folder / "metrics.jsonl", self.report.steps)
        general = self.job.general
        if config.keep_general:  # what is kept is not what is measured
            halves = [[row for number, row in enumerate(general) if number % 4 // 2 == half] for half in (0, 1)]
            self.anchored, self.job = halves[0], replace(self.job, general=tuple(halves[1]))

    def _take_up(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        state, progress = dict(checkpoint.state), dict(checkpoint.progress)
        self.report.steps = checkpoint.step
        self.best = state.pop("best", None)
        self.good = {name[len(GOOD) :]: state.pop(name) for name in list(state) if name.startswith(GOOD)}
        self.session.restore(state)
        self.guard = Guard.restored(progress.pop("guard", {}))
        self.plateau.restore(progress.pop("plateau", {}))
        for name, value in progress.items():
            setattr(self.report, name, value)
        self.tell.note(f"resumed after step {checkpoint.step}")

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
        self._check_base()
        report.loss_before = self._loss_at_start()
        names = ("loss_base", "loss_before", "general_before", "task_before", "task_rows")
        values = {name: getattr(report, name) for name in names}
        run_folder.write_json(path, {**values, "answers": [asdict(answer) for answer in self.before]})

    def _check_base(self) -> None:
        """Warn of a base that knows less than nothing of the text: then something about it is wrong."""
        chance = math.log(self.job.model.base.spec.vocab_size)
        if self.report.general_before > chance:
            self.tell.warning(
                f"the base has a loss of {self.report.general_before:.1f} on general text, worse than guessing "
                f"({chance:.1f}): its file may be damaged, or its tokenizer another's"
            )

    def _loss_at_start(self) -> float:
        """Held-out loss with the adapter on. Where one batch is the base's bit for bit, as with B at zero, all are."""
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
        anchors = self._anchors()
        course, report = self.job.course, self.report
        self.good = self.good or self.session.state()
        began, self.watching_seconds = time.perf_counter() - report.seconds, 0.0
        while not (course.is_done(report.steps, report.seconds) or self.plateau.is_over or self.should_stop()):
            self.cut_file = self.job.model.base.cut_file()
            if self.cut_file:
                break
            rate = course.rate_at(report.steps, report.seconds) * self.guard.rate
            anchor = anchors[report.steps % len(anchors)] if anchors else None
            self._step(course.rows(report.steps), rate, began, anchor)
            if self.diverged:
                break
            if self._is_time_to_save():
                self._save_checkpoint()
        if not self.session.is_finite():
            self.diverged = self.diverged or "numbers of the adapter are not finite"
            self.session.restore(self.good)
        if self.should_stop() and report.steps:
            self._save_checkpoint()
        self._keep_best()
        self.log.close()

    def _anchors(self) -> list["Anchor"]:
        """General text with what the base makes of it, in small batches; none unless it is to be kept."""
        if not self.job.config.keep_general:
            return []
        longest = max(ANCHOR_TOKENS, *(len(row.ids) for row in self.anchored))
        return [self.session.remember(batch) for batch in micro_batches(self.anchored, longest)]

    def _step(self, numbers: list[int], rate: float, began: float, anchor: "Anchor | None") -> None:
        """Take one optimiser step, if its loss and gradient are sound, and log it."""
        rows = [self.job.examples.train[number] for number in numbers]
        labels = sum(row.label_tokens for row in rows)
        parts = shares(rows, self.job.way.num_shares, self.job.way.micro_tokens)
        gradients = self.session.gradients(parts, labels, anchor, self.job.config.keep_general if anchor else 0.0)
        report, held_out = self.report, {}
        report.steps += 1
        verdict = self.guard.judge(gradients.loss.mean, gradients.norm)
        if verdict is Verdict.TAKE:
            if report.steps % SNAPSHOT_EVERY_STEPS == 1:  # before the step: this is the state that was just judged
                self.good = self.session.state()
            self.session.apply(gradients, rate, self.job.config.max_grad_norm)
            held_out = self._watch()
        else:
            self._go_back(verdict)
        tokens = sum(len(row.ids) for row in rows)
        report.tokens += tokens
        report.label_tokens += labels
        report.seconds = time.perf_counter() - began - self.watching_seconds
        row = {
            "step": report.steps, "loss": gradients.loss.mean, "learning_rate": rate, "grad_norm": gradients.norm,
            "tokens": tokens, "label_tokens": labels, "seconds": round(report.seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(), **held_out,
        }  # fmt: skip
        self.log.add(row)
        self.tell.step({**row, **self._outlook()})

    def _go_back(self, verdict: Verdict) -> None:
        """Leave a step out, or return to the last good state and go on more slowly, or give up there."""
        guard, step = self.guard, self.report.steps
        if verdict is Verdict.SKIP:
            self.tell.warning(f"step {step} was left out: {guard.why}")
            return
        self.session.restore(self.good)
        self.report.returns = guard.returns
        if verdict is Verdict.GIVE_UP:
            self.diverged = guard.why
            return
        self.tell.warning(f"step {step}: {guard.why}; back to the last good adapter, at {guard.rate:g} of the rate")

    def _watch(self) -> dict[str, float]:
        """The loss on some held-out rows, if it is time for it; the best adapter is remembered."""
        every, steps = self.job.eval_every_steps, self.report.steps
        if not every or steps % every or steps == self.job.course.total_steps:
            return {}
        return {"held_out_loss": self._held_out_on_the_way()}

    def _held_out_on_the_way(self) -> float:
        began = time.perf_counter()
        rows = list(self.session.losses([pack([row]) for row in self.job.watched]))
        if self.plateau.hear(self.report.steps, [row.mean for row in rows]):
            self.best = self.session.state()["adapter"]
        self.watching_seconds += time.perf_counter() - began
        return sum(rows, LossSum()).mean

    def _keep_best(self) -> None:
        """Go back to the adapter that did best on held-out rows, if the last one does clearly worse."""
        report = self.report
        report.kept_step = report.steps
        if self.best is None or self.should_stop() or self.cut_file:
            return
        if self.plateau.step < report.steps and not self.diverged:  # the last step has not been measured
            self._held_out_on_the_way()
        if not self.plateau.since and not self.diverged:
            return
        self.session.take(self.best)
        report.kept_step = self.plateau.best_step
        why = f"its loss of {self.plateau.best:.3f} on the held-out rows watched has clearly risen since"
        self.tell.decision(f"kept: the adapter of step {report.kept_step}; {why}")

    def _outlook(self) -> dict[str, Any]:
        """What progress shows beside the step's own figures."""
        report, course = self.report, self.job.course
        left = course.minutes * 60 - report.seconds if course.minutes else None
        if course.total_steps:
            left = (course.total_steps - report.steps) * report.seconds / report.steps
        return {"total": course.total_steps, "tokens_so_far": report.tokens, "seconds_left": max(0.0, left or 0.0)}

    def _is_time_to_save(self) -> bool:
        every, minutes = self.job.config.checkpoint_every_steps, self.job.config.checkpoint_every_minutes
        if every and self.report.steps % every == 0:
            return True
        return bool(minutes) and time.perf_counter() - self.saved_at >= minutes * 60

    def _save_checkpoint(self) -> None:
        names = ("tokens", "label_tokens", "seconds", "returns", "start")
        progress = {name: getattr(self.report, name) for name in names}
        progress |= {"guard": self.guard.state(), "plateau": self.plateau.state()}
        state = {**self.session.state(), **{GOOD + name: values for name, values in self.good.items()}}
        state |= {} if self.best is None else {"best": self.best}
        save_checkpoint(self.job.folder, self.report.steps, state, progress, self.job.origin)
        self.saved_at = time.perf_counter()

    # ---- ending ---------------------------------------------------------------------------------------------------

    def measure_after(self) -> None:
        """Evaluate the result on the same rows as before, unless the user wants to leave."""
        if self.should_stop() or self.diverged or self.cut_file:
            return
        self.tell.stage("measuring the result")
        report = self.report
        still = self.session.still_layers()
        if still:
            self.tell.warning(
                f"nothing moved in {plural(len(still), 'layer')}, which never had a gradient: {listing(still, 3)}"
            )
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
        if report.status == "done" and not self.job.config.checkpoint_every_steps:
            clear_checkpoints(folder)
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


def _method(config: TrainConfig) -> Method:
    return Method(config.weight_decay, config.lora_plus, config.dropout, config.freeze_a, config.seed)


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
