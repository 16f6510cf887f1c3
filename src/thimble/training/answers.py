"""Validation rows as questions, and what models wrote to them."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.labels import label_of, stratified
from thimble.core.metrics import average
from thimble.data.encode import Encoder
from thimble.data.encode_all import last_answer
from thimble.data.records import Record
from thimble.events import EventLog
from thimble.training.run_folder import make_folder, write_text


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
    source: str = ""  # where the row came from; not known of runs of an older release
    problem: str = ""  # why the metric has no figure for it
    sizes: Mapping[str, float] = field(default_factory=dict)  # what figures count in means, such as characters; else 1

    def described(self) -> dict[str, Any]:
        """It as plain data, for a line of a file."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("problem", "sizes")}


def mean_scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Each figure over all answers that have it."""
    return average((answer.scores for answer in answers), (answer.sizes for answer in answers))


def make_questions(records: Sequence[Record], encoder: Encoder, most: int, has_labels: bool = False) -> list[Question]:
    """At most `most` records that end in an answer, as questions: the first, or with labels some of every label."""
    if has_labels:
        answers = [last_answer(record) for record in records]
        ending = [number for number, answer in enumerate(answers) if answer is not None]
        chosen = stratified([label_of(answers[number] or "") for number in ending], most)
        records = [records[ending[number]] for number in chosen]
    asked = ((record, encoder.question(record)) for record in records)
    questions = (Question(*found, _asked(record), record.source) for record, found in asked if found)
    return list(itertools.islice(questions, most))


def _asked(record: Record) -> str:
    users = [turn.get("content") or "" for turn in record.messages or () if turn["role"] == "user"]
    return users[-1] if users else (record.prompt or "")


def of_every_label(answers: Sequence[Answer], least: int, most: int) -> list[int]:
    """Numbers of answers to show: one of every expected label in turn until there are enough, at most `most`."""
    by_label: dict[str, list[int]] = {}
    for number, answer in enumerate(answers):
        by_label.setdefault(label_of(answer.reference), []).append(number)
    wanted = min(max(least, len(by_label)), most)
    turns = itertools.zip_longest(*by_label.values())
    return [number for turn in turns for number in turn if number is not None][:wanted]


def write_answers(path: str | None, rows: Iterable[Mapping[str, Any]], log: EventLog) -> None:
    """Write answers as JSON lines, if the user named a file; the rest of a result does not depend on it."""
    if not path:
        return
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        make_folder(Path(path).absolute().parent)
        write_text(Path(path), text.encode(errors="replace").decode())  # lone surrogates are no UTF-8
    except OSError as error:
        log.warning(f"the answers cannot be written to {path} ({error.strerror or error})")
    else:
        log.note(f"answers: all of them are in {path}")
