"""Several adapters combined into one, by the names and the mathematics of PEFT's `add_weighted_adapter`.

`cat` is the exact weighted sum, of all ranks together, and `svd` the best approximation of it with fewer. The others
keep the rank by combining A with A and B with B, each times the root of weight · scale, so that products of one
adapter's A with another's B come in; or, with `_svd` behind their names, they combine the dense updates and decompose
the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thimble.core.adapter import Adapter
from thimble.core.inits import random_stream
from thimble.core.lowrank import Array, Factors, as_update, delta, svd, total, truncate
from thimble.errors import listing


@dataclass(frozen=True)
class Combination:
    """How adapters become one.

    Attributes:
        weights: What each adapter is multiplied by, none of them 0.
        kind: One of PEFT's `combination_type`.
        density: Share of the numbers that pruning keeps, above 0 and at most 1.
        majority_sign_method: What elects a sign in TIES: `total`, the sum of the numbers, or `frequency`, their count.
        rank: Of what is decomposed by SVD; None is the highest of any layer.
        seed: Of the numbers that DARE drops.
    """

    weights: Sequence[float]
    kind: str = "cat"
    density: float = 1.0
    majority_sign_method: str = "total"
    rank: int | None = None
    seed: int = 0

    @property
    def is_svd(self) -> bool:
        """Whether the result is decomposed."""
        return self.kind.endswith("svd")


@dataclass(frozen=True)
class _Part:
    """What one adapter brings to one matrix."""

    numbers: Array
    weight: float
    stream: str  # names the random numbers that DARE draws for it


def combine(adapters: Sequence[Adapter], how: Combination) -> Iterator[tuple[str, Factors]]:
    """The layers of the combined adapter, one at a time; of those that some adapters lack, the others are combined.

    There must be no `combination_problems`.
    """
    how = replace(how, rank=how.rank or max(f.rank for adapter in adapters for f in adapter.layers.values()))
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.layers):
        found = [(number, adapter.layers[path]) for number, adapter in enumerate(adapters) if path in adapter.layers]
        yield path, _combined(path, dict(found), how)


def combination_problems(adapters: Mapping[str, Adapter], kind: str) -> list[str]:
    """Why adapters of one base, by the names that the user knows them by, cannot be combined in this way."""
    problems = []
    names = [name for name, adapter in adapters.items() if adapter.has_magnitudes]
    if len(adapters) > 1 and names:
        problems.append(
            f"adapter {listing(names)} is DoRA: it sets the lengths of the rows of W + scale B A, and lengths do not "
            "add up; merge one at a time, or make it plain first with thimble export --to peft --approximate-rank 64"
        )
    ranks: dict[str, dict[str, int]] = {}
    for name, adapter in adapters.items():
        for path, factors in adapter.layers.items():
            ranks.setdefault(path, {})[name] = factors.rank
    differing = [path for path, found in ranks.items() if len(set(found.values())) > 1]
    if differing and kind != "cat" and not kind.endswith("svd"):
        found = listing(f"{rank} in {name}" for name, rank in ranks[differing[0]].items())
        other = "svd" if kind == "linear" else f"{kind}_svd"
        problems.append(
            f"--combination-type {kind} combines A with A and B with B, which need one rank, and {differing[0]} has "
            f"rank {found}: use cat, or {other} with --rank"
        )
    return problems


def _combined(path: str, updates: Mapping[int, Factors], how: Combination) -> Factors:
    """One layer, from the updates of the adapters that have it, by their number."""
    if how.kind in ("cat", "svd"):
        summed = total([_weighted(factors, how.weights[number]) for number, factors in updates.items()])
        return truncate(summed, how.rank or 1)[0] if how.is_svd else summed
    if how.is_svd:
        dense = [_Part(delta(f), how.weights[number], f"{path}:{number}") for number, f in updates.items()]
        merged = _merged(dense, how)
        return as_update(svd(merged, min(how.rank or 1, *merged.shape)))
    sides = []
    for side in ("A", "B"):
        parts = []
        for number, factors in updates.items():
            strength = how.weights[number] * factors.scale
            sign = -1.0 if side == "A" and strength < 0 else 1.0  # on one side only: on both it would cancel
            parts.append(_Part(getattr(factors, side), sign * abs(strength) ** 0.5, f"{path}:{number}:{side}"))
        sides.append(_merged(parts, how))
    return Factors(sides[0], sides[1], 1.0)


def _weighted(factors: Factors, weight: float) -> Factors:
    """An update times a weight; its scale stays positive, as readers of adapters expect."""
    b = -factors.B if weight < 0 else factors.B
    return factors if weight == 1 else replace(factors, B=b, scale=factors.scale * abs(weight))


def _merged(parts: Sequence[_Part], how: Combination) -> Array:
    """The weighted sum of matrices of one shape, pruned before, and with TIES over the numbers of the elected sign.

    Yadav et al., TIES, arXiv:2306.01708, algorithm 1; Yu et al., DARE, arXiv:2311.03099, section 3.2. As in PEFT, signs
    are elected before the weights are applied.
    """
    stack = np.stack([_pruned(part, how) for part in parts])  # (adapters, rows, columns)
    weighted = stack * np.array([part.weight for part in parts], stack.dtype)[:, None, None]
    if "ties" not in how.kind:
        return np.asarray(weighted.sum(0))
    signs = np.sign(stack)
    votes = (stack if how.majority_sign_method == "total" else signs).sum(0)
    agrees = signs == np.where(votes >= 0, 1.0, -1.0)
    counts = np.maximum(agrees.sum(0), 1).astype(stack.dtype)
    return np.asarray((weighted * agrees).sum(0) / counts)


def _pruned(part: _Part, how: Combination) -> Array:
    """A matrix without the share of its numbers that is dropped: at random, the others growing, or the smallest."""
    numbers, density = part.numbers, how.density
    if density >= 1 or how.kind.startswith("linear"):
        return numbers
    if how.kind.startswith("dare"):
        return np.where(drawn_mask(part.stream, numbers.shape, density, how.seed), numbers / density, 0).astype("f4")
    kept = int(density * numbers.size)
    sizes = np.abs(numbers).reshape(-1)
    mask = np.zeros(numbers.size, bool)
    mask[np.argpartition(sizes, numbers.size - kept)[numbers.size - kept :] if kept else []] = True
    return np.where(mask.reshape(numbers.shape), numbers, 0)


def drawn_mask(stream: str, shape: tuple[int, ...], density: float, seed: int) -> Array:
    """Which numbers of a matrix DARE keeps, bool (shape): each with the probability `density`."""
    return np.asarray(random_stream(seed, stream).random(shape, np.float32) < density)
