"""The layers of a base, of an adapter or of two adapters measured one after the other, and means over them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Array
from thimble.errors import ConfigError, listing
from thimble.models import inspection
from thimble.models.base import Base, Weight
from thimble.models.inspection import InitShares, Overlap, Spectrum, Update, find_block, in_order

MOST_OPERATIONS = 1e12  # about a minute on two cores; a base that takes more has its blocks sampled
LEAST_BLOCKS = 3  # sampled, however large they are

Row = Spectrum | Update | Overlap | InitShares


@dataclass(frozen=True)
class Subject:
    """What is inspected, opened and checked."""

    kind: str  # `base`, `adapter` or `two adapters`
    names: list[str]  # what it is called
    base: Base | None  # None for two adapters, and for one of no text model
    adapters: list[Adapter] = field(default_factory=list)  # none, one or two
    blocks: list[int] = field(default_factory=list)  # numbers of the blocks whose weights are decomposed

    def _opened(self) -> Base:
        if self.base is None:
            raise ValueError("nothing is known of the weights without a base")
        return self.base

    def layers(self) -> list[str]:
        """Paths of the layers to measure, in the order of the model."""
        if self.kind == "base":
            return [layer for layer in self._opened().spec.linear_shapes() if find_block(layer) in self.blocks]
        first, *others = (adapter.layers for adapter in self.adapters)
        return in_order(layer for layer in first if all(layer in other for other in others))

    def measure(self, layer: str) -> tuple[Row | None, str]:
        """Measure one layer, or say why nothing can be said about its weight."""
        if self.kind == "two adapters":
            first, second = (adapter.layers[layer] for adapter in self.adapters)
            return inspection.overlap_of(layer, first, second), ""
        if self.kind == "adapter" and self.base is None:
            return inspection.update_of(layer, self.adapters[0].layers[layer], None, is_decomposed=False), ""
        weight = self._opened().weights[f"{layer}.weight"]
        matrix, fault = _read(weight)
        if self.kind == "base":
            return (None if matrix is None else inspection.spectrum_of(layer, matrix, weight)), fault
        factors, is_decomposed = self.adapters[0].layers[layer], find_block(layer) in self.blocks
        return inspection.update_of(layer, factors, matrix, is_decomposed), fault

    def only_in(self) -> dict[str, list[str]]:
        """Of two adapters, the layers that only one has, by its name."""
        if len(self.adapters) < 2:
            return {}
        first, second = (adapter.layers for adapter in self.adapters)
        pairs = zip(self.names, (first, second), (second, first), strict=True)
        return {name: in_order(layer for layer in own if layer not in others) for name, own, others in pairs}


def _read(weight: Weight) -> tuple[Array | None, str]:
    """A weight, float32 (out, in); or None, and why it has no spectrum."""
    matrix = weight.read()
    weight.release(slice(0, weight.info.shape[0]))  # a base may be larger than memory
    if not np.isfinite(matrix).all():
        return None, "holds NaN or Inf"
    return (matrix, "") if matrix.any() else (None, "is all zeros")


def choose_blocks(base: Base, adapters: Iterable[Adapter], asked: Sequence[str]) -> tuple[list[int], int]:
    """The blocks that were asked for; else all, or an even spread of as many as take about a minute; and of how many.

    Only the blocks of the adapters' layers count, if there are any.
    """
    shapes = base.spec.linear_shapes()
    layers = [layer for adapter in adapters for layer in adapter.layers] or list(shapes)
    known = sorted({block for layer in layers if layer in shapes and (block := find_block(layer)) is not None})
    if asked:
        wrong = [name for name in asked if not name.isdecimal() or int(name) not in known]
        if wrong:
            raise ConfigError(f"--blocks {listing(wrong)}: expected some of {listing(known, 40)}")
        return sorted({int(name) for name in asked}), len(known)
    work = sum(_operations(shapes[layer]) for layer in layers if layer in shapes) * (2 if adapters else 1)
    count = min(len(known), max(LEAST_BLOCKS, int(len(known) * MOST_OPERATIONS / max(work, 1))))
    if count < len(known):
        return sorted({known[round(at)] for at in np.linspace(0, len(known) - 1, count)}), len(known)
    return known, len(known)


def _operations(shape: tuple[int, int]) -> float:
    """Floating-point operations of an SVD by way of the smaller Gram matrix."""
    small, large = sorted(shape)
    return 2.0 * small**2 * large + 9.0 * small**3


def by_movement(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Layers that an adapter moved, by relative norm, the furthest first; and those that one left as they are."""
    updates = [row for row in rows if isinstance(row, Update)]
    moved = [update for update in updates if update.norm and update.relative_norm is not None]
    unmoved = [update.layer for update in updates if not update.norm]
    unmoved += [row.layer for row in rows if isinstance(row, Overlap) and not all(row.norms)]
    return [update.layer for update in sorted(moved, key=lambda update: -(update.relative_norm or 0.0))], unmoved


def grouped(rows: Iterable[Row], name: str) -> dict[str, dict[str, float]]:
    """Means over the rows that have an attribute in common, by its value."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(getattr(row, name)), []).append(row)
    return {group: summary(members) for group, members in groups.items()}


def summary(rows: Sequence[Any]) -> dict[str, float]:
    """How many layers, and means of all their numbers that are known; shares of energy count by their energy."""
    means: dict[str, float] = {"layers": len(rows)}
    for spec in fields(rows[0]) if rows else ():
        known = [value for row in rows if isinstance(value := getattr(row, spec.name), int | float)]
        if known and spec.name != "block":
            means[spec.name] = float(np.mean(known))
    if "cosine" in means:
        means["cosine"] = _joint_cosine(rows)
    if rows and isinstance(rows[0], InitShares):
        total = sum(row.energy for row in rows)
        for name in ("kaiming", "eva", "gradient"):
            means[name] = sum(row.energy * getattr(row, name) for row in rows) / total if total else 0.0
    return means


def _joint_cosine(overlaps: Sequence[Overlap]) -> float:
    """Cosine between two adapters over some layers, their updates laid end to end as one vector each."""
    inner = sum((row.cosine or 0.0) * row.norms[0] * row.norms[1] for row in overlaps)
    lengths = [math.sqrt(sum(row.norms[side] ** 2 for row in overlaps)) for side in (0, 1)]
    return inner / (lengths[0] * lengths[1]) if all(lengths) else 0.0
