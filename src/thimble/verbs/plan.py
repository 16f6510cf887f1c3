"""`thimble plan`: what a training run would decide, need and cost, without training."""

import time
from dataclasses import dataclass
from typing import Any

from thimble.core.config import PlanConfig
from thimble.core.estimate import adapter_parameters, available_bytes
from thimble.data.batches import shares
from thimble.verbs.events import OnEvent, Teller, ignore
from thimble.verbs.job import Job, describe_base, prepare_job
from thimble.verbs.prepare import open_session
from thimble.verbs.train import start_adapter

MEASURED_STEPS = 2


@dataclass
class PlanReport:
    """What a run would be.

    Attributes:
        base: The base in one line.
        base_parameters: Numbers in it.
        adapter_parameters: Numbers that would be trained.
        rows: Rows to learn from.
        tokens_per_epoch: Tokens of all of them.
        label_tokens_per_epoch: Of these, the tokens learned from.
        longest_row_tokens: The longest row.
        steps: Optimiser steps, or None for a run by the clock.
        memory: Expected peak by part, bytes.
        available_bytes: What this machine has free.
        seconds_per_step: Measured on a few steps of this very run.
        seconds_total: For all steps, evaluation not counted.
        tokens_per_second: Of training.
        told: Decisions, notes and warnings.
    """

    base: str
    base_parameters: int
    adapter_parameters: int
    rows: int
    tokens_per_epoch: int
    label_tokens_per_epoch: int
    longest_row_tokens: int
    steps: int | None
    memory: dict[str, int]
    available_bytes: int
    seconds_per_step: float
    seconds_total: float
    tokens_per_second: float
    told: dict[str, list[str]]


def plan(config: PlanConfig, on_event: OnEvent = ignore) -> PlanReport:
    """Decide everything that `train` would, and time a few steps; writes nothing.

    Args:
        config: The knobs of train.
        on_event: Hears what was decided.

    Returns:
        The report.

    Raises:
        InputError: If train would refuse the run.
    """
    tell = Teller(on_event)
    job = prepare_job(config, tell, needs_folder=False)
    tell.stage("timing a few steps")
    seconds, tokens = _time_steps(job)
    steps, report = job.course.total_steps, job.examples.train_report
    return PlanReport(
        base=describe_base(job.model),
        base_parameters=job.model.base.num_parameters,
        adapter_parameters=adapter_parameters(job.model.base.spec, job.layers, job.config.rank),
        rows=report.num_rows,
        tokens_per_epoch=report.tokens,
        label_tokens_per_epoch=report.label_tokens,
        longest_row_tokens=report.longest,
        steps=steps,
        memory=job.memory.parts(),
        available_bytes=available_bytes(),
        seconds_per_step=seconds,
        seconds_total=seconds * steps if steps else (job.course.minutes or 0) * 60,
        tokens_per_second=tokens / seconds,
        told=tell.told,
    )


def _time_steps(job: Job) -> tuple[float, float]:
    """Mean seconds and tokens of a step, after one to warm up; the updates are thrown away."""
    session = open_session(job.model, job.config.compute, job.way)
    session.train(start_adapter(job.config, job), num_shares=job.way.num_shares)
    spent: list[float] = []
    tokens = 0
    for step in range(MEASURED_STEPS + 1):
        rows = [job.examples.train[number] for number in job.course.rows(step)]
        step_shares = shares(rows, job.way.num_shares, job.way.micro_tokens)
        began = time.perf_counter()
        gradients = session.gradients(step_shares, sum(row.label_tokens for row in rows))
        session.apply(gradients, job.course.rate, job.config.max_grad_norm)
        spent.append(time.perf_counter() - began)
        tokens += sum(len(row.ids) for row in rows) if step else 0
    return sum(spent[1:]) / MEASURED_STEPS, tokens / MEASURED_STEPS


def as_table(report: PlanReport) -> list[tuple[str, Any]]:
    """The figures worth a line each, for people."""
    memory = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in report.memory.items() if name != "total")
    share = report.adapter_parameters / report.base_parameters
    tokens = f"{report.tokens_per_epoch:,} tokens, {report.label_tokens_per_epoch:,} learned"
    data = f"{report.rows:,} rows, {tokens}; longest row {report.longest_row_tokens:,}"
    return [
        ("base", report.base),
        ("trained", f"{report.adapter_parameters / 1e6:.2f}M parameters ({share:.1%} of the base)"),
        ("data", data),
        ("memory", f"{report.memory['total'] / 1e9:.2f} GB of {report.available_bytes / 1e9:.2f} GB free"),
        ("", f"MB: {memory}"),
        ("speed", f"{report.tokens_per_second:,.0f} tokens/s, {report.seconds_per_step:.2f} s a step"),
        ("time", f"{report.seconds_total / 60:.1f} minutes" + (f" for {report.steps:,} steps" if report.steps else "")),
    ]  # fmt: skip
