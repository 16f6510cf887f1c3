"""Operators and methods as templates have them: each pays from the budget before it does anything.

What C code does cannot be stopped once it runs, so its cost is reckoned from the sizes of what it is given.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from thimble.data.sandbox.budget import (
    UNIT_BYTES,
    Counted,
    RunawayTemplateError,
    current,
    join,
    listed,
    produce,
    search_units,
    text,
    units_of,
    weigh,
)

MAX_BITS = 2048  # of an integer; the largest float has 1024
MAX_FIELD = 999  # characters to which a format pads a field
MARKUP = 6  # times as long as the text it escapes
MAX_RANGE = 1_000_000
SCALARS = (str, int, float, bool, type(None))
ONLY_TEXT = {str}
CONTAINERS = (list, tuple, dict)

TEXT_METHODS = frozenset(
    "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill".split()
)
LIST_METHODS = frozenset("copy count index".split())
DICT_METHODS = frozenset("copy get items keys values".split())

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_BACKWARDS = frozenset(("rfind", "rindex", "rpartition", "rsplit"))
_SEARCHES = _BACKWARDS | {"count", "find", "index", "partition", "replace", "split"}
_PIECES = frozenset(("rsplit", "split", "splitlines"))
_STRIPS = frozenset(("lstrip", "rstrip", "strip"))
_CASES = frozenset(("capitalize", "casefold", "lower", "swapcase", "title", "upper"))
_PADS = frozenset(("center", "ljust", "rjust", "zfill"))
_PRINTF = re.compile(r"[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?.?", re.DOTALL)


# --- operators


def add(left: Any, *rest: Any) -> Any:
    """`left + ...`, a chain of texts at once."""
    terms = (left, *rest)
    if set(map(type, terms)) == ONLY_TEXT:
        return join(terms)
    for right in rest:
        left = _plus(left, right)
    return left


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        return produce(4 * MARKUP * (len(left) + len(right)), operator.add, left, right)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return produce(8 * (len(left) + len(right)), operator.add, left, right)
    current().spend(1)
    return left + right


def concat(*values: Any) -> str:
    """`left ~ ...`, as text."""
    return join([str(text(value)) for value in values])


def multiply(left: Any, right: Any) -> Any:
    """`left * right`, which also repeats texts and lists."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            size = 4 if isinstance(sequence, str) else 8
            return produce(size * len(sequence) * max(0, times), operator.mul, left, right)
    current().spend(1)
    return left * right


def power(left: Any, right: Any) -> Any:
    """`left ** right`."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * max(0, right))
    current().spend(1)
    return left**right


def modulo(left: Any, right: Any) -> Any:
    """`left % right`, which also fills a pattern."""
    if not isinstance(left, str):
        current().spend(1)
        return left % right
    fields, width = _fields(left)
    # Any letter may be written as ten; a mapping may be written by every field.
    worst = 10 * weigh(right) * (fields if isinstance(right, Mapping) else 1)
    return produce(UNIT_BYTES * (worst + units_of(left)) + 4 * width, operator.mod, left, right)


def _fields(pattern: str) -> tuple[int, int]:
    """Number of fields of a printf pattern, and the widths they ask for in sum."""
    fields, width, place = 0, 0, pattern.find("%")
    while place >= 0:
        current().spend(1)
        fields, place = fields + 1, _behind_key(pattern, place + 1)
        for found in _PRINTF.finditer(pattern, place):
            width += sum(map(_width, found.groups(default="")))
            place = pattern.find("%", found.end())
            break
    return fields, width


def _behind_key(pattern: str, place: int) -> int:
    """Where a field goes on behind its (key), in which parentheses nest."""
    if not pattern.startswith("(", place):
        return place
    depth = 0
    for end in range(place, len(pattern)):
        depth += {"(": 1, ")": -1}.get(pattern[end], 0)
        if not depth:
            return end + 1
    return len(pattern)


def _width(number: str) -> int:
    if number == "*" or len(number) > len(str(MAX_FIELD)):
        raise RunawayTemplateError(f"it pads a field to {number[:20]} characters")
    return int(number or 0)


def check_spec(spec: str) -> None:
    """Refuse a format specification that pads to many characters."""
    for number in re.findall(r"\d+", spec):
        _width(number)


def check_number(number: Any) -> Any:
    """Give back a number that is not too large to compute with."""
    if isinstance(number, int):
        _check_bits(number.bit_length())
    return number


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise RunawayTemplateError(f"it computes a number of {bits} bits")


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "gt": operator.gt, "gteq": operator.ge, "lt": operator.lt,
    "lteq": operator.le, "in": lambda left, right: left in right, "notin": lambda left, right: left not in right,
}  # fmt: skip


def compare(left: Any, *rest: Any) -> Any:
    """`left == right < ...`: names of operators, each with what stands behind it."""
    result = True
    for name, right in zip(rest[::2], rest[1::2], strict=True):
        if name in ("in", "notin"):
            right = _searched(left, right)
        elif isinstance(left, str) and isinstance(right, str):
            current().spend(1 + min(len(left), len(right)) // UNIT_BYTES)
        elif isinstance(left, CONTAINERS) and isinstance(right, CONTAINERS):
            weigh(left), weigh(right)
        result = _COMPARISONS[name](left, right)
        if not result:
            return result
        left = right
    return result


def comparison(name: str) -> Callable[[Any, Any], Any]:
    """The same as a test: `is eq(right)`."""
    return lambda left, right: compare(left, name, right)


def _searched(sought: Any, place: Any) -> Any:
    if isinstance(sought, str) and isinstance(place, str):
        current().spend(search_units(len(place), len(sought)))
        return place
    weight = weigh(sought)
    if isinstance(place, dict):
        return place
    if not isinstance(sought, SCALARS) and isinstance(place, CONTAINERS):
        weigh(place)
    return Counted(place, weight)


# --- what the compiler would have done without a call


def sliced(value: Any) -> Any:
    """Pay for a slice of a value."""
    if isinstance(value, str):
        current().spend(units_of(value))
    elif hasattr(value, "__len__"):
        current().spend(1 + len(value) // 4)
    return value


def key(value: Any) -> Any:
    """Pay for hashing a value."""
    if not isinstance(value, SCALARS):
        weigh(value)
    return value


def bounded_range(*bounds: int) -> range:
    """`range(...)`, of as many numbers as a template may ever loop over."""
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE or max(map(abs, bounds)) > 2**31:
        raise RunawayTemplateError(f"it loops over {numbers}"[:200])
    return numbers


def bounded_dict(pairs: Any = (), /, **more: Any) -> dict[Any, Any]:
    """`dict(...)`, item by item: keys may be chosen so that each is slower to add than the last."""
    made: dict[Any, Any] = {}
    for name, value in Counted(pairs.items() if isinstance(pairs, Mapping) else pairs, 4):
        made[key(name)] = value
    return made | more


# --- methods


def call_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a text, a list or a dict."""
    owner, name = method.__self__, method.__name__
    if isinstance(owner, str) and name == "join" and args:
        return method(_joinable(owner, args[0]), *args[1:], **kwargs)
    weight = sum(map(weigh, (*args, *kwargs.values())))
    if isinstance(owner, str):
        return _call_text(method, owner, args, kwargs)
    if name in ("count", "index"):
        _searched(args[0] if args else None, owner)
        # What is not found is written into the message of the error.
        current().spend(len(owner) * (1 + weight) + 10 * weight)
    elif name == "copy":
        sliced(owner)
    return method(*args, **kwargs)


def _joinable(between: str, values: Any) -> list[Any]:
    parts = listed(values)
    length = sum(len(part) + len(between) for part in parts if isinstance(part, str))
    current().spend(length * (1 if type(between) is str else MARKUP) // 8)
    return parts


def _call_text(method: Any, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else kwargs.get("sep")
    size, name, room = len(owner), method.__name__, 4 * UNIT_BYTES + UNIT_BYTES * units_of(owner)
    if name in _SEARCHES and isinstance(first, str):
        current().spend(search_units(size, len(first), name in _BACKWARDS))
    if name in _PIECES:
        room += 3 * UNIT_BYTES * pieces(owner, name, first)
    elif name == "replace":
        room = 4 * (size + _growth(owner, *args[:2]))
    elif name in _PADS and isinstance(first, int):
        room = 4 * max(size, first)
    elif name in _CASES:
        room = 12 * size  # a letter in capitals may be three
    elif name in _STRIPS and isinstance(first, str):
        current().spend(size * len(first) // 1024)
    return produce(room * (1 if type(owner) is str else MARKUP), lambda: method(*args, **kwargs))


def pieces(owner: str, name: str, between: Any = None) -> int:
    """At most how many pieces a text is cut into by its method of that name."""
    if name == "splitlines":
        return 1 + sum(map(owner.count, _LINE_ENDS))
    return 1 + (owner.count(between) if between and isinstance(between, str) else len(owner) // 2)


def _growth(owner: str, old: Any = None, new: Any = None) -> int:
    if not isinstance(old, str) or not isinstance(new, str):
        return 0
    return max(0, len(new) - len(old)) * owner.count(old)
