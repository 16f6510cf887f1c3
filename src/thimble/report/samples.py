"""Answers of a run side by side, as its page shows them: expected, before and after, and the words that differ."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from thimble.core.metrics import tool_calls, valid_json
from thimble.report.verdict import Report

MOST_DIFF_TOKENS = 800  # longer answers are not compared word by word: it takes quadratic time
LEAST_ALIKE = 0.35  # below this ratio nearly every word differs, and marking them all would only be noise
LONG_QUESTION = 400  # characters; the rest is folded away

Parts = list[tuple[str, bool]]  # of a text, each with whether it is missing in the other one


def samples_note(report: Report) -> str:
    """Which rows they are, and what the marks mean."""
    if not report["metrics_after"]:
        which = "The first validation rows."
    elif report["metrics_rows"] <= len(report["samples"]):
        which = "All validation rows that were answered."
    else:
        which = "Not a random draw: first the rows that gained most, last those that gained least."
    return f"{which} Words are marked where the answer after training and the expected one differ."


def samples_of(report: Report, players: Mapping[str, str]) -> list[dict[str, Any]]:
    """All samples of a run, each with what it was expected to be; `players` are HTML by what was asked, for sound."""
    return [_sample(sample, players.get(sample["asked"], "")) for sample in report["samples"]]


def _sample(sample: Mapping[str, str], player: str) -> dict[str, Any]:
    reference, before, after = sample["reference"], sample["before"], sample["after"]
    match = _match(after, reference)
    # the same content in another order is right: marking the order would look like a fault
    expected_parts, after_parts = _differences(reference, reference if match == "equal" else after)
    after_parts = [(after.strip(), False)] if match == "equal" else after_parts
    asked = sample["asked"].strip()
    answers = [
        {"name": "Expected", "parts": expected_parts, "match": ""},
        {"name": "Before", "parts": [(before.strip(), False)], "match": _match(before, reference)},
        {"name": "After", "parts": after_parts, "match": match},
    ]
    is_long = len(asked) > LONG_QUESTION
    return {
        "player": player,
        "asked": asked,
        "is_long": is_long,
        "start": asked[: LONG_QUESTION // 2],
        "answers": answers,
    }


def _match(answer: str, reference: str) -> str:
    """`same`, `equal` (the same JSON or tool call, written differently) or `differs`."""
    if answer.strip() == reference.strip():
        return "same"
    is_equal = tool_calls(answer, reference)["all arguments right"] or valid_json(answer, reference)["all fields right"]
    return "equal" if is_equal else "differs"


def _differences(expected: str, written: str) -> tuple[Parts, Parts]:
    """Both texts cut into parts, each with whether it is missing in the other."""
    texts = (expected.strip(), written.strip())
    left, right = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in texts)
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    is_compared = texts[0] != texts[1] and max(len(left), len(right)) <= MOST_DIFF_TOKENS
    if not is_compared or matcher.ratio() < LEAST_ALIKE:
        return [(texts[0], False)], [(texts[1], False)]
    parts: tuple[Parts, Parts] = ([], [])
    for kind, i, j, k, m in matcher.get_opcodes():
        for side, piece in zip(parts, ("".join(left[i:j]), "".join(right[k:m])), strict=True):
            if piece:
                side.append((piece, kind != "equal"))
    return parts
