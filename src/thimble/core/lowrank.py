"""The maths of low-rank updates, on numpy.

Letters, used everywhere: W float (out, in), frozen; A (rank, in); B (out, rank); scale one number.
A layer with an adapter computes y = x Wᵀ + scale · (x Aᵀ) Bᵀ, so its weight is W + scale · B A
(Hu et al., LoRA, arXiv:2106.09685, section 4.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


class Layout(NamedTuple):
    """How the weight that B A updates lies in its layer; a linear layer's is (out, in), as B A is."""

    kernel: tuple[int, ...] = ()  # of a convolution (out, in, *kernel): `in` of A counts channels times places
    groups: int = 1  # of a convolution: B is (out, rank / groups), and reads of the h Aᵀ of its own group alone
    is_embedding: bool = False  # (in, out): a row for each of `in` words
    experts: int = 0  # of a parameter that is no layer's weight: how many (out, in) it stacks, 1 if it has two axes


LINEAR = Layout()


@dataclass(frozen=True)
class Factors:
    """The update of one layer: scale · B A, and with DoRA the length of each row of the updated weight.

    Attributes:
        A: float (rank, in); of a parameter, the rows of its experts one after the other, (experts · rank, in).
        B: float (out, rank); of a convolution in groups (out, rank / groups); of a parameter (out, rank · experts),
            first column 0 of each expert, then column 1 of each.
        scale: The number the product is multiplied by.
        magnitude: float (out,), lengths of the rows of W + scale · B A after they are set anew (Liu et al., DoRA,
            arXiv:2402.09353, equation 5); None leaves them as they are.
        layout: How the weight lies in its layer.
    """

    A: Array
    B: Array
    scale: float
    magnitude: Array | None = None
    layout: Layout = LINEAR

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1] * self.layout.groups:
            raise ValueError(f"A is {self.A.shape} and B is {self.B.shape}: expected (rank, in) and (out, rank)")
        if self.layout.experts and self.A.shape[0] % self.layout.experts:
            raise ValueError(f"A is {self.A.shape}: expected one rank for each of {self.layout.experts} experts")
        if self.magnitude is not None and self.magnitude.shape != (len(self.B),):
            raise ValueError(f"magnitude is {self.magnitude.shape}: expected ({len(self.B)},)")

    @property
    def rank(self) -> int:
        """Number of rows of A: of a parameter, those of all its experts."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it updates, or of each matrix in it."""
        return len(self.B), int(self.A.shape[1])

    @property
    def num_parameters(self) -> int:
        """Numbers in A, B and the magnitude."""
        return self.A.size + self.B.size + (0 if self.magnitude is None else self.magnitude.size)


def scale(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """Turn alpha into the factor of B A: alpha / rank, or alpha / √rank (Kalajdzievski, arXiv:2312.03732, equation 4).

    >>> scale(32, 16)
    2.0
    """
    return float(alpha / np.sqrt(rank)) if use_rslora else alpha / rank


def delta(factors: Factors) -> Array:
    """The dense update, before any magnitude: scale · B A, float (out, in); of experts (experts · out, in), in order.

    >>> delta(Factors(np.ones((1, 2)), np.ones((2, 1)), 0.5)).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if factors.layout.experts:
        return np.concatenate([delta(expert) for expert in of_each_expert(factors)])
    return np.asarray(factors.scale * (factors.B @ factors.A))


def of_each_expert(factors: Factors) -> list[Factors]:
    """The update of each matrix that a parameter stacks, in order."""
    count, rank = factors.layout.experts, factors.rank // factors.layout.experts
    sides = ((factors.A[e * rank : (e + 1) * rank], factors.B[:, e::count]) for e in range(count))
    return [Factors(a, b, factors.scale) for a, b in sides]


def of_experts(updates: Sequence[Factors]) -> Factors:
    """The other way round: updates of one rank and scale, (out, in) each, as that of the parameter that stacks them."""
    b = np.stack([update.B for update in updates], 2).reshape(len(updates[0].B), -1)  # (out, rank, experts)
    return Factors(
        np.concatenate([update.A for update in updates]), b, updates[0].scale, layout=Layout(experts=len(updates))
    )


def merge(weight: Array, factors: Factors) -> Array:
    """Add an update to a weight in at least float32 and return it in the dtype of `weight`.

    Args:
        weight: W, float (out, in), of experts (experts · out, in); not changed.
        factors: The update.

    Returns:
        W + scale · B A, with rows of the lengths in `magnitude` if there is one.
    """
    if factors.magnitude is None:
        return _add(weight, delta(factors))
    total = _add(np.asarray(weight, np.promote_types(weight.dtype, np.float32)), delta(factors))
    lengths = np.linalg.norm(total, axis=1)
    rates = factors.magnitude / np.where(lengths > 0, lengths, 1.0)
    return np.asarray(total * rates[:, None], weight.dtype)


def unmerge(weight: Array, factors: Factors) -> Array:
    """Undo `merge` of an update without a magnitude, up to the rounding of the dtype of `weight`."""
    return _add(weight, -delta(factors))


def difference(factors: Factors, origin: Factors) -> Factors:
    """One update that is another less a third: scale · (B A − B₀ A₀), of rank 2 r, exactly.

    A over A − A₀, and B − B₀ beside B₀: while A and B are near A₀ and B₀, A over A₀ and B beside −B₀ would cancel but
    for the rounding of whatever dtype they are multiplied in.
    """
    a = np.concatenate([factors.A, factors.A - origin.A])
    b = np.concatenate([factors.B - origin.B, origin.B], axis=1)
    return replace(factors, A=a, B=b)


def total(updates: Sequence[Factors]) -> Factors:
    """The sum of updates as one of the sum of their ranks, exactly.

    Args:
        updates: Without magnitudes, which do not add.

    Returns:
        All A above one another and all B side by side, with the scale that is largest; B is rescaled only where
        scales differ.

    Raises:
        ValueError: If an update has a magnitude and is not the only one.
    """
    if len(updates) > 1 and any(update.magnitude is not None for update in updates):
        raise ValueError("updates with magnitudes cannot be added")
    if len(updates) == 1:
        return updates[0]
    largest = max((update.scale for update in updates), key=abs)
    sides = [update.B * (update.scale / (largest or 1.0)) for update in updates]
    return Factors(np.concatenate([update.A for update in updates]), np.concatenate(sides, axis=1), largest)


def _add(weight: Array, update: Array) -> Array:
    wide = np.promote_types(weight.dtype, np.float32)
    total: Array = np.add(weight, update, dtype=wide)
    return np.asarray(total, weight.dtype)


def svd_of_update(factors: Factors) -> "Decomposition":
    """All min(r, out, in) singular values and vectors of scale · B A, without forming it; no magnitude counts.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the SVD of the small R_b R_aᵀ gives that of B A in O((out + in) r²).
    """
    q_b, r_b = np.linalg.qr(factors.B.astype(np.float64))
    q_a, r_a = np.linalg.qr(factors.A.astype(np.float64).T)
    u, values, vt = thin_svd(r_b @ r_a.T)
    fan_out, fan_in, rank = len(factors.B), factors.A.shape[1], factors.rank
    return Decomposition(q_b @ u, values * factors.scale, vt @ q_a.T, 1.0, 6.0 * (fan_out + fan_in) * rank**2)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of an update by one of smaller rank.

    The optimum is the truncated SVD (Eckart and Young, 1936).

    Args:
        factors: The update.
        rank: The rank wanted, at least 1.

    Returns:
        The truncated update, with singular values split evenly between A and B, and its relative error
        ‖BA − B'A'‖_F / ‖BA‖_F (0 for a zero update).
    """
    rank = min(rank, factors.rank)
    found = svd_of_update(factors)
    values, root = found.values, np.sqrt(found.values[:rank] / (factors.scale or 1.0))
    new_b, new_a = found.left[:, :rank] * root, root[:, None] * found.right[:rank]
    total = float(np.sqrt((values**2).sum()))
    error = float(np.sqrt((values[rank:] ** 2).sum())) / total if total > 0 else 0.0
    return replace(factors, A=new_a.astype(factors.A.dtype), B=new_b.astype(factors.B.dtype)), error


# ---- decompositions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decomposition:
    """A matrix of low rank, left · diag(values) · right, taken out of a larger one.

    Attributes:
        left: float64 (rows, rank).
        values: float64 (rank,); singular values or eigenvalues, the largest first; ones for QR.
        right: float64 (rank, columns).
        energy: Share of the squared Frobenius norm of the matrix that the product holds, 0 to 1.
        operations: Floating-point operations it took, to leading order.
    """

    left: Array
    values: Array
    right: Array
    energy: float
    operations: float

    @property
    def product(self) -> Array:
        """left · diag(values) · right, float64 (rows, columns)."""
        return np.asarray((self.left * self.values) @ self.right)


def as_update(found: Decomposition) -> Factors:
    """A decomposed update, its singular values split evenly between A and B: float32, with a scale of 1."""
    root = np.sqrt(found.values)
    a, b = root[:, None] * found.right, found.left * root
    return Factors(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32), 1.0)


def thin_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """All singular values and vectors of a small matrix, in float64.

    LAPACK's divide and conquer, as numpy brings it, fails on a few ordinary matrices ("SVD did not converge"), and then
    does not on their transposes.

    Args:
        matrix: float (rows, columns).

    Returns:
        U (rows, k), values (k,) and Vᵀ (k, columns), the largest value first; k is the smaller side.
    """
    wide = np.asarray(matrix, np.float64)
    try:
        u, values, vt = np.linalg.svd(wide, full_matrices=False)
    except np.linalg.LinAlgError:
        if not np.isfinite(wide).all():
            raise
        v, values, ut = np.linalg.svd(wide.T, full_matrices=False)
        u, vt = ut.T, v.T
    return u, values, vt


def svd(matrix: Array, rank: int, end: str = "top") -> Decomposition:
    """Exact singular value decomposition, kept at one end of the spectrum (Eckart and Young, 1936).

    Goes through the eigenvectors of the smaller Gram matrix in float64, which costs two thirds of a full SVD; in
    float32 the squared condition number would drown the small end.

    Args:
        matrix: float (rows, columns).
        rank: Singular values kept, at most the smaller side.
        end: `top` keeps the largest, `bottom` the smallest.

    Returns:
        The kept part, float64, the largest value first.
    """
    wide = np.asarray(matrix, np.float64)
    if wide.shape[0] > wide.shape[1]:
        flipped = svd(wide.T, rank, end)
        return Decomposition(flipped.right.T, flipped.values, flipped.left.T, flipped.energy, flipped.operations)
    squares, vectors = np.linalg.eigh(wide @ wide.T)
    kept = slice(0, rank) if end == "bottom" else slice(len(squares) - rank, None)
    left = vectors[:, kept][:, ::-1]
    right = left.T @ wide
    values = np.linalg.norm(right, axis=1)
    right = right / np.where(values > 0, values, 1.0)[:, None]
    rows, columns = wide.shape
    return Decomposition(left, values, right, _share(values, wide), 2.0 * rows * rows * columns + 9.0 * rows**3)


def randomised_svd(
    matrix: Array, rank: int, iterations: int = 4, oversampling: int = 8, seed: int = 0
) -> Decomposition:
    """Top of the spectrum by subspace iteration from a random basis (Halko et al., arXiv:0909.4061, algorithm 4.4).

    Args:
        matrix: float (rows, columns).
        rank: Singular values kept.
        iterations: Times the subspace is multiplied by M Mᵀ; four leave at most 1 % more than the best residual.
        oversampling: Further directions that are carried along and dropped at the end.
        seed: Of the random basis.

    Returns:
        The kept part, the largest value first.
    """
    rows, columns = matrix.shape
    width = min(rank + oversampling, rows, columns)
    basis = np.random.Generator(np.random.Philox(key=[seed, width])).standard_normal((columns, width))
    narrow = np.asarray(matrix, np.float32)  # the large products; the small ones are float64
    image: Array = narrow @ basis.astype(np.float32)
    for _ in range(iterations):
        image = narrow @ (narrow.T @ _orthonormal(image))
    left = _orthonormal(image)
    u, values, right = thin_svd(left.T @ narrow)
    operations = (2.0 * iterations + 2) * 2 * rows * columns * width
    kept = (left @ u)[:, :rank], values[:rank], right[:rank]
    return Decomposition(*kept, _share(values[:rank], narrow), operations)


def qr(matrix: Array, rank: int) -> Decomposition:
    """The first columns of Q and rows of R: the part of a matrix in the span of its first `rank` columns.

    Only those columns are orthonormalised, R follows as Qᵀ M: the same product at a fraction of the cost of a full QR.

    Args:
        matrix: float (rows, columns).
        rank: Columns of Q kept, at most the smaller side.

    Returns:
        Q and R with values of one; R in the precision of the matrix.
    """
    left = _orthonormal(np.asarray(matrix[:, :rank], np.float64))
    right = left.astype(matrix.dtype).T @ matrix
    rows, columns = matrix.shape
    energy = _share(np.linalg.norm(right, axis=1), matrix)
    return Decomposition(left, np.ones(rank), right, energy, 4.0 * rows * rank**2 + 2.0 * rows * columns * rank)


def eigen(moment: Array, rank: int, end: str = "top") -> Decomposition:
    """Eigendecomposition of a symmetric matrix, such as a second moment Σ xᵀ x; no other matrix has one of this form.

    Args:
        moment: float (n, n), symmetric and positive semidefinite.
        rank: Eigenvalues kept.
        end: `top` keeps the largest, `bottom` the smallest.

    Returns:
        Eigenvectors as columns of `left` and rows of `right`, the largest value first.
    """
    values, vectors = np.linalg.eigh(np.asarray(moment, np.float64))
    kept = slice(0, rank) if end == "bottom" else slice(len(values) - rank, None)
    left, values = vectors[:, kept][:, ::-1], np.maximum(values[kept][::-1], 0.0)
    return Decomposition(left, values, left.T, _share(values, moment), 9.0 * len(moment) ** 3)


def pca(samples: Array, rank: int, is_centred: bool = True) -> Decomposition:
    """Principal components: the eigenvectors of a covariance, which are the right singular vectors of the samples.

    Args:
        samples: float (samples, n).
        rank: Components kept.
        is_centred: Take off the mean first, which makes the second moment a covariance.

    Returns:
        Scores in `left`, components as rows of `right`; energy is the share of the variance.
    """
    wide = np.asarray(samples, np.float64)
    return svd(wide - wide.mean(0) if is_centred else wide, rank)


def _orthonormal(matrix: Array) -> Array:
    return np.linalg.qr(matrix)[0]


def _share(values: Array, matrix: Array) -> float:
    total = float(np.linalg.norm(matrix)) ** 2
    return min(1.0, float((values**2).sum()) / total) if total > 0 else 1.0


def rank_for(values: Array, energy: float) -> int:
    """The smallest rank, at least 1, whose values hold a share of the energy Σ values², above 0 and at most 1.

    >>> rank_for(np.array([3.0, 1.0, 0.5]), 0.9)
    2
    """
    squares = np.cumsum(np.square(values, dtype=np.float64))
    if not len(squares) or squares[-1] == 0:
        return 1
    return int(min(np.searchsorted(squares, energy * squares[-1] * (1 - 1e-12)) + 1, len(squares)))
