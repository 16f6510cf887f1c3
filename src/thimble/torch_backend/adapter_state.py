"""The trained numbers: every A and B of an adapter as views of one flat float32 vector.

One vector makes the optimiser, the gradient norm, checkpoints and the cast to the compute type single operations.
"""

from collections.abc import Mapping, Sequence
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
        grads: For each task that runs beside others, the gradients of A and B summed over its micro-batches, float32;
            empty if the adapter is not trained.
    """

    A: Tensor
    B: Tensor
    scale: float
    grads: Sequence[tuple[Tensor, Tensor]] = ()


class AdapterState:
    """An adapter in memory, for training or for use.

    Args:
        adapter: Start values.
        compute: Type of the products that A and B take part in.
        num_tasks: Keep gradients, for this many tasks that run side by side; 0 if the adapter is not trained.
    """

    def __init__(self, adapter: Adapter, compute: torch.dtype, num_tasks: int = 0) -> None:
        self.shapes = {path: (f.A.shape, f.B.shape, f.scale) for path, f in adapter.layers.items()}
        parts = [part.reshape(-1) for f in adapter.layers.values() for part in (f.A, f.B)]
        self.master = torch.from_numpy(np.concatenate(parts or [np.zeros(0)]).astype(np.float32))
        self.grads = [torch.zeros_like(self.master) for _ in range(num_tasks)]
        self.working = self.master if compute == torch.float32 else self.master.to(compute)
        self.pairs = self._make_pairs()

    def _make_pairs(self) -> dict[str, LoraPair]:
        working, grads = self._views(self.working), [self._views(grad) for grad in self.grads]
        return {
            path: LoraPair(*working[path], shape[2], [views[path] for views in grads])
            for path, shape in self.shapes.items()
        }

    def _views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        views, start = {}, 0
        for path, (a, b, _) in self.shapes.items():
            middle, end = start + a[0] * a[1], start + a[0] * a[1] + b[0] * b[1]
            views[path] = (flat[start:middle].view(a), flat[middle:end].view(b))
            start = end
        return views

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
