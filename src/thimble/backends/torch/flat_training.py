"""What sessions that train low-rank updates in one flat vector share: the optimiser's step, and checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from thimble.backends.session import Gradient
from thimble.backends.torch.adamw import AdamW
from thimble.backends.torch.adapters import TrainableAdapter
from thimble.core.adapter import Adapter
from thimble.core.method import Method


@dataclass(frozen=True)
class TrainState:
    """An adapter in training, with its optimiser."""

    active: TrainableAdapter
    method: Method
    optimiser: AdamW


def begin(active: TrainableAdapter, method: Method) -> TrainState:
    """Train an adapter from the values it has."""
    spans, goal = active.spans, active.flat.clone() if method.weight_decay else None
    rates = [(spans.A, 0.0 if method.freezes_a else 1.0), (spans.B, method.lora_plus), (spans.magnitude, 1.0)]
    return TrainState(active, method, AdamW(active.flat, method.weight_decay, goal, rates, method.beta2))


class FlatTraining:
    """The part of a session that knows nothing of its model; see thimble.backends.session for what methods promise."""

    def adapter(self, state: TrainState) -> Adapter:
        return state.active.export()

    def apply(self, state: TrainState, gradient: Gradient, rate: float) -> TrainState:
        most = state.method.max_grad_norm
        scale = most / gradient.norm if gradient.norm > most else 1.0
        state.optimiser.step(torch.from_numpy(gradient.flat), rate, scale)
        return self._refreshed(state)

    def _refreshed(self, state: TrainState) -> TrainState:
        """Have the trained parameters reach the layers."""
        return state

    def snapshot(
        self, state: TrainState, into: Mapping[str, NDArray[np.float32]] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        kept = dict(into or {})
        for name, values in self._arrays(state).items():
            if name in kept:
                np.copyto(kept[name], values)
            else:
                kept[name] = values.copy()
        return kept

    def _arrays(self, state: TrainState) -> dict[str, NDArray[np.float32]]:
        """All that training changes: the flat adapter and AdamW's moments and step count."""
        return {"adapter": state.active.flat.numpy(), **state.optimiser.state()}

    def restore(self, state: TrainState, arrays: Mapping[str, NDArray[np.float32]]) -> TrainState:
        state.optimiser.restore(arrays)
        if "adapter" in arrays:
            state.active.flat.copy_(torch.from_numpy(arrays["adapter"]))
        return self._refreshed(state)

    def is_finite(self, state: TrainState) -> bool:
        return all(np.isfinite(values).all() for values in self._arrays(state).values())

    def unmoved_layers(self, state: TrainState) -> list[str]:
        moved = state.active.views(state.optimiser.squares)
        return [path for path, part in moved.items() if not (bool(part.A.any()) or bool(part.B.any()))]
