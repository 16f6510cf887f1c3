"""Regular expressions for paths of layers, as people write them for PEFT, that nobody can make run forever.

Python's own engine goes back and tries again, which a hostile expression makes it do without end. Here all ways are
gone at once, character by character (Thompson, "Regular expression search algorithm", 1968), so an expression takes no
longer than its length times that of the path.
"""

import re
import string
from collections.abc import Callable, Iterable
from typing import NamedTuple

LETTERS = frozenset(string.ascii_letters + string.digits + "_.-")  # of which paths are made
MOST_CHARACTERS, MOST_STATES, MOST_DEPTH = 500, 500, 20  # of an expression
MOST_MOVES = 20_000  # that are remembered
_DIGITS = frozenset(string.digits)
_KINDS = {"d": _DIGITS, "D": LETTERS - _DIGITS, "w": LETTERS - {".", "-"}, "W": frozenset(".-"), "S": LETTERS,
          "s": frozenset[str]()}  # fmt: skip
_START, _END = "^", "$"
_SIGNS = ("*", "+", "?", "{")  # of how often
_TIMES = re.compile(r"\{(?P<least>\d{1,3})(?P<many>,(?P<most>\d{0,3}))?\}")
_SET = re.compile(r"\[(?P<not>\^?)(?P<inside>\]?(\\.|[^\]\\\[])*)\]")
_RANGE = re.compile(r"(?P<kind>\\[dDwWsS])|\\?(?P<low>.)(-\\?(?P<high>.))?")


class _State(NamedTuple):
    """One place in an expression: what may come next there, and where it leads."""

    letters: frozenset[str]  # one of which has to come; none if it is passed without a character
    after: tuple[int, ...]
    holds_at: str = ""  # `^` or `$`: passed at the start or at the end alone


_Part = Callable[[int], int]  # adds the states of a part in front of the state that follows it; which is its first


class PathPattern:
    """A regular expression for a path, or for its end behind a dot, as PEFT's `get_pattern_key` takes it.

    Making one of what is none, is too long or needs an engine that goes back (`\\1`, `(?=`) raises a ValueError.
    """

    def __init__(self, text: str) -> None:
        self._states: list[_State] = []
        self._text, self._depth = text[: MOST_CHARACTERS + 1], 0  # what is left to read
        self._moves: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}
        part = self._either()
        if self._text or len(text) > MOST_CHARACTERS:
            raise ValueError("it is too long" if len(text) > MOST_CHARACTERS else f"{self._text[:9]!r} has no place")
        self._end = self._add(frozenset(), ())
        start = part(self._end)
        behind = self._repeated(self._one(LETTERS), 0, None)(self._one(frozenset("."))(start))
        self._start = self._add(frozenset(), (start, behind))

    def matches(self, path: str) -> bool:
        """Whether it matches a path."""
        now = self._reached([self._start], is_start=True, is_end=not path)
        for place, letter in enumerate(path, 1):
            key = (now, letter, place == len(path))
            if key not in self._moves:
                self._moves = self._moves if len(self._moves) < MOST_MOVES else {}
                on = [state.after for number in now if letter in (state := self._states[number]).letters]
                self._moves[key] = self._reached([number for after in on for number in after], False, key[2])
            now = self._moves[key]
        return self._end in now

    def _reached(self, states: Iterable[int], is_start: bool, is_end: bool) -> frozenset[int]:
        """Some states and all that they lead to without a character."""
        found, left = set[int](), list(states)
        while left:
            number = left.pop()
            state = self._states[number]
            if number not in found and not (is_start < (state.holds_at == _START) or is_end < (state.holds_at == _END)):
                found.add(number)
                left += () if state.letters else state.after
        return frozenset(found)

    def _add(self, letters: frozenset[str], after: tuple[int, ...], holds_at: str = "") -> int:
        if len(self._states) >= MOST_STATES:
            raise ValueError("it is too long")
        self._states.append(_State(letters, after, holds_at))
        return len(self._states) - 1

    def _take(self, start: str) -> bool:
        """Whether what is left begins so, which is then read."""
        is_there = self._text.startswith(start)
        self._text = self._text[len(start) :] if is_there else self._text
        return is_there

    def _either(self) -> _Part:
        """Alternatives, up to the end or a bracket that closes."""
        choices = [self._row()]
        while self._take("|"):
            choices.append(self._row())
        return lambda after: self._add(frozenset(), tuple(part(after) for part in choices))

    def _row(self) -> _Part:
        """Parts that follow one another."""
        parts: list[_Part] = []
        while self._text and self._text[0] not in "|)":
            parts.append(self._times(self._single()))

        def build(after: int) -> int:
            for part in reversed(parts):
                after = part(after)
            return after

        return build

    def _times(self, part: _Part) -> _Part:
        """A part as often as what stands behind it says."""
        found = _TIMES.match(self._text)
        if found:
            self._take(found[0])
            least = int(found["least"])
            most = (int(found["most"]) if found["most"] else None) if found["many"] else least
        else:
            sign = next((sign for sign in "*+?" if self._take(sign)), "")
            if not sign:
                return part
            least, most = int(sign == "+"), 1 if sign == "?" else None
        self._take("?")  # as few as possible: the same paths match
        if self._text.startswith(_SIGNS) or (most is not None and most < least):
            raise ValueError(f"{self._text[:9]!r} has no place")
        return self._repeated(part, least, most)

    def _repeated(self, part: _Part, least: int, most: int | None) -> _Part:
        def build(after: int) -> int:
            end = after
            if most is None:
                after = self._add(frozenset(), (end,))
                self._states[after] = _State(frozenset(), (part(after), end))
            for _ in range(0 if most is None else most - least):
                after = self._add(frozenset(), (part(after), end))
            for _ in range(least):
                after = part(after)
            return after

        return build

    def _single(self) -> _Part:
        """One character, a set of them, what is in brackets, or a mark of the start or the end."""
        if found := _SET.match(self._text):
            self._take(found[0])
            return self._one(_letters_of(found["inside"], bool(found["not"])))
        if self._take("(?:") or self._take("("):
            return self._group()
        for mark in (_START, _END):
            if self._take(mark):
                if self._text.startswith(_SIGNS):
                    raise ValueError(f"{self._text[:9]!r} has no place")
                return lambda after: self._add(frozenset(), (after,), mark)
        letter = self._text[: 2 if self._text[0] == "\\" else 1]
        kind = letter[1:]
        if letter in ("\\", "[", "}", *_SIGNS) or (kind.isalnum() and kind not in _KINDS):
            raise ValueError(f"{self._text[:9]!r} cannot be read")
        self._take(letter)
        return self._one(LETTERS if letter == "." else _KINDS[kind] if kind in _KINDS else frozenset(letter[-1]))

    def _group(self) -> _Part:
        self._depth += 1
        if self._depth > MOST_DEPTH or self._text.startswith("?"):
            raise ValueError(f"{self._text[:9]!r} cannot be read")
        part = self._either()
        self._depth -= 1
        if not self._take(")"):
            raise ValueError("a bracket is not closed")
        return part

    def _one(self, letters: frozenset[str]) -> _Part:
        """One of some characters; paths hold none but `LETTERS`, so another one stands for a set that nothing is in."""
        return lambda after: self._add(letters or frozenset(" "), (after,))


def _letters_of(inside: str, is_without: bool) -> frozenset[str]:
    """The characters of a set."""
    found = set[str]()
    for part in _RANGE.finditer(inside):
        if part["kind"]:
            found |= _KINDS[part["kind"][1]]
            continue
        low, high = part["low"], part["high"] or part["low"]
        if low > high:
            raise ValueError(f"{part[0]!r} is no range")
        found |= {letter for letter in LETTERS if low <= letter <= high}
    return LETTERS - found if is_without else frozenset(found)
