"""How good a model is on validation rows: loss, and answers scored by a metric."""

import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, Session
from thimble.core.metrics import METRICS, LossSum, Metric, parse_tool_calls, valid_json
from thimble.data.batches import micro_batches
from thimble.data.encode import IGNORED, Encoder, Row
from thimble.data.records import Record
from thimble.data.tokenizer import Tokenizer
from thimble.errors import ConfigError
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.execution import ExecutionPlan
from thimble.training.control import Control

SHORT_ANSWER_WORDS = 8  # references up to this long are scored by exact match unless the user says otherwise


@dataclass(frozen=True)
class Question:
    """A validation row to be answered."""

    prompt: NDArray[np.int32]  # int32 (tokens,)
    reference: str  # what the model should write
    asked: str  # the prompt's last user turn, for people
    source: str  # where the row came from


@dataclass(frozen=True)
class Answer:
    """A question with what a model wrote."""

    asked: str
    reference: str
    written: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ValidationSet:
    """What every model is measured on, and how."""

    rows: Sequence[Row]  # rows to take the loss over
    questions: Sequence[Question]  # rows to answer
    metric: Metric | None  # scores an answer, or None
    tokenizer: Tokenizer  # turns tokens back into text
    max_new_tokens: int  # most tokens of an answer
    cache_tokens: int  # most tokens in the key-value cache
    planned_tokens: int  # tokens read at a time, on all workers, for which that holds; fewer leave less for the cache


def measure(
    session: Session, adapter: ActiveAdapter, validation: ValidationSet, execution: ExecutionPlan, control: Control
) -> tuple[LossSum, list[Answer]]:
    """Take the loss over all rows and answer the questions, in their order, greedily; what is interrupted is dropped.

    Rows that begin with a question are read once for both.
    """
    questions, by_source = validation.questions, {row.source: row for row in validation.rows}
    readings = [_reading(question, by_source) for question in questions]
    rest = [row for row in validation.rows if not any(row is read for read in readings)]
    loss = validation_loss(session, adapter, rest, execution, control, "validation rows")
    session.release()  # the cache takes the place of activations
    engine = _engine(session, validation, execution)
    options = SamplingOptions(validation.max_new_tokens, validation.tokenizer.stop_ids)
    numbers = {}
    for place in sorted(range(len(readings)), key=lambda place: -len(questions[place].prompt)):
        scored = readings[place].ids, readings[place].labels
        numbers[engine.add(questions[place].prompt, options, adapter, scored)] = place
    written: dict[int, list[int]] = {place: [] for place in numbers.values()}
    answers: dict[int, Answer] = {}
    while not engine.is_idle and not control.should_stop():
        for token in engine.step():
            place = numbers[token.request]
            loss += token.loss or LossSum()
            written[place] += [] if token.id is None else [token.id]
            if token.finish:
                answers[place] = _scored(questions[place], written[place], validation)
                control.log.progress("reading and answering validation rows,", len(answers), len(numbers))
    return loss, [answers[place] for place in sorted(answers)]


def _engine(session: Session, validation: ValidationSet, execution: ExecutionPlan) -> Engine:
    """An engine that makes the most tokens a second in the memory there is."""
    share = min(1.0, execution.micro_tokens * execution.num_shares / validation.planned_tokens)
    return Engine(
        session, execution.num_shares, cache_tokens=int(validation.cache_tokens * share),
        prefill_tokens=execution.micro_tokens, is_interactive=False,
    )  # fmt: skip


def _reading(question: Question, rows: Mapping[str, Row]) -> Row:
    """The row that begins with a question; the bare question if the row was cut or left out."""
    row, tokens = rows.get(question.source), len(question.prompt)
    if row is not None and np.array_equal(row.ids[:tokens], question.prompt):
        return row
    return Row(question.prompt, np.full(tokens, IGNORED, np.int32), question.source)


def _scored(question: Question, ids: list[int], validation: ValidationSet) -> Answer:
    text = validation.tokenizer.decode(ids)
    scores = validation.metric(text, question.reference) if validation.metric else {}
    return Answer(question.asked, question.reference, text, scores)


def validation_loss(
    session: Session, adapter: ActiveAdapter, rows: Sequence[Row], execution: ExecutionPlan, control: Control, what: str
) -> LossSum:
    """Summed loss over rows, in micro-batches of the execution plan; `what` is reported with the progress."""
    total, batches = LossSum(), micro_batches(rows, execution.micro_tokens)
    for number, loss in enumerate(session.losses(adapter, batches, execution)):
        total += loss
        control.log.progress(f"reading {what}, batch", number + 1, len(batches))
        if control.should_stop():
            break
    return total


def make_questions(records: Sequence[Record], encoder: Encoder, most: int) -> list[Question]:
    """The first `most` records that end in an answer, as questions."""
    asked = ((record, encoder.question(record)) for record in records)
    questions = (Question(*found, _asked(record), record.source) for record, found in asked if found)
    return list(itertools.islice(questions, most))


def _asked(record: Record) -> str:
    users = [turn.get("content") or "" for turn in record.messages or () if turn["role"] == "user"]
    return users[-1] if users else (record.prompt or "")


def choose_metric(wanted: str, questions: Sequence[Question]) -> tuple[str, Metric | None]:
    """Name and function of the metric a user asked for, or of the one that suits the references; None: loss alone."""
    if wanted in METRICS:
        return wanted, METRICS[wanted]
    if wanted == "none" or (wanted == "auto" and not questions):
        return "none", None
    if wanted != "auto":
        return wanted, _user_metric(wanted)
    references = [question.reference for question in questions]
    if all(parse_tool_calls(text) for text in references):
        return "tools", METRICS["tools"]
    if all(text.lstrip()[:1] in ("{", "[") and valid_json(text, text)["valid JSON"] for text in references):
        return "json", METRICS["json"]
    if all(len(text.split()) <= SHORT_ANSWER_WORDS for text in references):
        return "exact", METRICS["exact"]
    return "none", None


def _user_metric(wanted: str) -> Metric:
    """Load `file.py:name`; the user named the file, so it is run."""
    expected = "expected auto, none, exact, json, tools, or your own function as file.py:name"
    path, _, name = wanted.rpartition(":")
    if not path.endswith(".py"):
        raise ConfigError(f"metric is {wanted!r}: {expected}")
    if not Path(path).is_file():
        raise ConfigError(f"metric is {wanted!r}: there is no file {path}; {expected}")
    spec = importlib.util.spec_from_file_location("user_metric", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"metric is {wanted!r}: {path} cannot be read as Python; {expected}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"metric {path} does not run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"metric is {wanted!r}: {path} defines no function {name}(answer, reference)")
    return _checked(function, wanted)


def _checked(function: Callable[[str, str], Any], wanted: str) -> Metric:
    """Let a user's metric return a number, a truth value or a dict of them."""

    def score(answer: str, reference: str) -> dict[str, float]:
        value = function(answer, reference)
        values = value if isinstance(value, Mapping) else {wanted.rpartition(":")[2]: value}
        try:
            return {str(name): float(number) for name, number in values.items()}
        except (TypeError, ValueError):
            raise ConfigError(f"metric {wanted} returned {value!r}: expected a number or a dict of numbers") from None

    return score
