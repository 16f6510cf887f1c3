"""The adapter as a value: low-rank updates by layer path. Knows no files, no framework and no base."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from thimble.core.inits import draw
from thimble.core.lowrank import Factors, difference
from thimble.core.targets import Size


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by layer path, plus where they came from.

    Attributes:
        layers: Layer path, such as `model.layers.0.self_attn.q_proj`, to its factors; float32 (rank, in), (out, rank).
        base: Name or path of the base it was trained on, for people; may be empty.
        notes: Text kept in the header of the tensor file, such as the fingerprint of the base.
        origin: What is taken off the updates of layers that are trained in delta form, scale · (B A − B₀ A₀).
    """

    layers: Mapping[str, Factors]
    base: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapter holds."""
        magnitudes = (f.magnitude for f in self.layers.values() if f.magnitude is not None)
        return sum(f.A.size + f.B.size for f in self.layers.values()) + sum(m.size for m in magnitudes)

    def plain(self) -> "Adapter":
        """The same function as an adapter of larger rank, without an origin: what every other tool understands."""
        whole = {
            path: difference(factors, self.origin[path]) if path in self.origin else factors
            for path, factors in self.layers.items()
        }
        return replace(self, layers=whole, origin={})

    def is_finite(self) -> bool:
        """Whether every number is finite; an adapter that is not must never be published."""
        return all(is_finite(factors) for factors in (*self.layers.values(), *self.origin.values()))


def is_finite(factors: Factors) -> bool:
    """Whether every number of an update is finite."""
    parts = (factors.A, factors.B, factors.scale, 0.0 if factors.magnitude is None else factors.magnitude)
    return all(bool(np.isfinite(part).all()) for part in parts)


def fresh_adapter(shapes: Mapping[str, tuple[int, int]], init: str, sizes: Mapping[str, Size], seed: int) -> Adapter:
    """An adapter before the first step, drawn at random, that leaves the model as it is.

    Args:
        shapes: Path of each layer to its (out, in).
        init: How it is drawn; see `thimble.core.inits.draw`.
        sizes: Rank and scale of each adapted layer.
        seed: The run's seed.

    Returns:
        The adapter, without base or notes.
    """
    return Adapter({path: draw(init, shapes[path], *size, seed, path) for path, size in sizes.items()})
