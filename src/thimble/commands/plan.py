"""`thimble plan`: what a training run would decide, need and cost, without training."""

from dataclasses import asdict, dataclass
from typing import Any

from thimble.config.train import PlanConfig
from thimble.errors import ConfigError
from thimble.events import EventLog, OnEvent, ignore
from thimble.models.machine import disk_bytes_per_second
from thimble.training.alternatives import Alternative, alternatives
from thimble.training.memory_plan import Target, target_machine
from thimble.training.module_plan import plan_module_run
from thimble.training.plan import describe_base, plan_run
from thimble.training.task_choice import TEXT, choose_task


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
        task: What would be trained.
        unit: What `tokens` are: tokens, or for other tasks pixels or frames.
        rows_per_second: Of training.
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
    task: str = TEXT
    unit: str = "tokens"
    rows_per_second: float = 0.0


def plan(config: PlanConfig, on_event: OnEvent = ignore) -> PlanReport:
    """Decide everything that `train` would, and count what it would cost; write nothing."""
    log = EventLog(on_event)
    if (task := choose_task(config, log)) != TEXT:
        return _plan_module(config, task, log)
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
        alternatives=list(alternatives(config, run_plan)), messages=log.messages,
    )  # fmt: skip


def _plan_module(config: PlanConfig, task: str, log: EventLog) -> PlanReport:
    """The same of a run on a module, which is opened and run for a few rows to measure what it takes."""
    if config.machine:
        raise ConfigError(
            f"--machine {','.join(config.machine)}: a module is measured where it runs, so there is no plan for "
            f"another machine with --task {task}; leave it out"
        )
    plan = plan_module_run(config, task, log, needs_folder=False)
    costs, steps, base = plan.reading.costs, plan.step_schedule.total_steps, plan.opened.base
    seconds = plan.seconds_per_step
    return PlanReport(
        base=base.name, base_parameters=base.num_parameters, adapter_parameters=plan.opened.session.trained_parameters,
        rows=len(costs), tokens_per_epoch=sum(costs), target_tokens_per_epoch=len(costs),
        longest_row_tokens=max(costs), steps=steps, memory=plan.memory.parts(), available_bytes=plan.allowed_bytes,
        seconds_per_step=seconds, seconds_total=seconds * steps if steps else (plan.step_schedule.minutes or 0) * 60,
        tokens_per_second=sum(costs) / plan.step_schedule.steps_per_epoch / seconds,
        machine=asdict(target_machine(config).machine), alternatives=[], messages=log.messages, task=task,
        unit=plan.reading.unit, rows_per_second=len(costs) / plan.step_schedule.steps_per_epoch / seconds,
    )  # fmt: skip


def _about_estimate(target: Target) -> str:
    """How far the plan for another machine may be believed."""
    return (
        f"planned for {target.machine.name} with {target.free_bytes / 1e9:.2f} GB for the run: its memory is counted, "
        "but its speed is at best that of this processor for so many cores, with the memory bandwidth of this machine; "
        "another processor may be several times faster or slower. Run plan there to know"
    )
