"""The training loop: one for every backend and every task. Knows no framework and no files."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import Gradient, Objective, StepKey, TrainingSession, TrainState
from thimble.core.adapter import Adapter
from thimble.core.method import Method
from thimble.models.execution import ExecutionPlan
from thimble.models.machine import peak_memory_bytes
from thimble.training.before_after import measure_after, measure_before
from thimble.training.best_step import BestStep
from thimble.training.checkpoint import Checkpoint
from thimble.training.control import Control
from thimble.training.guard import EPOCHS_IN_A_ROW, Guard, Memorisation, Plateau, Verdict
from thimble.training.progress import Progress
from thimble.training.protocols import Before, Collective, Scores, Sink, Task
from thimble.training.step_schedule import StepSchedule
from thimble.training.strength import find_strength

SNAPSHOT_EVERY_STEPS = 2  # how far a rollback goes at most: a copy takes a hundredth of a step
VALID = "good."  # before the names of the last valid state in a checkpoint
BEST = "best"  # the adapter that did best on validation rows, likewise
PAUSE_SECONDS = 1.0  # between two questions whether to go on

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class LoopPlan:
    """What the loop carries out."""

    adapter: Adapter  # the initial adapter
    method: Method  # how its parameters are trained; its seed is that of dropout
    step_schedule: StepSchedule  # the rows and the learning rate of each step, and when the run ends
    execution: ExecutionPlan  # how a step is run
    eval_every_steps: int = 0  # how often validation rows are measured during training; 0 is never
    patience: int = 0  # clear rises of their loss in a row that end the run; 0 is never
    memorised_nats: float = 0.0  # mean loss of an epoch that ends the run when it is below it twice; 0 is never
    strength: float | None = 1.0  # the share of the trained update that is kept; None: chosen by validation rows
    keeps_best: bool = True  # whether validation rows are enough to return to the step that did best on them
    checkpoint_every_steps: int | None = None  # how often a checkpoint is saved; None is never
    checkpoint_every_minutes: float = 0.0  # likewise, by the clock; 0 is never
    checkpoint: Checkpoint | None = None  # where the run is resumed, or None
    initialization: Mapping[str, Any] = field(default_factory=dict)  # what was measured to choose init and ranks


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        adapter: The trained adapter; of a run that diverged the last valid one.
        progress: Counts, and how the last step was run.
        before: What was measured before the first step.
        after: What was measured after the last one; None if the run was cut short.
        best_step: The step whose adapter this is.
        saved_step: That of the newest checkpoint; 0 without one.
        diverged: Why the run was given up, or nothing.
        cut_file: The file of the base that became shorter and ended the run, or None.
        is_stopped: Whether somebody stopped the run.
        strength: The share of the trained update that the adapter has.
    """

    adapter: Adapter
    progress: Progress
    before: Before
    after: Scores | None
    best_step: int
    saved_step: int
    diverged: str
    cut_file: Path | None
    is_stopped: bool
    strength: float

    @property
    def status(self) -> str:
        """`done`, `interrupted` or `diverged`."""
        return "diverged" if self.diverged else "interrupted" if self.is_stopped or self.cut_file else "done"


def run(
    plan: LoopPlan, task: Task, session: TrainingSession, collective: Collective, sink: Sink, control: Control
) -> TrainResult:
    """Train an adapter, and measure before and after; raises MemoryError if the smallest parts of a step do not fit."""
    loop = _Loop(plan, task, session, collective, sink, control)
    before = loop.measure_before()
    loop.train()
    loop.choose_strength()
    loop.write_adapter()
    after = loop.measure_after(before)
    session.release()
    return TrainResult(
        loop.adapter(), loop.progress, before, after, loop.best_step, loop.saved_step, loop.diverged,
        loop.cut_file, control.should_stop(), loop.strength,
    )  # fmt: skip


class _Loop:
    """The state of a run between its phases, which are called in order."""

    def __init__(
        self, plan: LoopPlan, task: Task, session: TrainingSession, collective: Collective, sink: Sink, control: Control
    ) -> None:
        self.plan, self.task, self.session, self.collective = plan, task, session, collective
        self.sink, self.control, self.log = sink, control, control.log
        plateau, measured = Plateau(plan.patience), dict(plan.initialization)
        memorisation = Memorisation(plan.memorised_nats)
        self.progress = Progress(plan.execution, Guard(), plateau, memorisation, initialization=measured)
        self.state: TrainState = session.start(plan.adapter, plan.method)
        self.best = BestStep(task, session, self.progress, plan.keeps_best, self.log)
        self.valid: Arrays = {}  # the last state known to be valid
        self.best_step = self.saved_step = 0
        self.strength = 1.0 if plan.strength is None else plan.strength
        self.saved_at, self.began, self.idle_seconds = time.perf_counter(), 0.0, 0.0
        self.diverged = ""
        self.cut_file: Path | None = None
        if plan.checkpoint:
            self._resume(plan.checkpoint)

    def _resume(self, checkpoint: Checkpoint) -> None:
        arrays = dict(checkpoint.state)
        self.best.flat = arrays.pop(BEST, None)
        self.valid = {name[len(VALID) :]: arrays.pop(name) for name in list(arrays) if name.startswith(VALID)}
        self.state = self.session.restore(self.state, arrays)
        self.progress.restore(checkpoint.step, checkpoint.progress)
        self.saved_step = checkpoint.step
        self.log.note(f"resumed after step {checkpoint.step}")

    # ---- before and after -----------------------------------------------------------------------------------------

    def measure_before(self) -> Before:
        """Measure the base before training, or read what an interrupted run measured."""
        if self.progress.steps and (saved := self.sink.saved_before()):
            return saved
        active = self.session.load(self.plan.adapter) if self.progress.steps else self.state.active
        before = measure_before(self.task, self.session, active, self.progress.execution, self.control)
        if not self.control.should_stop():
            self.sink.write_before(before)
        return before

    def measure_after(self, before: Before) -> Scores | None:
        """Measure the result, unless the run was cut short; memory that runs out does not cost what was learned."""
        if self.control.should_stop() or self.diverged or self.cut_file:
            return None
        try:
            active = self.state.active if self.strength == 1 else self.session.load(self.adapter())
            # Where a run went back to a state from before, that may have had no gradient yet.
            unmoved = [] if self.progress.guard.rollbacks else self.session.unmoved_layers(self.state)
            found = active, unmoved
            return measure_after(self.task, self.session, *found, before, self.progress.execution, self.control)
        except MemoryError as error:
            self.log.warning(
                f"memory ran out while the result was measured ({error}): evaluate with --adapter can do that"
            )
            return None

    def adapter(self) -> Adapter:
        """What was learned, at the strength it is kept with."""
        return self.session.adapter(self.state).at_strength(self.strength)

    def choose_strength(self) -> None:
        """Weaken the update as far as that costs hardly anything, if that is to be found out."""
        if self.plan.strength is not None or self.control.should_stop() or self.diverged or self.cut_file:
            return
        self.strength, why = find_strength(self.task, self.session, self.state, self.progress.execution)
        self.log.decision(f"strength: {self.strength:g}, {why}")

    def write_adapter(self) -> None:
        """Keep what was learned before it is measured, so that nothing that goes wrong there can cost it."""
        try:
            self.sink.write_adapter(self.adapter())
        except OSError as error:
            self.log.warning(f"the adapter cannot be written ({error.strerror or error}); it is tried again at the end")

    # ---- steps ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Take all steps, and end with the best valid adapter."""
        objectives = self.task.objectives(self.session, self.progress.execution, self.control)
        self.log.stage("training")
        with contextlib.ExitStack() as held:

            def open_file() -> BinaryIO:
                return held.enter_context(self.sink.scratch_file())

            features = self.task.features(self.session, self.state, self.plan.execution, open_file, self.control)
            self._take_steps(objectives, features)
        self._log_early_end()
        if not self.session.is_finite(self.state):
            self.diverged = self.diverged or "parameters of the adapter or moments of its optimiser are NaN or Inf"
            self.state = self.session.restore(self.state, self.valid)
        is_saving = self.plan.checkpoint_every_steps or self.plan.checkpoint_every_minutes
        if self.progress.steps and not self.diverged and is_saving:
            self._save_checkpoint()  # what was learned is not to be learned again if measuring it is interrupted
        self._keep_best()
        self.sink.end_steps()

    def _take_steps(self, objectives: Sequence[Objective], features: Any) -> None:
        """Take all steps, of rows whose features may be known."""
        self.session.release()  # evaluation and training have buffers of other sizes
        if not self.valid:
            self._remember()
        self.began, self.idle_seconds = time.perf_counter() - self.progress.seconds, 0.0
        while not (self.diverged or self._is_over()):
            self._step(objectives[self.progress.steps % len(objectives)], features)
            if not self.diverged:
                self._between_steps()

    def _is_over(self) -> bool:
        """Whether no further step is to be taken."""
        progress = self.progress
        is_done = self.plan.step_schedule.is_done(progress.steps, progress.seconds)
        if is_done or progress.plateau.is_over or progress.memorisation.is_over or self.control.should_stop():
            return True
        self.cut_file = self.control.cut_file()
        return self.cut_file is not None

    def _log_early_end(self) -> None:
        """Say why a run ends before its last step whose training rows are known by heart."""
        progress, schedule, most = self.progress, self.plan.step_schedule, self.plan.memorised_nats
        if progress.memorisation.is_over and not schedule.is_done(progress.steps, progress.seconds):
            total = schedule.total_steps
            self.log.decision(
                f"ended: after step {progress.steps}{f' of {total}' if total else ''}; the training loss of "
                f"{EPOCHS_IN_A_ROW} epochs in a row was below {most:g}, so the rows are known by heart, and more "
                "steps would mostly cost what the base knew; --patience 0 takes them all the same"
            )

    def _step(self, objective: Objective, features: Any) -> None:
        """Take one optimiser step, if its loss and gradient are valid, and log it."""
        progress, schedule = self.progress, self.plan.step_schedule
        rows = schedule.rows(progress.steps)
        rate = schedule.rate_at(progress.steps, progress.seconds) * progress.guard.rate
        gradient, target_tokens = self._gradient(rows, objective, features)
        progress.steps += 1
        verdict, validation = progress.guard.judge(gradient.loss.mean, gradient.norm), {}
        if verdict is Verdict.TAKE:
            if progress.steps % SNAPSHOT_EVERY_STEPS == 1:  # before the step: this is the state that was just judged
                self._remember()
            self.state = self.session.apply(self.state, gradient, rate)
            progress.memorisation.add(gradient.loss, schedule.ends_epoch(progress.steps - 1))
            validation = self._watch()
        else:
            self._rollback(verdict)
        tokens = sum(self.task.costs[row] for row in rows)
        progress.count(len(rows), tokens, target_tokens)
        progress.seconds = time.perf_counter() - self.began - self.idle_seconds
        row = {
            "step": progress.steps, "loss": gradient.loss.mean, "learning_rate": rate, "grad_norm": gradient.norm,
            "rows": len(rows), "tokens": tokens, "label_tokens": target_tokens, "seconds": round(progress.seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(), **validation,
        }  # fmt: skip
        self.sink.write_step(row)
        self.log.step({**row, **self._outlook(), "unit": self.task.unit, "counted": self.task.counted})

    def _gradient(self, rows: Sequence[int], objective: Objective, features: Any) -> tuple[Gradient, int]:
        """The gradient of a step and its target tokens; if memory runs out, in smaller parts from there on."""
        progress = self.progress
        key = StepKey(self.plan.method.seed, progress.steps)
        while True:
            work = self.task.work(rows, progress.execution, key, features)
            try:
                part = self.session.gradient(self.state, work, objective, progress.execution, key)
                return self.collective.sum(part), work.target_tokens
            except MemoryError as error:
                why = str(error)
            self._shrink(max(self.task.costs[row] for row in rows), why)

    def _shrink(self, longest: int, why: str) -> None:
        """Go on with the next smaller execution plan, here and in every later call."""
        step, smaller = self.progress.steps + 1, self.progress.execution.smaller(longest)
        if smaller is None:
            raise MemoryError(f"in step {step}, in the smallest parts there are: {why}")
        self.session.release()
        self.progress.execution = smaller
        self.log.warning(
            f"memory ran out in step {step}: from here on in micro-batches of {smaller.micro_tokens} tokens, "
            f"{smaller.num_shares} in parallel; the last digits may differ"
        )

    def _remember(self) -> None:
        """Keep a copy of the state, in the place of the one before, if it is valid."""
        if self.session.is_finite(self.state):
            self.valid = self.session.snapshot(self.state, self.valid or None)

    def _rollback(self, verdict: Verdict) -> None:
        """Leave a step out, or return to the last valid state and go on more slowly, or give up there."""
        guard, step = self.progress.guard, self.progress.steps
        if verdict is Verdict.SKIP:
            self.log.warning(f"step {step} was left out: {guard.why}")
            return
        self.state = self.session.restore(self.state, self.valid)
        if verdict is Verdict.GIVE_UP:
            self.diverged = guard.why
        else:
            self.log.warning(f"step {step}: {guard.why}; back to the last good adapter, at {guard.rate:g} of the rate")

    def _outlook(self) -> dict[str, Any]:
        """What progress shows beside the step's own figures."""
        progress, schedule = self.progress, self.plan.step_schedule
        left = schedule.minutes * 60 - progress.seconds if schedule.minutes else 0.0
        if schedule.total_steps:
            left = (schedule.total_steps - progress.steps) * progress.seconds / progress.steps
        return {"total": schedule.total_steps, **progress.so_far(), "seconds_left": max(0.0, left)}

    # ---- validation during training -------------------------------------------------------------------------------

    def _watch(self) -> dict[str, float]:
        """The loss of some validation rows, if it is time for it."""
        every, steps = self.plan.eval_every_steps, self.progress.steps
        if not every or steps % every or steps == self.plan.step_schedule.total_steps:
            return {}
        began = time.perf_counter()
        self.state, loss = self.best.measure(self.state)
        self.idle_seconds += time.perf_counter() - began
        return {"held_out_loss": loss}

    def _keep_best(self) -> None:
        """End with the adapter that did best on validation rows, unless the run was cut short."""
        self.best_step = self.progress.steps
        if not (self.control.should_stop() or self.cut_file):
            self.state, self.best_step = self.best.settle(self.state, bool(self.diverged))

    # ---- checkpoints and pauses -----------------------------------------------------------------------------------

    def _between_steps(self) -> None:
        """Save a checkpoint if it is time, and wait if there is a reason to."""
        every, minutes = self.plan.checkpoint_every_steps, self.plan.checkpoint_every_minutes
        is_step = every and self.progress.steps % every == 0
        if is_step or (minutes and time.perf_counter() - self.saved_at >= minutes * 60):
            self._save_checkpoint()
        if why := self.control.should_wait():
            self._pause(why)

    def _pause(self, why: str) -> None:
        """Wait until there is no reason any more, or somebody stops the run."""
        self._save_checkpoint()
        saved = "with" if self.saved_step == self.progress.steps else "without"
        self.log.warning(f"paused after step {self.progress.steps}, {saved} a checkpoint: {why}")
        began = time.perf_counter()
        while not self.control.should_stop() and self.control.should_wait():
            time.sleep(PAUSE_SECONDS)
        waited = time.perf_counter() - began
        self.idle_seconds += waited
        if not self.control.should_stop():
            self.log.note(f"going on after a pause of {waited:.0f} s")

    def _save_checkpoint(self) -> None:
        """Save all it takes to continue; a run does not end because that fails."""
        step = self.progress.steps
        if step == self.saved_step:
            return
        arrays = {**self.session.snapshot(self.state), **{VALID + name: values for name, values in self.valid.items()}}
        arrays |= {} if self.best.flat is None else {BEST: self.best.flat}
        self.saved_at = time.perf_counter()
        try:
            self.sink.write_checkpoint(step, arrays, self.progress.state())
        except OSError as error:
            older = f"that of step {self.saved_step} is valid" if self.saved_step else "there is no older one"
            failed = f"the checkpoint of step {step} cannot be written ({error.strerror or error})"
            self.log.warning(f"{failed}: the run goes on, and {older}")
        else:
            self.saved_step = step
