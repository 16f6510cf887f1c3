"""Work between the matrix products: normalisation, gating, rotation; each with its backward pass.

Inputs and outputs are in the compute type, arithmetic is float32.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Prologue(Protocol):
    """What happens to an input before a projection reads it; recomputed in the backward pass, never stored."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (tokens, n) to what the projection reads (tokens, in)."""

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Map the gradient of the output (tokens, in) to that of x (tokens, n)."""


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) · weight (Zhang and Sennrich, arXiv:1910.07467).

    Attributes:
        weight: float32 (n,).
        eps: Added to the mean square.
    """

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """See Prologue; x may have any number of leading dimensions."""
        wide = x.float()
        return (wide * self._rate(wide) * self.weight).to(x.dtype)

    def _rate(self, wide: Tensor) -> Tensor:
        return torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """See Prologue."""
        wide = x.float()
        rate = self._rate(wide)
        normal, weighted = wide * rate, grad.float() * self.weight
        return (rate * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))).to(x.dtype)


@dataclass(frozen=True)
class Gated:
    """activation(gate) · up, with gate and up side by side in x (Shazeer, arXiv:2002.05202).

    Attributes:
        activation: `silu` or `gelu_tanh`.
    """

    activation: str

    def forward(self, x: Tensor) -> Tensor:
        """See Prologue: (tokens, 2 n) to (tokens, n)."""
        gate, up = x.chunk(2, -1)
        return (self._act(gate.float()) * up.float()).to(x.dtype)

    def _act(self, gate: Tensor) -> Tensor:
        return F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """See Prologue: (tokens, n) to (tokens, 2 n)."""
        gate, up = (part.float() for part in x.chunk(2, -1))
        wide = grad.float()
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, -1)
        d_up.copy_(wide * self._act(gate))
        d_gate.copy_(wide * up * self._slope(gate))
        return out

    def _slope(self, gate: Tensor) -> Tensor:
        if self.activation == "silu":
            sigmoid = torch.sigmoid(gate)
            return sigmoid * (1 + gate * (1 - sigmoid))
        root = math.sqrt(2 / math.pi)
        inner = torch.tanh(root * (gate + 0.044715 * gate**3))
        return 0.5 * (1 + inner) + 0.5 * gate * (1 - inner**2) * root * (1 + 3 * 0.044715 * gate**2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + dim / 2) of each head; the rest of a head beyond dim is kept (partial rotation).

    Args:
        x: (tokens, ..., head_dim).
        cos: float32 (tokens, dim / 2); negate `sin` to turn back.
        sin: float32 (tokens, dim / 2).

    Returns:
        The turned heads, in the type of x.
    """
    half = cos.shape[-1]
    shape = (cos.shape[0], *(1,) * (x.dim() - 2), half)
    cos, sin = cos.view(shape), sin.view(shape)
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), rest], -1)
