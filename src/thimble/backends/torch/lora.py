"""The layer of every adapter: y = h Wᵀ + scale · (h Aᵀ) Bᵀ with h = prologue(x).

One autograd function for a whole group of projections that read the same input (q, k and v; gate and up). It keeps
only x, recomputes h, adds gradients of A and B straight into their float32 sums, and makes no gradient of x when
nothing below needs it. Hand-derived as in Hu et al., arXiv:2106.09685: with g = ∂L/∂y,
∂L/∂B = scale · gᵀ(h Aᵀ), ∂L/∂A = scale · (g B)ᵀ h, ∂L/∂h = g W + scale · (g B) A.

With a magnitude m (DoRA, arXiv:2402.09353), row i of the weight is multiplied by m_i / n_i, n being the lengths of the
rows of W + scale · B A. They count as constants of a step (section 4.3 there), so g is multiplied by m / n before all
of the above, and ∂L/∂m = Σ g · (y before it) / n.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch import fused
from thimble.backends.torch.adapters import LoraFactors, Parameters
from thimble.backends.torch.elementwise import Prologue
from thimble.backends.torch.frozen import FrozenLinear, as_numpy
from thimble.backends.torch.lora_rows import RowUpdates
from thimble.backends.torch.threads import parallel_for
from thimble.core.dropout import drop_threshold, keep_factor

Layers = Mapping[str, LoraFactors]
Ranges = Sequence[tuple[slice, Layers]]


@dataclass(frozen=True)
class Dropout:
    """What dropout leaves out of the inputs of A in one batch; see thimble.core.dropout."""

    rate: float  # share left out
    key: tuple[int, int]  # seed of the run and number of the step
    rows: np.ndarray  # int64 (tokens,), for each token the place of its row in the step
    tokens: np.ndarray  # int64 (tokens,), for each token its place in its row

    def apply(self, x: Tensor, layer: int, out: Tensor, is_added: bool = False) -> Tensor:
        """Write what is left of x to `out`, or add it: both (tokens, n), contiguous."""
        seed, step = (word & 0xFFFFFFFF for word in self.key)
        counter = (self.tokens, self.rows, np.uint64(layer), np.uint64(seed), np.uint64(step))
        what = (np.uint64(drop_threshold(self.rate)), keep_factor(self.rate), as_numpy(out), is_added)
        parallel_for(*x.shape, fused.drop, as_numpy(x), *counter, *what)
        return out


@dataclass(frozen=True)
class Lora:
    """What a forward pass adds to the frozen products: for each range of its tokens an adapter, and who watches."""

    ranges: Ranges = ()  # tokens, and the adapter they have; tokens of no range have none
    # where the gradients of A, B and magnitude are added, by layer path; None if nothing is trained
    grads: Mapping[str, Parameters] | None = None
    freezes_a: bool = False  # whether A gets no gradient
    rows: RowUpdates | None = None  # adapters of short rows, which are in no range; where no gradient is wanted
    dropout: Dropout | None = None  # of the inputs of A, or None
    # called, where no gradient is wanted, with what the weights are multiplied with, (tokens, in)
    on_input: "Callable[[Projection, Tensor], None] | None" = None
    # called in the backward pass with what the weights were multiplied with, (tokens, in), and the gradient of the
    # result, (tokens, sum of outs)
    on_gradient: "Callable[[Projection, Tensor, Tensor], None] | None" = None

    def at(self, places: NDArray[np.int64]) -> "Lora":
        """The same for a pass over some tokens of one in which all have the same adapter."""
        if self.dropout is None:
            return self
        rows, tokens = self.dropout.rows[places], self.dropout.tokens[places]
        return replace(self, dropout=replace(self.dropout, rows=rows, tokens=tokens))


BARE = Lora()


@dataclass
class Projection:
    """A group of linear layers with one input."""

    frozen: FrozenLinear  # the stacked frozen weights, (sum of outs, in)
    columns: dict[str, slice]  # layer path to the columns of the output that are its own
    number: int = 0  # its place among all groups of the decoder

    def adapted(self, layers: Layers) -> "Adapted":
        """The layers of this group that an adapter changes."""
        found = [(path, columns, layers[path]) for path, columns in self.columns.items() if path in layers]
        ends = itertools.accumulate(len(factors.A) for _, _, factors in found)
        return [(*layer, slice(end - len(layer[2].A), end)) for layer, end in zip(found, ends, strict=True)]

    def needs_gradient(self, lora: Lora) -> bool:
        """Whether the backward pass has something to do here."""
        is_trained = lora.grads is not None and any(self.adapted(layers) for _, layers in lora.ranges)
        return is_trained or lora.on_gradient is not None

    @torch.no_grad()
    def measure(self, layers: Layers) -> None:
        """Bring the row rates of layers with a magnitude up to date after A, B or the magnitude changed.

        For each row w of W and b of B, ‖w + s b A‖² = ‖w‖² + 2 s (w Aᵀ) bᵀ + s² b (A Aᵀ) bᵀ: nothing as large as W
        is made.
        """
        adapted = self.adapted(layers)
        if not _have_magnitude(adapted):
            return
        a = _stacked_a(adapted)
        answers = self.frozen.matmul(a, torch.empty(len(a), self.frozen.rows, dtype=a.dtype))  # A Wᵀ
        for _, columns, factors, rows in adapted:
            if factors.trained.magnitude is None:
                continue
            wide_a, b = factors.A.float(), factors.B.float()
            square = self.frozen.row_squares()[columns].clone()
            square += 2 * factors.scale * (answers[rows, columns].t().float() * b).sum(1)
            square += factors.scale**2 * ((b @ (wide_a @ wide_a.t())) * b).sum(1)
            length = factors.row_lengths = square.clamp_(min=0).sqrt_()
            factors.row_rates = torch.where(length > 0, factors.trained.magnitude / length, torch.ones_like(length))


# For each layer: its path, its columns of the output, its factors, and which rows they are of all A over one another.
Adapted = list[tuple[str, slice, LoraFactors, slice]]


def _have_magnitude(adapted: Adapted) -> bool:
    return any(factors.trained.magnitude is not None for _, _, factors, _ in adapted)


def _stacked_a(adapted: Adapted) -> Tensor:
    """All A over one another, (sum of ranks, in)."""
    return adapted[0][2].A if len(adapted) == 1 else torch.cat([factors.A for _, _, factors, _ in adapted])


def project(
    x: Tensor, projection: Projection, lora: Lora, prologue: Prologue | None = None, residual: Tensor | None = None
) -> Tensor:
    """Apply a group of projections to x, (tokens, n), or to what a prologue makes of it.

    The result, (tokens, sum of outs), is added to `residual` where there is one.
    """
    if torch.is_grad_enabled() and (x.requires_grad or projection.needs_gradient(lora)):
        start = torch.empty(0, requires_grad=True)  # makes autograd visit the lowest adapted layer, whose x needs none
        return _Project.apply(x, start, projection, lora, prologue, residual)  # type: ignore[no-any-return]
    size = (len(x), projection.frozen.rows)
    if residual is None:  # read by the next layer only
        y = projection.frozen.memory.scratch(f"output of {size[1]}", *size)
    else:
        y = torch.empty(size, dtype=x.dtype)
    h = _input(x, projection, prologue)
    if lora.on_input:
        lora.on_input(projection, h)
    _forward(h, projection, lora, y)
    return y if residual is None else y.add_(residual)


def _input(x: Tensor, projection: Projection, prologue: Prologue | None) -> Tensor:
    """What the weights are multiplied with; valid until the next projection's is made on this thread."""
    if prologue is None:
        return x
    frozen = projection.frozen
    return prologue.forward(x, frozen.memory.scratch("input", len(x), frozen.cols))


def _dropped(h: Tensor, projection: Projection, lora: Lora) -> Tensor:
    """What A reads: h, or in training what dropout leaves of it."""
    if lora.dropout is None:
        return h
    out = projection.frozen.memory.scratch("dropped", *h.shape)
    return lora.dropout.apply(h.contiguous(), projection.number, out)


def _forward(h: Tensor, projection: Projection, lora: Lora, y: Tensor) -> list[Tensor | None]:
    """Fill y with what the weights and the adapters make of h; return the low-rank products of each range of tokens."""
    frozen = projection.frozen
    found = [(tokens, projection.adapted(layers)) for tokens, layers in lora.ranges]
    if not any(adapted for _, adapted in found) and lora.rows is None:
        frozen.forward(h, y)
        return [None] * len(found)
    frozen.matmul(h, y)
    read = _dropped(h, projection, lora)
    lows = [_add_update(read[tokens], adapted, y[tokens]) if adapted else None for tokens, adapted in found]
    if lora.rows is not None:
        lora.rows.add(projection.number, projection.columns, h, y)
    if frozen.bias is not None:
        y.add_(frozen.bias)
    return lows


def _add_update(h: Tensor, adapted: Adapted, y: Tensor) -> Tensor:
    """Add scale · (h Aᵀ) Bᵀ of some layers to their columns of y; return h Aᵀ of all, (tokens, sum of ranks)."""
    low = torch.mm(h, _stacked_a(adapted).t())
    for _, columns, factors, rows in adapted:
        own = y[:, columns]
        own.addmm_(low[:, rows], factors.B.t(), alpha=factors.scale)
        if factors.row_rates is not None:
            own.mul_(factors.row_rates.to(own.dtype))
    return low


class _Project(torch.autograd.Function):
    """`project` with a backward pass, in which all tokens of the pass have one adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Tensor, projection: Projection, lora: Lora, prologue: Prologue | None,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        memory, size = projection.frozen.memory, (len(x), projection.frozen.rows)
        y = memory.keep(*size)
        lows = _forward(_input(x, projection, prologue), projection, lora, y)
        ctx.adapted = projection.adapted(lora.ranges[0][1]) if lora.ranges else []
        has_magnitude = _have_magnitude(ctx.adapted)
        ctx.save_for_backward(x, lows[0] if lows else None, y if has_magnitude else None)
        ctx.projection, ctx.lora, ctx.prologue = projection, lora, prologue
        if residual is None:
            return y
        # What a magnitude multiplied is needed again, so the sum is kept beside it.
        return torch.add(y, residual, out=memory.keep(*size)) if has_magnitude else y.add_(residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None, Tensor | None]:
        x, low, update = ctx.saved_tensors
        projection, lora, prologue, grad = ctx.projection, ctx.lora, ctx.prologue, grads[0]
        frozen, low_grad = projection.frozen, None
        residual_grad = grad if ctx.needs_input_grad[5] else None
        if ctx.adapted or lora.on_gradient:
            h = _input(x, projection, prologue)
            if lora.on_gradient:
                lora.on_gradient(projection, h, grad)
            if ctx.adapted:
                grad = _magnitude_gradients(projection, ctx.adapted, lora, update, grad)
                low_grad = _adapter_gradients(ctx.adapted, lora, _dropped(h, projection, lora), low, grad)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, residual_grad
        h_grad = frozen.input_grad(grad, frozen.memory.scratch("input_grad", len(x), frozen.cols))
        if low_grad is not None:
            _add_low_gradient(projection, ctx.adapted, lora, low_grad, h_grad)
        x_grad = prologue.backward(x, h_grad, frozen.memory) if prologue else h_grad
        return x_grad, None, None, None, None, residual_grad


def _magnitude_gradients(
    projection: Projection, adapted: Adapted, lora: Lora, update: Tensor | None, grad: Tensor
) -> Tensor:
    """Add the gradients of the magnitudes to their sums; return the gradient of what they multiplied."""
    if update is None:
        return grad
    bias = projection.frozen.bias
    grad = projection.frozen.memory.scratch("grad of rows", *grad.shape).copy_(grad)
    for path, columns, factors, _ in adapted:
        magnitude = factors.trained.magnitude
        if factors.row_rates is None or magnitude is None:
            continue
        own = grad[:, columns]
        if lora.grads is not None:
            made = update[:, columns].float() if bias is None else update[:, columns].float() - bias[columns].float()
            total = (own.float() * made).sum(0)  # Σ g · y; y holds m / n, of which only 1 / n is wanted
            total = torch.where(magnitude != 0, total / magnitude, torch.zeros_like(total))
            lora.grads[path].magnitude.add_(total)  # type: ignore[union-attr]
        own.mul_(factors.row_rates.to(own.dtype))
    return grad


def _adapter_gradients(adapted: Adapted, lora: Lora, h: Tensor, low: Tensor, grad: Tensor) -> Tensor:
    """Add the gradients of every A and B of the group to their sums; return scale · g B, (tokens, sum of ranks)."""
    low_grad = torch.empty_like(low)
    for path, columns, factors, rows in adapted:
        own = grad[:, columns]
        torch.mul(torch.mm(own, factors.B), factors.scale, out=low_grad[:, rows])
        if lora.grads is not None:
            product = torch.mm(own.t(), low[:, rows][:, : factors.rank])  # (out, rank)
            lora.grads[path].B.add_(product, alpha=factors.scale)
    if lora.freezes_a or lora.grads is None:
        return low_grad
    a_grad = torch.mm(low_grad.t(), h)
    for path, _, factors, rows in adapted:
        own = lora.grads[path].A.add_(a_grad[rows][: factors.rank])
        if factors.origin is not None:  # A is in both halves
            own.add_(a_grad[rows][factors.rank :])
    return low_grad


def _add_low_gradient(projection: Projection, adapted: Adapted, lora: Lora, low_grad: Tensor, h_grad: Tensor) -> None:
    """Add what reaches h through A to its gradient."""
    if lora.dropout is None:
        h_grad.addmm_(low_grad, _stacked_a(adapted))
        return
    through_a = projection.frozen.memory.scratch("dropped", *h_grad.shape)
    torch.mm(low_grad, _stacked_a(adapted), out=through_a)
    lora.dropout.apply(through_a, projection.number, h_grad, is_added=True)
