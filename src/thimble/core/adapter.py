"""The adapter as a value: low-rank updates by layer path. Knows no files, no framework and no base."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.inits import BUILDERS, LayerData
from thimble.core.lowrank import (
    LINEAR,
    Factors,
    difference,
    of_each_expert,
    of_experts,
    rank_for,
    svd_of_update,
    truncate,
)
from thimble.core.targets import Size
from thimble.errors import listing

_written = functools.cache(str)  # of a dtype: numpy takes longer to write it than it takes to hash a small matrix


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by layer path, plus where they came from.

    Attributes:
        layers: Layer path, such as `model.layers.0.self_attn.q_proj`, to its factors; float32 (rank, in), (out, rank).
        base: Name or path of the base it was trained on, for people; may be empty.
        notes: Text kept in the header of the tensor file, such as the fingerprint of the base.
        origin: What is taken off the updates of layers that are trained in delta form, scale · (B A − B₀ A₀).
        prefix: What stands in front of `layers.0...` in the names of the modules that PEFT adapts, `model.` for a plain
            text model; layer paths here always begin with `model.`.
        replaced: Tensors of the model that were trained themselves, and take the place of the base's: heads, norms,
            biases; by their names in the model, float32 (counters of norms int64).
        settings: Fields of PEFT's config that are not those of a plain adapter of a text model: `bias`,
            `fan_in_fan_out`, `task_type`, `auto_mapping`; and `target_parameters`, the parameters of the model in its
            order.
    """

    layers: Mapping[str, Factors]
    base: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Factors] = field(default_factory=dict)
    prefix: str = "model."
    replaced: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """How many parameters the adapter holds."""
        factors = sum(factors.num_parameters for factors in self.layers.values())
        return factors + sum(values.size for values in self.replaced.values())

    @property
    def has_magnitudes(self) -> bool:
        """Whether a layer sets the lengths of the rows of its weight (DoRA)."""
        return any(factors.magnitude is not None for factors in self.layers.values())

    def plain(self) -> "Adapter":
        """The same function as an adapter of larger rank, without an origin: what every other tool understands."""
        layers = {
            path: difference(factors, self.origin[path]) if path in self.origin else factors
            for path, factors in self.layers.items()
        }
        return replace(self, layers=layers, origin={})

    def by_expert(self) -> "Adapter":
        """The same with a layer for each matrix that a parameter stacks: `mlp.experts.3.down_proj` of the fourth."""
        layers: dict[str, Factors] = {}
        for path, factors in self.layers.items():
            module, _, name = path.rpartition(".")
            apart = of_each_expert(factors) if factors.layout.experts > 1 else [factors]
            layers |= (
                {f"{module}.{e}.{name}": one for e, one in enumerate(apart)} if len(apart) > 1 else {path: factors}
            )
        return replace(self, layers=layers)

    def identity(self) -> str:
        """A hash of all that changes what the adapter computes, and of nothing else; the same for equal contents."""
        found = hashlib.sha256()
        for what, layers in (("", self.layers), ("origin ", self.origin)):
            for path in sorted(layers):
                factors = layers[path]
                parts = [factors.A, factors.B] + ([] if factors.magnitude is None else [factors.magnitude])
                found.update(f"{what}{path} {factors.scale!r} {[(p.shape, _written(p.dtype)) for p in parts]}".encode())
                for part in parts:
                    found.update(np.ascontiguousarray(part).data)
                if factors.layout != LINEAR:
                    found.update(repr(tuple(factors.layout)).encode())
        for name, values in sorted(self.replaced.items()):
            found.update(f"{name} {values.shape} {values.dtype}".encode())
            found.update(np.ascontiguousarray(values).data)
        return found.hexdigest()

    def at_strength(self, strength: float) -> "Adapter":
        """The same update times a number, by its scales alone; of one in delta form, B A − B₀ A₀ times that number."""
        if strength != 1 and self.has_magnitudes:
            raise ValueError("magnitudes (DoRA) are no part of the product, so no factor of it makes the update weaker")
        layers, origin = (
            {path: replace(factors, scale=factors.scale * strength) for path, factors in updates.items()}
            for updates in (self.layers, self.origin)
        )
        return replace(self, layers=layers, origin=origin)

    def is_finite(self) -> bool:
        """Whether no parameter is NaN or Inf; an adapter that has one must never be published."""
        updates = all(is_finite(factors) for factors in (*self.layers.values(), *self.origin.values()))
        return updates and all(bool(np.isfinite(values).all()) for values in self.replaced.values())


def is_finite(factors: Factors) -> bool:
    """Whether no number of an update is NaN or Inf."""
    parts = (factors.A, factors.B, factors.scale, 0.0 if factors.magnitude is None else factors.magnitude)
    return all(bool(np.isfinite(part).all()) for part in parts)


def fresh_adapter(
    shapes: Mapping[str, tuple[int, int]], init: str, sizes: Mapping[str, Size], seed: int,
    experts: Mapping[str, int] | None = None,
) -> Adapter:  # fmt: skip
    """An adapter drawn at random, by an init that needs nothing but shapes, which leaves the model as it is.

    `experts` has how many matrices each parameter among them stacks.
    """
    layers = {path: LayerData(path, shapes[path], *size, seed) for path, size in sizes.items()}
    stacked = experts or {}
    return Adapter(
        {path: drawn(init, layer, stacked[path]) if path in stacked else BUILDERS[init](layer)
         for path, layer in layers.items()}
    )  # fmt: skip


def drawn(init: str, parameter: LayerData, experts: int) -> Factors:
    """A and B of a parameter, whose rank is that of all its experts: each is drawn for itself, as a layer is."""
    ranks = parameter.rank // experts
    each = (replace(parameter, path=f"{parameter.path}.{number}", rank=ranks) for number in range(experts))
    return of_experts([BUILDERS[init](expert) for expert in each])


def conflicts(adapters: Mapping[str, Adapter]) -> list[str]:
    """Why adapters, by the names that the user knows them by, cannot be of one base; no sentence if they can."""
    wrong = []
    shapes: dict[str, tuple[tuple[int, int], str]] = {}
    for name, adapter in adapters.items():
        for path, factors in adapter.layers.items():
            known, first = shapes.setdefault(path, (factors.shape, name))
            if known != factors.shape:
                wrong.append(f"{path} is (out, in) {factors.shape} in {name} but {known} in {first}")
    return [f"the adapters do not belong to the same base: {listing(wrong, 2)}"] if wrong else []


def cut(factors: Factors, energy: float, most: int) -> tuple[Factors, float, float]:
    """Truncate an update to the smallest rank, at most `most`, that keeps a share of its energy ‖scale · B A‖².

    Returned are the update, as it was if no rank is saved, ‖scale · B A‖_F before, and the relative error.
    """
    values = svd_of_update(factors).values
    norm = float(np.linalg.norm(values))
    rank = min(rank_for(values, energy), most)
    if rank >= factors.rank:
        return factors, norm, 0.0
    small, error = truncate(factors, rank)
    return small, norm, error
