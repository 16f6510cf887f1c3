"""The trained numbers: every A and B of an adapter as views of one flat float32 vector.

One vector makes the optimiser, the gradient norm, checkpoints and the cast to the compute type single operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors


@dataclass
class LoraPair:
    """A and B of one layer, in the compute type, with room for their gradients.

    Attributes:
        A: (rank, in), compute type.
        B: (out, rank), compute type.
        scale: Factor of B A.
        grad_A: float32 (rank, in), summed over micro-batches.
        grad_B: float32 (out, rank), likewise.
    """

    A: Tensor
    B: Tensor
    scale: float
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None


class AdapterState:
    """An adapter in memory, for training or for use.

    Args:
        adapter: Start values.
        compute: Type of the products that A and B take part in.
        is_trained: Keep gradients and float32 masters.
    """

    def __init__(self, adapter: Adapter, compute: torch.dtype, is_trained: bool = False) -> None:
        self.shapes = {path: (f.A.shape, f.B.shape, f.scale) for path, f in adapter.layers.items()}
        parts = [part.reshape(-1) for f in adapter.layers.values() for part in (f.A, f.B)]
        self.master = torch.from_numpy(np.concatenate(parts or [np.zeros(0)]).astype(np.float32))
        self.grad = torch.zeros_like(self.master) if is_trained else None
        self.working = self.master if compute == torch.float32 else self.master.to(compute)
        self.pairs = self._make_pairs()

    def _make_pairs(self) -> dict[str, LoraPair]:
        working, grads = self._views(self.working), self._views(self.grad) if self.grad is not None else {}
        return {
            path: LoraPair(*working[path], shape[2], *grads.get(path, (None, None)))
            for path, shape in self.shapes.items()
        }

    def _views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        views, start = {}, 0
        for path, (a, b, _) in self.shapes.items():
            middle, end = start + a[0] * a[1], start + a[0] * a[1] + b[0] * b[1]
            views[path] = (flat[start:middle].view(a), flat[middle:end].view(b))
            start = end
        return views

    def refresh(self) -> None:
        """Bring the compute-type copy up to date after the masters changed."""
        if self.working is not self.master:
            self.working.copy_(self.master)

    def export(self, like: Adapter) -> Adapter:
        """The current numbers as an adapter, with the base and notes of `like`."""
        views: Mapping[str, tuple[Tensor, Tensor]] = self._views(self.master)
        layers = {
            path: Factors(a.numpy().copy(), b.numpy().copy(), self.shapes[path][2]) for path, (a, b) in views.items()
        }
        return Adapter(layers, like.base, like.notes)
