"""Where A and B begin: every published start, as functions of one layer's matrices.

Which matrix is decomposed matters more than the algorithm: the weight (PiSSA, MiLoRA, OLoRA), the layer's inputs (EVA,
CorDA), the gradient (LoRA-GA, LoRA-One) or the error of quantising (LoftQ). W is never modified: a start that takes
its B A out of W is trained as scale · (B A − B₀ A₀), which is zero at first whatever B₀ A₀ is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thimble.core.lowrank import Array, Decomposition, Factors, eigen, qr, randomised_svd, svd

Floats = NDArray[np.float32]

GA_GAMMA = 16.0  # LoRA-GA: the size of its start, for models of this class (arXiv:2407.05000, section 4)
ONE_GAMMA = 128.0  # LoRA-One: the size of its first step, from its reference code (arXiv:2502.01235)
EXACT_SIDE = 256  # a matrix this small is decomposed exactly: a random start would save nothing


# ---- random ---------------------------------------------------------------------------------------------------------


def draw(kind: str, shape: tuple[int, int], rank: int, scale: float, seed: int, name: str) -> Factors:
    """A start that needs nothing but the shape; B A is zero.

    Args:
        kind: `kaiming`: A uniform in ±1/√in, as PEFT draws it (He et al., arXiv:1502.01852, with a = √5), B zero;
            `gaussian`: A normal with deviation 1/rank, B zero;
            `orthogonal`: A and B made of two halves of one orthogonal matrix, so that B A is zero though neither is;
            the rank must be even.
        shape: (out, in) of the layer.
        rank: Rank r.
        scale: Factor of B A.
        seed: The run's seed.
        name: Path of the layer; each layer has a stream of its own, so adding layers changes no other start.

    Returns:
        The factors, float32.
    """
    fan_out, fan_in = shape
    random = np.random.Generator(np.random.Philox(key=[seed, _stream(name)]))
    b = np.zeros((fan_out, rank), np.float32)
    if kind == "orthogonal":
        basis = np.linalg.qr(random.standard_normal((rank, rank)))[0]
        a = random.standard_normal((fan_in, rank // 2)) @ basis[0::2] / 10
        b = random.standard_normal((fan_out, rank // 2)) @ basis[1::2] / 10
        return _factors(a.T, b, scale)
    if kind == "gaussian":
        return _factors(random.standard_normal((rank, fan_in)) / rank, b, scale)
    bound = 1.0 / np.sqrt(fan_in)
    return _factors(random.uniform(-bound, bound, (rank, fan_in)), b, scale)


def _stream(name: str) -> int:
    """A stable 64-bit number for a name (FNV-1a), to key random streams."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


# ---- from the weight ------------------------------------------------------------------------------------------------


def from_weight(kind: str, weight: Array, rank: int, scale: float) -> Factors:
    """A start that is a piece of W: scale · B₀ A₀ is that piece.

    Args:
        kind: `pissa`: the largest singular values (Meng et al., arXiv:2404.02948, equations 2 to 4), by subspace
            iteration, or exactly as `pissa:exact`; `milora`: the smallest (Wang et al., arXiv:2406.09044);
            `olora`: the first columns of Q and rows of R (Büyükakyüz, arXiv:2406.01775).
        weight: W, float (out, in).
        rank: Rank r.
        scale: Factor of B A.

    Returns:
        The factors, float32.
    """
    if kind == "olora":
        piece = qr(weight, rank)
        return _factors(piece.right, piece.left, scale)
    if kind in ("milora", "pissa:exact"):
        piece = svd(weight, rank, "bottom" if kind == "milora" else "top")
    else:
        piece = _top(weight, rank)
    return _split(piece, scale)


def _split(piece: Decomposition, scale: float) -> Factors:
    """Factors with scale · B A = the piece, singular values split evenly."""
    root = np.sqrt(piece.values / scale)
    return _factors(root[:, None] * piece.right, piece.left * root, scale)


def loftq(weight: Array, kept: Array, rank: int, scale: float) -> Factors:
    """The best update of rank r for what quantising lost (Li et al., LoftQ, arXiv:2310.08659, algorithm 1 with T = 1).

    Later rounds would quantise W − scale · B A, another base than the one others share.

    Args:
        weight: W as the file has it, float (out, in).
        kept: W as it is kept, float (out, in).
        rank: Rank r.
        scale: Factor of B A, which PEFT leaves out of account.

    Returns:
        The factors: scale · B A is nearest to W − kept.
    """
    return _split(svd(weight - kept, rank), scale)


# ---- from the inputs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Sums over the inputs x of a layer.

    Attributes:
        square: Σ x xᵀ, float32 (n, n).
        total: Σ x, float32 (n,).
        count: How many inputs.
    """

    square: Floats
    total: Floats
    count: int

    @property
    def mean_square(self) -> Floats:
        """E[x xᵀ], float32 (n, n)."""
        return self.square / np.float32(self.count)


def eva(moments: Moments, rank: int, is_centred: bool = False) -> Floats:
    """Rows of A along the main directions of the layer's inputs (Paischer et al., EVA, arXiv:2410.07170); B is zero.

    The gradient of W is Σ δ xᵀ with the inputs as they are: the mean, which centring takes off, is a direction it uses.
    So the second moment is decomposed, and A x is as long as with a Kaiming start.

    Args:
        moments: Of the inputs.
        rank: Rank r.
        is_centred: As published: decompose the covariance, and keep rows of length one.

    Returns:
        A, float32 (rank, n).
    """
    square = moments.mean_square
    if is_centred:
        mean = moments.total / np.float32(moments.count)
        return top_directions(square - np.outer(mean, mean), rank)
    a = top_directions(square, rank)
    return at_kaiming_length(a, float(np.trace(square)), a @ square @ a.T)


def corda(weight: Array, moments: Moments, rank: int, scale: float, keeps_knowledge: bool = False) -> Factors:
    """The part of W that answers the layer's inputs most, or least (Yang et al., CorDA, arXiv:2406.05223).

    With W C = U S Vᵀ and C = E[x xᵀ], the published piece U_r S_r V_rᵀ C⁻¹ is U_r U_rᵀ W: no inverse is needed, and
    no damping, whatever the rank of C. Each direction is split evenly between A and B, so that the scale of C does not
    matter; with C = I this is PiSSA.

    Args:
        weight: W, float (out, in).
        moments: Of the inputs; inputs on which the base must not change, if `keeps_knowledge`.
        rank: Rank r.
        scale: Factor of B A.
        keeps_knowledge: Take the directions of the smallest answers, and leave the others alone.

    Returns:
        The factors.
    """
    answers = np.asarray(weight, np.float32) @ moments.mean_square
    if keeps_knowledge:  # by eigenvectors, which are at right angles even where there is no answer at all
        wide = answers.astype(np.float64)
        piece = eigen(wide @ wide.T, rank, "bottom")
    else:
        piece = _top(answers, rank)
    rows = piece.left.T @ weight
    lengths = np.linalg.norm(rows, axis=1)
    rows = rows / np.where(lengths > 0, lengths, 1.0)[:, None]
    return _split(Decomposition(piece.left, lengths, rows, piece.energy, piece.operations), scale)


def top_directions(square: Array, rank: int) -> Floats:
    """Main eigenvectors of a second moment as rows, the largest first: (n, n) to float32 (rank, n)."""
    found = eigen(square, rank) if len(square) <= EXACT_SIDE else randomised_svd(square, rank)
    return np.ascontiguousarray(found.right, np.float32)


def at_kaiming_length(a: Floats, input_square: float, answer: Array) -> Floats:
    """Scale A so that E‖A x‖² is what a Kaiming start gives, r E‖x‖² / (3 n): then its learning rate transfers.

    Orthonormal rows along the inputs make A x some seven times as long, which is why such starts are published with
    rates a tenth of LoRA's.

    Args:
        a: float32 (rank, n).
        input_square: E‖x‖².
        answer: E[(A x)(A x)ᵀ], float (rank, rank).

    Returns:
        A times one number.
    """
    rank, n = a.shape
    found = float(np.trace(answer))
    return np.asarray(a * np.sqrt(rank * input_square / (3 * n) / found), np.float32) if found > 0 else a


# ---- from the gradient ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sketch:
    """The main part of a matrix that was only met in products: of the gradient of W, or of Σ ‖δ‖² x xᵀ.

    Attributes:
        left: Left singular vectors, float (out, k), of the gradient.
        values: Singular values, float (k,), the largest first.
        right: Right singular vectors as rows, float32 (k, in).
        input_square: E‖x‖² of the layer's inputs.
        answer: E[(V x)(V x)ᵀ] with V = right, float (k, k).
    """

    left: Array
    values: Array
    right: Floats
    input_square: float
    answer: Array


def from_sketch(kind: str, sketch: Sketch, shape: tuple[int, int], rank: int, scale: float) -> Factors:
    """A start along the gradient that the first step will see.

    Args:
        kind: `gradient` and `weighted-pca`: A along the right singular vectors, as long as a Kaiming start, B zero;
            `gradient:lora-ga`: A along the first r right, B along the next r left singular vectors, trained in delta
            form (Wang et al., arXiv:2407.05000, theorem 3.1 and equation 9);
            `gradient:lora-one`: scale · B A is one gradient step of rank r, which the model takes at once (Zhang et
            al., arXiv:2502.01235, in the form of their code, √S / √(γ S₁) on both sides).
        sketch: Of the gradient; of Σ ‖δ‖² x xᵀ for `weighted-pca`.
        shape: (out, in) of the layer.
        rank: Rank r; `gradient:lora-ga` needs a sketch of 2 r values.
        scale: Factor of B A.

    Returns:
        The factors.
    """
    fan_out, _ = shape
    if kind == "gradient:lora-ga":
        length = np.sqrt(np.sqrt(fan_out) / GA_GAMMA)
        return _factors(length * sketch.right[:rank], length * sketch.left[:, rank : 2 * rank], scale)
    if kind == "gradient:lora-one":
        top = max(float(sketch.values[0]), 1e-30)
        root = np.sqrt(sketch.values[:rank] / (ONE_GAMMA * top))
        return _factors(root[:, None] * sketch.right[:rank], -sketch.left[:, :rank] * root, scale)
    a = at_kaiming_length(sketch.right[:rank], sketch.input_square, sketch.answer[:rank, :rank])
    return with_zero_b(a, fan_out, scale)


def with_zero_b(a: Array, fan_out: int, scale: float) -> Factors:
    """Factors of a start that leaves the model as it is."""
    return _factors(a, np.zeros((fan_out, len(a))), scale)


def _factors(a: Array, b: Array, scale: float) -> Factors:
    return Factors(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32), scale)


def _top(matrix: Array, rank: int) -> Decomposition:
    """Top of the spectrum: exact where that is cheap, else by subspace iteration."""
    return svd(matrix, rank) if min(matrix.shape) <= EXACT_SIDE else randomised_svd(matrix, rank)
