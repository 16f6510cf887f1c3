"""Runs that cost less than the one planned: each is planned as the run itself is, with one option changed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from thimble.config.train import TrainConfig
from thimble.errors import InputError
from thimble.models.cost import estimate_memory
from thimble.training.memory_plan import memory_inputs, plan_cost
from thimble.training.plan import RunPlan, plan_sizes

NOTICED = 0.999  # of memory or time: what saves less only looks cheaper by rounding


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


def alternatives(config: TrainConfig, run_plan: RunPlan) -> Iterator[Alternative]:
    """Runs that cost less in time, in memory or in both than the one planned, and fit what is allowed."""
    for change, options in _changes(config, run_plan):
        try:
            changed = config.replace(**{"memory_budget": run_plan.allowed_bytes, "remeasure": False, **options})
            sizes = plan_sizes(changed, run_plan.model, run_plan.folder)
            cost = plan_cost(changed, run_plan.model.base, run_plan.examples, sizes)
        except InputError:  # a run that would be refused is not offered
            continue
        found = Alternative(change, cost.memory.total, cost.seconds_per_step)
        is_cheaper = (
            found.memory_bytes < NOTICED * run_plan.memory.total
            or found.seconds_per_step < NOTICED * run_plan.seconds_per_step
        )
        if is_cheaper and found.memory_bytes <= run_plan.allowed_bytes:
            yield found


def _changes(config: TrainConfig, run_plan: RunPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options that make a run cheaper: as they are typed, and as values."""
    base, work = run_plan.model.base, run_plan.work
    num_blocks = base.spec.num_layers
    for compute in ("bf16-int8", "int8") if base.is_own else ():
        if run_plan.config.compute != compute and not (compute == "int8" and config.store == "dense"):
            yield f"--compute {compute}", {"compute": compute}
    if 0 < num_blocks // 2 and work.lowest < num_blocks // 2:
        name = f"last-{num_blocks - num_blocks // 2}"
        yield f"--targets {name}", {"targets": (name,)}
    if run_plan.execution.checkpointed_blocks < base.spec.checkpointable_blocks:
        inputs = memory_inputs(config, run_plan.config.compute, base, run_plan.examples, run_plan.sizes)
        least = estimate_memory(base, inputs, replace(run_plan.execution, checkpointed_blocks=num_blocks)).total
        gigabytes = math.ceil(least / 1e8) / 10
        if gigabytes * 1e9 < run_plan.memory.total:
            yield f"--memory-budget {gigabytes:.1f}GB", {"memory_budget": round(gigabytes * 1e9)}
    if config.rank is not None and config.rank > 1:
        yield f"--rank {config.rank // 2}", {"rank": config.rank // 2}
