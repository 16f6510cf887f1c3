"""Figures that say whether training worked: from sums and counts, and from answers against references."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from thimble.core.labels import label_of

Metric = Callable[[str, str], Mapping[str, float]]

# More tokens for the words of a text than for those of English: the base has read little of that language. Measured on
# the tokenizer of SmolLM2, made for English: English 0.8 to 1.1, the words in programs, SQL and JSON 1.0 to 1.3; French
# 1.7, German 1.8, Dutch 2.0, Turkish 2.3, Polish 2.8, Chinese 3.1, Russian 3.8, Korean 4.3, Arabic 4.8, Thai 9.5.
WEAK_RATIO = 1.5
# Insertions, deletions and substitutions over what the reference has of these: less is better, and it may be above 1.
ERROR_RATES = {"CER": "characters", "WER": "words"}


@dataclass(frozen=True)
class LossSum:
    """A loss as sum and count, so that means over any batching are the same."""

    nats: float = 0.0  # summed cross-entropy
    tokens: int = 0  # it was summed over

    def __add__(self, other: "LossSum") -> "LossSum":
        return LossSum(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Mean loss in nats per token (nan without tokens)."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(min(self.mean, 700.0)) if self.tokens else math.nan


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its base at some places of a text, as sums and count."""

    nats: float = 0.0  # summed KL(base ‖ model)
    same: int = 0  # places at which both find the same token likeliest
    places: int = 0

    def __add__(self, other: "Divergence") -> "Divergence":
        return Divergence(self.nats + other.nats, self.same + other.same, self.places + other.places)


def exact(answer: str, reference: str) -> dict[str, float]:
    """Whether the answer equals the reference, but for white space at its ends."""
    return {"exact match": float(answer.strip() == reference.strip())}


def accuracy(answer: str, reference: str) -> dict[str, float]:
    """Whether the answer is the right label, but for white space at its ends and the order of keys in JSON."""
    return {"accuracy": float(label_of(answer) == label_of(reference))}


def valid_json(answer: str, reference: str) -> dict[str, float]:
    """Whether the answer is JSON, and which share of the reference's fields it has right, each 0 to 1."""
    found, expected = _load(answer), _load(reference)
    given, fields = _flatten(found), _flatten(expected)
    right = _count_right(given, fields)
    return {
        "valid JSON": float(found is not None),
        "all fields right": float(found is not None and given.keys() == fields.keys() and right == len(fields)),
        "fields right": right / len(fields),
    }


def tool_calls(answer: str, reference: str) -> dict[str, float]:
    """How much of a tool call is right: `<tool_call>` blocks around JSON, or bare JSON; each figure 0 to 1.

    A call is valid if it parses and has a name and arguments; `fields right` is a share of the reference's arguments.
    """
    found, expected = parse_tool_calls(answer) or [], parse_tool_calls(reference) or []
    is_named = bool(found) and [call["name"] for call in found] == [call["name"] for call in expected]
    given = _flatten([call["arguments"] for call in found]) if is_named else {}
    fields = _flatten([call["arguments"] for call in expected])
    right = _count_right(given, fields)
    return {
        "valid JSON": float(bool(found)),
        "right function": float(is_named),
        "all arguments right": float(given.keys() == fields.keys() and right == len(fields)),
        "fields right": right / len(fields),
    }


def _count_right(given: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    return sum(path in given and _same(given[path], value) for path, value in fields.items())


def parse_tool_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls, with `name` and `arguments`, in one or more `<tool_call>{...}</tool_call>` blocks or in JSON alone.

    None if any part does not parse.
    """
    blocks = re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", text, re.DOTALL) or [text]
    calls: list[dict[str, Any]] = []
    for block in blocks:
        value = _load(block)
        for call in value if isinstance(value, list) else [value]:
            call = call.get("function", call) if isinstance(call, dict) else call
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            arguments = call.get("arguments", call.get("parameters"))
            arguments = _load(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(arguments, dict):
                return None
            calls.append({"name": call["name"], "arguments": arguments})
    return calls


def average(
    scores: Iterable[Mapping[str, float]], sizes: Iterable[Mapping[str, float]] | None = None
) -> dict[str, float]:
    """Mean of each figure over the rows that have it, in the order in which figures are first met.

    A row counts as its size for a figure, if it has one: rates of errors by characters come to that of all characters.
    """
    sums: dict[str, tuple[float, float]] = {}
    for row, size in zip(scores, itertools.repeat({}) if sizes is None else sizes, strict=False):
        for name, value in row.items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = total + value * size.get(name, 1.0), count + size.get(name, 1.0)
    return {name: total / count for name, (total, count) in sums.items()}


def goodness(name: str, value: float) -> float:
    """A figure so that more is better: a rate of errors is turned round."""
    return 1.0 - value if name in ERROR_RATES else value


def _load(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested JSON by path."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{path}.{key}").items()}
    if isinstance(value, list) and value:
        return {k: v for index, inner in enumerate(value) for k, v in _flatten(inner, f"{path}[{index}]").items()}
    return {path: value}


def _same(given: Any, expected: Any) -> bool:
    """Equality that takes 5 and 5.0 for the same, but not 1 and true."""
    if isinstance(given, bool) or isinstance(expected, bool):
        return given is expected
    return bool(given == expected)


METRICS: dict[str, Metric] = {"exact": exact, "labels": accuracy, "json": valid_json, "tools": tool_calls}
