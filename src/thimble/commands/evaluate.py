"""`thimble evaluate`: a base against adapters on the same rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from thimble.backends.open import choose_store, open_session
from thimble.config.evaluate import EvaluateConfig
from thimble.config.groups import COLUMNS
from thimble.config.train import unused
from thimble.core.adapter import Adapter
from thimble.core.labels import AnswerCounts
from thimble.core.metrics import METRICS, LossSum
from thimble.data.examples import Examples, encode_examples, log_read, open_data
from thimble.data.given_rows import FOLDER
from thimble.data.model import Model, log_base, model_with_adapters
from thimble.data.records import Dataset
from thimble.data.run_columns import columns_of_run, typed_columns
from thimble.errors import DataError, Problems, RunError, plural
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.models.cost import cache_token_bytes
from thimble.models.execution import ExecutionPlan, activation_dtype
from thimble.training import run_folder
from thimble.training.answers import Answer, Question, mean_scores, of_every_label, write_answers
from thimble.training.comparison import compare_losses, compare_metrics, label_report
from thimble.training.control import Control
from thimble.training.evaluation import ValidationSet, losses_alone, measure, rows_alone
from thimble.training.evidence import log_labels, log_language, log_recall
from thimble.training.metric import ChosenMetric, choose_questions, score_answers
from thimble.training.module_adapter import is_of_module
from thimble.training.module_answers import measure_adapters
from thimble.training.task_choice import TEXT

SHOWN_ANSWERS, MOST_SHOWN = 3, 12
PASS_TOKENS = 1024  # of a batch, which one worker runs
CACHE_BYTES = 750_000_000  # for keys and values while answering


@dataclass
class Result:
    """How one model did.

    Attributes:
        name: `base`, or the adapter folder.
        loss: Nats per target token.
        perplexity: exp of the loss.
        target_tokens: Tokens the loss was taken over.
        scores: Metrics, each the mean over the answers that have it.
        counts: How many those are.
        answers: Some rows as asked, reference, written; with labels one of every label.
        labels: If answers are labels: accuracy, majority baseline, precision, recall, F1 and confusion.
        loss_comparison: Against the base, on rows measured one by one: `rows` compared, those that are `better` and
            `worse`, `chance`, that random signs alone would give as large a gain, and the 95 % interval of the
            gain, `low` to `high`.
        metric_comparisons: Likewise by metric (McNemar's exact test), with the answers that have it.
    """

    name: str
    loss: float
    perplexity: float
    target_tokens: int
    scores: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    loss_comparison: dict[str, Any] = field(default_factory=dict)
    metric_comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class EvaluateReport:
    """All results on the same rows, the base first.

    Attributes:
        data: What the user named.
        base: Name of the base.
        rows: Rows the loss was taken over.
        answered_rows: Rows answered for the metrics.
        metric: Name of the metric.
        results: One per model.
        messages: Decisions, notes and warnings, in order.
    """

    data: str
    base: str
    rows: int
    answered_rows: int
    metric: str
    results: list[Result]
    messages: dict[str, list[str]]


class Measured(NamedTuple):
    """What was measured of one model."""

    total: LossSum  # over all rows
    alone: dict[int, LossSum]  # of some rows, by their numbers
    answers: list[Answer]


def evaluate(config: EvaluateConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> EvaluateReport:
    """Measure the bare base and each adapter on the same rows; those measured before a stop are reported."""
    log = EventLog(on_event)
    if is_of_module(config.adapter, config.task, config.base):
        return _evaluate_module(config, log, should_stop)
    model, examples, adapters, questions, metric = _prepare(config, log)  # before torch is loaded
    from thimble.backends.torch.compute import choose_compute
    from thimble.backends.torch.threads import num_cores

    compute, why = choose_compute(config.compute, config.remeasure)
    stores, why_store = choose_store(config.store, model.base, compute)
    log.decision(f"compute: {why}")
    log.decision(why_store)
    session, execution = open_session(model, compute, stores[0]), ExecutionPlan(stores[0], num_cores(), PASS_TOKENS)
    validation = ValidationSet(
        examples.valid, questions, model.tokenizer, config.max_new_tokens,
        cache_tokens=CACHE_BYTES // cache_token_bytes(model.base.spec, activation_dtype(compute, stores[0])),
        planned_tokens=PASS_TOKENS * execution.num_shares, alone=rows_alone(examples.unseen) if adapters else (),
    )  # fmt: skip
    measured: dict[str, Measured] = {}
    for name, adapter in {"base": None, **adapters}.items():
        if should_stop():
            break
        log.stage(f"measuring {name}")
        control, active = Control(log, should_stop), session.load(adapter)
        alone = losses_alone(session, active, validation, execution, control)
        total, answers = measure(session, active, validation, execution, control, alone)
        measured[name] = Measured(total, alone, score_answers(answers, metric, log))
    sources = [row.source for row in examples.valid]
    results = _results(measured, metric, sources, examples.unseen)
    rows = ({"model": name, **answer.described()} for name, found in measured.items() for answer in found.answers)
    write_answers(config.answers, rows, log)
    _require_scores(results, measured, metric, log)
    answered = len(questions) if metric.function else 0
    named = FOLDER if config.has_given_rows else config.data
    return EvaluateReport(named, model.base.name, len(examples.valid), answered, metric.name, results, log.messages)


def _evaluate_module(config: EvaluateConfig, log: EventLog, should_stop: ShouldStop) -> EvaluateReport:
    """Measure adapters on modules, with what they are compared with first."""
    run_folder.check_new_file(config.answers, "--answers")
    used, scores = measure_adapters(config, log, should_stop)
    metric = ChosenMetric("labels" if used.rows.labels else "none", METRICS["labels"] if used.rows.labels else None)
    measured = {
        name: Measured(sum(found.row_losses.values(), LossSum()), dict(found.row_losses), list(found.answers))
        for name, found in scores.items()
    }
    results = _results(measured, metric, used.rows.sources, used.rows.unseen)
    rows = ({"model": name, **answer.described()} for name, found in measured.items() for answer in found.answers)
    write_answers(config.answers, rows, log)
    count = len(used.rows.sources)
    return EvaluateReport(config.data, used.base.name, count, count, metric.name, results, log.messages)


def _results(
    measured: Mapping[str, Measured], metric: ChosenMetric, sources: Sequence[str], numbers: Sequence[int]
) -> list[Result]:
    """How each model did, and how it compares with the first, on the rows of these numbers."""
    results: list[Result] = []
    unseen = {sources[number] for number in numbers}
    for name, (total, alone, answers) in measured.items():
        chosen = of_every_label(answers, SHOWN_ANSWERS, MOST_SHOWN) if metric.has_labels else range(len(answers))
        shown = [
            answers[number].described() for number in list(chosen)[: MOST_SHOWN if metric.has_labels else SHOWN_ANSWERS]
        ]
        scores = mean_scores(answers)
        counts = Counter(figure for answer in answers for figure in answer.scores)
        result = Result(name, total.mean, total.perplexity, total.tokens, scores, dict(counts), shown)
        if metric.has_labels and answers:
            result.labels = label_report(answers, AnswerCounts())
        base = next(iter(measured.values()))
        if results:
            result.loss_comparison = compare_losses(base.alone, alone, sources)
        if results and len(answers) == len(base.answers):
            result.metric_comparisons = compare_metrics(base.answers, answers, unseen)
        results.append(result)
    return results


def _require_scores(
    results: Sequence[Result], measured: Mapping[str, Measured], metric: ChosenMetric, log: EventLog
) -> None:
    """Fail honestly if the metric scored nothing at all, with what was measured beside it."""
    answers = sum(len(found.answers) for found in measured.values())
    if metric.function and answers and not any(result.scores for result in results):
        fault = [text for text in log.messages["warning"] if text.startswith("the metric ")][-1]
        losses = ", ".join(f"{result.name} {result.loss:.3f}" for result in results)
        raise RunError(f"{fault}. Mend it and run the command again; the losses do not depend on it: {losses}")


def _open(config: EvaluateConfig, log: EventLog) -> Dataset:
    """The rows, by the columns of the run that trained the adapter if none are named and the rows have them."""
    run = columns_of_run(config, config.adapter)
    if run is None:
        return open_data(config)
    try:
        dataset = open_data(config.replace(**{name: getattr(run, name) for name in COLUMNS}))
    except DataError:
        dataset = open_data(config)
        log.warning(
            f"the adapter was trained on other columns than these rows have ({typed_columns(run)}): they are asked "
            "otherwise than it has learned; name the columns here"
        )
    else:
        log.decision(f"columns as in the run that trained the adapter: {typed_columns(run)}")
    return dataset


def _prepare(
    config: EvaluateConfig, log: EventLog
) -> tuple[Model, Examples, dict[str, Adapter], list[Question], ChosenMetric]:
    """Check everything that can be wrong."""
    problems = Problems((*config.problems, *unused(config, TEXT)))
    log.stage("reading the base and the examples")
    model, adapters = model_with_adapters(config.base, config.adapter, problems, log)
    dataset = problems.attempt(_open, config, log)
    problems.attempt(run_folder.check_new_file, config.answers, "--answers")
    examples = chosen = None
    if model and dataset:
        rows = dataset.test or dataset.valid or dataset.train  # of a folder the test file, else its valid file
        examples = problems.attempt(encode_examples, dataset, (), rows, model, config, log)
    if examples:
        chosen = problems.attempt(choose_questions, examples, config, bool(config.answers))
    model, examples, chosen = problems.required(model, examples, chosen)
    log_base(model.base, log, model.tokenizer, config.adapter)
    log.note(f"data: {plural(len(examples.valid), 'row')} of {examples.dataset.format}")
    log_read(examples, log)
    log_labels(examples, log)
    log_language(examples, model.tokenizer, log)
    log_recall(adapters, examples.dataset, log)
    return model, examples, adapters, *chosen
