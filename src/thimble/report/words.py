"""What a report calls things, by the task that was trained: what it is compared with, and what it counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "text"
FRAMES = "frames"  # the unit in which clips are counted, hundredths of a second
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


def speed(counted: str, rows: float, unit: str, costs: float) -> str:
    """A speed as a person tells it: tokens of text, or else rows, of clips with the seconds of sound that they are.

    >>> speed("tokens", 2.0, "tokens", 512.3), speed("clips", 2.51, "frames", 401)
    ('512 tokens/s', '2.5 clips/s, 4.0 s of sound/s')
    """
    if counted == "tokens":
        return f"{costs:,.0f} tokens/s"
    heard = f", {_few(costs / 100)} s of sound/s" if unit == FRAMES else ""
    return f"{_few(rows)} {counted}/s{heard}"


def rate_of(report: Mapping[str, Any]) -> tuple[str, float]:
    """What a report counts, and how much of it a second: rows of other tasks than text, if it has counted them."""
    if is_text(report) or not report.get("rows_per_second"):
        return str(report.get("unit") or "tokens"), report["tokens_per_second"]
    return words_of(report).rows, report["rows_per_second"]


def _few(number: float) -> str:
    return f"{number:,.1f}" if number < 10 else f"{number:,.0f}"


def is_text(report: Mapping[str, Any]) -> bool:
    """Whether a report is of a model that writes text."""
    return task_of(report) == TEXT
