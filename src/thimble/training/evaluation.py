"""How good a model is on validation rows: loss, and answers scored by a metric."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.metrics import METRICS, LossSum, Metric, average, parse_tool_calls, valid_json
from thimble.data.batches import micro_batches
from thimble.data.encode import IGNORED, Encoder, Row
from thimble.data.records import Record
from thimble.data.tokenizer import Tokenizer
from thimble.errors import ConfigError
from thimble.events import EventLog, ShouldStop, never

if TYPE_CHECKING:
    from thimble.backends.torch.session import TorchSession

ROWS_AT_ONCE = 64  # answers written side by side: a step costs little more for many rows than for few
SHORT_ANSWER_WORDS = 8  # references up to this long are scored by exact match unless the user says otherwise


@dataclass(frozen=True)
class Question:
    """A validation row to be answered.

    Attributes:
        prompt: int32 (tokens,).
        reference: What the model should write.
        asked: The prompt's last user turn, for people.
        source: Where the row came from.
    """

    prompt: NDArray[np.int32]
    reference: str
    asked: str
    source: str


@dataclass(frozen=True)
class Answer:
    """A question with what a model wrote."""

    asked: str
    reference: str
    written: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class ValidationSet:
    """What every model is measured on, and how.

    Attributes:
        rows: Rows to take the loss over.
        questions: Rows to answer.
        metric: Scores an answer, or None.
        tokenizer: Turns tokens back into text.
        max_new_tokens: Most tokens of an answer.
        pass_tokens: Most tokens read at a time on a core.
        cache_tokens: Most tokens remembered at a time.
    """

    rows: Sequence[Row]
    questions: Sequence[Question]
    metric: Metric | None
    tokenizer: Tokenizer
    max_new_tokens: int
    pass_tokens: int
    cache_tokens: int


def measure(
    session: "TorchSession", validation: ValidationSet, log: EventLog, should_stop: ShouldStop = never
) -> tuple[LossSum, list[Answer]]:
    """Take the loss over all rows and answer the questions, greedily, longest first so that groups are even.

    Rows that begin with a question are read once for both.

    Args:
        session: The model.
        validation: The rows.
        log: Hears of progress.
        should_stop: Asked after every token; what is interrupted is dropped.

    Returns:
        The summed loss, and the answers in the order of the questions.
    """
    questions, rest = validation.questions, {id(row): row for row in validation.rows}
    by_source = {row.source: row for row in validation.rows}
    readings = [_reading(question, by_source) for question in questions]
    for row in readings:
        rest.pop(id(row), None)
    loss = validation_loss(session, list(rest.values()), validation.pass_tokens, log, should_stop, "validation rows")
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    answers: dict[int, Answer] = {}
    while order and not should_stop():
        longest = len(questions[order[0]].prompt) + validation.max_new_tokens
        size = max(1, min(ROWS_AT_ONCE, validation.cache_tokens // longest))
        group, order = order[:size], order[size:]
        rows, prompts = [readings[i] for i in group], [len(questions[i].prompt) for i in group]
        part, written = session.answer(
            rows, prompts, validation.pass_tokens, validation.max_new_tokens, validation.tokenizer.stop_ids,
            on_token=lambda row, token: should_stop(),
        )  # fmt: skip
        if should_stop():
            break
        loss += part
        answers.update((i, _scored(questions[i], ids, validation)) for i, ids in zip(group, written, strict=True))
        log.progress("reading and answering validation rows,", len(answers), len(questions))
    return loss, [answers[i] for i in sorted(answers)]


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
    session: "TorchSession",
    rows: Sequence[Row],
    max_tokens: int,
    log: EventLog,
    should_stop: ShouldStop = never,
    what: str = "validation text",
) -> LossSum:
    """Summed loss over rows, in micro-batches of at most `max_tokens`; `what` is told with the progress."""
    total, batches = LossSum(), micro_batches(rows, max_tokens)
    for number, loss in enumerate(session.losses(batches)):
        total += loss
        log.progress(f"reading {what}, batch", number + 1, len(batches))
        if should_stop():
            break
    return total


def make_questions(records: Sequence[Record], encoder: Encoder, most: int) -> list[Question]:
    """The first `most` records that end in an answer, as questions."""
    questions: list[Question] = []
    for record in records:
        if len(questions) >= most:
            break
        found = encoder.question(record)
        if found:
            questions.append(Question(found[0], found[1], _asked(record), record.source))
    return questions


def _asked(record: Record) -> str:
    users = [turn.get("content") or "" for turn in record.messages or () if turn["role"] == "user"]
    return users[-1] if users else (record.prompt or "")


def choose_metric(wanted: str, questions: Sequence[Question]) -> tuple[str, Metric | None]:
    """The metric a user asked for, or the one that suits the references.

    Args:
        wanted: The option `metric`.
        questions: For `auto`: their references decide.

    Returns:
        Its name and function; None measures the loss alone.

    Raises:
        ConfigError: If the user's own function cannot be had.
    """
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
    assert spec is not None, path
    assert spec.loader is not None, path
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


def scores_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean of each figure over answers."""
    return average(answer.scores for answer in answers)
