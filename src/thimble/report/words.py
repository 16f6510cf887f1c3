"""What a report calls things, by the task that was trained: what it is compared with, and what it counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text"
FROZEN_WITH_HEAD = "the frozen model with a trained head"


@dataclass(frozen=True)
class Words:
    """The words of one task.

    Attributes:
        before: What the result is compared with.
        rows: What training read, in the plural.
        has_head: Whether that has a head of its own, so that a gain is that of LoRA alone.
    """

    before: str = "the base"
    rows: str = "rows"
    has_head: bool = False


_WORDS = {
    "classify-image": Words(FROZEN_WITH_HEAD, "pictures", has_head=True),
    "classify-audio": Words(FROZEN_WITH_HEAD, "clips", has_head=True),
    "classify-text": Words(FROZEN_WITH_HEAD, "texts", has_head=True),
    "embed": Words(rows="pairs"),
    "transcribe": Words(rows="clips"),
}


def task_of(report: Mapping[str, Any]) -> str:
    """The task of a report; those of older releases are of text."""
    return str(report.get("task") or TEXT)


def words_of(report: Mapping[str, Any]) -> Words:
    """The words for a report."""
    return _WORDS.get(task_of(report), Words())


def is_text(report: Mapping[str, Any]) -> bool:
    """Whether a report is of a model that writes text."""
    return task_of(report) == TEXT
