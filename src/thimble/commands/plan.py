"""`thimble plan`: what a training run would decide, need and cost, without training."""

from dataclasses import asdict, dataclass
from typing import Any

from thimble.config.train import PlanConfig
from thimble.events import EventLog, OnEvent, ignore
from thimble.models.machine import disk_bytes_per_second
from thimble.training.alternatives import Alternative, alternatives
from thimble.training.memory_plan import Target, target_machine
from thimble.training.plan import describe_base, plan_run


@dataclass
class PlanReport:
    """What a run would be.

    Attributes:
        base: The base in one line.
        base_parameters: Parameters of the base.
        adapter_parameters: Parameters that would be trained.
        rows: Training rows.
        tokens_per_epoch: Tokens of all of them.
        target_tokens_per_epoch: Of these, the target tokens.
        longest_row_tokens: The longest row.
        steps: Optimiser steps, or None for a run by the clock.
        memory: Expected peak by part, bytes.
        available_bytes: What the machine has free.
        seconds_per_step: Expected.
        seconds_total: For all steps, evaluation not counted.
        tokens_per_second: Of training.
        machine: Rates of the machine, as measured within the last week; load is the share of the cores that other
            programs took meanwhile, disk_bytes is measured now. With --machine, is_estimate is true.
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
    """Decide everything that `train` would, and count what it would cost; write nothing."""
    log = EventLog(on_event)
    run_plan = plan_run(config, log, needs_folder=False)
    config = config.replace(remeasure=False)
    target, steps, report = target_machine(config), run_plan.step_schedule.total_steps, run_plan.examples.train_report
    disk = {"disk_bytes": disk_bytes_per_second(run_plan.model.base.files[0])} if target.is_here else {}
    if not target.is_here:
        log.warning(_about_estimate(target))
    return PlanReport(
        base=describe_base(run_plan.model), base_parameters=run_plan.model.base.num_parameters,
        adapter_parameters=run_plan.work.trained, rows=len(report.lengths), tokens_per_epoch=report.tokens,
        target_tokens_per_epoch=report.target_tokens, longest_row_tokens=report.longest, steps=steps,
        memory=run_plan.memory.parts(), available_bytes=target.free_bytes, seconds_per_step=run_plan.seconds_per_step,
        seconds_total=run_plan.seconds_per_step * steps if steps else (run_plan.step_schedule.minutes or 0) * 60,
        tokens_per_second=run_plan.work.tokens / run_plan.seconds_per_step,
        machine={**asdict(target.machine), **disk, "is_estimate": not target.is_here},
        alternatives=list(alternatives(config, run_plan, target.machine)), messages=log.messages,
    )  # fmt: skip


def _about_estimate(target: Target) -> str:
    """How far the plan for another machine may be believed."""
    return (
        f"planned for {target.machine.name} with {target.free_bytes / 1e9:.2f} GB for the run: its memory is counted, "
        "but its speed is at best that of this processor for so many cores, with the memory bandwidth of this machine; "
        "another processor may be several times faster or slower. Run plan there to know"
    )
