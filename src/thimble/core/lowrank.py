"""The maths of low-rank updates, on numpy.

Letters, used everywhere: W float (out, in), frozen; A (rank, in); B (out, rank); scale one number.
A layer with an adapter computes y = x Wᵀ + scale · (x Aᵀ) Bᵀ, so its weight is W + scale · B A
(Hu et al., LoRA, arXiv:2106.09685, section 4.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Factors:
    """The update of one layer: scale · B A.

    Attributes:
        A: float (rank, in).
        B: float (out, rank).
        scale: The number the product is multiplied by.
    """

    A: Array
    B: Array
    scale: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(f"A is {self.A.shape} and B is {self.B.shape}: expected (rank, in) and (out, rank)")

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return int(self.A.shape[0])


def scale(alpha: float, rank: int, use_rslora: bool = False) -> float:
    """Turn alpha into the factor of B A.

    Args:
        alpha: Numerator.
        rank: Rank r of the update.
        use_rslora: Divide by √r instead of r (Kalajdzievski, arXiv:2312.03732, equation 4).

    Returns:
        alpha / rank, or alpha / √rank.

    Example:
        >>> scale(32, 16)
        2.0
    """
    return float(alpha / np.sqrt(rank)) if use_rslora else alpha / rank


def delta(factors: Factors) -> Array:
    """The dense update.

    Args:
        factors: The update as factors.

    Returns:
        scale · B A, float (out, in).

    Example:
        >>> delta(Factors(np.ones((1, 2)), np.ones((2, 1)), 0.5)).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    return np.asarray(factors.scale * (factors.B @ factors.A))


def merge(weight: Array, factors: Factors) -> Array:
    """Add an update to a weight in at least float32 and return it in the dtype of `weight`.

    Args:
        weight: W, float (out, in); not changed.
        factors: The update.

    Returns:
        W + scale · B A.
    """
    return _add(weight, delta(factors))


def unmerge(weight: Array, factors: Factors) -> Array:
    """Undo `merge`, up to the rounding of the dtype of `weight`."""
    return _add(weight, -delta(factors))


def _add(weight: Array, update: Array) -> Array:
    wide = np.promote_types(weight.dtype, np.float32)
    total: Array = np.add(weight, update, dtype=wide)
    return np.asarray(total, weight.dtype)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of an update by one of smaller rank.

    B A is never formed: with B = Q_b R_b and Aᵀ = Q_a R_a, the SVD of the small R_b R_aᵀ gives that of B A
    in O((out + in) r²) (Eckart and Young, 1936, for the optimum).

    Args:
        factors: The update.
        rank: The rank wanted, at least 1.

    Returns:
        The truncated update, with singular values split evenly between A and B, and its relative error
        ‖BA − B'A'‖_F / ‖BA‖_F (0 for a zero update).
    """
    rank = min(rank, factors.rank)
    q_b, r_b = np.linalg.qr(factors.B.astype(np.float64))
    q_a, r_a = np.linalg.qr(factors.A.astype(np.float64).T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    root = np.sqrt(s[:rank])
    new_b, new_a = (q_b @ u[:, :rank]) * root, root[:, None] * (vt[:rank] @ q_a.T)
    total = float(np.sqrt((s**2).sum()))
    error = float(np.sqrt((s[rank:] ** 2).sum())) / total if total > 0 else 0.0
    kept = Factors(new_a.astype(factors.A.dtype), new_b.astype(factors.B.dtype), factors.scale)
    return kept, error


def start_a(kind: str, rank: int, fan_in: int, seed: int, name: str) -> NDArray[np.float32]:
    """Draw the start of A; B starts at zero, so the model starts unchanged.

    Args:
        kind: `kaiming`: uniform in ±1/√in, as PEFT draws it (He et al., arXiv:1502.01852, with a = √5);
            `gaussian`: normal with standard deviation 1/rank.
        rank: Rank r.
        fan_in: Number of inputs of the layer.
        seed: The run's seed.
        name: Path of the layer; each layer has a stream of its own, so adding layers changes no other start.

    Returns:
        A, float32 (rank, in).
    """
    random = np.random.Generator(np.random.Philox(key=[seed, _stream(name)]))
    if kind == "gaussian":
        return (random.standard_normal((rank, fan_in)) / rank).astype(np.float32)
    bound = 1.0 / np.sqrt(fan_in)
    return random.uniform(-bound, bound, (rank, fan_in)).astype(np.float32)


def _stream(name: str) -> int:
    """A stable 64-bit number for a name (FNV-1a), to key random streams."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value
