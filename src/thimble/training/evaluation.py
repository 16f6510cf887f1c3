"""How good a model is on validation rows: the loss of each, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from thimble.backends.session import ActiveAdapter, Session
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches
from thimble.data.encode import IGNORED, Row
from thimble.data.tokenizer import Tokenizer
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.execution import ExecutionPlan
from thimble.training.answers import Answer, Question
from thimble.training.control import Control

ROWS_ALONE = 32  # validation rows that are read one by one, so that a gain can be told from chance


@dataclass(frozen=True)
class ValidationSet:
    """What every model is measured on."""

    rows: Sequence[Row]  # rows to take the loss over
    questions: Sequence[Question]  # rows to answer
    tokenizer: Tokenizer  # turns tokens back into text
    max_new_tokens: int  # most tokens of an answer
    cache_tokens: int  # most tokens in the key-value cache
    planned_tokens: int  # tokens read at a time, on all workers, for which that holds; fewer leave less for the cache
    alone: Sequence[int] = ()  # numbers of rows whose losses are kept one by one


def measure(
    session: Session, adapter: ActiveAdapter, validation: ValidationSet, execution: ExecutionPlan, control: Control,
    alone: Mapping[int, LossSum] | None = None,
) -> tuple[LossSum, list[Answer]]:  # fmt: skip
    """Take the loss over all rows and answer the questions, in their order, greedily; what is interrupted is dropped.

    `alone` holds the losses of rows that were read one by one, which are not read again. Other rows that begin with a
    question are read once for both. Answers have no scores yet.
    """
    questions, rows, losses = validation.questions, validation.rows, alone or {}
    by_source = {row.source: row for number, row in enumerate(rows) if number not in losses}
    readings = [_reading(question, by_source) for question in questions]
    done = {id(reading) for reading in readings}
    rest = [row for number, row in enumerate(rows) if number not in losses and id(row) not in done]
    total = sum(losses.values(), validation_loss(session, adapter, rest, execution, control, "validation rows"))
    session.release()  # the cache takes the place of activations
    engine = make_engine(session, validation, execution)
    options = SamplingOptions(validation.max_new_tokens, validation.tokenizer.stop_ids)
    places = {}
    for place in sorted(range(len(readings)), key=lambda place: -len(questions[place].prompt)):
        scored = readings[place].ids, readings[place].labels
        places[engine.add(questions[place].prompt, options, adapter, scored)] = place
    written: dict[int, list[int]] = {place: [] for place in places.values()}
    answers: dict[int, Answer] = {}
    while not engine.is_idle and not control.should_stop():
        for token in engine.step():
            place = places[token.request]
            written[place] += [] if token.id is None else [token.id]
            total += token.loss or LossSum()
            if token.finish:
                question, text = questions[place], validation.tokenizer.decode(written[place])
                answers[place] = Answer(question.asked, question.reference, text, {}, question.source)
                control.log.progress("reading and answering validation rows,", len(answers), len(places))
    return total, [answers[place] for place in sorted(answers)]


def rows_alone(unseen: Sequence[int]) -> list[int]:
    """Which validation rows are read one by one: some of those that say something new, evenly spread."""
    count = min(ROWS_ALONE, len(unseen))
    return [unseen[int((place + 0.5) * len(unseen) / count)] for place in range(count)]


def losses_alone(
    session: Session, adapter: ActiveAdapter, validation: ValidationSet, execution: ExecutionPlan, control: Control
) -> dict[int, LossSum]:
    """The losses of rows by their numbers; not of all if somebody wants to leave."""
    rows = [validation.rows[number] for number in validation.alone]
    found = row_losses(session, adapter, rows, execution, control, "validation rows one by one")
    return {validation.alone[place]: loss for place, loss in found.items()}


def make_engine(session: Session, validation: ValidationSet, execution: ExecutionPlan) -> Engine:
    """An engine that makes the most tokens a second in the memory there is."""
    share = min(1.0, execution.micro_tokens * execution.num_shares / validation.planned_tokens)
    return Engine(
        session, execution.num_shares, cache_tokens=int(validation.cache_tokens * share),
        prefill_tokens=execution.micro_tokens, is_interactive=False,
    )  # fmt: skip


def _reading(question: Question, rows: Mapping[str, Row]) -> Row:
    """The row that begins with a question; the bare question if the row was cut, left out or read before."""
    row, tokens = rows.get(question.source), len(question.prompt)
    if row is not None and np.array_equal(row.ids[:tokens], question.prompt):
        return row
    return Row(question.prompt, np.full(tokens, IGNORED, np.int32), question.source)


def row_losses(
    session: Session, adapter: ActiveAdapter, rows: Sequence[Row], execution: ExecutionPlan, control: Control, what: str
) -> dict[int, LossSum]:
    """The loss of each row by its number, read in micro-batches; not of all if somebody wants to leave."""
    found: dict[int, LossSum] = {}
    batches = micro_batches(rows, execution.micro_tokens, shares_prefixes=session.shares_prefixes)
    for batch, losses in zip(batches, session.row_losses(adapter, batches, execution), strict=True):
        found |= dict(zip(batch.numbers.tolist(), losses, strict=True))
        control.log.progress(f"reading {what},", len(found), len(rows))
        if control.should_stop():
            break
    return dict(sorted(found.items()))


def validation_loss(
    session: Session, adapter: ActiveAdapter, rows: Sequence[Row], execution: ExecutionPlan, control: Control, what: str
) -> LossSum:
    """Summed loss over rows, in micro-batches of the execution plan; `what` is reported with the progress."""
    total = LossSum()
    batches = micro_batches(rows, execution.micro_tokens, shares_prefixes=session.shares_prefixes)
    for number, loss in enumerate(session.losses(adapter, batches, execution)):
        total += loss
        control.log.progress(f"reading {what}, batch", number + 1, len(batches))
        if control.should_stop():
            break
    return total
