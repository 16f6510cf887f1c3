"""The layer that everything hangs on: y = h Wᵀ + scale · (h Aᵀ) Bᵀ with h = prologue(x).

One autograd function for a whole group of projections that read the same input (q, k and v; gate and up). It keeps
only x, recomputes h, adds gradients of A and B straight into their float32 sums, and makes no gradient of x when
nothing below needs it. Hand-derived as in Hu et al., arXiv:2106.09685: with g = ∂L/∂y,
∂L/∂B = scale · gᵀ(h Aᵀ), ∂L/∂A = scale · (g B)ᵀ h, ∂L/∂h = g W + scale · (g B) A.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thimble.torch_backend.adapter_state import LoraPair
from thimble.torch_backend.elementwise import Prologue
from thimble.torch_backend.frozen import FrozenLinear
from thimble.torch_backend.threads import place


@dataclass
class Projection:
    """A group of linear layers with one input, and the adapters that hang on them now.

    Attributes:
        frozen: The stacked frozen weights, (sum of outs, in).
        columns: Layer path to the columns of the output that are its own.
        pairs: Adapted layers: their columns and their A and B.
    """

    frozen: FrozenLinear
    columns: dict[str, slice]
    pairs: list[tuple[slice, LoraPair]] = field(default_factory=list)

    def attach(self, pairs: dict[str, LoraPair]) -> None:
        """Hang on the adapters of the layers in this group; an empty dict takes all off."""
        self.pairs = [(columns, pairs[path]) for path, columns in self.columns.items() if path in pairs]

    def stacked_a(self) -> Tensor:
        """All A over one another, (sum of ranks, in)."""
        return self.pairs[0][1].A if len(self.pairs) == 1 else torch.cat([pair.A for _, pair in self.pairs])


def project(
    x: Tensor, projection: Projection, prologue: Prologue | None = None, residual: Tensor | None = None
) -> Tensor:
    """Apply a group of projections.

    Args:
        x: (tokens, n), compute type.
        projection: The group.
        prologue: Applied to x first; None reads x as it is.
        residual: Added to the result, (tokens, sum of outs), or None.

    Returns:
        (tokens, sum of outs), compute type.
    """
    if torch.is_grad_enabled() and (x.requires_grad or projection.pairs):
        return _Project.apply(x, _anchor(), projection, prologue, residual)  # type: ignore[no-any-return]
    size = (len(x), projection.frozen.rows)
    if residual is None:  # read by the next layer only
        y = projection.frozen.memory.scratch(f"output of {size[1]}", *size)
    else:
        y = torch.empty(size, dtype=x.dtype)
    return _forward(x, projection, y, prologue, residual)[0]


def _anchor() -> Tensor:
    """Makes autograd visit the lowest adapted layer, whose x needs no gradient."""
    return torch.empty(0, requires_grad=True)


def _input(x: Tensor, projection: Projection, prologue: Prologue | None) -> Tensor:
    """What the weights are multiplied with; valid until the next projection's is made on this thread."""
    if prologue is None:
        return x
    frozen = projection.frozen
    return prologue.forward(x, frozen.memory.scratch("input", len(x), frozen.cols))


def _forward(
    x: Tensor, projection: Projection, y: Tensor, prologue: Prologue | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fill y with the result; return it with the low-rank products."""
    h = _input(x, projection, prologue)
    projection.frozen.product(h, y)
    if residual is not None:
        y.add_(residual)
    if not projection.pairs:
        return y, None
    low = torch.mm(h, projection.stacked_a().t())  # (tokens, sum of ranks)
    row = 0
    for columns, pair in projection.pairs:
        rank = pair.A.shape[0]
        y[:, columns].addmm_(low[:, row : row + rank], pair.B.t(), alpha=pair.scale)
        row += rank
    return y, low


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, projection: Projection, prologue: Prologue | None, residual: Tensor | None
    ) -> Tensor:
        kept = projection.frozen.memory.keep(len(x), projection.frozen.rows)
        y, low = _forward(x, projection, kept, prologue, residual)
        ctx.save_for_backward(x, low)
        ctx.projection, ctx.prologue = projection, prologue
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        x, low = ctx.saved_tensors
        projection, prologue, grad = ctx.projection, ctx.prologue, grads[0]
        low_grad = None
        if projection.pairs:
            h = _input(x, projection, prologue)
            low_grad = _adapter_gradients(projection, h, low, grad)
        residual_grad = grad if ctx.needs_input_grad[4] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, residual_grad
        frozen = projection.frozen
        h_grad = frozen.back(grad, frozen.memory.scratch("input_grad", len(x), frozen.cols))
        if low_grad is not None:
            h_grad.addmm_(low_grad, projection.stacked_a())
        x_grad = prologue.backward(x, h_grad, frozen.memory) if prologue else h_grad
        return x_grad, None, None, None, residual_grad


def _adapter_gradients(projection: Projection, h: Tensor, low: Tensor, grad: Tensor) -> Tensor:
    """Add the gradients of every A and B of the group to their sums; return scale · g B, (tokens, sum of ranks)."""
    low_grad, task = torch.empty_like(low), place()
    row = 0
    for columns, pair in projection.pairs:
        rows = slice(row, row + pair.A.shape[0])
        own = grad[:, columns]
        torch.mul(torch.mm(own, pair.B), pair.scale, out=low_grad[:, rows])
        if pair.grads:
            pair.grads[task][1].add_(torch.mm(own.t(), low[:, rows]), alpha=pair.scale)
        row = rows.stop
    a_grad = torch.mm(low_grad.t(), h)
    row = 0
    for _, pair in projection.pairs:
        if pair.grads:
            pair.grads[task][0].add_(a_grad[row : row + pair.A.shape[0]])
        row += pair.A.shape[0]
    return low_grad
