"""What a training run did, as plain data: report.json, `--json` and the Python call give the same names."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thimble.report.keys import with_new_keys


@dataclass
class TrainReport:
    """What a run did; the JSON report has the same names.

    Attributes:
        task: What was trained: `text`, `classify-image` and so on.
        status: `done`, `interrupted` or `diverged`.
        out: The run folder.
        adapter: The adapter folder.
        base: Name of the base.
        base_path: The file or folder it was read from, where what the user named only leads to it.
        loader: The class of transformers that opens the base for PEFT.
        steps: Optimiser steps taken.
        unit: What `tokens` counts: tokens, or for other tasks pixels or frames.
        tokens: Tokens read in training, prompts included.
        target_tokens: Of these, the tokens the loss was taken over; rows, where each has one label.
        seconds: Time spent training, evaluation not counted.
        total_seconds: Time from the call to the report.
        tokens_per_second: Tokens read in training per second.
        rows_per_second: Rows read in training per second.
        peak_memory_bytes: Peak resident memory of the process.
        loss_base: Validation loss of the bare base, nats per target token; NaN without validation rows.
        loss_before: The same with the adapter attached, before step 1.
        loss_after: The same after training.
        loss_train_before: Loss of the base on some training rows, nats per target token.
        loss_train_after: The same after training: how well those rows are remembered.
        loss_comparison: Validation rows measured one by one before and after: `rows` compared, `better` and `worse`,
            `chance`, that random signs alone would give as large a gain, and `low` and `high`, the 95 % interval of the
            gain (bootstrap). Where rows are pieces of texts, there are so many `groups`, each compared as one row.
        training_rows: Rows to learn from.
        validation_rows: Rows held out.
        known_rows: Of these, rows that are also training rows; they are left out of comparisons.
        untouched_rows: Validation rows on which the verdict rests, and which choose nothing, neither step nor strength;
            0 where they are too few to be set apart, or nothing is chosen.
        token_ratio: Tokens for the words of the data, over those for English ones; 0 if there are too few words.
        general_before: Loss of the base on general text, nats per token.
        general_after: The same after training; the rise is what was forgotten.
        general_comparison: The rows of general text before and after, as in `loss_comparison`.
        divergence: How far the model has moved from its base on `texts` that the base wrote, over all `places` of them:
            `same`, the share at which both find the same token likeliest, and `kl`, nats of KL(base ‖ model) a token,
            with 95 % intervals (`same_low`, `same_high`, `kl_low`, `kl_high`).
        metric: Name of the metric.
        metrics_before: Metrics of the base over validation rows, 0 to 1.
        metrics_after: The same after training.
        metrics_rows: Validation rows answered.
        metric_comparisons: By metric: answers that have it (`rows_before`, `rows_after`), and of `rows` compared those
            that rose (`better`) and fell (`worse`), with the `chance` of so many rises (McNemar's exact test) and
            the 95 % interval of the change, `low` to `high`.
        labels: If answers are labels: `training_rows` of each, and accuracy, majority baseline, precision, recall, F1
            and confusion, `before` and `after`.
        verdict: Whether it worked: `tone`, `word`, `text` and `cautions`.
        samples: Validation rows as asked, reference, and the answers before and after.
        skipped_rows: Rows left out, which skipped.jsonl lists with the reasons.
        adapter_parameters: Parameters of the adapter.
        base_parameters: Parameters of the base.
        initialization: What was measured to choose init and ranks, and the seconds it took.
        best_step: The step whose adapter was kept: the last one, unless an earlier one did better on validation rows.
        strength: The share of the trained update that the adapter has, as its alpha says.
        rollbacks: How often the run went back to its last valid state and on at half the learning rate.
        plan: Expected peak memory by part, bytes.
        planned_seconds_per_step: Expected time of a step.
        messages: Decisions, notes and warnings, in order.
        config: Every option, resolved.
        task_details: What tasks other than text show beside: how they are trained, calibration, ranks of retrieval.
    """

    task: str = "text"
    status: str = "done"
    out: str = ""
    adapter: str = ""
    base: str = ""
    base_path: str = ""
    loader: str = "AutoModelForCausalLM"
    steps: int = 0
    unit: str = "tokens"
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0
    rows_per_second: float = 0.0
    peak_memory_bytes: int = 0
    loss_base: float = math.nan
    loss_before: float = math.nan
    loss_after: float = math.nan
    loss_train_before: float = math.nan
    loss_train_after: float = math.nan
    loss_comparison: dict[str, Any] = field(default_factory=dict)
    training_rows: int = 0
    validation_rows: int = 0
    known_rows: int = 0
    untouched_rows: int = 0
    token_ratio: float = 0.0
    general_before: float = math.nan
    general_after: float = math.nan
    general_comparison: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] = field(default_factory=dict)
    metric: str = "none"
    metrics_before: Mapping[str, float] = field(default_factory=dict)
    metrics_after: Mapping[str, float] = field(default_factory=dict)
    metrics_rows: int = 0
    metric_comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    skipped_rows: int = 0
    adapter_parameters: int = 0
    base_parameters: int = 0
    initialization: dict[str, Any] = field(default_factory=dict)
    best_step: int = 0
    strength: float = 1.0
    rollbacks: int = 0
    plan: dict[str, int] = field(default_factory=dict)
    planned_seconds_per_step: float = 0.0
    messages: dict[str, list[str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    task_details: dict[str, Any] = field(default_factory=dict)


def read_report(values: Mapping[str, Any]) -> TrainReport:
    """Read a report back, of this release or the one before; what JSON could not hold is NaN again."""
    known = {spec.name: spec.default for spec in dataclasses.fields(TrainReport)}
    given = {name: value for name, value in with_new_keys(values).items() if name in known}
    lost = {name: math.nan for name, value in given.items() if value is None and isinstance(known[name], float)}
    return TrainReport(**given | lost)
