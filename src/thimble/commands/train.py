"""`thimble train`: from examples to an adapter, with proof of what it learned. The one training loop is here."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble import __version__
from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.core.method import Method, parse_init
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches, pack, shares
from thimble.data.encode import Row
from thimble.errors import RunError, listing
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.files.peft import load_adapter
from thimble.models.machine import peak_memory_bytes
from thimble.report.keys import to_json_dict, with_new_keys
from thimble.report.page import write_report
from thimble.training import run_folder
from thimble.training.before_after import Proof
from thimble.training.checkpoint import (
    Checkpoint,
    checkpoint_names,
    clear_checkpoints,
    clear_unfinished,
    latest_checkpoint,
    locked,
    save_checkpoint,
)
from thimble.training.guard import Guard, Plateau, Verdict
from thimble.training.initialise import Initialization, initialise
from thimble.training.plan import RunPlan, plan_run
from thimble.training.prepare import open_session, skipped_rows
from thimble.training.result import TrainReport, read_report
from thimble.training.waiting import ShouldWait, Waiting, never_wait

if TYPE_CHECKING:
    from thimble.backends.torch.session import Gradients, KlReference, TorchSession

SNAPSHOT_EVERY_STEPS = 2  # how far a run falls back at most: a copy takes a hundredth of a step
GOOD = "good."  # before the names of the last sound state in a checkpoint
COUNTED = ("tokens", "target_tokens", "seconds", "rollbacks", "initialization")  # of the report, kept in a checkpoint
REFERENCE_TOKENS = 256  # of general text beside each step, where the base's answers to it are to be kept


def train(
    config: TrainConfig,
    on_event: OnEvent = ignore,
    should_stop: ShouldStop = never,
    should_wait: ShouldWait = never_wait,
) -> TrainReport:
    """Train an adapter and measure what it learned.

    Args:
        config: The options.
        on_event: Hears of decisions, progress and steps.
        should_stop: Asked between steps; on True the run ends and keeps what was learned.
        should_wait: Asked between steps; a reason makes the run save a checkpoint and wait until there is none.

    Returns:
        The report, which also lies in the run folder as report.json and report.html.

    Raises:
        InputError: If the run is refused; nothing has been written then.
        RunError: If it diverged; the last good adapter is kept.
    """
    started = time.perf_counter()
    log = EventLog(on_event)
    with contextlib.ExitStack() as held:
        out = Path(config.out) if config.resume and config.out else None
        is_held = out is not None and out.is_dir() and not _finished_report(out)
        if out and is_held:  # before its checkpoint is read
            held.enter_context(locked(out))
        finished = _finished_report(out)
        if finished:
            return finished
        run_plan = plan_run(config, log)
        if not is_held:
            held.enter_context(locked(run_plan.folder))
        held.enter_context(_memory_told(run_plan.folder))
        log.stage("loading the base")
        session = open_session(run_plan.model, run_plan.config.compute, run_plan.execution)
        start = _saved_start(run_plan) or initialise(
            parse_init(run_plan.config.init), run_plan.config, run_plan.sizes, run_plan.calibration_data(), session, log
        )
        waiting = Waiting(should_wait, should_stop, log)
        run = _Run(replace(run_plan, config=start.config), session, log, should_stop, waiting)
        run.begin(start)
        run.proof.before()
        run.learn()
        run.measure_after()
        return run.finish(started)


@contextlib.contextmanager
def _memory_told(folder: Path) -> Iterator[None]:
    """Turn memory that runs out into an honest failure that says how to go on."""
    try:
        yield
    except MemoryError as error:
        saved = latest_checkpoint(folder)
        kept = f"; --resume goes on from step {saved.step}" if saved else ""
        raise RunError(
            f"memory ran out ({error}): free some, lower seq_len, or say what there is with --memory-budget{kept}"
        ) from None


def _finished_report(out: Path | None) -> TrainReport | None:
    """The report of a run that `resume` finds finished."""
    value = run_folder.read_json(out / "report.json") if out else None
    if not isinstance(value, dict) or value.get("status") != "done":
        return None
    return read_report(value)


def _saved_start(run_plan: RunPlan) -> Initialization | None:
    """Where a run that is taken up again began, if that was written down."""
    if not run_plan.checkpoint or not (run_plan.folder / run_folder.START).is_dir():
        return None
    saved = load_adapter(run_plan.folder / run_folder.START).layers
    layers = {path: saved[path] for path in run_plan.sizes}  # checkpoints hold numbers in this order
    is_delta = parse_init(run_plan.config.init).is_delta
    bare = {path: replace(factors, magnitude=None) for path, factors in layers.items()}
    return Initialization(Adapter(layers, origin=bare if is_delta else {}), run_plan.config)


class _Run:
    """One training run; the methods are its phases, called in order."""

    def __init__(
        self, run_plan: RunPlan, session: "TorchSession", log: EventLog, should_stop: ShouldStop, waiting: Waiting
    ) -> None:
        self.run_plan, self.session, self.log, self.should_stop = run_plan, session, log, should_stop
        self.waiting = waiting
        self.report = TrainReport(
            out=str(run_plan.folder), base=run_plan.model.base.name, base_parameters=run_plan.model.base.num_parameters,
            metric=run_plan.metric_name, plan=run_plan.memory.parts(), planned_seconds_per_step=run_plan.seconds_per_step,
            config=run_plan.config.resolved(), messages=log.messages,
        )  # fmt: skip
        self.proof = Proof(run_plan, session, self.report, log, should_stop)
        self.guard, self.plateau = Guard(), Plateau(run_plan.config.patience)
        self.best: NDArray[np.float32] | None = None  # numbers of the adapter that did best on validation rows
        self.good: dict[str, NDArray[np.float32]] = {}  # the last state known to be sound
        self.saved_at, self.saved_step = time.perf_counter(), 0
        self.idle_seconds = 0.0  # since learning began: spent waiting, or on validation rows
        self.data = {str(path): run_folder.hash_file(path) for path in run_plan.examples.dataset.files}
        self.diverged = ""
        self.cut_file: Path | None = None

    # ---- beginning ------------------------------------------------------------------------------------------------

    def begin(self, start: Initialization) -> None:
        """Make the run folder and the adapter, or take up a checkpoint."""
        folder, config = self.run_plan.folder, self.run_plan.config
        checkpoint = self.run_plan.checkpoint
        clear_unfinished(folder)
        run_folder.write_config(folder, config.resolved())
        skipped = skipped_rows(self.run_plan.examples)
        if skipped:
            run_folder.write_text(folder / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped))
        self.report.skipped_rows = self.run_plan.examples.left_out
        if parse_init(config.init).needs != "nothing" and not checkpoint:
            plain = replace(start.adapter, origin={})
            run_folder.publish_adapter(folder, plain, run_folder.START)
        name, notes = self.run_plan.model.base.name, {"thimble_version": __version__, "init": config.init}
        adapter = replace(start.adapter, base=name, notes=notes)
        self.report.adapter_parameters, self.report.initialization = adapter.num_parameters, start.numbers
        self.session.train(adapter, _method(config))
        if checkpoint:
            self._take_up(checkpoint)
        elif config.resume:
            self._log_fresh_start(checkpoint_names(folder))
        self.step_log = run_folder.StepLog(folder / run_folder.STEPS, self.report.steps)
        general = self.run_plan.general
        if config.keep_general:  # what is kept is not what is measured
            halves = [[row for number, row in enumerate(general) if number % 4 // 2 == half] for half in (0, 1)]
            self.reference_rows, self.proof.run_plan = halves[0], replace(self.run_plan, general=tuple(halves[1]))

    def _log_fresh_start(self, damaged: list[str]) -> None:
        """Say that a run that was to be taken up begins anew, and why."""
        what = f"{self.run_plan.folder} has no valid checkpoint: training starts from the beginning"
        if damaged:
            self.log.warning(f"{what} ({listing(damaged, 3)} found, but damaged)")
        else:
            self.log.note(what)

    def _take_up(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        state, progress = dict(checkpoint.state), with_new_keys(checkpoint.progress)
        self.report.steps = self.saved_step = checkpoint.step
        self.best = state.pop("best", None)
        self.good = {name[len(GOOD) :]: state.pop(name) for name in list(state) if name.startswith(GOOD)}
        self.session.restore(state)
        self.guard = Guard.restored(progress.pop("guard", {}))
        self.plateau.restore(progress.pop("plateau", {}))
        for name in COUNTED:
            setattr(self.report, name, progress[name])
        self.log.note(f"resumed after step {checkpoint.step}")

    # ---- learning -------------------------------------------------------------------------------------------------

    def learn(self) -> None:
        """The training loop."""
        self.log.stage("training")
        self.session.release()  # measuring and learning have buffers of other sizes
        references = self._kl_references()
        step_schedule, report = self.run_plan.step_schedule, self.report
        if not self.good:
            self._remember()
        began, self.idle_seconds = time.perf_counter() - report.seconds, 0.0
        while not (step_schedule.is_done(report.steps, report.seconds) or self.plateau.is_over or self.should_stop()):
            self.cut_file = self.run_plan.model.base.cut_file()
            if self.cut_file:
                break
            rate = step_schedule.rate_at(report.steps, report.seconds) * self.guard.rate
            reference = references[report.steps % len(references)] if references else None
            self._step(step_schedule.rows(report.steps), rate, began, reference)
            if self.diverged:
                break
            self._between_steps()
        if not self.session.is_finite():
            self.diverged = self.diverged or "numbers of the adapter or its optimiser are NaN or Inf"
            self.session.restore(self.good)
        self._save_last()
        self._keep_best()
        self.step_log.close()

    def _between_steps(self) -> None:
        """Save a checkpoint if it is time, and wait if there is a reason to."""
        if self._is_time_to_save():
            self._save_checkpoint()
        self.waiting.watch_heat()
        why = self.waiting.why()
        if why:
            self._save_checkpoint()
            saved = "with" if self.saved_step == self.report.steps else "without"
            self.log.warning(f"paused after step {self.report.steps}, {saved} a checkpoint: {why}")
            self.idle_seconds += self.waiting.wait()

    def _kl_references(self) -> list["KlReference"]:
        """General text with what the base makes of it, in small batches; none unless it is to be kept."""
        if not self.run_plan.config.keep_general:
            return []
        longest = max(REFERENCE_TOKENS, *(len(row.ids) for row in self.reference_rows))
        return [self.session.kl_reference(batch) for batch in micro_batches(self.reference_rows, longest)]

    def _step(self, numbers: list[int], rate: float, began: float, reference: "KlReference | None") -> None:
        """Take one optimiser step, if its loss and gradient are sound, and log it."""
        rows = [self.run_plan.examples.train[number] for number in numbers]
        labels = sum(row.target_tokens for row in rows)
        gradients = self._gradients(rows, labels, reference)
        report, validation = self.report, {}
        report.steps += 1
        verdict = self.guard.judge(gradients.loss.mean, gradients.norm)
        if verdict is Verdict.TAKE:
            if report.steps % SNAPSHOT_EVERY_STEPS == 1:  # before the step: this is the state that was just judged
                self._remember()
            self.session.apply(gradients, rate, self.run_plan.config.max_grad_norm)
            validation = self._watch()
        else:
            self._rollback(verdict)
        tokens = sum(len(row.ids) for row in rows)
        report.tokens += tokens
        report.target_tokens += labels
        report.seconds = time.perf_counter() - began - self.idle_seconds
        row = {
            "step": report.steps, "loss": gradients.loss.mean, "learning_rate": rate, "grad_norm": gradients.norm,
            "tokens": tokens, "label_tokens": labels, "seconds": round(report.seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(), **validation,
        }  # fmt: skip
        self.step_log.add(row)
        self.log.step({**row, **self._outlook()})

    def _gradients(self, rows: Sequence[Row], labels: int, reference: "KlReference | None") -> "Gradients":
        """Gradients of a step; if memory runs out, in smaller parts from there on."""
        while True:
            execution = self.run_plan.execution
            try:
                parts = shares(rows, execution.num_shares, execution.micro_tokens)
                return self.session.gradients(
                    parts, labels, reference, self.run_plan.config.keep_general if reference else 0.0
                )
            except MemoryError as error:
                smaller = execution.smaller(max(len(row.ids) for row in rows))
                if smaller is None:
                    raise MemoryError(
                        f"in step {self.report.steps + 1}, in the smallest parts there are: {error}"
                    ) from None
            self.session.release()
            self.run_plan = replace(self.run_plan, execution=smaller)
            self.proof.run_in(smaller)
            self.log.warning(
                f"memory ran out in step {self.report.steps + 1}: from here on in micro-batches of "
                f"{smaller.micro_tokens} tokens, {smaller.num_shares} in parallel; the last digits may differ"
            )

    def _remember(self) -> None:
        """Keep a copy of the state, in the place of the one before, if there is nothing wrong with it."""
        if not self.session.is_finite():
            return
        for name, values in self.session.state().items():
            if name in self.good:
                np.copyto(self.good[name], values)
            else:
                self.good[name] = values.copy()

    def _rollback(self, verdict: Verdict) -> None:
        """Leave a step out, or return to the last good state and go on more slowly, or give up there."""
        guard, step = self.guard, self.report.steps
        if verdict is Verdict.SKIP:
            self.log.warning(f"step {step} was left out: {guard.why}")
            return
        self.session.restore(self.good)
        self.report.rollbacks = guard.rollbacks
        if verdict is Verdict.GIVE_UP:
            self.diverged = guard.why
            return
        self.log.warning(f"step {step}: {guard.why}; back to the last good adapter, at {guard.rate:g} of the rate")

    def _watch(self) -> dict[str, float]:
        """The loss on some validation rows, if it is time for it; the best adapter is remembered."""
        every, steps = self.run_plan.eval_every_steps, self.report.steps
        if not every or steps % every or steps == self.run_plan.step_schedule.total_steps:
            return {}
        return {"held_out_loss": self._validation_on_the_way()}

    def _validation_on_the_way(self) -> float:
        began = time.perf_counter()
        rows = list(self.session.losses([pack([row]) for row in self.run_plan.watched]))
        if self.plateau.hear(self.report.steps, [row.mean for row in rows]):
            self.best = self.session.state()["adapter"].copy()
        self.idle_seconds += time.perf_counter() - began
        return sum(rows, LossSum()).mean

    def _keep_best(self) -> None:
        """Go back to the adapter that did best on validation rows, if the last one does clearly worse."""
        report = self.report
        report.best_step = report.steps
        if self.best is None or self.should_stop() or self.cut_file:
            return
        if self.plateau.step < report.steps and not self.diverged:  # the last step has not been measured
            self._validation_on_the_way()
        if not self.plateau.since and not self.diverged:
            return
        self.session.take(self.best)
        report.best_step = self.plateau.best_step
        why = f"its loss of {self.plateau.best:.3f} on the validation rows watched has clearly risen since"
        self.log.decision(f"kept: the adapter of step {report.best_step}; {why}")

    def _outlook(self) -> dict[str, Any]:
        """What progress shows beside the step's own figures."""
        report, step_schedule = self.report, self.run_plan.step_schedule
        left = step_schedule.minutes * 60 - report.seconds if step_schedule.minutes else None
        if step_schedule.total_steps:
            left = (step_schedule.total_steps - report.steps) * report.seconds / report.steps
        return {
            "total": step_schedule.total_steps,
            "tokens_so_far": report.tokens,
            "seconds_left": max(0.0, left or 0.0),
        }

    def _is_time_to_save(self) -> bool:
        every, minutes = self.run_plan.config.checkpoint_every_steps, self.run_plan.config.checkpoint_every_minutes
        if every and self.report.steps % every == 0:
            return True
        return bool(minutes) and time.perf_counter() - self.saved_at >= minutes * 60

    def _save_last(self) -> None:
        """What was learned is not to be learned again if measuring it is interrupted."""
        config = self.run_plan.config
        if (
            self.report.steps
            and not self.diverged
            and (config.checkpoint_every_steps or config.checkpoint_every_minutes)
        ):
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        """Save all it takes to go on; a run does not end because that fails."""
        report = self.report
        if report.steps == self.saved_step:
            return
        progress = {name: getattr(report, name) for name in COUNTED}
        progress |= {
            "guard": self.guard.state(),
            "plateau": self.plateau.state(),
            "execution": asdict(self.run_plan.execution),
        }
        state = {**self.session.state(), **{GOOD + name: values for name, values in self.good.items()}}
        state |= {} if self.best is None else {"best": self.best}
        self.saved_at = time.perf_counter()
        try:
            self.step_log.flush()
            save_checkpoint(self.run_plan.folder, report.steps, state, progress, self.run_plan.origin)
        except OSError as error:
            older = f"that of step {self.saved_step} is whole" if self.saved_step else "there is no older one"
            self.log.warning(
                f"the checkpoint of step {report.steps} cannot be written ({error.strerror or error}): the run goes "
                f"on, and {older}"
            )
        else:
            self.saved_step = report.steps

    # ---- ending ---------------------------------------------------------------------------------------------------

    def measure_after(self) -> None:
        """Measure the result, unless the run was cut short; memory that runs out does not cost what was learned."""
        if self.should_stop() or self.diverged or self.cut_file:
            return
        try:
            self.proof.after()
        except MemoryError as error:
            self.session.release()
            self.log.warning(f"memory ran out while the result was measured ({error}): `thimble evaluate` can do that")

    def finish(self, started: float) -> TrainReport:
        """Publish the adapter and write the reports.

        Args:
            started: When the run began, by `time.perf_counter`.

        Returns:
            The report.

        Raises:
            RunError: If the run diverged, its base was cut off, or its result cannot be written.
        """
        report, folder = self.report, self.run_plan.folder
        self.session.release()
        is_interrupted = self.should_stop() or self.cut_file
        report.status = "diverged" if self.diverged else "interrupted" if is_interrupted else "done"
        report.tokens_per_second = report.tokens / report.seconds if report.seconds else 0.0
        report.peak_memory_bytes = peak_memory_bytes()
        report.total_seconds = time.perf_counter() - started
        try:
            self._publish()
        except OSError as error:
            kept = f" --resume, which goes on from step {self.saved_step}" if self.saved_step else ""
            raise RunError(
                f"the result cannot be written to {folder} ({error.strerror or error}): free some room or mend it, and "
                f"run the command again{kept}"
            ) from None
        if self.cut_file:
            raise RunError(
                f"{self.cut_file} became shorter while it was read, after step {report.steps}: what was learned until "
                f"then is kept in {report.adapter}; copy the base again"
            )
        if self.diverged:
            raise RunError(
                f"training diverged at step {report.steps}: {self.diverged}. The last good adapter is kept in "
                f"{report.adapter}; try a learning_rate of {self.run_plan.step_schedule.safer_rate:.2g}"
            )
        return report

    def _publish(self) -> None:
        report, folder, base = self.report, self.run_plan.folder, self.run_plan.model.base
        report.adapter = str(run_folder.publish_adapter(folder, self.session.adapter()))
        run_folder.write_manifest(folder, self._fingerprint(), base.name, self.data, __version__)
        write_report(folder / "report.html", asdict(report), run_folder.read_steps(folder / run_folder.STEPS))
        run_folder.write_json(folder / "report.json", to_json_dict(report))  # last: with it the run is done
        if report.status == "done" and not self.run_plan.config.checkpoint_every_steps:
            clear_checkpoints(folder)

    def _fingerprint(self) -> str | None:
        try:
            return self.run_plan.model.base.fingerprint()
        except OSError as error:
            self.log.warning(f"the base is gone ({error.filename}), so the manifest does not hold its hash")
            return None


def _method(config: TrainConfig) -> Method:
    return Method(config.weight_decay, config.lora_plus, config.dropout, config.freeze_a, config.seed)
