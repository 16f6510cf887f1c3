"""Single settings of a base, from config.json or GGUF metadata: each of the right type and of a size that models have.

A setting that is taken on trust ends in a crash, an endless loop or, worst, in other numbers than the model's own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError
from thimble.files.untrusted import shown

# Sizes far beyond any model of these families: a file that asks for more is damaged, and would cost memory to look at.
MOST = {
    "num_hidden_layers": 1024, "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 8192,
    "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 30,
}  # fmt: skip
NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Refuse sizes that are missing or that no model has, all at once, before anything is made of them."""
    wrong = [f"{name} is missing: copy the base again" for name in NEEDED if fields.get(name) is None]
    wrong += [
        f"{name} is {shown(fields[name])}: expected from 1 to {most:,}"
        for name, most in MOST.items()
        if fields.get(name) is not None and not (type(fields[name]) is int and 1 <= fields[name] <= most)
    ]
    if wrong:
        raise BaseModelError(*wrong)


def whole(fields: Mapping[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number within bounds; nothing, or zero where that is too low, is the default, if there is one."""
    value = fields.get(name)
    if default is not None and (value is None or (low > 0 and value == 0)):
        return default
    if type(value) is not int or not low <= value <= high:
        raise BaseModelError(f"{name} is {shown(value)}: expected a whole number from {low:,} to {high:,}")
    return value


def number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float | None = None) -> float:
    """A number within bounds; nothing or zero is the default, if there is one."""
    value: Any = fields.get(name)
    if default is not None and (value is None or value == 0):
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise BaseModelError(f"{name} is {shown(value)}: expected a number from {low:g} to {high:g}")
    return float(value)


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """A truth value; nothing is false."""
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise BaseModelError(f"{name} is {shown(value)}: expected true or false")
    return bool(value)


def group(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object of further settings; nothing is an empty one."""
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise BaseModelError(f"{name} is {shown(value)}: expected an object of settings")
    return dict(value or {})


def per_layer(fields: Mapping[str, Any], name: str, layers: int, known: tuple[Any, ...]) -> list[Any] | None:
    """One of the known values for each layer, or None if there is no such list."""
    values = fields.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != layers or any(value not in known for value in values):
        wanted = " or ".join(map(str, known))
        raise BaseModelError(f"{name} is {shown(values)}: expected {wanted} for each of the {layers:,} layers")
    return values


def positives(fields: Mapping[str, Any], name: str, count: int) -> NDArray[np.float64]:
    """Positive numbers, as many as there are angles: float64 (count,)."""
    values = fields.get(name)
    is_list = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if is_list or isinstance(values, np.ndarray):
        try:
            found = np.asarray(values, np.float64)
        except OverflowError:  # an integer past all floats
            found = np.zeros(0)
        if found.shape == (count,) and ((found > 1e-9) & (found < 1e9)).all():
            return found
    raise BaseModelError(f"{name} is {shown(values)}: expected {count:,} positive numbers, one for each angle")
