"""Adapters in memory: as they take part in products, and as one flat float32 vector while they are trained.

One vector makes the optimiser, the gradient norm and checkpoints single operations. All A come first, then all B, then
all magnitudes, so that each kind can have a learning rate of its own.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, Layout

# What Python and torch hold of a layer beside its numbers, at least (measured of one that answers): of rank 1 more
# than half of those.
OBJECT_BYTES = 3600


@dataclass(frozen=True)
class Parameters:
    """What is trained of one layer, or its gradients, as views of a flat vector."""

    A: Tensor  # float32 (rank, in)
    B: Tensor  # float32 (out, rank)
    magnitude: Tensor | None  # float32 (out,), or None


@dataclass
class LoraFactors:
    """A and B of one layer in the compute type, brought up to date after each step.

    Of a layer in delta form they hold B A − B₀ A₀ as (B − B₀) A + B₀ (A − A₀): A over A − A₀, and B − B₀ beside B₀. The
    differences are taken in float32, so that what is small beside the start is not rounded away.
    """

    A: Tensor  # (ranks, in), compute type
    B: Tensor  # (out, ranks), compute type
    scale: float  # factor of B A
    rank: int  # how many rows of A and columns of B are trained
    trained: Parameters  # the parameters behind them
    origin: Parameters | None = None  # what they are trained as the difference to, or None
    # float32 (out,): length of each row of W + scale · B A, where there is a magnitude
    row_lengths: Tensor | None = None
    row_rates: Tensor | None = None  # float32 (out,): magnitude over length; 1 where there is no length to set

    def refresh(self) -> None:
        """Follow the trained parameters."""
        trained, origin, rank = self.trained, self.origin, self.rank
        if self.A.data_ptr() != trained.A.data_ptr():
            self.A[:rank].copy_(trained.A)
            self.B[:, :rank].copy_(trained.B if origin is None else trained.B - origin.B)
        if origin is not None:
            self.A[rank:].copy_(trained.A - origin.A)


@dataclass(frozen=True)
class _Shape:
    """What does not change in training."""

    A: tuple[int, ...]
    B: tuple[int, ...]
    scale: float
    has_magnitude: bool
    layout: Layout


class Spans(NamedTuple):
    """Where each kind of parameter lies in the flat vector."""

    A: slice
    B: slice
    magnitude: slice


class ActiveAdapter:
    """An adapter ready for products in the compute type; one without layers is the bare base."""

    def __init__(self, layers: Mapping[str, LoraFactors]) -> None:
        self.layers = layers
        self.tables: dict[int, Any] = {}  # by group of projections: what thimble.backends.torch.lora_rows looks up


class FinishedAdapter(ActiveAdapter):
    """One that only answers. Its B lie transposed, as loops for few tokens read them, and nothing is held twice.

    Args:
        adapter: Whose arrays are used as they are where that can be: they must not be changed any more.
        compute: Of the products.
    """

    def __init__(self, adapter: Adapter, compute: torch.dtype) -> None:
        self.identity = adapter.identity()
        super().__init__(
            {path: _finished(factors, adapter.origin.get(path), compute) for path, factors in adapter.layers.items()}
        )

    @property
    def resident_bytes(self) -> int:
        """See thimble.backends.session.ActiveAdapter."""
        kept = [(f.A, f.B, f.trained.magnitude, f.row_lengths, f.row_rates) for f in self.layers.values()]
        numbers = sum(tensor.nbytes for tensors in kept for tensor in tensors if tensor is not None)
        return numbers + OBJECT_BYTES * len(self.layers)


def _finished(factors: Factors, start: Factors | None, compute: torch.dtype) -> LoraFactors:
    a, b = _stacked(torch.from_numpy(factors.A).float(), torch.from_numpy(factors.B).float(), _as_origin(start))
    a, b = a.to(compute).contiguous(), b.to(compute).t().contiguous().t()
    magnitude = None if factors.magnitude is None else torch.from_numpy(factors.magnitude).float()
    return LoraFactors(a, b, factors.scale, len(factors.A), Parameters(a, b, magnitude))


class TrainableAdapter(ActiveAdapter):
    """One whose values lie in one flat float32 vector, and reach the layers from there; of None, the bare base."""

    def __init__(self, adapter: Adapter | None, compute: torch.dtype) -> None:
        adapter = adapter or Adapter({})
        self._shapes = {
            path: _Shape(f.A.shape, f.B.shape, f.scale, f.magnitude is not None, f.layout)
            for path, f in adapter.layers.items()
        }
        self._like = replace(adapter, layers={}, origin=dict(adapter.origin))
        every = adapter.layers.values()
        kinds = ([f.A for f in every], [f.B for f in every], [f.magnitude for f in every if f.magnitude is not None])
        ends = np.cumsum([0, *(sum(array.size for array in arrays) for arrays in kinds)])
        self.spans = Spans(*(slice(int(a), int(b)) for a, b in zip(ends, ends[1:], strict=False)))
        self.flat = torch.empty(int(ends[-1]))
        for span, arrays in zip(self.spans, kinds, strict=True):
            values = np.concatenate([array.reshape(-1) for array in arrays] or [np.zeros(0)])
            self.flat[span] = torch.from_numpy(values.astype(np.float32))
        trained = self.views(self.flat)
        super().__init__({path: self._factors(path, trained[path], compute) for path in self._shapes})

    @property
    def resident_bytes(self) -> int:
        """See thimble.backends.session.ActiveAdapter."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        turned = sum(factors.B.nbytes for factors in self.layers.values())  # Bᵀ in `tables`
        return sum(own.values()) + turned + OBJECT_BYTES * len(self.layers)

    def _tensors(self) -> Iterator[Tensor]:
        """All tensors; some are views of one another."""
        yield self.flat
        for factors in self.layers.values():
            yield from (factors.A, factors.B)
            yield from () if factors.origin is None else (factors.origin.A, factors.origin.B)

    @functools.cached_property
    def identity(self) -> str:
        """See thimble.backends.session.ActiveAdapter; of one that is not trained any more."""
        return self.export().identity()

    def _factors(self, path: str, trained: Parameters, compute: torch.dtype) -> LoraFactors:
        origin = _as_origin(self._like.origin.get(path))
        a, b = _stacked(trained.A, trained.B, origin)
        return LoraFactors(a.to(compute), b.to(compute), self._shapes[path].scale, len(trained.A), trained, origin)

    def views(self, flat: Tensor) -> dict[str, Parameters]:
        """A flat vector of the adapter's size by layer."""
        rests = [flat[span] for span in self.spans]

        def take(kind: int, shape: tuple[int, ...]) -> Tensor:
            count = int(np.prod(shape))
            part, rests[kind] = rests[kind][:count], rests[kind][count:]
            return part.view(shape)

        return {
            path: Parameters(take(0, s.A), take(1, s.B), take(2, s.B[:1]) if s.has_magnitude else None)
            for path, s in self._shapes.items()
        }

    def export(self) -> Adapter:
        """The current values as an adapter, float32."""
        views: Mapping[str, Parameters] = self.views(self.flat)
        layers = {path: _copied(parameters, self._shapes[path]) for path, parameters in views.items()}
        return replace(self._like, layers=layers)


def _as_origin(start: Factors | None) -> Parameters | None:
    return None if start is None else Parameters(torch.from_numpy(start.A), torch.from_numpy(start.B), None)


def _stacked(a: Tensor, b: Tensor, origin: Parameters | None) -> tuple[Tensor, Tensor]:
    """A over A − A₀ and B − B₀ beside B₀, where there is something that a layer is the difference to."""
    return (a, b) if origin is None else (torch.cat([a, a - origin.A]), torch.cat([b - origin.B, origin.B], 1))


def _copied(parameters: Parameters, shape: _Shape) -> Factors:
    magnitude = None if parameters.magnitude is None else parameters.magnitude.numpy().copy()
    return Factors(parameters.A.numpy().copy(), parameters.B.numpy().copy(), shape.scale, magnitude, shape.layout)
