"""How A and B are initialised: published inits, and some of our own, each a function of one layer's matrices.

Which matrix is decomposed matters more than the algorithm: the weight (PiSSA, MiLoRA, OLoRA), the layer's inputs (EVA,
CorDA), the gradient (LoRA-GA, LoRA-One) or the error of quantising (LoftQ). W is never modified: an init that takes
its B A out of W is trained as scale · (B A − B₀ A₀), which is zero at first whatever B₀ A₀ is.

What each init needs stands in `thimble.core.method.INITS`; `BUILDERS` has a function of one `LayerData` for each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from thimble.core.lowrank import Array, Decomposition, Factors, eigen, qr, randomised_svd, svd

Floats = NDArray[np.float32]
T = TypeVar("T")

GA_GAMMA = 16.0  # LoRA-GA: the size of A and B, for models of this class (arXiv:2407.05000, section 4)
ONE_GAMMA = 128.0  # LoRA-One: the size of its first step, from its reference code (arXiv:2502.01235)
EXACT_SIDE = 256  # a matrix this small is decomposed exactly: subspace iteration would save nothing


# ---- what A and B are made from -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Sums over the inputs x of a layer.

    Attributes:
        square: Σ xᵀ x, float32 (n, n).
        total: Σ x, float32 (n,).
        count: How many inputs.
        found: Rows of A made from them before: layers that read the same input share them.
    """

    square: Floats
    total: Floats
    count: int
    found: dict[tuple[int, bool], Floats] = field(default_factory=dict, repr=False, compare=False)

    @property
    def mean_square(self) -> Floats:
        """E[xᵀ x], float32 (n, n)."""
        return self.square / np.float32(self.count)


@dataclass(frozen=True)
class Sketch:
    """The main part of a matrix that was only met in products: of the gradient of W, or of Σ ‖δ‖² xᵀ x.

    Attributes:
        left: Left singular vectors, float (out, k), of the gradient.
        values: Singular values, float (k,), the largest first.
        right: Right singular vectors as rows, float32 (k, in).
        input_square: E‖x‖² of the layer's inputs.
        answer: E[(x Vᵀ)ᵀ (x Vᵀ)] with V = right, float (k, k).
    """

    left: Array
    values: Array
    right: Floats
    input_square: float
    answer: Array


@dataclass(frozen=True)
class LayerData:
    """All that the A and B of one layer may be made from; what an init does not need may be missing.

    Attributes:
        path: Of the layer; together with the seed it keys the layer's own random stream, so that adding layers changes
            no other one.
        shape: (out, in).
        rank: Rank r.
        scale: Factor of B A.
        seed: The run's seed.
        weight: W as the file has it, float (out, in).
        kept: W as it is kept in memory, float (out, in).
        moments: Of the layer's inputs.
        sketch: Of its gradient; of Σ ‖δ‖² xᵀ x for `weighted-pca`.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    scale: float
    seed: int = 0
    weight: Array | None = None
    kept: Array | None = None
    moments: Moments | None = None
    sketch: Sketch | None = None


# ---- random ---------------------------------------------------------------------------------------------------------


def kaiming(layer: LayerData) -> Factors:
    """A uniform in ±1/√in, as PEFT draws it (He et al., arXiv:1502.01852, with a = √5); B zero."""
    bound = 1.0 / np.sqrt(layer.shape[1])
    return _with_zero_b(_random(layer).uniform(-bound, bound, (layer.rank, layer.shape[1])), layer)


def gaussian(layer: LayerData) -> Factors:
    """A normal with deviation 1/rank, B zero; a row is √in / rank long, and the default rate makes up for that."""
    return _with_zero_b(_random(layer).standard_normal((layer.rank, layer.shape[1])) / layer.rank, layer)


def orthogonal(layer: LayerData) -> Factors:
    """A and B from two halves of one orthogonal matrix, so that B A is zero though neither is; the rank is even.

    As PEFT draws it. It is zero up to rounding only, so it is trained as a difference, which is zero exactly.
    """
    (fan_out, fan_in), rank, random = layer.shape, layer.rank, _random(layer)
    basis = np.linalg.qr(random.standard_normal((rank, rank)))[0]
    a = random.standard_normal((fan_in, rank // 2)) @ basis[0::2] / 10  # (in, rank)
    b = random.standard_normal((fan_out, rank // 2)) @ basis[1::2] / 10  # (out, rank)
    return _factors(a.T, b, layer.scale)


def embedding(layer: LayerData) -> Factors:
    """A zero, B standard normal, as PEFT begins an embedding: each of its inputs meets one column of A alone."""
    (fan_out, fan_in), rank = layer.shape, layer.rank
    return _factors(np.zeros((rank, fan_in)), _random(layer).standard_normal((fan_out, rank)), layer.scale)


def _random(layer: LayerData) -> np.random.Generator:
    return random_stream(layer.seed, layer.path)


def random_stream(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on a seed and a name alone (its FNV-1a hash keys them)."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return np.random.Generator(np.random.Philox(key=[seed, value]))


# ---- from the weight: B₀ A₀ is along a piece of W ------------------------------------------------------------------


def pissa(layer: LayerData) -> Factors:
    """The largest singular values of W by subspace iteration (Meng et al., arXiv:2404.02948, equations 2 to 4)."""
    return _split(top(_given(layer.weight), layer.rank), layer.scale)


def pissa_exact(layer: LayerData) -> Factors:
    """The largest singular values of W, exactly."""
    return _split(svd(_given(layer.weight), layer.rank), layer.scale)


def milora(layer: LayerData) -> Factors:
    """The smallest singular values of W (Wang et al., arXiv:2406.09044)."""
    return _split(svd(_given(layer.weight), layer.rank, "bottom"), layer.scale)


def olora(layer: LayerData) -> Factors:
    """B the first columns of Q, A the first rows of R (Büyükakyüz, OLoRA, arXiv:2406.01775).

    So scale · B₀ A₀ is `scale` times that piece of W, as in the paper's algorithm and in PEFT: a base from which it
    is taken changes with alpha.
    """
    piece = qr(_given(layer.weight), layer.rank)
    return _factors(piece.right, piece.left, layer.scale)


def loftq(layer: LayerData) -> Factors:
    """The best update of rank r for what quantising lost (Li et al., LoftQ, arXiv:2310.08659, algorithm 1 with T = 1).

    scale · B A is nearest to W − kept; PEFT leaves the scale out of account. Later rounds would quantise
    W − scale · B A, another base than the one others share.
    """
    return _split(svd(_given(layer.weight) - _given(layer.kept), layer.rank), layer.scale)


def _split(piece: Decomposition, scale: float) -> Factors:
    """Factors with scale · B A = the piece, singular values split evenly."""
    root = np.sqrt(piece.values / scale)
    return _factors(root[:, None] * piece.right, piece.left * root, scale)


# ---- from the inputs ------------------------------------------------------------------------------------------------


def eva(layer: LayerData) -> Factors:
    """A along the main directions of the layer's inputs (Paischer et al., EVA, arXiv:2410.07170), B zero.

    The gradient of W is Σ δᵀ x with the inputs as they are: the mean, which centring takes off, is a direction it uses.
    So the second moment is decomposed, and x Aᵀ is as long as with Kaiming's init.
    """
    return _with_zero_b(_eva_rows(_given(layer.moments), layer.rank, is_centred=False), layer)


def eva_centred(layer: LayerData) -> Factors:
    """EVA as published: the covariance is decomposed, and the rows of A keep length one."""
    return _with_zero_b(_eva_rows(_given(layer.moments), layer.rank, is_centred=True), layer)


def _eva_rows(moments: Moments, rank: int, is_centred: bool) -> Floats:
    """A, float32 (rank, n); computed once for all layers that read the same input."""
    known = moments.found.get((rank, is_centred))
    if known is not None:
        return known
    square = moments.mean_square
    if is_centred:
        mean = moments.total / np.float32(moments.count)
        a = top_directions(square - np.outer(mean, mean), rank)
    else:
        a = top_directions(square, rank)
        a = at_kaiming_length(a, float(np.trace(square)), a @ square @ a.T)
    moments.found[rank, is_centred] = a
    return a


def corda(layer: LayerData) -> Factors:
    """The part of W that answers the layer's inputs most (Yang et al., CorDA, arXiv:2406.05223).

    With W C = U S Vᵀ and C = E[xᵀ x], the published piece U_r S_r V_rᵀ C⁻¹ is U_r U_rᵀ W: no inverse is needed, and
    no damping, whatever the rank of C. Each direction is split evenly between A and B, so that the scale of C does not
    matter; with C = I this is PiSSA.
    """
    return _answering_part(layer, top(_answers(layer), layer.rank))


def corda_knowledge(layer: LayerData) -> Factors:
    """The part of W that answers least to inputs on which the base must not change.

    The smallest singular vectors are those of the thin decomposition: W writes nothing along the others of a tall W.
    """
    basis = np.linalg.qr(_given(layer.weight).astype(np.float64))[0]  # of what W writes, (out, min(out, in))
    wide = basis.T @ _answers(layer)
    # By eigenvectors, which are at right angles even where there is no answer at all.
    least = eigen(wide @ wide.T, layer.rank, "bottom")
    return _answering_part(layer, replace(least, left=basis @ least.left))


def _answers(layer: LayerData) -> Floats:
    """W C, float32 (out, in)."""
    return np.asarray(_given(layer.weight), np.float32) @ _given(layer.moments).mean_square


def _answering_part(layer: LayerData, piece: Decomposition) -> Factors:
    """U_r U_rᵀ W, with the lengths of its rows as singular values."""
    rows = piece.left.T @ _given(layer.weight)  # (rank, in)
    lengths = np.linalg.norm(rows, axis=1)
    rows = rows / np.where(lengths > 0, lengths, 1.0)[:, None]
    return _split(Decomposition(piece.left, lengths, rows, piece.energy, piece.operations), layer.scale)


def top_directions(square: Array, rank: int) -> Floats:
    """Main eigenvectors of a second moment as rows, the largest first: (n, n) to float32 (rank, n)."""
    found = eigen(square, rank) if len(square) <= EXACT_SIDE else randomised_svd(square, rank)
    return np.ascontiguousarray(found.right, np.float32)


def at_kaiming_length(a: Floats, input_square: float, answer: Array) -> Floats:
    """Scale A so that E‖x Aᵀ‖² is what Kaiming's init gives, r E‖x‖² / (3 n): then its learning rate transfers.

    Orthonormal rows along the inputs make x Aᵀ some seven times as long, which is why such inits are published with
    rates a tenth of LoRA's.

    Args:
        a: float32 (rank, n).
        input_square: E‖x‖².
        answer: E[(x Aᵀ)ᵀ (x Aᵀ)], float (rank, rank).

    Returns:
        A times one number.
    """
    rank, n = a.shape
    found = float(np.trace(answer))
    return np.asarray(a * np.sqrt(rank * input_square / (3 * n) / found), np.float32) if found > 0 else a


# ---- from the gradient that the first step sees ---------------------------------------------------------------------


def gradient(layer: LayerData) -> Factors:
    """A along the right singular vectors of the sketch, as long as with Kaiming's init, B zero."""
    sketch, rank = _given(layer.sketch), layer.rank
    return _with_zero_b(at_kaiming_length(sketch.right[:rank], sketch.input_square, sketch.answer[:rank, :rank]), layer)


def whitened(layer: LayerData) -> Factors:
    """A along the right singular vectors of the sketch, every row answering as much as one of Kaiming's, B zero.

    Row a becomes a · c / √E(x aᵀ)², with c² = E‖x‖² / (3 n): without it, x Aᵀ is mostly the direction in which the
    inputs are largest, and AdamW moves the columns of B alike though their inputs are not.
    """
    sketch, rank = _given(layer.sketch), layer.rank
    answers = np.diag(sketch.answer)[:rank]
    wanted = sketch.input_square / (3 * layer.shape[1])
    lengths = np.sqrt(wanted / np.where(answers > 0, answers, 1.0))
    return _with_zero_b(np.where(answers > 0, lengths, 1.0)[:, None] * sketch.right[:rank], layer)


def lora_ga(layer: LayerData) -> Factors:
    """A along the first r right, B along the next r left singular vectors, so the sketch has 2 r of them.

    Trained in delta form (Wang et al., arXiv:2407.05000, theorem 3.1 and equation 9). All are c = out^¼ / √γ long,
    whatever the scale s. A step of plain gradient descent moves the weight by rate · s² c² (G P + Q G), with P and Q
    the projections on what A and B span: alpha counts twice, so the scale of the paper's runs belongs to its rates.
    """
    sketch, rank = _given(layer.sketch), layer.rank
    length = np.sqrt(np.sqrt(layer.shape[0]) / GA_GAMMA)
    return _factors(length * sketch.right[:rank], length * sketch.left[:, rank : 2 * rank], layer.scale)


def lora_one(layer: LayerData) -> Factors:
    """scale · B A is one gradient step of rank r, which the model takes at once.

    Zhang et al., arXiv:2502.01235, in the form of their code: √S / √(γ S₁) on both sides.
    """
    sketch, rank = _given(layer.sketch), layer.rank
    top = max(float(sketch.values[0]), 1e-30)
    root = np.sqrt(sketch.values[:rank] / (ONE_GAMMA * top))
    return _factors(root[:, None] * sketch.right[:rank], -sketch.left[:, :rank] * root, layer.scale)


# ---- shared ---------------------------------------------------------------------------------------------------------


def _given(value: T | None) -> T:
    if value is None:
        raise ValueError("this init needs more than the layer data hold; see thimble.core.method.INITS")
    return value


def _with_zero_b(a: Array, layer: LayerData) -> Factors:
    """Factors that leave the model as it is."""
    return _factors(a, np.zeros((layer.shape[0], len(a))), layer.scale)


def _factors(a: Array, b: Array, scale: float) -> Factors:
    return Factors(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32), scale)


def top(matrix: Array, rank: int) -> Decomposition:
    """Top of the spectrum: exact where that is cheap, else by subspace iteration."""
    return svd(matrix, rank) if min(matrix.shape) <= EXACT_SIDE else randomised_svd(matrix, rank)


BUILDERS: dict[str, Callable[[LayerData], Factors]] = {
    "kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal, "olora": olora, "pissa": pissa,
    "pissa:exact": pissa_exact, "milora": milora, "eva": eva, "eva:centred": eva_centred, "corda": corda,
    "corda:knowledge": corda_knowledge, "weighted-pca": gradient, "gradient": gradient, "gradient:whitened": whitened,
    "gradient:lora-ga": lora_ga, "gradient:lora-one": lora_one, "loftq": loftq,
}  # fmt: skip
