"""A metric of the user's own: a function in a file, loaded, checked and called with care, for it may fail."""

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from thimble.core.metrics import METRICS, Metric
from thimble.errors import ConfigError
from thimble.files.user_program import load_program, place_of

EXPECTED = f"expected auto, none, {', '.join(METRICS)}, or your own function as file.py:name"
INSTEAD = {
    **dict.fromkeys(("accuracy", "acc", "f1", "precision", "recall", "classification"), "--metric labels reports that"),
    **dict.fromkeys(("exact_match", "em"), "--metric exact is its name"),
    **dict.fromkeys(("tool", "tool_calls", "function_calling"), "--metric tools is its name"),
    **dict.fromkeys(("perplexity", "ppl", "loss"), "the loss is always reported, also with --metric none"),
}


class MetricFault(Exception):
    """A user's metric that failed on an answer; the text says where and how."""


def user_metric(wanted: str) -> Metric:
    """Load `file.py:name`; the user named the file, so it is run."""
    path, _, name = wanted.rpartition(":")
    if not path.endswith(".py"):
        hint = INSTEAD.get(wanted.lower().replace("-", "_").replace(" ", "_"))
        forgot = f"name the function too, as in {wanted}:score" if wanted.endswith(".py") else ""
        raise ConfigError(f"--metric {wanted}: {hint or forgot or EXPECTED}" + (f"; {EXPECTED}" if hint else ""))
    if not Path(path).is_file():
        raise ConfigError(f"--metric {wanted}: there is no file {path}; {EXPECTED}")
    function = getattr(load_program(Path(path), f"--metric {wanted}", EXPECTED), name, None)
    if not callable(function):
        raise ConfigError(f"--metric {wanted}: {path} defines no function {name}(answer, reference)")
    _check_signature(function, wanted)
    return _checked(function, path, name)


def _check_signature(function: Callable[..., Any], wanted: str) -> None:
    """Refuse a function that cannot be called with an answer and a reference, as far as that can be seen."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function that is not written in Python
        return
    where = ""
    if isinstance(code := getattr(function, "__code__", None), CodeType):
        where = f", {code.co_filename} line {code.co_firstlineno},"
    name = wanted.rpartition(":")[2]
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigError(f"--metric {wanted}: {name}{where} is async or a generator; expected a plain function")
    try:
        signature.bind("answer", "reference")
    except TypeError:
        raise ConfigError(
            f"--metric {wanted}: {name}{signature}{where} cannot be called with an answer and a reference; expected "
            f"{name}(answer, reference), two texts"
        ) from None


def _checked(function: Callable[[str, str], Any], path: str, name: str) -> Metric:
    """Let a user's metric return a number, a truth value or a dict of them; whatever else it does is a MetricFault."""
    code = getattr(function, "__code__", None)
    place = f"{path} line {code.co_firstlineno}" if isinstance(code, CodeType) else path

    def score(answer: str, reference: str) -> dict[str, float]:
        try:
            value = function(answer, reference)
            values = dict(value) if isinstance(value, Mapping) else {name: value}
            found = {str(key): _number(figure) for key, figure in values.items()}
        except (Exception, SystemExit) as error:
            raise MetricFault(place_of(error, path)) from error
        bad = [key for key, figure in found.items() if figure is None]
        if bad:
            what = "nothing (None)" if value is None else _short(value)
            where = f" for {bad[0]!r}" if isinstance(value, Mapping) else ""
            raise MetricFault(f"{place}: {name} returned {what}{where}; expected a number or a dict of numbers")
        return {key: figure for key, figure in found.items() if figure is not None}

    return score


def _number(value: Any) -> float | None:
    """A figure as a float; None if it is text, missing, NaN or Inf."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:56] + " ..."
