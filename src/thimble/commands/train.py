"""`thimble train`: from examples to an adapter, with proof of what it learned."""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from thimble import __version__
from thimble.backends.open import open_session
from thimble.config.paths import kept_paths
from thimble.config.train import TrainConfig
from thimble.core.adapter import Adapter
from thimble.core.method import Method, parse_init
from thimble.data import given_rows
from thimble.errors import Problems, RunError, listing
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.files.peft import load_adapter
from thimble.models.adapter_base import base_notes, peft_name
from thimble.report.words import words_of
from thimble.training import run_folder
from thimble.training.checkpoint import checkpoint_folders, latest_checkpoint, locked
from thimble.training.control import Control, ShouldWait, never_wait
from thimble.training.finish import finish, make_report
from thimble.training.initialise import Initialization, initialise
from thimble.training.loop import LoopPlan, TrainResult, run
from thimble.training.module_plan import ModulePlan, plan_module_run
from thimble.training.module_run import initial_adapter
from thimble.training.moved import check_finished
from thimble.training.plan import RunPlan, plan_run
from thimble.training.protocols import OneProcess
from thimble.training.result import TrainReport, read_report
from thimble.training.sink import RunFolderSink
from thimble.training.task_choice import TEXT, choose_task
from thimble.training.tasks.module_task import ModuleTask
from thimble.training.tasks.text import text_task


def train(
    config: TrainConfig,
    on_event: OnEvent = ignore,
    should_stop: ShouldStop = never,
    should_wait: ShouldWait = never_wait,
) -> TrainReport:
    """Train an adapter and measure what it learned; a stopped run keeps what it learned, a reason to wait pauses it."""
    started, log = time.perf_counter(), EventLog(on_event)
    out = Path(config.out) if config.resume and config.out else None
    with contextlib.ExitStack() as held:
        is_held = out is not None and out.is_dir() and not _finished_report(out)
        if out and is_held:  # before its checkpoint is read
            held.enter_context(locked(out))
        if out and (finished := _finished_report(out)):
            problems = Problems(config.problems)
            problems.attempt(check_finished, config, out)
            problems.required()
            return finished
        task = choose_task(config, log)
        run_plan = plan_run(config, log) if task == TEXT else plan_module_run(config, task, log)
        if not is_held:
            held.enter_context(locked(run_plan.folder))
        held.enter_context(_memory_explained(run_plan.folder))
        if isinstance(run_plan, ModulePlan):
            return _train_module(_keep_rows(run_plan), Control(log, should_stop, should_wait), started)
        control = Control(log, should_stop, should_wait, run_plan.model.base.cut_file)
        return _train_text(_keep_rows(run_plan), control, started)


PlanT = TypeVar("PlanT", RunPlan, ModulePlan)


def _keep_rows(run_plan: PlanT) -> PlanT:
    """Keep rows that were given in Python in the run folder, from where the run can be resumed and repeated."""
    if not run_plan.config.has_given_rows:
        return run_plan
    place = run_plan.folder / given_rows.FOLDER
    with run_folder.atomic_folder(place) as new:
        for file in run_plan.files:
            shutil.copyfile(file, new / file.name)
    files = tuple(place / file.name for file in run_plan.files)
    return run_plan.with_files(files, run_plan.config.replace(data=str(place), has_given_rows=False))


def _train_text(run_plan: RunPlan, control: Control, started: float) -> TrainReport:
    """Load the base, initialise, train, publish."""
    log, config, execution = control.log, run_plan.config, run_plan.execution
    log.stage("loading the base")
    session = open_session(run_plan.model, config.compute, execution.store, execution.is_streamed)
    initial = _saved_initialization(run_plan) or initialise(
        parse_init(config.init), config, run_plan.sizes, run_plan.calibration_data(), session, log
    )
    run_plan = replace(run_plan, config=initial.config)
    is_kept = parse_init(config.init).needs != "nothing" and not run_plan.checkpoint
    sink = _begin(run_plan, replace(initial.adapter, origin={}) if is_kept else None, log)
    base = run_plan.model.base
    notes = {"thimble_version": __version__, "init": config.init, **base_notes(run_plan.origin["base"])}
    adapter = replace(initial.adapter, base=peft_name(base), notes=notes, prefix=base.prefix)
    plan = _loop_plan(run_plan, adapter, initial.measured)
    result = run(plan, text_task(run_plan), session, OneProcess(), sink, control)
    return _end(run_plan, result, sink, log, started)


def _train_module(run_plan: ModulePlan, control: Control, started: float) -> TrainReport:
    """Fit a head to the frozen module, train, publish."""
    adapter = initial_adapter(run_plan, control)
    sink = _begin(run_plan, None if run_plan.checkpoint else replace(adapter, origin={}), control.log)
    schedule = run_plan.step_schedule
    task = ModuleTask(
        run_plan.reading, run_plan.watch, run_plan.opened.base.name, schedule.rows,
        epochs=schedule.epochs if schedule.total_steps else math.inf, is_augmented=bool(run_plan.config.augment),
        counted=words_of({"task": run_plan.config.task}).rows, class_weights=run_plan.class_weights,
    )  # fmt: skip
    result = run(_loop_plan(run_plan, adapter, {}), task, run_plan.opened.session, OneProcess(), sink, control)
    return _end(run_plan, result, sink, control.log, started)


def _end(
    run_plan: RunPlan | ModulePlan, result: TrainResult, sink: RunFolderSink, log: EventLog, started: float
) -> TrainReport:
    facts = run_plan.facts()
    report = make_report(facts, result, log, time.perf_counter() - started)
    return finish(facts, result, report, sink, log)


@contextlib.contextmanager
def _memory_explained(folder: Path) -> Iterator[None]:
    """Turn memory that runs out into an honest failure that says how to continue."""
    try:
        yield
    except MemoryError as error:
        saved = latest_checkpoint(folder)
        kept = f"; --resume goes on from step {saved.step}" if saved else ""
        raise RunError(
            f"memory ran out ({error}): free some, lower --seq-len, or say what there is with --memory-budget{kept}"
        ) from None


def _finished_report(out: Path | None) -> TrainReport | None:
    """The report of a run that `--resume` finds finished."""
    value = run_folder.read_json(out / "report.json") if out else None
    if out is None or not isinstance(value, dict) or value.get("status") != "done":
        return None
    return replace(read_report(value), out=str(out), adapter=str(out / "adapter"))  # it may have been moved


def _saved_initialization(run_plan: RunPlan) -> Initialization | None:
    """The initial adapter of a run that is resumed, if it was written down."""
    if not run_plan.checkpoint or not (run_plan.folder / run_folder.START).is_dir():
        return None
    saved = load_adapter(run_plan.folder / run_folder.START).layers
    layers = {path: saved[path] for path in run_plan.sizes}  # checkpoints hold parameters in this order
    is_delta = parse_init(run_plan.config.init).is_delta
    bare = {path: replace(factors, magnitude=None) for path, factors in layers.items()}
    return Initialization(Adapter(layers, origin=bare if is_delta else {}), run_plan.config)


def _begin(run_plan: RunPlan | ModulePlan, initial: Adapter | None, log: EventLog) -> RunFolderSink:
    """Make the run folder, and write what is known before the first step."""
    folder, config, checkpoint = run_plan.folder, run_plan.config, run_plan.checkpoint
    sink = RunFolderSink(folder, run_plan.origin, run_plan.files)
    done = checkpoint.step if checkpoint else 0
    sink.begin(kept_paths(config, config.resolved()), run_plan.skipped_rows(), initial, done)
    if config.resume and not checkpoint:
        what = f"{folder} has no valid checkpoint: training starts from the beginning"
        if damaged := [path.name for path in checkpoint_folders(folder)]:
            log.warning(f"{what} ({listing(damaged, 3)} found, but damaged)")
        else:
            log.note(what)
    return sink


def _loop_plan(run_plan: RunPlan | ModulePlan, adapter: Adapter, measured: Mapping[str, Any]) -> LoopPlan:
    config = run_plan.config
    return LoopPlan(
        adapter=adapter,
        method=Method(
            config.weight_decay, config.lora_plus, config.dropout, config.freeze_a, config.max_grad_norm, config.seed,
            config.adam_beta2,
        ),
        step_schedule=run_plan.step_schedule, execution=run_plan.execution,
        eval_every_steps=run_plan.watch.every_steps, patience=run_plan.patience,
        memorised_nats=run_plan.memorised_nats, keeps_best=run_plan.watch.keeps_best, strength=run_plan.strength,
        checkpoint_every_steps=config.checkpoint_every_steps,
        checkpoint_every_minutes=config.checkpoint_every_minutes, checkpoint=run_plan.checkpoint,
        initialization=measured,
    )  # fmt: skip
