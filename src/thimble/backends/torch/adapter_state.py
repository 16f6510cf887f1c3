"""The trained numbers: every A, B and magnitude of an adapter as views of one flat float32 vector.

One vector makes the optimiser, the gradient norm and checkpoints single operations. All A come first, then all B, then
all magnitudes, so that each kind can have a learning rate of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors


@dataclass(frozen=True)
class Numbers:
    """Numbers of one layer that belong together, as views: the trained ones, or their gradients.

    Attributes:
        A: float32 (rank, in).
        B: float32 (out, rank).
        magnitude: float32 (out,), or None.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None


@dataclass
class LoraPair:
    """A and B of one layer, in the compute type, with room for their gradients.

    Of a layer in delta form they hold B A − B₀ A₀ as (B − B₀) A + B₀ (A − A₀): A over A − A₀, and B − B₀ beside B₀. The
    differences are taken in float32, so that what is small beside the start is not rounded away.

    Attributes:
        A: (ranks, in), compute type.
        B: (out, ranks), compute type.
        scale: Factor of B A.
        rank: How many rows of A and columns of B are trained.
        trained: The numbers behind them.
        origin: What they are trained as the difference to, or None.
        grads: For each task that runs beside others, the gradients summed over its micro-batches; empty if the adapter
            is not trained.
        freezes_a: Whether A gets no gradient.
        row_lengths: float32 (out,): length of each row of W + scale · B A, where there is a magnitude.
        row_rates: float32 (out,): magnitude over length; 1 where there is no length to set.
    """

    A: Tensor
    B: Tensor
    scale: float
    rank: int
    trained: Numbers
    origin: Numbers | None = None
    grads: Sequence[Numbers] = ()
    freezes_a: bool = False
    row_lengths: Tensor | None = None
    row_rates: Tensor | None = None


@dataclass
class _Shape:
    """What does not change in training."""

    A: tuple[int, ...]
    B: tuple[int, ...]
    scale: float
    has_magnitude: bool


@dataclass
class Spans:
    """Where each kind of number lies in the flat vector."""

    A: slice
    B: slice
    magnitude: slice = field(default_factory=lambda: slice(0, 0))


class AdapterState:
    """An adapter in memory, for training or for use.

    Args:
        adapter: Start values.
        compute: Type of the products that A and B take part in.
        num_tasks: Keep gradients, for this many tasks that run side by side; 0 if the adapter is not trained.
        freezes_a: Whether A gets no gradient.
    """

    def __init__(self, adapter: Adapter, compute: torch.dtype, num_tasks: int = 0, freezes_a: bool = False) -> None:
        self.shapes = {
            path: _Shape(f.A.shape, f.B.shape, f.scale, f.magnitude is not None) for path, f in adapter.layers.items()
        }
        self.origin = dict(adapter.origin)
        every = adapter.layers.values()
        kinds = ([f.A for f in every], [f.B for f in every], [f.magnitude for f in every if f.magnitude is not None])
        ends = np.cumsum([0, *(sum(array.size for array in arrays) for arrays in kinds)])
        self.spans = Spans(*(slice(int(a), int(b)) for a, b in zip(ends, ends[1:], strict=False)))
        self.master = torch.empty(int(ends[-1]))
        for span, arrays in zip((self.spans.A, self.spans.B, self.spans.magnitude), kinds, strict=True):
            flat = np.concatenate([array.reshape(-1) for array in arrays] or [np.zeros(0)])
            self.master[span] = torch.from_numpy(flat.astype(np.float32))
        self.grads = [torch.zeros_like(self.master) for _ in range(num_tasks)]
        trained, grads = self.views(self.master), [self.views(grad) for grad in self.grads]
        self.pairs = {
            path: self._pair(path, trained[path], [views[path] for views in grads], compute, freezes_a)
            for path in self.shapes
        }

    def _pair(
        self, path: str, trained: Numbers, grads: Sequence[Numbers], compute: torch.dtype, freezes_a: bool
    ) -> LoraPair:
        start, a, b, origin = self.origin.get(path), trained.A, trained.B, None
        if start is not None:
            origin = Numbers(torch.from_numpy(start.A), torch.from_numpy(start.B), None)
            a, b = torch.cat([a, a - origin.A]), torch.cat([b - origin.B, origin.B], 1)
        a, b, scale = a.to(compute), b.to(compute), self.shapes[path].scale
        return LoraPair(a, b, scale, len(trained.A), trained, origin, grads, freezes_a)

    def views(self, flat: Tensor) -> dict[str, Numbers]:
        """A flat vector of the adapter's size by layer."""
        rests = [flat[span] for span in (self.spans.A, self.spans.B, self.spans.magnitude)]

        def take(kind: int, shape: tuple[int, ...]) -> Tensor:
            count = int(np.prod(shape))
            part, rests[kind] = rests[kind][:count], rests[kind][count:]
            return part.view(shape)

        return {
            path: Numbers(take(0, s.A), take(1, s.B), take(2, s.B[:1]) if s.has_magnitude else None)
            for path, s in self.shapes.items()
        }

    def clear_gradients(self) -> None:
        """Begin a new sum."""
        for grad in self.grads:
            grad.zero_()

    def gradient(self) -> Tensor:
        """The gradient of all numbers, summed over tasks, in place of the first one's."""
        for grad in self.grads[1:]:
            self.grads[0].add_(grad)
        return self.grads[0]

    def refresh(self) -> None:
        """Bring the copies in the compute type up to date after the masters changed."""
        for pair in self.pairs.values():
            trained, origin, rank = pair.trained, pair.origin, pair.rank
            if pair.A.data_ptr() != trained.A.data_ptr():
                pair.A[:rank].copy_(trained.A)
                pair.B[:, :rank].copy_(trained.B if origin is None else trained.B - origin.B)
            if origin is not None:
                pair.A[rank:].copy_(trained.A - origin.A)

    def export(self, like: Adapter) -> Adapter:
        """The current numbers as an adapter, with the base and notes of `like`."""
        views: Mapping[str, Numbers] = self.views(self.master)
        layers = {path: self._factors(numbers, self.shapes[path].scale) for path, numbers in views.items()}
        return Adapter(layers, like.base, like.notes, self.origin)

    def _factors(self, numbers: Numbers, scale: float) -> Factors:
        magnitude = None if numbers.magnitude is None else numbers.magnitude.numpy().copy()
        return Factors(numbers.A.numpy().copy(), numbers.B.numpy().copy(), scale, magnitude)
