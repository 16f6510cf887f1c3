"""Buffers that are used again, so that the heap is not cut into pieces between steps of uneven length.

What one product needs and what the backward pass needs come and go in turns. On the heap the short-lived pieces leave
holes in which smaller long-lived ones settle: two thirds more memory than is in use. Here each has its own place.
"""

import threading

import torch
from torch import Tensor

ROUNDED_TOKENS = 128  # buffers grow in steps of so many rows


class Scratch(threading.local):
    """Buffers of a thread for what one product needs: the decoded weight, and the input made for it.

    What was taken last for a purpose is valid until the next time.

    Args:
        compute: Type of the numbers.
    """

    def __init__(self, compute: torch.dtype) -> None:
        self.compute = compute
        self._buffers: dict[str, Tensor] = {}

    def take(self, purpose: str, rows: int, cols: int) -> Tensor:
        """The buffer for a purpose as (rows, cols), grown if it is too small."""
        if purpose not in self._buffers or self._buffers[purpose].numel() < rows * cols:
            self._buffers[purpose] = torch.empty(rows * cols, dtype=self.compute)
        return self._buffers[purpose][: rows * cols].view(rows, cols)


class Activations:
    """What the forward pass keeps for the backward pass, in the same places every time.

    A thread's forward pass asks for its tensors in the same order for every micro-batch; each gets the buffer it had
    before. `begin` makes all of that thread's earlier tensors invalid.

    Args:
        compute: Type of the numbers.
    """

    def __init__(self, compute: torch.dtype) -> None:
        self._compute = compute
        self._threads: dict[int, list[Tensor]] = {}
        self._taken: dict[int, int] = {}

    def begin(self) -> None:
        """A new forward pass begins on this thread."""
        self._taken[threading.get_ident()] = 0

    def take(self, rows: int, cols: int) -> Tensor:
        """The next tensor, (rows, cols)."""
        thread = threading.get_ident()
        buffers, number = self._threads.setdefault(thread, []), self._taken.get(thread, 0)
        self._taken[thread] = number + 1
        if number == len(buffers):
            buffers.append(torch.empty(0, dtype=self._compute))
        if buffers[number].numel() < rows * cols:
            rounded = -(-rows // ROUNDED_TOKENS) * ROUNDED_TOKENS
            buffers[number] = torch.empty(rounded * cols, dtype=self._compute)
        return buffers[number][: rows * cols].view(rows, cols)

    def release(self) -> None:
        """Give the memory back; what was taken stays valid for those who hold it."""
        self._threads.clear()
