"""A training run on a module of any kind, checked and decided but not begun: what plan.py is for text.

The module is opened here, for what it is made of decides what can be adapted; nothing is written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thimble.backends.open import OpenedModule, open_module_session
from thimble.config.train import TrainConfig, misplaced
from thimble.config.values import read_pattern
from thimble.core.labels import balanced, describe
from thimble.core.method import AUTO_RANK, parse_init
from thimble.core.metrics import METRICS
from thimble.core.schedule import default_beta2
from thimble.data.examples import log_skipped
from thimble.data.model import find_module_base
from thimble.data.pooling import MEAN
from thimble.errors import BaseModelError, ConfigError, Problems, ThimbleError, escaped, listing, plural
from thimble.events import EventLog
from thimble.files.user_program import place_of
from thimble.models.cost import MemoryPlan
from thimble.models.execution import ExecutionPlan
from thimble.models.module_base import ModuleBase
from thimble.training import run_folder
from thimble.training.checkpoint import Checkpoint, check_origin, latest_checkpoint, saved_origin
from thimble.training.evidence import log_few, way_to_more
from thimble.training.facts import RunFacts
from thimble.training.metric import ChosenMetric
from thimble.training.module_memory import ModuleCost, plan_memory
from thimble.training.moved import log_changed_options, log_new_places, missing_parts
from thimble.training.plan import ADAPTER_FILES, RUN_FOLDER_BYTES
from thimble.training.step_schedule import StepSchedule, rate_factors
from thimble.training.tasks.kinds import KINDS, TaskKind
from thimble.training.tasks.reading import TRAIN, Reading, TaskRows, warnings_of
from thimble.training.watch import Watch, choose_watch, log_watch


@dataclass(frozen=True)
class ModulePlan:
    """Everything that is decided before the first step."""

    config: TrainConfig  # options with what was left open resolved
    kind: TaskKind
    opened: OpenedModule  # the module, with LoRA on it
    rows: TaskRows
    reading: Reading
    watch: Watch
    step_schedule: StepSchedule
    execution: ExecutionPlan
    memory: MemoryPlan
    allowed_bytes: int
    seconds_per_step: float
    origin: dict[str, str]
    checkpoint: Checkpoint | None
    folder: Path
    answers_path: str | None
    memorised_nats: float = 0.0  # a low training loss ends no run: what comes first is the head's
    strength: float = 1.0  # the head was trained beside the adapter, so no other fits it

    @property
    def files(self) -> tuple[Path, ...]:
        """Of the data, as far as they are tables."""
        return self.rows.files

    def with_files(self, files: tuple[Path, ...], config: TrainConfig) -> "ModulePlan":
        """The same run with its data in other files, which hold the same."""
        return replace(self, config=config, rows=replace(self.rows, files=files))

    @property
    def class_weights(self) -> Sequence[float]:
        """What a training row of each class counts; empty: each the same."""
        return _class_weights(self.config, self.rows)

    def skipped_rows(self) -> list[dict[str, str]]:
        """Rows that were left out, with where each stands and why."""
        return [{"source": row.source, "problem": "; ".join(row.problems)} for row in self.rows.skipped.found]

    @property
    def patience(self) -> int:
        """Clear rises in a row that end the run; 0 is never."""
        return self.config.patience if self.watch.keeps_best else 0

    def facts(self) -> RunFacts:
        """The run as its report tells of it."""
        rows, name = self.rows, {"labels": "labels", "tokens": "CER"}.get(self.kind.loss, "none")
        return RunFacts(
            task=self.config.task, unit=self.reading.unit, config=self.config, base=self.opened.base,
            folder=self.folder, origin=self.origin,
            metric=ChosenMetric(name, METRICS.get(name), rows.learned), training_rows=len(self.reading.costs),
            sources=rows.sources, judging=self.watch.judging, untouched_rows=self.watch.untouched_rows,
            known_rows=len(rows.known), skipped_rows=rows.skipped.count, learned=rows.learned,
            memory=self.memory.parts(), seconds_per_step=self.seconds_per_step,
            safer_rate=self.step_schedule.safer_rate, answers_path=self.answers_path,
            media=rows.media,
        )  # fmt: skip


def plan_module_run(config: TrainConfig, task: str, log: EventLog, needs_folder: bool = True) -> ModulePlan:
    """Check everything that can be wrong, decide what was left open; raises InputError with every problem."""
    log.stage("reading the base and the examples")
    kind, folder = KINDS[task], run_folder.choose_folder(config.out, config.data)
    opened, rows, reading = _check(config, task, kind, folder, needs_folder, log)
    _log_opened(opened, rows, reading, config, log)
    schedule = _schedule(config, kind, opened, reading)
    _log_schedule(schedule, len(reading.costs), "adapter and head" if kind.has_head else "adapters", log)
    cost = _cost(config, opened, reading, schedule)
    for decision in opened.session.convolutions:
        log.decision(decision)
    execution = cost.execution
    checkpoint = latest_checkpoint(folder) if config.resume else None
    if checkpoint:
        execution = ExecutionPlan(**checkpoint.progress["execution"])
        for name in checkpoint.damaged:
            log.warning(f"checkpoint {name} is damaged and is left out: the run goes on from step {checkpoint.step}")
    steps = schedule.total_steps or (schedule.minutes or 0.0) * 60 / cost.seconds_per_step
    step_cost = sum(reading.costs) / schedule.steps_per_epoch
    watch = choose_watch(config, rows.unseen, reading.valid_costs, step_cost, steps)
    log_watch(watch, config.patience, log)
    origin = _origin(opened, rows, reading, execution)
    began = checkpoint.origin if checkpoint else (saved_origin(folder) or {}) if config.resume else {}
    places = {"base": str(opened.base.path), "data": config.data}
    check_origin(began, origin, places, config.accept_changes, log)
    log_new_places(config, log)
    log_changed_options(config, log)
    length = {} if config.epochs or schedule.minutes else {"max_steps": schedule.total_steps}
    beta2 = config.adam_beta2 or default_beta2(steps)
    resolved = config.replace(
        task=task, out=str(folder), compute="fp32", store=execution.store, learning_rate=schedule.rate,
        warmup_steps=schedule.resolved_warmup, remeasure=False, answers=None, adam_beta2=beta2, targets=opened.targets,
        batch_rows=config.batch_rows or kind.step_rows, **length,
    )  # fmt: skip
    return ModulePlan(
        resolved, kind, opened, rows, reading, watch, schedule, execution, cost.memory, cost.allowed_bytes,
        cost.seconds_per_step, origin, checkpoint, folder, config.answers,
    )  # fmt: skip


def _check(
    config: TrainConfig, task: str, kind: TaskKind, folder: Path, needs_folder: bool, log: EventLog
) -> tuple[OpenedModule, TaskRows, Reading]:
    """Read everything, and refuse the run with every problem found."""
    problems = Problems((*config.problems, *misplaced(config, task)))
    missing = missing_parts(config)
    problems.add(*set(missing.values()))
    base = None if "base" in missing else problems.attempt(find_module_base, config.base, task)
    rows = None if "data" in missing else problems.attempt(_open_rows, config, kind)
    opened = reading = None
    if base and rows:
        opened = problems.attempt(_open, base, config, task, kind, rows)
    if opened and rows:
        reading = problems.attempt(rows.reading, _as_begun(opened.base, config, folder), config)
    if needs_folder:
        trained = opened.session.trained_parameters if opened else 0
        problems.attempt(run_folder.check_folder, folder, config.resume, RUN_FOLDER_BYTES + trained * 4 * ADAPTER_FILES)
    problems.attempt(run_folder.check_new_file, config.answers, "--answers")
    return problems.required(opened, rows, reading)


def _as_begun(base: ModuleBase, config: TrainConfig, folder: Path) -> ModuleBase:
    """The base with the pooling of the run that goes on: earlier releases took the mean, whatever a base notes."""
    began = saved_origin(folder) if config.resume else None
    pooling = {"pooling": began.get("pooling", MEAN)} if began else {}
    return replace(base, preprocessing={**base.preprocessing, **pooling})


def _open_rows(config: TrainConfig, kind: TaskKind) -> TaskRows:
    if not config.data:
        raise ConfigError("no data is given: name a file or folder of examples, as in: thimble train pictures/")
    return kind.open_rows(config)


def _class_weights(config: TrainConfig, rows: TaskRows) -> Sequence[float]:
    return balanced(rows.learned, rows.labels) if config.class_weights == "balanced" else ()


def _open(base: ModuleBase, config: TrainConfig, task: str, kind: TaskKind, rows: TaskRows) -> OpenedModule:
    """Load the module and put LoRA on it."""
    return open_module_session(
        base, task, kind.loss, rows.labels, config.targets, config.train_also, seed=config.seed,
        rank=config.rank or AUTO_RANK, alpha=config.alpha,
        rank_pattern={name: int(rank) for name, rank in read_pattern(config.rank_pattern).items()},
        alpha_pattern=read_pattern(config.alpha_pattern), use_rslora=config.use_rslora, use_dora=config.use_dora,
        dropout=config.dropout, init=parse_init(config.init), store=config.store,
        target_parameters=config.target_parameters,
    )  # fmt: skip


def _schedule(config: TrainConfig, kind: TaskKind, opened: OpenedModule, reading: Reading) -> StepSchedule:
    """The steps of a run: each takes so many rows, whatever they cost."""
    count = len(reading.costs)

    def usual(_: float) -> tuple[float, dict[str, float]]:
        factors = rate_factors(config, count, opened.session.rate_layers)
        return float(f"{kind.rate * math.prod(factors.values()):.1e}"), factors

    return StepSchedule(config, [1] * count, config.batch_rows or kind.step_rows, count, usual, kind.epochs)


def _cost(config: TrainConfig, opened: OpenedModule, reading: Reading, schedule: StepSchedule) -> ModuleCost:
    """What the steps take; a BaseModelError if the module cannot be run on the rows at all."""
    try:
        return plan_memory(config, opened.session, reading, schedule)
    except (ThimbleError, MemoryError):
        raise
    except Exception as error:  # of code that is not ours, run here for the first time
        given = listing(f"{name} {array.shape}" for name, array in reading.batch(TRAIN, [0], None).inputs.items())
        raise BaseModelError(
            f"base {opened.base.name} fails on what it is given, which is {given} of one row: "
            f"{escaped(place_of(error, str(opened.base.path)))}; how rows are made ready stands in docs/tasks.md"
        ) from error


def _origin(opened: OpenedModule, rows: TaskRows, reading: Reading, execution: ExecutionPlan) -> dict[str, str]:
    from thimble.backends.torch.compute import torch_version
    from thimble.backends.torch.threads import num_cores

    return {
        "base": opened.base.quick_fingerprint(), "data": rows.digest, "cores": str(num_cores()),
        "execution": execution.described(), "torch": torch_version(),
        **{name: str(value) for name, value in reading.preprocessing.items() if name == "pooling"},
    }  # fmt: skip


# ---- what was decided, for people -----------------------------------------------------------------------------------


def _log_opened(opened: OpenedModule, rows: TaskRows, reading: Reading, config: TrainConfig, log: EventLog) -> None:
    """Tell what the base is, what is trained of it, and what is odd about the data."""
    base = opened.base
    log.note(f"base: {base.name} ({base.architecture or base.loader}, {base.num_parameters / 1e6:.1f}M parameters)")
    for note in (*base.notes, *rows.told):
        log.note(note)
    log_skipped(rows.skipped, log)
    for warning in (*base.warnings, *rows.warnings, *warnings_of(reading)):
        log.warning(warning)
    for decision in opened.decisions:
        log.decision(decision)
    if rows.labels:
        log.note(describe(rows.learned, "the training rows"))
    if weights := _class_weights(config, rows):
        shown = listing((f"{weight:.2g} {label}" for weight, label in zip(weights, rows.labels, strict=True)), 12)
        log.decision(f"class weights: {shown}")
    if rows.sources or config.valid_split:
        count = len(rows.sources) + len(reading.costs)
        way = way_to_more(count, rows.has_valid_part, config.valid_split, len(rows.labels))
        log_few(len(rows.sources), len(rows.unseen), way, log)


def _log_schedule(schedule: StepSchedule, rows: int, trained: str, log: EventLog) -> None:
    if schedule.minutes:
        log.decision(f"length: {schedule.minutes:g} minutes")
    else:
        steps = plural(schedule.total_steps or 0, "step")
        log.decision(f"length: {steps}, {schedule.epochs:.1f} passes over {plural(rows, 'row')}")
    if schedule.is_default_rate:
        times = "".join(f", times {factor:.2g} for {name}" for name, factor in schedule.rate_factors.items())
        log.decision(f"learning rate: {schedule.rate:g}, what usually does well for {trained}{times}")
