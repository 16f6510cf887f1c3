"""A linear classifier on frozen features: multinomial logistic regression, the linear probe of a model.

Fitted on all rows at once by L-BFGS (Liu and Nocedal, 1989), from zero, so that the same rows give the same numbers.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Vector = NDArray[np.float64]

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the L2 penalty, on features of variance 1
PARTS = 5  # of the rows, of which one chooses the penalty
LEAST_ROWS = 20  # to choose a penalty by; of fewer the strongest but one is taken
MOST_ITERATIONS, MEMORY = 150, 10
TOLERANCE = 1e-4  # largest slope at which the fit ends
MOST_HALVINGS = 20
SUFFICIENT = 1e-4  # share of the promised fall that a step has to bring (Armijo)


@dataclass(frozen=True)
class Probe:
    """A fitted head.

    Attributes:
        weight: float32 (classes, features).
        bias: float32 (classes,).
        penalty: The strength of the L2 penalty that was chosen.
    """

    weight: Floats
    bias: Floats
    penalty: float


def cross_entropy(logits: Floats, labels: NDArray[np.int64]) -> Floats:
    """Loss of each row, nats: logits float32 (rows, classes) against labels int64 (rows,)."""
    high = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - high).sum(1)) + high[:, 0]
    found: Floats = total - logits[np.arange(len(labels)), labels]
    return found


def fit_probe(features: Floats, labels: NDArray[np.int64], classes: int, weights: Sequence[float] = ()) -> Probe:
    """Fit a head to what comes to it.

    Args:
        features: float32 (rows, width).
        labels: int64 (rows,), from 0.
        classes: How many there are.
        weights: What a row of each class counts; 1 if empty.

    Returns:
        The head with the penalty that does best on every fifth row of a label, fitted to all rows.
    """
    mean, spread = features.mean(0), features.std(0)
    scale = np.where(spread > 1e-6 * max(float(spread.max()), 1e-30), 1 / np.maximum(spread, 1e-30), 0.0)
    scaled = ((features - mean) * scale).astype(np.float32)
    counts = np.asarray(weights or [1.0] * classes, np.float32)
    penalty = _choose(scaled, labels, counts)
    weight, bias = _fit(scaled, labels, counts, penalty)
    weight = weight * scale
    return Probe(weight.astype(np.float32), (bias - weight @ mean).astype(np.float32), penalty)


def _choose(features: Floats, labels: NDArray[np.int64], counts: Floats) -> float:
    place = np.zeros(len(labels), np.int64)  # of each row among those of its label
    for label in range(len(counts)):
        own = np.flatnonzero(labels == label)
        place[own] = np.arange(len(own))
    held = place % PARTS == PARTS - 1
    if len(labels) < LEAST_ROWS or not held.any():
        return STRENGTHS[-2]
    losses = {}
    for penalty in STRENGTHS:
        weight, bias = _fit(features[~held], labels[~held], counts, penalty)
        logits = features[held] @ weight.T.astype(np.float32) + bias.astype(np.float32)
        losses[penalty] = float((counts[labels[held]] * cross_entropy(logits, labels[held])).mean())
    return min(losses, key=lambda penalty: losses[penalty])


def _fit(features: Floats, labels: NDArray[np.int64], counts: Floats, penalty: float) -> tuple[Vector, Vector]:
    """Weight (classes, features) and bias (classes,) of least mean cross-entropy + penalty / 2 · ‖weight‖².

    Rows count as `counts` (classes,) says of their label.
    """
    (rows, width), classes, times = features.shape, len(counts), counts[labels]
    wanted = np.zeros((rows, classes), np.float32)
    wanted[np.arange(rows), labels] = 1

    def slope(flat: Vector) -> tuple[float, Vector]:
        weight, bias = flat[: classes * width].reshape(classes, width), flat[classes * width :]
        logits = features @ weight.T.astype(np.float32) + bias.astype(np.float32)
        logits -= logits.max(1, keepdims=True)
        shares = np.exp(logits)
        shares /= shares.sum(1, keepdims=True)
        own = np.log(np.maximum(shares[np.arange(rows), labels], 1e-30))
        loss = -float((times * own).mean(dtype=np.float64))
        errors = (shares - wanted) * times[:, None] / np.float32(rows)
        gradient = errors.T @ features + penalty * weight
        total = loss + penalty / 2 * float((weight * weight).sum())
        return total, np.concatenate([gradient.ravel(), errors.sum(0, dtype=np.float64)])

    flat = _minimise(slope, np.zeros(classes * (width + 1)))
    return flat[: classes * width].reshape(classes, width), flat[classes * width :]


def _minimise(slope: Callable[[Vector], tuple[float, Vector]], start: Vector) -> Vector:
    """L-BFGS with the step halved until it brings a share of the fall that the slope promises."""
    point, (value, gradient) = start, slope(start)
    moves: deque[tuple[Vector, Vector]] = deque(maxlen=MEMORY)
    for _ in range(MOST_ITERATIONS):
        if np.abs(gradient).max() < TOLERANCE:
            break
        direction = _direction(gradient, moves)
        promised, step = float(gradient @ direction), 1.0
        for _ in range(MOST_HALVINGS):
            moved = point + step * direction
            new_value, new_gradient = slope(moved)
            if new_value <= value + SUFFICIENT * step * promised:
                break
            step /= 2
        else:
            break
        if float((moved - point) @ (new_gradient - gradient)) > 0:
            moves.append((moved - point, new_gradient - gradient))
        point, value, gradient = moved, new_value, new_gradient
    return point


def _direction(gradient: Vector, moves: deque[tuple[Vector, Vector]]) -> Vector:
    """The two loops of L-BFGS."""
    found, shares = -gradient, list[float]()
    for move, change in reversed(moves):
        shares.append(float(move @ found) / float(move @ change))
        found = found - shares[-1] * change
    if moves:
        move, change = moves[-1]
        found = found * (float(move @ change) / float(change @ change))
    for (move, change), share in zip(moves, reversed(shares), strict=True):
        found = found + (share - float(change @ found) / float(move @ change)) * move
    return found
