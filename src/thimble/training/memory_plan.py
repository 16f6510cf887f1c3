"""Which execution plan a run gets, and the memory and time it takes: counted the same way for all alternatives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from thimble.backends.open import choose_store
from thimble.config.train import PlanConfig, TrainConfig
from thimble.config.values import read_machine
from thimble.core.method import AUTO_RANK, parse_init
from thimble.core.sizes import MICRO_BATCH_TOKENS, padded
from thimble.core.targets import Size
from thimble.data.examples import Examples
from thimble.errors import DoesNotFitError, plural
from thimble.models import cost
from thimble.models.base import Base
from thimble.models.execution import ExecutionPlan
from thimble.models.machine import Machine, available_bytes
from thimble.models.model_spec import ModelSpec, adapted_shapes
from thimble.training.kl_reference import kl_pass_tokens, kl_places
from thimble.training.step_schedule import StepSchedule, text_schedule

MOST_SIZES = 7  # of batches, however uneven the rows are: what many rows make together varies less
SYSTEM_BYTES = 600_000_000  # that a freshly started server takes, of the memory that its description names
SHARE_TOKENS = 512  # a step is divided among workers as long as each gets so many tokens


@dataclass(frozen=True)
class Target:
    """The machine that a run is planned for: this one, or one that the user describes."""

    machine: Machine  # its rates
    free_bytes: int  # memory that a run may take
    is_here: bool = True


def target_machine(config: TrainConfig) -> Target:
    """This machine, or that of `--machine`: cores like those here, and what a fresh system leaves of its memory."""
    from thimble.backends.torch.compute import machine

    here, described = machine(), config.machine if isinstance(config, PlanConfig) else ()
    if not described:
        return Target(here, available_bytes())
    cores, memory = read_machine(described)
    cores = cores or here.cores
    flops = {name: rate * cores / here.cores for name, rate in here.flops.items()}
    free = memory - SYSTEM_BYTES if memory else available_bytes()
    name = f"{plural(cores, 'core')} like those of {here.name}"
    return Target(replace(here, name=name, cores=cores, flops=flops), max(0, free), is_here=False)


@dataclass(frozen=True)
class RunCost:
    """How the steps of a run are executed, and what they take."""

    compute: str  # `fp32`, `bf16`, `bf16-int8` or `int8`
    reasons: tuple[str, str]  # why that compute type, and why that store
    step_schedule: StepSchedule  # the steps
    execution: ExecutionPlan  # how a step is run
    memory: cost.MemoryPlan  # expected peak
    allowed_bytes: int  # by the user, or by what the machine has free
    work: cost.StepWork  # what a step does on average
    seconds_per_step: float  # expected


def plan_cost(
    config: TrainConfig, base: Base, examples: Examples, sizes: dict[str, Size], first: Sequence[ExecutionPlan] = ()
) -> RunCost:
    """Choose compute type, store and execution plan (those in `first` go first), and count what the run takes."""
    from thimble.backends.torch.compute import choose_compute

    spec = base.spec
    compute, why_compute = choose_compute(config.compute, config.remeasure)
    target = target_machine(config)
    stores, why_store = choose_store(config.store, base, compute)
    lengths, target_tokens = examples.train_report.lengths, examples.train_report.target_tokens
    layers = rate_layers(config, sizes, spec)
    step_schedule = text_schedule(config, lengths, target_tokens, spec.family, spec.hidden_size, layers)
    inputs = memory_inputs(config, compute, base, examples, sizes)
    num_sizes = min(MOST_SIZES, len({padded(length) for length in lengths}))
    step_tokens = min(config.batch_tokens, examples.train_report.tokens)
    cores = target.machine.cores if base.is_own else 1  # transformers runs one micro-batch at a time
    plans = [*first, *execution_plans(step_tokens, inputs.longest, stores, spec.num_layers, num_sizes, cores)]
    plans = [plan for plan in plans if plan.checkpointed_blocks <= spec.checkpointable_blocks]
    allowed, whose = config.memory_budget or target.free_bytes, "--memory-budget allows"
    if not config.memory_budget or (not target.is_here and target.free_bytes < allowed):
        allowed, whose = target.free_bytes, "this machine has free" if target.is_here else "--machine leaves"
    memory, execution = _first_that_fits(base, inputs, plans, allowed, whose)
    if execution.store != stores[0]:
        why_store = f"store {execution.store}: {stores[0]} does not fit the memory"
    report, steps = examples.train_report, step_schedule.steps_per_epoch
    square = sum(length * length for length in lengths) / report.tokens
    epochs = step_schedule.epochs if step_schedule.total_steps else 1.0
    work = cost.StepWork(
        report.tokens / steps,
        report.target_tokens / steps,
        square,
        inputs.trained,
        inputs.lowest,
        epochs,
        inputs.kl_pass_tokens / config.keep_general_every_steps,
    )
    seconds = cost.estimate_seconds(base, compute, work, execution, target.machine)
    return RunCost(compute, (why_compute, why_store), step_schedule, execution, memory, allowed, work, seconds)


def rate_layers(config: TrainConfig, sizes: Mapping[str, Size], spec: ModelSpec) -> list[tuple[int, int]]:
    """The rank that alpha is divided by, and in, of each adapted layer: what default learning rates depend on."""
    shapes, stacks = adapted_shapes(spec), spec.parameter_shapes()
    # Rank auto divides every alpha by the same number, whatever rank a layer is given.
    ranks = {path: size.rank // stacks[path][0] if path in stacks else size.rank for path, size in sizes.items()}
    return [(ranks[path] if config.rank else AUTO_RANK, shapes[path][1]) for path in sizes]


def memory_inputs(
    config: TrainConfig, compute: str, base: Base, examples: Examples, sizes: dict[str, Size]
) -> cost.MemoryInputs:
    """What the memory of a run depends on; ranks that are found from the data take memory before training."""
    init = parse_init(config.init)
    calibrates = ("inputs", "gradients") if config.rank is None else ()
    stacks = base.spec.parameter_shapes()
    return cost.MemoryInputs(
        compute=compute, trained=cost.adapter_parameters(base.spec, sizes, config.use_dora),
        longest=max(examples.train_report.longest, examples.valid_report.longest), lowest=cost.lowest_block(sizes),
        needs=(init.needs, *calibrates), is_delta=init.is_delta, kl_pass_tokens=kl_pass_tokens(config),
        kl_places=kl_places(config), replaced=sum(math.prod(stacks[path]) for path in sizes if path in stacks),
    )  # fmt: skip


def execution_plans(
    step_tokens: int, longest: int, stores: Sequence[str], num_blocks: int, num_sizes: int = 1, cores: int = 0
) -> list[ExecutionPlan]:
    """The ways to run a step, the fastest first, on so many cores or those here; the longest row is never split."""
    from thimble.backends.torch.threads import num_cores

    cores, step = cores or num_cores(), max(step_tokens, longest)
    shares = {max(1, min(cores, step_tokens // SHARE_TOKENS)), 1}
    sizes = {max(longest, min(size, step_tokens)) for size in (*MICRO_BATCH_TOKENS, longest)}
    checkpointed = sorted({num_blocks * quarters // 4 for quarters in range(5)})
    plans = [
        ExecutionPlan(store, share, size, min(share * size, step), blocks, is_streamed, num_sizes)
        for store in stores for share in shares for size in sizes for blocks in checkpointed
        for is_streamed in ((False, True) if store == "file" else (False,))
    ]  # fmt: skip
    # Of plans that cost about the same, the one that cuts a step the least: each product reads the weights again.
    return sorted(plans, key=lambda execution: (execution.relative_cost(num_blocks, cores), -execution.micro_tokens))


def _first_that_fits(
    base: Base, inputs: cost.MemoryInputs, plans: Sequence[ExecutionPlan], allowed: int, whose: str
) -> tuple[cost.MemoryPlan, ExecutionPlan]:
    """The first execution plan that fits the memory allowed, by whom the message says."""
    found = [(cost.estimate_memory(base, inputs, execution), execution) for execution in plans]
    for memory, execution in found:
        if memory.total <= allowed:
            return memory, execution
    least = min(memory.total for memory, _ in found)
    raise DoesNotFitError(
        f"the run needs at least {least / 1e9:.2f} GB and {whose} {allowed / 1e9:.2f} GB: lower --seq-len "
        f"(the longest row has {inputs.longest} tokens), lower --rank, take a smaller base, or allow at least "
        f"{math.ceil(least / 1e7) / 100:.2f}GB"
    )
