"""What `thimble inspect` measures of one layer: a weight, an update, two updates, or what inits make of its gradient.

Each is a row of numbers, so that rows can be averaged, written as JSON and drawn.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from thimble.core import spectra
from thimble.core.lowrank import Array, Decomposition, Factors, merge, rank_for, svd, svd_of_update
from thimble.core.targets import ATTENTION, MLP
from thimble.files.blocks import step_sizes
from thimble.models.base import Weight

CURVE_POINTS = 101  # of a cumulated spectrum
SHARE_OF_DIRECTIONS = 0.9  # of an update's energy: the directions that hold it are compared with those of W


@dataclass
class Spectrum:
    """The singular values of one weight.

    Attributes:
        layer: Path of the layer.
        kind: Last part of the path.
        block: Number of its block.
        shape: Outputs and inputs.
        norm: Frobenius norm of W.
        stable_rank: Energy over that of the largest singular value.
        effective_rank: exp of the entropy of the singular values.
        rank_50: Rank that holds 50 % of the energy.
        rank_80: The same for 80 %.
        rank_90: The same for 90 %.
        rank_95: The same for 95 %.
        rank_99: The same for 99 %.
        top_16: Share of the energy in the 16 largest singular values.
        below_noise: Share of the singular values below what rounding to the file's dtype makes by itself; null
            for dtypes without one step size a block.
        curve: Share of the energy held by 0, 1, ... 100 % of the full rank.
    """

    layer: str
    kind: str
    block: int
    shape: list[int]
    norm: float
    stable_rank: float
    effective_rank: float
    rank_50: int
    rank_80: int
    rank_90: int
    rank_95: int
    rank_99: int
    top_16: float
    below_noise: float | None
    curve: list[float]


@dataclass
class Update:
    """What an adapter does to one layer; null where nothing can be said, or the block was not decomposed.

    Attributes:
        layer: Path of the layer.
        kind: Last part of the path.
        block: Number of its block.
        rank: Rows of A.
        norm: Frobenius norm of the update, scale included.
        relative_norm: The same over the norm of W.
        stable_rank: Energy over that of the largest singular value.
        effective_rank: exp of the entropy of the singular values.
        rank_90: Rank that holds 90 % of the energy.
        rank_99: The same for 99 %.
        written_top: How far the leading directions that the update writes (those that hold 90 % of its energy) lie in
            the top left singular vectors of W, as many as the adapter has rank: mean squared cosine.
        written_bottom: The same for the bottom ones.
        written_chance: What random directions would give.
        read_top: As written_top, of the directions that the update reads and the right singular vectors of W.
        read_bottom: As written_bottom.
        read_chance: As written_chance.
        intruders: Of the 10 largest directions of the updated weight, how many are like none of W's.
        values: Singular values of the update.
    """

    layer: str
    kind: str
    block: int
    rank: int
    norm: float
    relative_norm: float | None
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_99: int
    written_top: float | None = None
    written_bottom: float | None = None
    written_chance: float | None = None
    read_top: float | None = None
    read_bottom: float | None = None
    read_chance: float | None = None
    intruders: int | None = None
    values: list[float] = field(default_factory=list)


@dataclass
class Overlap:
    """What two adapters have in common in one layer; null where one of them does nothing.

    Attributes:
        layer: Path of the layer.
        kind: Last part of the path.
        block: Number of its block; null for a layer outside the blocks.
        ranks: Rows of both A.
        read: Overlap of the row spaces of A, from 0 (at right angles) to 1 (one holds the other).
        read_chance: What random ones would give.
        written: Overlap of the column spaces of B.
        written_chance: What random ones would give.
        cosine: Of the angle between both updates, from -1 (opposite) over 0 (unrelated) to 1 (the same but for size).
        norms: Frobenius norms of both updates.
    """

    layer: str
    kind: str
    block: int | None
    ranks: list[int]
    read: float | None
    read_chance: float
    written: float | None
    written_chance: float
    cosine: float | None
    norms: list[float]


@dataclass
class InitShares:
    """What share of the gradient of one weight each init captures, on rows that its A was not made from.

    Attributes:
        layer: Path of the layer.
        kind: Last part of the path.
        block: Number of its block.
        rank: Rows of A.
        energy: ‖G‖², the squared Frobenius norm of the gradient, summed over batches.
        kaiming: Share of it that lies in the rows of a random A.
        eva: The same with A along the main directions of the layer's inputs.
        gradient: The same with A along those of the gradient.
    """

    layer: str
    kind: str
    block: int
    rank: int
    energy: float
    kaiming: float
    eva: float
    gradient: float


def find_block(path: str) -> int | None:
    """Number of the block that a layer belongs to, of any model; None for one outside the blocks."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def kind_of(path: str) -> str:
    """Last part of the path of a layer, such as `q_proj`."""
    return path.rsplit(".", 1)[-1]


def in_order(layers: Iterable[str]) -> list[str]:
    """Layers as they run in a model: a file holds them by name, with block 10 before block 2."""
    kinds = (*ATTENTION, *MLP)

    def order(layer: str) -> tuple[int, int, str]:
        block, kind = find_block(layer), kind_of(layer)
        return (-1 if block is None else block, kinds.index(kind) if kind in kinds else len(kinds), layer)

    return sorted(layers, key=order)


def spectrum_of(layer: str, matrix: Array, weight: Weight) -> Spectrum:
    """Measure W, float32 (out, in), finite and not all zeros; the blocks of its file tell how it was rounded."""
    values = spectra.singular_values(matrix)
    rows, columns = matrix.shape
    steps = step_sizes(weight.raw(), weight.dtype)
    below = None if steps is None else float((values < spectra.noise_edge((rows, columns), steps)).mean())
    ranks = [rank_for(values, share) for share in (0.5, 0.8, 0.9, 0.95, 0.99)]
    return Spectrum(
        layer, kind_of(layer), find_block(layer) or 0, [rows, columns], float(np.linalg.norm(values)),
        spectra.stable_rank(values), spectra.effective_rank(values), *ranks, spectra.energy_within(values, 16), below,
        spectra.energy_curve(values, CURVE_POINTS).round(5).tolist(),
    )  # fmt: skip


def update_of(layer: str, factors: Factors, matrix: Array | None, is_decomposed: bool) -> Update:
    """Measure what an adapter does to one layer; the dense update is never formed, except to count intruders.

    A magnitude counts for intruders alone. W is float32 (out, in), or None if nothing can be said about it; to compare
    the update with its directions (`is_decomposed`) takes two SVDs of its size.
    """
    found = svd_of_update(factors)
    values = np.abs(found.values)
    norm = float(np.linalg.norm(values))
    of_weight = None if matrix is None else norm / float(np.linalg.norm(matrix.astype(np.float64)))
    rank_90, rank_99 = (rank_for(values, share) if norm else 0 for share in (0.9, 0.99))
    update = Update(
        layer, kind_of(layer), find_block(layer) or 0, factors.rank, norm, of_weight, spectra.stable_rank(values),
        spectra.effective_rank(values), rank_90, rank_99, values=values.tolist(),
    )  # fmt: skip
    if norm and matrix is not None and is_decomposed:
        _compare_with_weight(update, found, factors, matrix)
    return update


def _compare_with_weight(update: Update, of_update: Decomposition, factors: Factors, matrix: Array) -> None:
    """Fill in how the leading directions of an update lie to those of W, and which of W + update are new."""
    size = min(matrix.shape)
    rank = min(factors.rank, size)
    of_weight = svd(matrix, size)
    leading = rank_for(of_update.values, SHARE_OF_DIRECTIONS)
    written, read = of_update.left[:, :leading], of_update.right[:leading].T
    left, right = of_weight.left, of_weight.right.T
    cosine = spectra.mean_squared_cosine
    update.written_top, update.written_bottom = (cosine(s, written) for s in (left[:, :rank], left[:, -rank:]))
    update.read_top, update.read_bottom = (cosine(s, read) for s in (right[:, :rank], right[:, -rank:]))
    update.written_chance, update.read_chance = rank / matrix.shape[0], rank / matrix.shape[1]
    update.intruders = spectra.intruders(left, svd(merge(matrix, factors), min(spectra.INTRUDER_DIRECTIONS, size)).left)


def overlap_of(layer: str, first: Factors, second: Factors) -> Overlap:
    """Measure what two adapters have in common in one layer; their ranks may differ."""
    read = [spectra.column_space(factors.A.T) for factors in (first, second)]
    written = [spectra.column_space(factors.B) for factors in (first, second)]
    norms = [math.sqrt(max(spectra.inner_product(factors, factors), 0.0)) for factors in (first, second)]
    rank = max(first.rank, second.rank)
    return Overlap(
        layer, kind_of(layer), find_block(layer), [first.rank, second.rank],
        _known(spectra.overlap(*read)), rank / first.A.shape[1],
        _known(spectra.overlap(*written)), rank / first.B.shape[0],
        spectra.inner_product(first, second) / (norms[0] * norms[1]) if all(norms) else None, norms,
    )  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
