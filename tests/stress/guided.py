"""Inputs worth changing again: those that take the program where none before took it (coverage-guided, as AFL is)."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import thimble

T = TypeVar("T")

SOURCE = str(Path(thimble.__file__).parent)
WATCHED_EVERY = 10  # inputs: to watch every line makes a reader several times slower
MOST_KEPT = 2000


class Corpus(Generic[T]):
    """Inputs to change, the first one sound.

    Args:
        first: What to begin with.
    """

    def __init__(self, first: T) -> None:
        self.first, self.found = first, list[T]()
        self._steps: set[tuple[object, int, int]] = set()  # from which line to which, in which function
        self._turn = 0

    def pick(self, dice: random.Random) -> T:
        """The sound one half of the time, else one that was found."""
        return dice.choice(self.found) if self.found and dice.random() < 0.5 else self.first

    def watch(self, made: T, read: Callable[[], object]) -> None:
        """Read an input now and then line by line, and keep it if it went where none was."""
        self._turn += 1
        if self._turn % WATCHED_EVERY or len(self.found) >= MOST_KEPT:
            return
        before, seen = len(self._steps), self._steps
        trace_before = sys.gettrace()
        sys.settrace(lambda frame, *_: _follow(frame, seen) if frame.f_code.co_filename.startswith(SOURCE) else None)
        try:
            read()
        except BaseException:  # what is wrong is counted when it is read in earnest
            pass
        finally:
            sys.settrace(trace_before)
        if len(self._steps) > before:
            self.found.append(made)


def _follow(frame: FrameType, seen: set[tuple[object, int, int]]) -> Callable[..., Any]:
    code, last = frame.f_code, 0

    def line(frame: FrameType, *_: object) -> Any:
        nonlocal last
        seen.add((code, last, frame.f_lineno))
        last = frame.f_lineno
        return line

    return line
