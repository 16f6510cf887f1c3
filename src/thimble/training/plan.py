"""A training run, checked and decided but not begun: what `train` carries out and `plan` describes."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from thimble.config.train import TrainConfig
from thimble.core.method import parse_init
from thimble.core.metrics import Metric
from thimble.core.sizes import MICRO_BATCH_TOKENS, padded
from thimble.core.targets import Size, select_layers
from thimble.data.encode import Row, encode_all
from thimble.data.records import MAX_VALIDATION_ROWS, Dataset, general_records, split_rows
from thimble.data.spool import Chosen
from thimble.errors import DoesNotFitError, Problems, plural
from thimble.events import EventLog
from thimble.models.cost import (
    ExecutionPlan,
    MemoryPlan,
    Work,
    adapter_parameters,
    cache_token_bytes,
    estimate_memory,
    estimate_seconds,
    lowest_block,
)
from thimble.models.machine import available_bytes
from thimble.training import run_folder
from thimble.training.calibration import CalibrationData
from thimble.training.checkpoint import Checkpoint, check_origin, latest_checkpoint, origin_of
from thimble.training.evaluation import Question, ValidationSet, choose_metric, make_questions
from thimble.training.initialise import check_init
from thimble.training.prepare import (
    Examples,
    Model,
    choose_store,
    encode_examples,
    log_examples,
    make_encoder,
    open_data,
    open_model,
)
from thimble.training.step_schedule import StepSchedule

MOST_SIZES = 7  # of batches, however uneven the rows are: what many rows make together varies less
SHARE_TOKENS = 512  # a step is shared out to cores as long as each gets so many tokens
RUN_FOLDER_BYTES = 20_000_000  # report, logs and room to spare, beside adapter and checkpoints
ADAPTER_FILES = (
    25  # adapter and start, each twice as large in delta form, and three checkpoints of seven times its size
)
WARNED_RATE = 0.02  # of learning: far above what works for adapters
WATCHED_SHARE = 0.05  # of a run's time, spent on validation rows on the way
TRAINED_TOKEN_COST = 2.5  # of a token that is learned from, in tokens that are only read
MOST_WATCHES, LEAST_WATCHES = 9, 3  # measurements on the way
LEAST_WATCHED = 16  # rows: fewer say too little to stop by
SHOWN_WITHOUT_METRIC = 3  # validation rows answered only to be looked at


@dataclass(frozen=True)
class RunPlan:
    """Everything that was decided before the first weight is loaded.

    Attributes:
        config: Options with compute type, store, rate and steps resolved.
        model: The base with tokenizer and template.
        examples: The user's rows.
        general: Rows of general text, for the forgetting check.
        layers: Paths of the adapted layers.
        sizes: Their ranks and scales, as far as they are known before training.
        watched: Held-out rows measured on the way.
        eval_every_steps: How often; 0 is never.
        step_schedule: The steps.
        memory: Expected peak.
        allowed_bytes: By the user, or by what the machine has free.
        work: What a step does on average.
        seconds_per_step: Expected.
        execution: How a step is run.
        validation: What the base and the result are measured on.
        metric_name: What the metric is called.
        origin: What the run is made of, by hash, and what its sums depend on.
        checkpoint: Where it is taken up, or None.
        folder: The run folder, not made yet.
    """

    config: TrainConfig
    model: Model
    examples: Examples
    general: tuple[Row, ...]
    layers: list[str]
    sizes: dict[str, Size]
    watched: list[Row]
    eval_every_steps: int
    step_schedule: StepSchedule
    memory: MemoryPlan
    allowed_bytes: int
    work: Work
    seconds_per_step: float
    execution: ExecutionPlan
    validation: ValidationSet
    metric_name: str
    origin: dict[str, str]
    checkpoint: Checkpoint | None
    folder: Path

    def calibration_data(self) -> CalibrationData:
        """The rows that initializations and ranks are found on: those of the first steps."""
        shapes = self.model.base.spec.linear_shapes()
        return CalibrationData.of_steps(
            self.examples.train, self.step_schedule.rows, self.config.calibration_steps, general_rows=self.general,
            micro_tokens=self.execution.micro_tokens, shapes={path: shapes[path] for path in self.layers},
            seed=self.config.seed,
        )  # fmt: skip


def plan_run(config: TrainConfig, log: EventLog, needs_folder: bool = True) -> RunPlan:
    """Check everything that can be wrong, decide everything that was left open.

    Args:
        config: The options.
        log: Hears what was found and decided.
        needs_folder: Whether a run folder will be written.

    Returns:
        The run_plan.

    Raises:
        InputError: With every problem found.
    """
    log.stage("reading the base and the examples")
    checked = _check(config, needs_folder, log)
    log.note(f"base: {describe_base(checked.model)}")
    log_examples(checked.examples, log)
    return _decide(config, checked, log)


class _Checked(NamedTuple):
    """What was found sound."""

    model: Model
    layers: list[str]
    sizes: dict[str, Size]
    examples: Examples
    questions: list[Question]
    metric: tuple[str, Metric | None]
    folder: Path


def _check(config: TrainConfig, needs_folder: bool, log: EventLog) -> _Checked:
    """Read everything, and refuse the run with every problem found."""
    problems = Problems(config.problems)
    model = problems.attempt(open_model, config.base)
    dataset = problems.attempt(open_data, config.data, config.strict)
    layers = problems.attempt(select_layers, config.targets, model.base.spec.linear_shapes()) if model else None
    folder = run_folder.choose_folder(config.out, config.data)
    sizes = (
        problems.attempt(check_init, parse_init(config.init), config, model, layers, folder)
        if model and layers
        else None
    )
    if needs_folder:
        trained = adapter_parameters(model.base.spec, sizes, config.use_dora) if model and sizes else 0
        needed = RUN_FOLDER_BYTES + trained * 4 * ADAPTER_FILES
        problems.attempt(run_folder.check_folder, folder, config.resume, needed)
    examples = problems.attempt(_split_and_encode, dataset, model, config, log) if model and dataset else None
    questions = make_questions(examples.valid_records, examples.encoder, config.eval_rows) if examples else []
    metric = problems.attempt(choose_metric, config.metric, questions)
    return _Checked(*problems.required(model, layers, sizes, examples, questions, metric, folder))


def _decide(config: TrainConfig, checked: _Checked, log: EventLog) -> RunPlan:
    """Choose what the user left open, and tell it."""
    from thimble.backends.torch.compute import choose_compute, machine, torch_version
    from thimble.backends.torch.threads import num_cores

    model, layers, sizes, examples, questions, (metric_name, metric), folder = checked
    layers = list(sizes)
    spec = model.base.spec
    compute, why_compute = choose_compute(config.compute)
    stores, why_store = choose_store(config, model.base, compute)
    log.decision(f"compute: {why_compute}")
    step_schedule = StepSchedule(config, examples.train_report.lengths, spec.family, spec.hidden_size)
    _log_step_schedule(step_schedule, len(examples.train), log)
    trained = adapter_parameters(spec, sizes, config.use_dora)
    lowest = lowest_block(layers)
    allowed = config.memory_budget or available_bytes()
    checkpoint = latest_checkpoint(folder) if config.resume else None
    kept = checkpoint.progress.get("execution") if checkpoint else None  # sums in another order end in other digits
    first = (ExecutionPlan(**kept),) if kept else ()
    memory, execution = _fit_memory(model, config, (compute, stores), (trained, lowest), examples, (allowed, first))
    log.decision(
        why_store if execution.store == stores[0] else f"store {execution.store}: {stores[0]} does not fit the memory"
    )
    log.decision(f"memory: {_described(memory, execution, spec.num_layers, allowed)}")
    work = _work(examples, step_schedule, trained, lowest)
    seconds = estimate_seconds(model.base, compute, work, execution, machine())
    _log_time(seconds, step_schedule, log)
    watched, every = _choose_watched(
        config, examples, step_schedule.total_steps or step_schedule.minutes * 60 / seconds
    )
    _log_watched(config, watched, every, log)
    origin = origin_of(
        model.base, itertools.chain(examples.train, examples.valid), compute=compute, cores=str(num_cores()),
        execution=execution.described(), torch=torch_version(),
    )  # fmt: skip
    if checkpoint:
        check_origin(checkpoint, origin, config.accept_changes, log)
    resolved = config.replace(
        out=str(folder), compute=compute, store=execution.store, learning_rate=step_schedule.rate, warmup_steps=step_schedule.warmup_steps,
        **({} if config.epochs or step_schedule.minutes else {"max_steps": step_schedule.total_steps}),
    )  # fmt: skip
    # Answering may take for its cache what training takes for activations: the peak is that of training.
    cache_tokens = memory.activations // cache_token_bytes(spec, compute)
    validation = ValidationSet(
        examples.valid, questions if metric else questions[:SHOWN_WITHOUT_METRIC], metric, model.tokenizer,
        config.max_new_tokens, execution.micro_tokens, cache_tokens,
    )  # fmt: skip
    return RunPlan(
        config=resolved, model=model, examples=examples, general=_general_rows(model, config), layers=layers,
        sizes=sizes, watched=watched, eval_every_steps=every, step_schedule=step_schedule, memory=memory, allowed_bytes=allowed,
        work=work, seconds_per_step=seconds, execution=execution, validation=validation, metric_name=metric_name,
        origin=origin, checkpoint=checkpoint, folder=folder,
    )  # fmt: skip


def _general_rows(model: Model, config: TrainConfig) -> tuple[Row, ...]:
    """General text for the forgetting check; conversations only where the base has a template for them."""
    records = [record for record in general_records() if model.template or record.text is not None]
    return tuple(encode_all(records, make_encoder(model, config.replace(loss_on="auto")))[0])


def _split_and_encode(dataset: Dataset, model: Model, config: TrainConfig, log: EventLog) -> Examples:
    if dataset.valid is not None:
        return encode_examples(dataset, dataset.train, dataset.valid, model, config, log)
    if dataset.is_text:
        return _split_pieces(encode_examples(dataset, dataset.train, (), model, config, log), config.valid_split)
    train, valid = split_rows(dataset.train, config.valid_split, config.seed)
    return encode_examples(dataset, train, valid, model, config, log)


def _split_pieces(examples: Examples, share: float) -> Examples:
    """Hold out pieces of long texts, evenly spread: a file of text is one record but many rows."""
    rows = examples.train
    count = min(max(1, round(len(rows) * share)), MAX_VALIDATION_ROWS) if share and len(rows) > 1 else 0
    held = {int((number + 0.5) * len(rows) / count) for number in range(count)}
    learned = [number for number in range(len(rows)) if number not in held]
    lengths = [examples.train_report.lengths[number] for number in learned]
    report = replace(
        examples.train_report, num_rows=len(learned), lengths=lengths, tokens=sum(lengths), longest=max(lengths),
        target_tokens=sum(rows[number].target_tokens for number in learned),
    )  # fmt: skip
    valid = tuple(rows[number] for number in sorted(held))
    return replace(examples, train=Chosen(rows, learned), train_report=report, valid=valid)


def describe_base(model: Model) -> str:
    """A base in one line: name, family, size and dtypes."""
    base = model.base
    kinds = " and ".join(list(base.dtypes())[:2])
    size = f"{base.num_parameters / 1e6:.0f}M parameters, {base.size_bytes / 1e6:.0f} MB of {kinds}"
    return f"{base.name} ({base.spec.family}, {size})"


def _log_step_schedule(step_schedule: StepSchedule, rows: int, log: EventLog) -> None:
    if step_schedule.minutes:
        log.decision(f"length: {step_schedule.minutes:g} minutes")
    else:
        passes = f"{step_schedule.epochs:.1f} passes over {plural(rows, 'row')}"
        log.decision(f"length: {plural(step_schedule.total_steps or 0, 'step')}, {passes}")
    if step_schedule.is_default_rate:
        times = "".join(f", times {factor:.2g} for {name}" for name, factor in step_schedule.rate_factors.items())
        log.decision(f"learning rate: {step_schedule.rate:g}, from the width of the base and the rows in a step{times}")
    elif step_schedule.rate > WARNED_RATE:
        log.warning(
            f"learning_rate is {step_schedule.rate:g}: far above what works for adapters (about 0.0001 to 0.002)"
        )


def _fit_memory(
    model: Model,
    config: TrainConfig,
    how: tuple[str, tuple[str, ...]],
    what: tuple[int, int],
    examples: Examples,
    limits: tuple[int, tuple[ExecutionPlan, ...]],
) -> tuple[MemoryPlan, ExecutionPlan]:
    """The way a run was begun in or else the fastest to run a step, if it fits the memory allowed."""
    (compute, stores), (allowed, first) = how, limits
    longest = max(examples.train_report.longest, examples.valid_report.longest)
    num_sizes = min(MOST_SIZES, len({padded(length) for length in examples.train_report.lengths}))
    step_tokens = min(config.batch_tokens, examples.train_report.tokens)
    plans = [*first, *_execution_plans(step_tokens, longest, stores, model.base.spec.num_layers, num_sizes)]
    trained, lowest = what
    looks_at_all = ("inputs", "gradients") if config.rank is None else ()
    init = parse_init(config.init)
    start = ((init.needs, *looks_at_all), init.is_delta)
    plans = [
        (estimate_memory(model.base, compute, trained, longest, execution, lowest, *start), execution)
        for execution in plans
    ]
    for plan, execution in plans:
        if plan.total <= allowed:
            return plan, execution
    least = min(plans, key=lambda pair: pair[0].total)[0]
    whose = "memory_budget allows" if config.memory_budget else "this machine has free"
    raise DoesNotFitError(
        f"the run needs at least {least.total / 1e9:.2f} GB and {whose} {allowed / 1e9:.2f} GB: lower seq_len "
        f"(the longest row has {longest} tokens), lower rank, take a smaller base, or allow at least "
        f"{math.ceil(least.total / 1e7) / 100:.2f}GB"
    )


def _work(examples: Examples, step_schedule: StepSchedule, trained: int, lowest: int) -> Work:
    """What a step of this run does on average."""
    report = examples.train_report
    steps = step_schedule.steps_per_epoch
    squares = sum(length * length for length in report.lengths)
    return Work(report.tokens / steps, report.target_tokens / steps, squares / report.tokens, trained, lowest)


def _choose_watched(config: TrainConfig, examples: Examples, steps: float) -> tuple[list[Row], int]:
    """Held-out rows to measure on the way, and every how many steps.

    All of it takes at most a small share of the run: as many rows as that allows, and at least LEAST_WATCHED, for which
    a short run is measured less often, or not at all.
    """
    rows = list(examples.valid)
    if not rows or config.eval_every_steps == 0:
        return [], 0
    tokens = sum(len(row.ids) for row in rows) / len(rows)
    step_tokens = min(config.batch_tokens, examples.train_report.tokens)
    allowed = WATCHED_SHARE * TRAINED_TOKEN_COST * step_tokens * steps / tokens  # rows read on the way, in all
    times = min(MOST_WATCHES, int(allowed / min(len(rows), LEAST_WATCHED)))
    every = config.eval_every_steps or (round(steps / (times + 1)) if times >= LEAST_WATCHES else 0)
    if not every:
        return [], 0
    count = min(len(rows), max(LEAST_WATCHED, int(allowed * every / steps)))
    return [rows[int(number * len(rows) / count)] for number in range(count)], max(1, every)


def _log_watched(config: TrainConfig, watched: Sequence[Row], every: int, log: EventLog) -> None:
    if not every:
        return
    stops = f"; {config.patience} clearly above the lowest in a row end the run" if config.patience else ""
    log.decision(f"validation loss: on {plural(len(watched), 'row')} every {plural(every, 'step')}{stops}")


def _log_time(seconds: float, step_schedule: StepSchedule, log: EventLog) -> None:
    whole = f", {seconds * step_schedule.total_steps / 60:.1f} minutes in all" if step_schedule.total_steps else ""
    log.decision(f"time: about {seconds:.2g} s a step{whole}; measuring before and after comes on top")


def _execution_plans(
    step_tokens: int, longest: int, stores: Sequence[str], num_blocks: int, num_sizes: int = 1
) -> list[ExecutionPlan]:
    """Ways to run a step of at most so many tokens, or of one row that is longer; the fastest first."""
    from thimble.backends.torch.threads import num_cores

    cores, step = num_cores(), max(step_tokens, longest)
    shares = {max(1, min(cores, step_tokens // SHARE_TOKENS)), 1}
    sizes = {max(longest, min(size, step_tokens)) for size in (*MICRO_BATCH_TOKENS, longest)}
    recomputed = sorted({num_blocks * quarters // 4 for quarters in range(5)})
    plans = [
        ExecutionPlan(store, share, size, min(share * size, step), again, is_streamed, num_sizes)
        for store in stores for share in shares for size in sizes for again in recomputed
        for is_streamed in ((False, True) if store == "file" else (False,))
    ]  # fmt: skip
    return sorted(plans, key=lambda execution: execution.relative_cost(num_blocks, cores))


def _described(memory: MemoryPlan, execution: ExecutionPlan, num_blocks: int, allowed: int) -> str:
    """How a step is run, and what it will take."""
    parallel = f", {execution.num_shares} in parallel" if execution.num_shares > 1 else ""
    kept = "keeping all activations"
    if execution.checkpointed_blocks:
        kept = f"recomputing {execution.checkpointed_blocks} of {num_blocks} blocks in the backward pass"
    streamed = ", reading the weights from the file each time" if execution.is_streamed else ""
    need = f"about {memory.total / 1e9:.2f} of {allowed / 1e9:.2f} GB"
    return f"{need}, in micro-batches of {execution.micro_tokens} tokens{parallel}, {kept}{streamed}"
