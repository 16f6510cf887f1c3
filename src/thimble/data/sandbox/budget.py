"""What one rendering of a chat template may cost, and what a value weighs.

Whatever a template does is paid for before it is done, in units: one for a step, one for every 32 bytes made. A value
weighs what all it holds weighs, each part as often as it is reached: ten lists of ten lists of ten, each the same
object, are a thousand to whoever writes or compares them. Knows nothing of Jinja.
"""

import sys
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextvars import ContextVar
from typing import Any, TypeVar

from thimble.errors import BaseModelError, DataError

T = TypeVar("T")

MAX_CHARACTERS = 1_000_000  # of one rendered conversation
MAX_UNITS = 1_000_000  # of one rendering of a short conversation
MAX_SECONDS = 1.0  # of the thread's processor time: that other programs run is not the template's fault
MAX_DEPTH = 200  # of values in values; deeper ones overflow the stack of the C code that hashes them
UNIT_BYTES = 32
UNITS_PER_CHARACTER = 2  # more for a long conversation: templates copy the text of a message some twenty times
LONG_CHARACTERS, LONG_MESSAGES = 100_000, 1000  # from here on a conversation itself may be too much
SHORT_CHARACTERS = 1000  # of which as many are paid for as if each took four bytes
LOOK_UNITS = 256  # spent between two looks at the clock

_CURRENT: "ContextVar[Budget]" = ContextVar("budget")
current = _CURRENT.get


class RunawayTemplateError(BaseModelError):
    """A chat template that would hang or fill the memory."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template of the base does what no template may: {what}. Use a base whose template is intact."
        )


class Budget:
    """What a rendering may still spend; a context, in which `current` gives it. Threads have each their own."""

    __slots__ = ("_deadline", "_is_extended", "_left", "_look_at", "_messages", "_token", "_tools")

    def __init__(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> None:
        """Begin to count, time included.

        Args:
            messages: The conversation; the budget grows with it once it is needed.
            tools: Tool definitions, or None.
        """
        self._messages, self._tools = messages, tools
        self._left, self._look_at = MAX_UNITS, MAX_UNITS - LOOK_UNITS
        self._deadline = time.thread_time() + MAX_SECONDS
        self._is_extended = False

    def __enter__(self) -> "Budget":
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _CURRENT.reset(self._token)

    def spend(self, units: int) -> None:
        """Take units, before what they are for is done. Raises a RunawayTemplateError or DataError if none are left."""
        self._left -= units
        if self._left < self._look_at:
            self._look()

    def refund(self, units: int) -> None:
        """Give back units that were taken for the worst case."""
        self._left += units
        self._look_at = max(self._look_at, self._left - LOOK_UNITS)

    def _look(self) -> None:
        is_late = time.thread_time() > self._deadline
        if self._left < 0 or is_late:
            self._extend(is_late)
        self._look_at = max(0, self._left - LOOK_UNITS)

    def _extend(self, is_late: bool) -> None:
        """Add what a conversation of this length may cost; if that is spent too, say whose fault it is."""
        length, count = characters((self._messages, self._tools)), len(self._messages)
        if not self._is_extended:
            self._is_extended = True
            self._left += UNITS_PER_CHARACTER * (length + 100 * count)
            self._deadline += length / MAX_CHARACTERS
            if self._left >= 0 and time.thread_time() <= self._deadline:
                return
        if length > LONG_CHARACTERS or count > LONG_MESSAGES:
            raise DataError(
                f"this conversation of {count:,} messages and {length:,} characters is more than the chat template of "
                f"the base can write in the time and memory it has: expected at most {MAX_CHARACTERS:,} characters. "
                "Shorten it."
            )
        took = (
            f"{MAX_SECONDS:g} s of the processor" if is_late else f"{MAX_UNITS:,} steps or texts of {UNIT_BYTES} bytes"
        )
        raise RunawayTemplateError(f"it takes more than {took} for one conversation")


def characters(value: Any) -> int:
    """Length of all texts in plain data."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            left += [*item, *item.values()]
        elif isinstance(item, Sequence):
            left += item
    return total


def units_of(text: str) -> int:
    """What a text in memory costs; a letter takes one to four bytes."""
    return sys.getsizeof(text) // UNIT_BYTES


def weigh(value: Any) -> int:
    """Spend the weight of a value, so that C code may walk through it, and give it back as a number."""
    if not isinstance(value, str):
        return measure(value)[0]
    units = units_of(value)
    current().spend(units)
    return units


def measure(value: Any) -> tuple[int, int]:
    """Spend the weight of a value. Returns it with the depth of the value; of a value nested too deeply says so."""
    spend = current().spend
    total, depth, level = 0, 0, [value]
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RunawayTemplateError(f"it nests values in values more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for item in level:
            units, parts = _part(item)
            total += units
            spend(units + len(parts))
            below.extend(parts)
            if isinstance(parts, Mapping):
                below.extend(parts.values())
        level = below
    return total, depth


def _part(item: Any) -> tuple[int, Any]:
    """Units of a value by itself, and what it holds; `_held` is how a class of ours tells the latter."""
    if isinstance(item, str):
        return units_of(item), ()
    if isinstance(item, int):
        return 1 + item.bit_length() // 64, ()
    if isinstance(item, list | tuple | dict | KeysView | ValuesView | ItemsView):
        return 2, item
    held = getattr(type(item), "_held", None)
    return (2, held(item)) if held else (1, ())


def text(value: Any) -> str:
    """A value as `str` writes it; a text stays what it is."""
    if isinstance(value, str):
        return value
    # repr writes a letter with up to ten.
    return produce(10 * UNIT_BYTES * weigh(value), str, value)


def produce(worst_bytes: int, make: Callable[..., T], *values: Any) -> T:
    """Call what makes a text or a list of at most so many bytes; what a text was smaller is given back."""
    budget, worst = current(), 1 + worst_bytes // UNIT_BYTES
    budget.spend(worst)
    made = make(*values)
    if isinstance(made, str):
        budget.refund(max(0, worst - units_of(made)))
    return made


def join(parts: Sequence[str], between: str = "") -> str:
    """Texts as one."""
    length = sum(map(len, parts)) + len(between) * len(parts)
    if length < SHORT_CHARACTERS:
        current().spend(1 + length // 8)
        return between.join(parts)
    return produce(4 * length, between.join, parts)


def search_units(length: int, sought: int, is_backwards: bool = False) -> int:
    """Units of a search at its worst; long words are sought in linear time forwards, but never backwards."""
    places = max(0, length - sought + 1)
    return 1 + places * (sought if is_backwards or length < 2500 else min(sought, 100)) // 1024


class Counted:
    """An iterable whose every item is paid for; as long as what it wraps."""

    __slots__ = ("_iterable", "_units")

    def __init__(self, iterable: Any, units: int = 1) -> None:
        self._iterable, self._units = iterable, units

    def __iter__(self) -> Iterator[Any]:
        spend, units = current().spend, self._units
        for item in self._iterable:
            spend(units)
            yield item

    def __len__(self) -> int:
        return len(self._iterable)

    def __bool__(self) -> bool:
        return bool(self._iterable)


def listed(iterable: Any) -> list[Any]:
    """The items of anything; three units each, since a letter of its own takes 84 bytes."""
    return list(Counted(iterable, 3))
