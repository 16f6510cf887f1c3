"""What singular values and subspaces tell of a weight or an update, on numpy.

A spectrum is the vector of all singular values of a matrix, the largest first. The energy of a matrix is its squared
Frobenius norm, which is Σ σ². A subspace is given by a matrix with orthonormal columns.
"""

import numpy as np

from thimble.core.lowrank import Array, Factors, thin_svd

NOISE_FLOOR = 1e-6  # of the largest singular value: smaller ones of float32 factors are rounding
INTRUDER_COSINE = 0.6  # below this to every direction of W, a direction is new (arXiv:2410.21228, section 3)
INTRUDER_DIRECTIONS = 10  # largest directions of the updated weight that are looked at (the same)


# ---- spectra --------------------------------------------------------------------------------------------------------


def singular_values(matrix: Array) -> Array:
    """All singular values, as roots of the eigenvalues of the smaller Gram matrix in float64.

    Takes a fraction of the time of an SVD. Values below 1e-8 of the largest are lost to rounding and come out as zero
    or as noise of that size, which no energy notices.

    Args:
        matrix: float (rows, columns).

    Returns:
        float64 (min(rows, columns),), the largest first.
    """
    wide = np.asarray(matrix, np.float64)
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)))


def stable_rank(values: Array) -> float:
    """How many directions as strong as the strongest would hold the same energy: ‖W‖_F² / σ₁²; 0 if all are zero.

    From 1 (one direction is everything) to the full rank (all are alike); see Rudelson and Vershynin, *Sampling from
    large matrices* (2007), section 1.
    """
    largest = float(np.max(values, initial=0.0))
    return float(np.square(values / largest).sum()) if largest > 0 else 0.0


def effective_rank(values: Array) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, EUSIPCO 2007, definition 1).

    Counts small values more than the stable rank does: n equal values give n, whatever their size; zeros alone give 0.
    """
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def energy_within(values: Array, rank: int) -> float:
    """Share of the energy in the `rank` largest singular values, 0 to 1; 1 if all are zero."""
    squares = np.square(values, dtype=np.float64)
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total > 0 else 1.0


def energy_curve(values: Array, points: int) -> Array:
    """Share of the energy held by growing shares of the full rank, so that matrices of all sizes can be compared.

    Args:
        values: A spectrum, float (n,).
        points: Where it is taken: at shares of n evenly spread from 0 to 1.

    Returns:
        float64 (points,), rising from 0 to 1; in between two ranks it is interpolated.
    """
    squares = np.concatenate([[0.0], np.cumsum(np.square(values, dtype=np.float64))])
    at = np.linspace(0, len(values), points)
    return np.interp(at, np.arange(len(squares)), squares / (squares[-1] or 1.0))


def noise_edge(shape: tuple[int, int], steps: Array) -> float:
    """The largest singular value that the rounding of a quantised weight has by itself.

    Rounding to steps of s leaves errors of variance s²/12; a random matrix of deviation d has singular values up to
    d · (√rows + √columns) (Bai and Yin, 1988). What lies below in the spectrum of W may be nothing else.

    Args:
        shape: (rows, columns) of the weight.
        steps: Distances between neighbouring values, one a block, float (blocks,); blocks are of equal size.

    Returns:
        The edge, in the unit of the singular values.
    """
    deviation = np.sqrt(np.square(steps, dtype=np.float64).mean() / 12)
    return float(deviation * (np.sqrt(shape[0]) + np.sqrt(shape[1])))


# ---- subspaces ------------------------------------------------------------------------------------------------------


def column_space(matrix: Array) -> Array:
    """An orthonormal basis of what the columns of a matrix span.

    Args:
        matrix: float (n, columns), such as B, or Aᵀ for the rows of A.

    Returns:
        float64 (n, k), the strongest direction first; k is the rank, 0 for a matrix of zeros.
    """
    left, values, _ = thin_svd(matrix)
    return np.asarray(left[:, values > NOISE_FLOOR * np.max(values, initial=0.0)])


def mean_squared_cosine(space: Array, directions: Array) -> float:
    """How much of some directions lies in a subspace, on average: ‖Uᵀ D‖_F² / k.

    1 if all of them lie within, 0 if all stand at right angles to it; a random direction gives r / n on average.

    Args:
        space: U, orthonormal, float (n, r).
        directions: D, orthonormal, float (n, k).

    Returns:
        The mean over the k directions, 0 to 1; not a number if there are none.
    """
    if not directions.shape[1]:
        return float("nan")
    return float(np.square(space.T @ directions).sum() / directions.shape[1])


def overlap(first: Array, second: Array) -> float:
    """How far the smaller of two subspaces lies in the other: φ = ‖U₁ᵀ U₂‖_F² / min(r₁, r₂).

    Hu et al., LoRA, arXiv:2106.09685, section 7.2, equation 4. Two random ones give max(r₁, r₂) / n on average.

    Args:
        first: U₁, orthonormal, float (n, r₁).
        second: U₂, orthonormal, float (n, r₂).

    Returns:
        0 (at right angles) to 1 (one contains the other); not a number if either is empty.
    """
    small, large = sorted((first, second), key=lambda space: space.shape[1])
    return mean_squared_cosine(large, small)


def inner_product(first: Factors, second: Factors) -> float:
    """⟨ΔW₁, ΔW₂⟩ = Σ over the entries of both updates, from r × r matrices: s₁ s₂ tr((B₂ᵀ B₁)(A₁ A₂ᵀ))."""
    over_rows = second.B.T.astype(np.float64) @ first.B  # (r₂, r₁)
    over_columns = second.A.astype(np.float64) @ first.A.T  # (r₂, r₁)
    return float((over_rows * over_columns).sum() * first.scale * second.scale)


def intruders(before: Array, after: Array) -> int:
    """How many of the largest directions of an updated weight are new: like none of the directions of W.

    Shuttleworth et al., arXiv:2410.21228, algorithm 1. Such directions go with forgetting.

    Args:
        before: All left singular vectors of W, float (out, n).
        after: The largest of the updated weight, float (out, k).

    Returns:
        Columns of `after` whose cosine to every column of `before` is below INTRUDER_COSINE.
    """
    nearest = np.abs(before.T @ after).max(axis=0, initial=0.0)
    return int((nearest < INTRUDER_COSINE).sum())
