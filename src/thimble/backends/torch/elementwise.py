"""What happens to an input before a projection reads it: normalisation or gating, with the backward pass.

Inputs and outputs are in the compute type, arithmetic is float32; the loops are in `thimble.backends.torch.fused`.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from thimble.backends.torch import fused
from thimble.backends.torch.frozen import as_numpy
from thimble.backends.torch.memory import Memory
from thimble.backends.torch.threads import parallel_for


class Prologue(Protocol):
    """Applied to an input before a projection reads it; recomputed in the backward pass, never stored."""

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Map x (rows, n) to what the projection reads (rows, in), in `out` if given."""

    def backward(self, x: Tensor, grad: Tensor, memory: Memory | None = None) -> Tensor:
        """Map the gradient of the output (rows, in) to that of x (rows, n), which may lie in scratch of `memory`."""


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) · weight (Zhang and Sennrich, arXiv:1910.07467)."""

    weight: Tensor  # float32 (n,)
    eps: float  # added to the mean square

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See Prologue; x may have any number of leading dimensions."""
        x = x.contiguous()
        out = torch.empty_like(x) if out is None else out
        rows = _rows(x)
        parallel_for(*rows.shape, fused.norm_forward, rows, self.weight.numpy(), np.float32(self.eps), _rows(out))
        return out

    def backward(self, x: Tensor, grad: Tensor, memory: Memory | None = None) -> Tensor:
        """See Prologue; the result is added to the stream's gradient, so it never lies in scratch."""
        x, grad = x.contiguous(), grad.contiguous()
        out = torch.empty_like(x)
        rows, weight = _rows(x), self.weight.numpy()
        parallel_for(*rows.shape, fused.norm_backward, rows, weight, np.float32(self.eps), _rows(grad), _rows(out))
        return out


@dataclass(frozen=True)
class Gated:
    """activation(gate) · up, with gate and up side by side in x (Shazeer, arXiv:2002.05202)."""

    activation: str  # `silu` or `gelu_tanh`

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """See Prologue: (rows, 2 n) to (rows, n)."""
        out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype) if out is None else out
        parallel_for(*x.shape, fused.GATES[self.activation][0], as_numpy(x), as_numpy(out))
        return out

    def backward(self, x: Tensor, grad: Tensor, memory: Memory | None = None) -> Tensor:
        """See Prologue: (rows, n) to (rows, 2 n)."""
        out = memory.scratch("gated_grad", *x.shape) if memory else torch.empty_like(x)
        parallel_for(*x.shape, fused.GATES[self.activation][1], as_numpy(x), as_numpy(grad), as_numpy(out))
        return out


def _rows(x: Tensor) -> np.ndarray:
    """A contiguous tensor as an array (rows, last dimension)."""
    return as_numpy(x.view(-1, x.shape[-1]))
