"""JSON with something wrong in it that is still JSON, or almost: other values, keys lost, keys twice."""

import copy
import json
import random
from typing import Any

from stress.files import mutated

# What stands in a text as a number or a list, but cannot be made by `json.dumps`.
RAW = {
    "@nan": "NaN", "@inf": "-Infinity", "@large": "1e999", "@long": "9" * 5000, "@deep": "[" * 200 + "]" * 200,
    "@deeper": '{"a":' * 50_000,
}  # fmt: skip
DEEP: list = []
for _ in range(40):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 255, 10**6, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e-320,
    1e308, -1e308, "", "8", "NaN", "x" * 100_000, "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J\n",
    "a\nimport os", "https://x/y", "(a+)+$", "(" * 500, ".*", "^", "猫" * 100, [], {}, [None], [0], [[]], {"": ""},
    {"a": {"b": [1]}}, [1] * 5000, {str(n): n for n in range(3000)}, DEEP, *RAW,
)  # fmt: skip


def changed(value: Any, dice: random.Random) -> Any:
    """A copy of a parsed object with one to three things changed."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 3)):
        value = _change(value, dice)
    return value


def _change(value: Any, dice: random.Random) -> Any:
    children = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not children or dice.random() < 0.08:
        return _other(value, dice)
    key, kind = dice.choice(children), dice.randrange(10)
    if kind == 0:
        del value[key]
    elif kind == 1:  # another value of the same object
        value[key] = copy.deepcopy(value[dice.choice(children)])
    elif kind == 2 and isinstance(value, dict):
        value[dice.choice(HOSTILE[20:36]) if dice.random() < 0.7 else f"{key}x"] = _other(value[key], dice)
    elif kind == 3 and isinstance(value, dict):
        value[f"{key}."] = value.pop(key)
    elif kind == 4 and isinstance(value, list):
        value.insert(key, _other(value[key], dice))
    else:
        value[key] = _change(value[key], dice)
    return value


def _other(value: Any, dice: random.Random) -> Any:
    if isinstance(value, int) and dice.random() < 0.4:
        return value + dice.choice([-8, -1, 1, 8, value, 1 << 20])
    return copy.deepcopy(dice.choice(HOSTILE))


def text_of(value: Any, dice: random.Random) -> bytes:
    """JSON text of an object, with what only text can hold, and now and then a key twice."""
    text = json.dumps(value, ensure_ascii=dice.random() < 0.9).encode("utf-8", "surrogatepass")
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"'.encode(), raw.encode())
    if isinstance(value, dict) and value and dice.random() < 0.1:
        key = json.dumps(dice.choice(list(value))).encode()
        text = text.replace(key + b":", key + b": 5, " + key + b":", 1)
    return text


def damaged_json(value: Any, dice: random.Random) -> bytes:
    """Half of the time JSON with other values, half of the time its text with other bytes."""
    if dice.random() < 0.5:
        return text_of(changed(value, dice), dice)
    text = json.dumps(value).encode()
    return mutated(text, dice, len(text))
