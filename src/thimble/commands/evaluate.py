"""`thimble evaluate`: a base against adapters on the same rows."""

from dataclasses import asdict, dataclass, field
from typing import Any

from thimble.backends.open import choose_store, open_session
from thimble.config.evaluate import EvaluateConfig
from thimble.core.adapter import Adapter
from thimble.core.metrics import Metric, average
from thimble.data.examples import Examples, encode_examples, log_read, open_data
from thimble.data.given_rows import FOLDER
from thimble.data.model import Model, log_base, model_with_adapters
from thimble.errors import Problems, plural
from thimble.events import EventLog, OnEvent, ShouldStop, ignore, never
from thimble.models.cost import cache_token_bytes
from thimble.models.execution import ExecutionPlan
from thimble.training.control import Control
from thimble.training.evaluation import Question, ValidationSet, choose_metric, make_questions, measure

SHOWN_ANSWERS = 3
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
        scores: Metrics, 0 to 1.
        answers: Some rows as asked, reference, written.
    """

    name: str
    loss: float
    perplexity: float
    target_tokens: int
    scores: dict[str, float]
    answers: list[dict[str, Any]] = field(default_factory=list)


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


def evaluate(config: EvaluateConfig, on_event: OnEvent = ignore, should_stop: ShouldStop = never) -> EvaluateReport:
    """Measure the bare base and each adapter on the same rows; those measured before a stop are reported."""
    log = EventLog(on_event)
    model, examples, adapters, questions, (metric_name, metric) = _prepare(config, log)  # before torch is loaded
    from thimble.backends.torch.compute import choose_compute
    from thimble.backends.torch.threads import num_cores

    compute, why = choose_compute(config.compute, config.remeasure)
    stores, why_store = choose_store(config.store, model.base, compute)
    log.decision(f"compute: {why}")
    log.decision(why_store)
    session, execution = open_session(model, compute, stores[0]), ExecutionPlan(stores[0], num_cores(), PASS_TOKENS)
    validation = ValidationSet(
        examples.valid, questions if metric else questions[:SHOWN_ANSWERS], metric, model.tokenizer,
        config.max_new_tokens, cache_tokens=CACHE_BYTES // cache_token_bytes(model.base.spec, compute),
        planned_tokens=PASS_TOKENS * execution.num_shares,
    )  # fmt: skip
    results: list[Result] = []
    for name, adapter in {"base": None, **adapters}.items():
        if should_stop():
            break
        log.stage(f"measuring {name}")
        loss, answers = measure(session, session.load(adapter), validation, execution, Control(log, should_stop))
        shown, scores = [asdict(answer) for answer in answers[:SHOWN_ANSWERS]], average(a.scores for a in answers)
        results.append(Result(name, loss.mean, loss.perplexity, loss.tokens, scores, shown))
    answered, named = len(questions) if metric else 0, FOLDER if config.has_given_rows else config.data
    return EvaluateReport(named, model.base.name, len(examples.valid), answered, metric_name, results, log.messages)


def _prepare(
    config: EvaluateConfig, log: EventLog
) -> tuple[Model, Examples, dict[str, Adapter], list[Question], tuple[str, Metric | None]]:
    """Check everything that can be wrong."""
    problems = Problems(config.problems)
    log.stage("reading the base and the examples")
    model, adapters = model_with_adapters(config.base, config.adapter, problems, log)
    dataset = problems.attempt(open_data, config)
    examples = None
    if model and dataset:
        rows = dataset.test or dataset.valid or dataset.train  # of a folder the test file, else its valid file
        examples = problems.attempt(encode_examples, dataset, (), rows, model, config, log)
    questions = make_questions(examples.valid_records, examples.encoder, config.eval_rows) if examples else []
    chosen = problems.attempt(choose_metric, config.metric, questions)
    model, examples, chosen = problems.required(model, examples, chosen)
    log_base(model.base, log, model.tokenizer, config.adapter)
    log.note(f"data: {plural(len(examples.valid), 'row')} of {examples.dataset.format}")
    log_read(examples, log)
    return model, examples, adapters, questions, chosen
