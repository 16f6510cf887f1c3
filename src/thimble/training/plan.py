"""A training run, checked and decided but not begun: what `train` carries out and `plan` describes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thimble.config.train import TrainConfig
from thimble.core.method import parse_init
from thimble.core.schedule import SHORT_RUN_STEPS, default_beta2
from thimble.core.targets import Size, select_layers, select_parameters
from thimble.data.encode import Row
from thimble.data.examples import Examples, general_rows, log_examples, open_data, skipped_rows, split_and_encode
from thimble.data.model import Model, log_base, open_model
from thimble.errors import Problems, listing, plural
from thimble.events import EventLog
from thimble.files.peft import load_adapter
from thimble.models.adapter_base import difference
from thimble.models.cost import MemoryPlan, StepWork, adapter_parameters, cache_token_bytes
from thimble.models.execution import ExecutionPlan, activation_dtype
from thimble.models.model_spec import adapted_shapes
from thimble.training import run_folder
from thimble.training.answers import Question
from thimble.training.calibration import CalibrationData
from thimble.training.checkpoint import Checkpoint, check_origin, latest_checkpoint, origin_of, saved_origin
from thimble.training.evaluation import ValidationSet, rows_alone
from thimble.training.evidence import log_evidence
from thimble.training.facts import RunFacts
from thimble.training.guard import EPOCHS_IN_A_ROW, MEMORISED_NATS
from thimble.training.initialise import check_init, narrowed
from thimble.training.kl_reference import described
from thimble.training.memory_plan import RunCost, plan_cost
from thimble.training.metric import ChosenMetric, choose_questions
from thimble.training.moved import log_changed_options, log_new_places, missing_parts
from thimble.training.step_schedule import StepSchedule
from thimble.training.strength import fixed_strength
from thimble.training.watch import Watch, choose_watch, log_watch

RUN_FOLDER_BYTES = 20_000_000  # report, logs and room to spare, beside adapter and checkpoints
# Adapter and initial adapter, each twice as large in delta form, and three checkpoints of seven times its size.
ADAPTER_FILES = 25
WARNED_RATE = 0.02  # of learning: far above what works for adapters
FEW_ROWS = 100  # to train on: a run that has more, and none to stop by, does not end because its loss is low


@dataclass(frozen=True)
class RunPlan:
    """Everything that is decided before the first weight is loaded."""

    config: TrainConfig  # options with compute type, store, rate and steps resolved
    model: Model  # the base with tokenizer and template
    examples: Examples  # the user's rows
    general: tuple[Row, ...]  # rows of general text, for the forgetting check
    sizes: dict[str, Size]  # ranks and scales of the adapted layers by path, as far as they are known before training
    watch: Watch  # what validation rows are for
    strength: float | None  # of the result; None: chosen after training
    step_schedule: StepSchedule  # the steps
    memory: MemoryPlan  # expected peak
    allowed_bytes: int  # by the user, or by what the machine has free
    work: StepWork  # what a step does on average
    seconds_per_step: float  # expected
    execution: ExecutionPlan  # how a step is run
    validation: ValidationSet  # what the base and the result are measured on
    metric: ChosenMetric  # what answers are scored with
    token_ratio: float  # tokens for the words of the data, in those for English ones; 0 if there are too few
    origin: dict[str, str]  # what the run is made of, by hash, and what its sums depend on
    checkpoint: Checkpoint | None  # where it is resumed, or None
    folder: Path  # the run folder, not made yet
    answers_path: str | None  # a file for all answers, if the user wants one; no part of what repeats the run

    @property
    def patience(self) -> int:
        """Clear rises in a row that end the run; 0 is never."""
        return self.config.patience if self.watch.keeps_best else 0

    @property
    def memorised_nats(self) -> float:
        """Training loss of an epoch that ends the run when it is below it twice; 0 is never."""
        return _memorised_nats(self.config, len(self.examples.train), self.watch.keeps_best)

    @property
    def files(self) -> tuple[Path, ...]:
        """Of the data."""
        return self.examples.dataset.files

    def with_files(self, files: tuple[Path, ...], config: TrainConfig) -> "RunPlan":
        """The same run with its data in other files, which hold the same."""
        examples = replace(self.examples, dataset=replace(self.examples.dataset, files=files))
        return replace(self, config=config, examples=examples)

    def skipped_rows(self) -> list[dict[str, str]]:
        """Rows that were left out, with where each stands and why."""
        return skipped_rows(self.examples)

    def facts(self) -> RunFacts:
        """The run as its report tells of it."""
        examples, watch = self.examples, self.watch
        return RunFacts(
            task="text", unit="tokens", config=self.config, base=self.model.base, folder=self.folder,
            origin=self.origin,
            metric=self.metric, training_rows=len(examples.train), sources=[row.source for row in examples.valid],
            judging=watch.judging, untouched_rows=watch.untouched_rows, known_rows=len(examples.known),
            skipped_rows=examples.left_out, learned=examples.train_report.answers, memory=self.memory.parts(),
            seconds_per_step=self.seconds_per_step, safer_rate=self.step_schedule.safer_rate,
            token_ratio=self.token_ratio, answers_path=self.answers_path,
        )  # fmt: skip

    def calibration_data(self) -> CalibrationData:
        """The rows that initializations and ranks are found on: those of the first steps."""
        spec = self.model.base.spec
        shapes, experts = adapted_shapes(spec), {path: shape[0] for path, shape in spec.parameter_shapes().items()}
        return CalibrationData.of_steps(
            self.examples.train, self.step_schedule.rows, self.config.calibration_steps, general_rows=self.general,
            execution=self.execution, shapes={path: shapes[path] for path in self.sizes}, seed=self.config.seed,
            experts=experts,
        )  # fmt: skip


def plan_run(config: TrainConfig, log: EventLog, needs_folder: bool = True) -> RunPlan:
    """Check everything that can be wrong, decide what was left open; raises InputError with every problem."""
    log.stage("reading the base and the examples")
    model, sizes, examples, questions, metric, folder = _check(config, needs_folder, log)
    log.note(f"base: {describe_base(model)}")
    log_base(model.base, log, model.tokenizer)
    init = parse_init(config.init)
    if init.needs == "adapter" and not config.resume:
        if told := difference(init.path, load_adapter(init.path), model.base):
            log.warning(told)
    rank = 0 if init.needs == "adapter" else config.rank or 0
    if narrow := narrowed(rank, init, sizes, model.base.spec):
        ranks = listing(f"{path} {size.rank}" for path, size in narrow.items())
        log.note(f"rank: {rank} is more than some layers can have, which get less: {ranks}")
    log_examples(examples, log)
    ratio = log_evidence(examples, model.tokenizer, config.valid_split, log)
    checkpoint = latest_checkpoint(folder) if config.resume else None
    kept = checkpoint.progress.get("execution") if checkpoint else None  # sums in another order end in other digits
    cost = plan_cost(config, model.base, examples, sizes, (ExecutionPlan(**kept),) if kept else ())
    _log_cost(config, cost, len(examples.train), model.base.spec.num_layers, log)
    steps = cost.step_schedule.total_steps or (cost.step_schedule.minutes or 0.0) * 60 / cost.seconds_per_step
    config = config.replace(adam_beta2=_choose_beta2(config, steps, log))
    watch, strength = _choose_ends(config, examples, steps, log)
    origin = _origin(model, examples, cost)
    for name in checkpoint.damaged if checkpoint else ():
        log.warning(f"checkpoint {name} is damaged and is left out: the run goes on from step {checkpoint.step}")
    began = checkpoint.origin if checkpoint else (saved_origin(folder) or {}) if config.resume else {}
    places = {"base": str(model.base.path), "data": config.data}
    check_origin(began, origin, places, config.accept_changes, log)
    log_new_places(config, log)
    log_changed_options(config, log)
    return RunPlan(
        config=_resolved(config, cost, folder), model=model, examples=examples, general=general_rows(model, config),
        sizes=sizes, watch=watch, strength=strength, step_schedule=cost.step_schedule,
        memory=cost.memory, allowed_bytes=cost.allowed_bytes, work=cost.work, seconds_per_step=cost.seconds_per_step,
        execution=cost.execution, validation=_validation_set(config, model, examples, questions, cost, watch),
        metric=metric,
        token_ratio=ratio, origin=origin, checkpoint=checkpoint, folder=folder,
        answers_path=config.answers,
    )  # fmt: skip


def _check(
    config: TrainConfig, needs_folder: bool, log: EventLog
) -> tuple[Model, dict[str, Size], Examples, list[Question], ChosenMetric, Path]:
    """Read everything, and refuse the run with every problem found."""
    problems = Problems(config.problems)
    missing = missing_parts(config)
    problems.add(*set(missing.values()))
    model = None if "base" in missing else problems.attempt(open_model, config.base)
    dataset = None if "data" in missing else problems.attempt(open_data, config)
    folder = run_folder.choose_folder(config.out, config.data)
    sizes = problems.attempt(plan_sizes, config, model, folder) if model else None
    if needs_folder:
        trained = adapter_parameters(model.base.spec, sizes, config.use_dora) if model and sizes else 0
        needed = RUN_FOLDER_BYTES + trained * 4 * ADAPTER_FILES
        problems.attempt(run_folder.check_folder, folder, config.resume, needed)
    examples = problems.attempt(split_and_encode, dataset, model, config, log) if model and dataset else None
    questions: list[Question] = []
    metric = None
    problems.attempt(run_folder.check_new_file, config.answers, "--answers")
    if examples and "metric" not in missing:
        questions, metric = problems.attempt(choose_questions, examples, config, bool(config.answers)) or ([], None)
    model, sizes, examples, metric = problems.required(model, sizes, examples, metric)
    return model, sizes, examples, questions, metric, folder


def plan_sizes(config: TrainConfig, model: Model, folder: Path) -> dict[str, Size]:
    """Rank and scale of each adapted layer, as far as known; the run folder knows where a resumed run began."""
    spec, problems = model.base.spec, Problems()
    layers = problems.attempt(select_layers, config.targets, spec.linear_shapes())
    parameters = problems.attempt(select_parameters, config.target_parameters, list(spec.parameter_shapes()))
    if not (config.targets or config.target_parameters):
        problems.add(
            "--targets '': names no layer to adapt; leave it out for all-linear, or name layers such as q_proj,v_proj"
        )
    problems.add(*_unfit_for(parameters or (), config))
    layers, parameters = problems.required(layers, parameters)
    return check_init(parse_init(config.init), config, model, [*layers, *parameters], folder)


def _unfit_for(parameters: Sequence[str], config: TrainConfig) -> list[str]:
    """What the options ask for that parameters cannot have."""
    asked = {
        f"--init {config.init}": config.init not in ("kaiming", "gaussian") and "adapter:" not in config.init,
        "--use-dora": config.use_dora, f"--dropout {config.dropout:g}": config.dropout > 0,
        "--rank auto": config.rank is None,
    }  # fmt: skip
    what = f"--target-parameters {','.join(config.target_parameters)}"
    return [f"{name}: not with {what}, which has it in no adapter of PEFT; leave one of them out"
            for name, is_asked in asked.items() if is_asked and parameters]  # fmt: skip


def _origin(model: Model, examples: Examples, cost: RunCost) -> dict[str, str]:
    from thimble.backends.torch.compute import torch_version
    from thimble.backends.torch.threads import num_cores

    return origin_of(
        model.base, itertools.chain(examples.train, examples.valid), compute=cost.compute, cores=str(num_cores()),
        execution=cost.execution.described(), torch=torch_version(),
    )  # fmt: skip


def _resolved(config: TrainConfig, cost: RunCost, folder: Path) -> TrainConfig:
    """The options with what `auto` chose, so that they repeat the run."""
    schedule = cost.step_schedule
    length = {} if config.epochs or schedule.minutes else {"max_steps": schedule.total_steps}
    return config.replace(
        out=str(folder), compute=cost.compute, store=cost.execution.store, learning_rate=schedule.rate,
        warmup_steps=schedule.resolved_warmup, remeasure=False, answers=None, **length,
    )  # fmt: skip


def _validation_set(
    config: TrainConfig,
    model: Model,
    examples: Examples,
    questions: list[Question],
    cost: RunCost,
    watch: Watch,
) -> ValidationSet:
    """What is measured; the cache of an answer may take what training takes for activations, so that is the peak."""
    dtype = activation_dtype(cost.compute, cost.execution.store)
    cache_tokens = cost.memory.activations // cache_token_bytes(model.base.spec, dtype)
    planned_tokens = cost.execution.micro_tokens * cost.execution.num_shares
    most_new = config.max_new_tokens
    alone = rows_alone(watch.judging)
    return ValidationSet(examples.valid, questions, model.tokenizer, most_new, cache_tokens, planned_tokens, alone)


def _choose_ends(config: TrainConfig, examples: Examples, steps: float, log: EventLog) -> tuple[Watch, float | None]:
    """What ends a run and what its result is kept with: the parts of validation rows, and the strength."""
    strength, why = fixed_strength(config, len(examples.unseen))
    lengths, step_tokens = (
        [len(row.ids) for row in examples.valid],
        min(config.batch_tokens, examples.train_report.tokens),
    )
    watch = choose_watch(config, examples.unseen, lengths, step_tokens, steps, strength is None)
    log_watch(watch, config.patience, log)
    if most := _memorised_nats(config, len(examples.train), watch.keeps_best):
        log.decision(f"early end: if the training loss of {EPOCHS_IN_A_ROW} epochs in a row is below {most:g}")
    if strength is not None and config.strength != 1:
        log.decision(f"strength: {strength:g}, {why}")
    return watch, strength


def _choose_beta2(config: TrainConfig, steps: float, log: EventLog) -> float:
    """AdamW's β₂, as given or by the steps that are planned."""
    if config.adam_beta2 is not None:
        return config.adam_beta2
    length = "below" if steps < SHORT_RUN_STEPS else "of at least"
    beta2 = default_beta2(steps)
    log.decision(f"AdamW: beta2 {beta2:g}, for a run {length} {SHORT_RUN_STEPS:,} steps")
    return beta2


def _memorised_nats(config: TrainConfig, rows: int, keeps_best: bool) -> float:
    """Training loss at which a run on so many rows ends: where they are few, and validation rows too few to stop by."""
    return MEMORISED_NATS if config.patience and rows < FEW_ROWS and not keeps_best else 0.0


# ---- what was decided, for people -----------------------------------------------------------------------------------


def describe_base(model: Model) -> str:
    """A base in one line: name, family, size and dtypes."""
    base = model.base
    kinds = " and ".join(list(base.dtypes())[:2])
    size = f"{base.num_parameters / 1e6:.0f}M parameters, {base.size_bytes / 1e6:.0f} MB of {kinds}"
    return f"{base.name} ({base.spec.about}{',' if base.is_own else ';'} {size})"


def _log_cost(config: TrainConfig, cost: RunCost, rows: int, num_blocks: int, log: EventLog) -> None:
    why_compute, why_store = cost.reasons
    log.decision(f"compute: {why_compute}")
    _log_step_schedule(cost.step_schedule, rows, log)
    log.decision(why_store)
    execution = cost.execution
    parallel = f", {execution.num_shares} in parallel" if execution.num_shares > 1 else ""
    kept = "keeping all activations"
    if execution.checkpointed_blocks:
        kept = f"activation checkpointing in {execution.checkpointed_blocks} of {num_blocks} blocks"
    streamed = ", reading the weights from the file each time" if execution.is_streamed else ""
    need = f"about {cost.memory.total / 1e9:.2f} of {cost.allowed_bytes / 1e9:.2f} GB"
    log.decision(f"memory: {need}, in micro-batches of {execution.micro_tokens} tokens{parallel}, {kept}{streamed}")
    steps, seconds = cost.step_schedule.total_steps, cost.seconds_per_step
    in_all = f", {seconds * steps / 60:.1f} minutes in all" if steps else ""
    if kept := described(config):
        log.decision(kept)
    log.decision(f"time: about {seconds:.2g} s a step{in_all}; measuring before and after comes on top")


def _log_step_schedule(schedule: StepSchedule, rows: int, log: EventLog) -> None:
    if schedule.minutes:
        log.decision(f"length: {schedule.minutes:g} minutes")
    else:
        passes = f"{schedule.epochs:.1f} passes over {plural(rows, 'row')}"
        log.decision(f"length: {plural(schedule.total_steps or 0, 'step')}, {passes}")
    if schedule.total_steps and schedule.warmup_steps > schedule.total_steps:
        log.warning(
            f"--warmup-steps is {schedule.warmup_steps}, more than the {plural(schedule.total_steps, 'step')} of the "
            "run: the rate rises to its peak in all of them and never falls; name fewer"
        )
    if schedule.is_default_rate:
        derived = f"from the width of the base and {schedule.target_tokens:.0f} target tokens a step"
        times = "".join(f", times {factor:.2g} for {name}" for name, factor in schedule.rate_factors.items())
        log.decision(f"learning rate: {schedule.rate:g}, {derived}{times}")
    elif schedule.rate > WARNED_RATE:
        log.warning(f"--learning-rate is {schedule.rate:g}: far above what works for adapters (about 0.0001 to 0.002)")
