"""`thimble plan`: what a training run would decide, need and cost, without training."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from thimble.config.train import PlanConfig
from thimble.core.targets import select_layers
from thimble.events import EventLog, OnEvent, ignore
from thimble.models.cost import (
    ExecutionPlan,
    Work,
    adapter_parameters,
    estimate_memory,
    estimate_seconds,
)
from thimble.models.machine import Machine, available_bytes, disk_bytes_per_second
from thimble.training.plan import RunPlan, describe_base, plan_run


@dataclass(frozen=True)
class Alternative:
    """Another run than the one that was planned.

    Attributes:
        change: What to change, as options.
        memory_bytes: Expected peak.
        seconds_per_step: Expected.
    """

    change: str
    memory_bytes: int
    seconds_per_step: float


@dataclass
class PlanReport:
    """What a run would be.

    Attributes:
        base: The base in one line.
        base_parameters: Numbers in it.
        adapter_parameters: Numbers that would be trained.
        rows: Rows to learn from.
        tokens_per_epoch: Tokens of all of them.
        target_tokens_per_epoch: Of these, the tokens learned from.
        longest_row_tokens: The longest row.
        steps: Optimiser steps, or None for a run by the clock.
        memory: Expected peak by part, bytes.
        available_bytes: What this machine has free.
        seconds_per_step: Expected.
        seconds_total: For all steps, evaluation not counted.
        tokens_per_second: Of training.
        machine: Rates of this machine, as measured within the last week; disk_bytes is measured now.
        alternatives: Other runs, and what they would cost.
        messages: Decisions, notes and warnings.
    """

    base: str
    base_parameters: int
    adapter_parameters: int
    rows: int
    tokens_per_epoch: int
    target_tokens_per_epoch: int
    longest_row_tokens: int
    steps: int | None
    memory: dict[str, int]
    available_bytes: int
    seconds_per_step: float
    seconds_total: float
    tokens_per_second: float
    machine: dict[str, Any]
    alternatives: list[Alternative]
    messages: dict[str, list[str]]


def plan(config: PlanConfig, on_event: OnEvent = ignore) -> PlanReport:
    """Decide everything that `train` would, and count what it would cost; writes nothing.

    Args:
        config: The options of train.
        on_event: Hears what was decided.

    Returns:
        The report.

    Raises:
        InputError: If train would refuse the run.
    """
    from thimble.backends.torch.compute import machine

    log = EventLog(on_event)
    run_plan = plan_run(config, log, needs_folder=False)
    steps, report, rates = run_plan.step_schedule.total_steps, run_plan.examples.train_report, machine()
    return PlanReport(
        base=describe_base(run_plan.model),
        base_parameters=run_plan.model.base.num_parameters,
        adapter_parameters=run_plan.work.trained,
        rows=report.num_rows,
        tokens_per_epoch=report.tokens,
        target_tokens_per_epoch=report.target_tokens,
        longest_row_tokens=report.longest,
        steps=steps,
        memory=run_plan.memory.parts(),
        available_bytes=available_bytes(),
        seconds_per_step=run_plan.seconds_per_step,
        seconds_total=run_plan.seconds_per_step * steps if steps else (run_plan.step_schedule.minutes or 0) * 60,
        tokens_per_second=run_plan.work.tokens / run_plan.seconds_per_step,
        machine={**asdict(rates), "disk_bytes": disk_bytes_per_second(run_plan.model.base.files[0])},
        alternatives=[
            other for other in _alternatives(run_plan, rates) if other.memory_bytes <= run_plan.allowed_bytes
        ],
        messages=log.messages,
    )


def _alternatives(run_plan: RunPlan, rates: Machine) -> Iterator[Alternative]:
    """Runs that cost less: in time, in memory or in both."""
    config, work, execution, base = run_plan.config, run_plan.work, run_plan.execution, run_plan.model.base
    longest = run_plan.examples.train_report.longest

    def cost(
        change: str, work: Work, compute: str = config.compute, execution: ExecutionPlan = execution
    ) -> Alternative:
        memory = estimate_memory(base, compute, work.trained, longest, execution, work.lowest)
        return Alternative(change, memory.total, estimate_seconds(base, compute, work, execution, rates))

    if "int8" in rates.flops and config.compute != "int8":
        yield cost("--compute int8", work, "int8", replace(execution, store="int8"))
    half = base.spec.num_layers // 2
    if 0 < half and work.lowest < half:
        name = f"last-{base.spec.num_layers - half}"
        some = {path: run_plan.sizes[path] for path in select_layers([name], run_plan.sizes)}
        trained = adapter_parameters(base.spec, some, config.use_dora)
        yield cost(f"--targets {name}", replace(work, trained=trained, lowest=half))
    if execution.checkpointed_blocks < base.spec.num_layers:
        less = cost("", work, execution=replace(execution, checkpointed_blocks=base.spec.num_layers))
        yield replace(less, change=f"--memory-budget {math.ceil(less.memory_bytes / 1e8) / 10:.1f}GB")
    if config.rank is not None and config.rank > 1:
        yield cost(f"--rank {config.rank // 2}", replace(work, trained=work.trained // 2))
