"""Buffers that are used again, so that the heap is not cut into pieces between steps of uneven length.

What one product needs and what the backward pass needs come and go in turns. On the heap the short-lived pieces leave
holes in which smaller long-lived ones settle: up to twice the memory that is in use. Here each has its own place.
"""

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from thimble.core.sizes import BUFFER_TOKENS

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class _Room:
    """The buffers of one thread."""

    scratch: dict[str, Tensor] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    taken: int = 0  # of kept, since the forward pass began


class Memory:
    """The buffers of a decoder, with a room for each thread that runs it."""

    def __init__(self, compute: torch.dtype) -> None:
        self.compute = compute
        self._rooms: dict[int, _Room] = {}

    def _room(self) -> _Room:
        return self._rooms.setdefault(threading.get_ident(), _Room())

    def scratch(self, purpose: str, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer for a purpose as (rows, cols); what was in it is lost, so each purpose has one user at a time."""
        buffers = self._room().scratch
        if purpose not in buffers or buffers[purpose].numel() < rows * cols:
            buffers.pop(purpose, None)  # before the larger one is made
            buffers[purpose] = torch.empty(_rounded(rows) * cols, dtype=dtype or self.compute)
        return buffers[purpose][: rows * cols].view(rows, cols)

    def begin(self, after: int = 0) -> None:
        """A new forward pass begins on this thread: of what it kept before, only the first so many are still needed."""
        self._room().taken = after

    def keep(self, rows: int, cols: int) -> Tensor:
        """The next tensor that the backward pass will need, (rows, cols).

        A thread's forward pass asks for these in the same order for every micro-batch; each gets the buffer it had.
        """
        room = self._room()
        if room.taken == len(room.kept):
            room.kept.append(torch.empty(0, dtype=self.compute))
        if room.kept[room.taken].numel() < rows * cols:
            room.kept[room.taken] = torch.empty(0)  # before the larger one is made
            room.kept[room.taken] = torch.empty(_rounded(rows) * cols, dtype=self.compute)
        room.taken += 1
        return room.kept[room.taken - 1][: rows * cols].view(rows, cols)

    def release(self) -> None:
        """Give the memory back; what was taken stays valid for those who hold it."""
        self._rooms.clear()
        _trim_heap()


def out_of_memory(work: Callable[P, T]) -> Callable[P, T]:
    """Have work raise a MemoryError when memory runs out, which torch tells as a RuntimeError like any other."""

    @functools.wraps(work)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise MemoryError(str(error).partition(":")[2].strip().partition(". ")[0]) from None
            raise

    return told


def _trim_heap() -> None:
    """Have the C library give free pages back to the system, where it is glibc: it keeps them otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _rounded(rows: int) -> int:
    return -(-rows // BUFFER_TOKENS) * BUFFER_TOKENS
