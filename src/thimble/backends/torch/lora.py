"""The layer that everything hangs on: y = h Wᵀ + scale · (h Aᵀ) Bᵀ with h = prologue(x).

One autograd function for a whole group of projections that read the same input (q, k and v; gate and up). It keeps
only x, recomputes h, adds gradients of A and B straight into their float32 sums, and makes no gradient of x when
nothing below needs it. Hand-derived as in Hu et al., arXiv:2106.09685: with g = ∂L/∂y,
∂L/∂B = scale · gᵀ(h Aᵀ), ∂L/∂A = scale · (g B)ᵀ h, ∂L/∂h = g W + scale · (g B) A.

With a magnitude m (DoRA, arXiv:2402.09353), row i of the weight is multiplied by m_i / n_i, n being the lengths of the
rows of W + scale · B A. They count as constants of a step (section 4.3 there), so g is multiplied by m / n before all
of the above, and ∂L/∂m = Σ g · (y before it) / n.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thimble.backends.torch import fused
from thimble.backends.torch.adapter_state import LoraPair
from thimble.backends.torch.elementwise import Prologue
from thimble.backends.torch.frozen import FrozenLinear, as_numpy
from thimble.backends.torch.threads import parallel_for, worker


@dataclass
class Noise:
    """What dropout leaves out: a function of seed, step, micro-batch and layer, the same in a resumed run.

    Attributes:
        rate: Share left out.
        here: Of each thread, the number of the micro-batch it learns from, as `batch`; nothing is left out without one.
    """

    rate: float
    here: threading.local = field(default_factory=threading.local)

    def drop(self, x: Tensor, key: int, out: Tensor, is_added: bool = False) -> Tensor:
        """Write what is left of x to `out`, or add it: both (tokens, n), contiguous."""
        threshold, factor = np.uint32(self.rate * 2**32), np.float32(1 / (1 - self.rate))
        parallel_for(*x.shape, fused.drop, as_numpy(x), np.uint32(key), threshold, factor, as_numpy(out), is_added)
        return out


@dataclass
class Projection:
    """A group of linear layers with one input, and the adapters that hang on them now.

    Attributes:
        frozen: The stacked frozen weights, (sum of outs, in).
        columns: Layer path to the columns of the output that are its own.
        number: Its place among all groups of the decoder.
        pairs: Adapted layers: their columns and their A and B.
        noise: Dropout of what A reads in training, or None.
        on_input: Called, where no gradient is wanted, with what the weights are multiplied with, (tokens, in).
        on_gradient: Called in the backward pass with what the weights were multiplied with, (tokens, in), and the
            gradient of the result, (tokens, sum of outs); None if nobody looks.
    """

    frozen: FrozenLinear
    columns: dict[str, slice]
    number: int = 0
    pairs: list[tuple[slice, LoraPair]] = field(default_factory=list)
    noise: Noise | None = None
    on_input: Callable[[Tensor], None] | None = None
    on_gradient: Callable[[Tensor, Tensor], None] | None = None

    def attach(self, pairs: dict[str, LoraPair], noise: Noise | None = None) -> None:
        """Hang on the adapters of the layers in this group; an empty dict takes all off."""
        self.pairs = [(columns, pairs[path]) for path, columns in self.columns.items() if path in pairs]
        self.noise = noise if self.pairs else None
        self.measure()

    @property
    def needs_gradient(self) -> bool:
        """Whether the backward pass has something to do here."""
        return bool(self.pairs) or self.on_gradient is not None

    @property
    def has_magnitude(self) -> bool:
        """Whether rows of the weight are set to other lengths."""
        return any(pair.trained.magnitude is not None for _, pair in self.pairs)

    def stacked_a(self) -> Tensor:
        """All A over one another, (sum of ranks, in)."""
        return self.pairs[0][1].A if len(self.pairs) == 1 else torch.cat([pair.A for _, pair in self.pairs])

    def dropout_key(self) -> int | None:
        """The key of this group in the micro-batch that this thread learns from; None if it does not."""
        batch = getattr(self.noise.here, "batch", None) if self.noise else None
        return None if batch is None else hash((batch, self.number)) & 0xFFFFFFFF

    @torch.no_grad()
    def measure(self) -> None:
        """Bring the row rates of layers with a magnitude up to date after A, B or the magnitude changed.

        For each row w of W and b of B, ‖w + s b A‖² = ‖w‖² + 2 s (w Aᵀ) bᵀ + s² b (A Aᵀ) bᵀ: nothing as large as W
        is made.
        """
        if not self.has_magnitude:
            return
        a = self.stacked_a()
        answers = self.frozen.matmul(a, torch.empty(len(a), self.frozen.rows, dtype=a.dtype))  # A Wᵀ
        row = 0
        for columns, pair in self.pairs:
            rows = slice(row, row + len(pair.A))
            row = rows.stop
            if pair.trained.magnitude is None:
                continue
            wide_a, b = pair.A.float(), pair.B.float()
            square = self.frozen.row_squares()[columns].clone()
            square += 2 * pair.scale * (answers[rows, columns].t().float() * b).sum(1)
            square += pair.scale**2 * ((b @ (wide_a @ wide_a.t())) * b).sum(1)
            length = pair.row_lengths = square.clamp_(min=0).sqrt_()
            pair.row_rates = torch.where(length > 0, pair.trained.magnitude / length, torch.ones_like(length))


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
    if torch.is_grad_enabled() and (x.requires_grad or projection.needs_gradient):
        return _Project.apply(x, _anchor(), projection, prologue, residual)  # type: ignore[no-any-return]
    size = (len(x), projection.frozen.rows)
    if residual is None:  # read by the next layer only
        y = projection.frozen.memory.scratch(f"output of {size[1]}", *size)
    else:
        y = torch.empty(size, dtype=x.dtype)
    h = _input(x, projection, prologue)
    if projection.on_input:
        projection.on_input(h)
    _update(h, projection, y, projection.dropout_key())
    return y if residual is None else y.add_(residual)


def _anchor() -> Tensor:
    """Makes autograd visit the lowest adapted layer, whose x needs no gradient."""
    return torch.empty(0, requires_grad=True)


def _input(x: Tensor, projection: Projection, prologue: Prologue | None) -> Tensor:
    """What the weights are multiplied with; valid until the next projection's is made on this thread."""
    if prologue is None:
        return x
    frozen = projection.frozen
    return prologue.forward(x, frozen.memory.scratch("input", len(x), frozen.cols))


def _dropped(h: Tensor, projection: Projection, key: int | None) -> Tensor:
    """What A reads: h, or in training what dropout leaves of it."""
    if projection.noise is None or key is None:
        return h
    return projection.noise.drop(h.contiguous(), key, projection.frozen.memory.scratch("dropped", *h.shape))


def _update(h: Tensor, projection: Projection, y: Tensor, key: int | None) -> Tensor | None:
    """Fill y with what the weights and the adapters make of h; return the low-rank products, (tokens, sum of ranks)."""
    frozen = projection.frozen
    if not projection.pairs:
        frozen.forward(h, y)
        return None
    frozen.matmul(h, y)
    low = torch.mm(_dropped(h, projection, key), projection.stacked_a().t())
    row = 0
    for columns, pair in projection.pairs:
        ranks = pair.A.shape[0]
        own = y[:, columns]
        own.addmm_(low[:, row : row + ranks], pair.B.t(), alpha=pair.scale)
        if pair.row_rates is not None:
            own.mul_(pair.row_rates.to(own.dtype))
        row += ranks
    if frozen.bias is not None:
        y.add_(frozen.bias)
    return low


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, projection: Projection, prologue: Prologue | None, residual: Tensor | None
    ) -> Tensor:
        memory, size = projection.frozen.memory, (len(x), projection.frozen.rows)
        y = memory.keep(*size)
        ctx.key = projection.dropout_key()
        low = _update(_input(x, projection, prologue), projection, y, ctx.key)
        ctx.save_for_backward(x, low, y if projection.has_magnitude else None)
        ctx.projection, ctx.prologue = projection, prologue
        if residual is None:
            return y
        # What a magnitude multiplied is needed again, so the sum is kept beside it.
        return torch.add(y, residual, out=memory.keep(*size)) if projection.has_magnitude else y.add_(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        x, low, update = ctx.saved_tensors
        projection, prologue, grad = ctx.projection, ctx.prologue, grads[0]
        frozen, low_grad = projection.frozen, None
        residual_grad = grad if ctx.needs_input_grad[4] else None
        if projection.needs_gradient:
            h = _input(x, projection, prologue)
            if projection.on_gradient:
                projection.on_gradient(h, grad)
            if projection.pairs:
                grad = _magnitude_gradients(projection, update, grad)
                low_grad = _adapter_gradients(projection, _dropped(h, projection, ctx.key), low, grad)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, residual_grad
        h_grad = frozen.input_grad(grad, frozen.memory.scratch("input_grad", len(x), frozen.cols))
        if low_grad is not None:
            _add_low_gradient(projection, low_grad, ctx.key, h_grad)
        x_grad = prologue.backward(x, h_grad, frozen.memory) if prologue else h_grad
        return x_grad, None, None, None, residual_grad


def _magnitude_gradients(projection: Projection, update: Tensor | None, grad: Tensor) -> Tensor:
    """Add the gradients of the magnitudes to their sums; return the gradient of what they multiplied."""
    if update is None:
        return grad
    bias = projection.frozen.bias
    grad = projection.frozen.memory.scratch("grad of rows", *grad.shape).copy_(grad)
    for columns, pair in projection.pairs:
        if pair.row_rates is None or pair.trained.magnitude is None:
            continue
        own = grad[:, columns]
        if pair.grads:
            made = update[:, columns].float() if bias is None else update[:, columns].float() - bias[columns].float()
            total = (own.float() * made).sum(0)  # Σ g · y; y holds m / n, of which only 1 / n is wanted
            magnitude = pair.trained.magnitude
            total = torch.where(magnitude != 0, total / magnitude, torch.zeros_like(total))
            pair.grads[worker()].magnitude.add_(total)  # type: ignore[union-attr]
        own.mul_(pair.row_rates.to(own.dtype))
    return grad


def _adapter_gradients(projection: Projection, h: Tensor, low: Tensor, grad: Tensor) -> Tensor:
    """Add the gradients of every A and B of the group to their sums; return scale · g B, (tokens, sum of ranks)."""
    low_grad, task = torch.empty_like(low), worker()
    row = 0
    for columns, pair in projection.pairs:
        rows = slice(row, row + pair.A.shape[0])
        own = grad[:, columns]
        torch.mul(torch.mm(own, pair.B), pair.scale, out=low_grad[:, rows])
        if pair.grads:
            pair.grads[task].B.add_(torch.mm(own.t(), low[:, row : row + pair.rank]), alpha=pair.scale)
        row = rows.stop
    if any(pair.freezes_a or not pair.grads for _, pair in projection.pairs):
        return low_grad
    a_grad = torch.mm(low_grad.t(), h)
    row = 0
    for _, pair in projection.pairs:
        own = pair.grads[task].A.add_(a_grad[row : row + pair.rank])
        if pair.origin is not None:  # A is in both halves
            own.add_(a_grad[row + pair.rank : row + 2 * pair.rank])
        row += pair.A.shape[0]
    return low_grad


def _add_low_gradient(projection: Projection, low_grad: Tensor, key: int | None, h_grad: Tensor) -> None:
    """Add what reaches h through A to its gradient."""
    if projection.noise is None or key is None:
        h_grad.addmm_(low_grad, projection.stacked_a())
        return
    through_a = projection.frozen.memory.scratch("dropped", *h_grad.shape)
    torch.mm(low_grad, projection.stacked_a(), out=through_a)
    projection.noise.drop(through_a, key, h_grad, is_added=True)
