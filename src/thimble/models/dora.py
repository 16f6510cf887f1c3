"""A DoRA adapter as plain LoRA, for programs that know no other: what it changes of each weight, at a lower rank."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from thimble.core.adapter import Adapter
from thimble.core.inits import top
from thimble.core.lowrank import Factors, as_update, delta, merge
from thimble.models.base import Base


def without_magnitudes(
    adapter: Adapter, base: Base, rank: int, on_layer: Callable[[int], None] = lambda done: None
) -> tuple[Adapter, dict[str, float]]:
    """Approximate a DoRA adapter by a plain one; holds one dense weight at a time.

    What is merged is W' = W + ΔW with rows of other lengths, and W' − W has full rank: a multiple of each row of W is
    in it. Its truncated SVD is the best approximation (Eckart and Young, 1936).

    Args:
        adapter: With magnitudes.
        base: What it was made for.
        rank: The most that a layer gets.
        on_layer: Told how many layers are done.

    Returns:
        The plain adapter, with scales of 1, and by layer the relative error ‖W' − W − B A‖_F / ‖W' − W‖_F.
    """
    layers: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for path, factors in adapter.layers.items():
        layers[path] = factors
        if factors.magnitude is not None:
            weight = base.weights[f"{path}.weight"].read()
            change = merge(weight, factors) - weight  # (out, in)
            layers[path] = as_update(top(change, min(rank, *change.shape)))
            size = float(np.linalg.norm(change))
            errors[path] = float(np.linalg.norm(change - delta(layers[path]))) / size if size else 0.0
        on_layer(len(layers))
    return replace(adapter, layers=layers), errors
