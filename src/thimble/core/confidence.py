"""How sure a classifier is of its labels, and how sure it may be: temperature, calibration error, Brier score."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 15  # as Guo et al.
NEWTON_STEPS = 50
COLDEST, HOTTEST = 0.01, 100.0  # temperatures; where every row is right, none is cold enough
LEAST_ROWS = 20  # to fit a temperature on


class Bin(NamedTuple):
    """Rows whose probability of the label that is given lies in one range."""

    rows: int
    confidence: float  # mean of that probability
    accuracy: float  # share of rows with the right label


def probabilities(logits: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of logits (rows, classes) divided by a temperature, float64."""
    scaled = logits.astype(np.float64) / temperature
    exponents = np.exp(scaled - scaled.max(1, keepdims=True))
    return np.asarray(exponents / exponents.sum(1, keepdims=True))


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The temperature by which logits are to be divided so that probabilities are as honest as they can be.

    It has the least cross-entropy on these rows (Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
    section 4.2), which is convex in the inverse; found by Newton's method, kept within the interval known to hold it.
    Fit it on other rows than those it is judged by.

    Args:
        logits: (rows, classes), not NaN or Inf.
        labels: Numbers of the right classes, (rows,).

    Returns:
        A temperature from COLDEST to HOTTEST; 1 if there are fewer than LEAST_ROWS rows.
    """
    if len(labels) < LEAST_ROWS:
        return 1.0
    values = logits.astype(np.float64)
    right = values[np.arange(len(labels)), labels]
    low, high, inverse = 1 / HOTTEST, 1 / COLDEST, 1.0
    for _ in range(NEWTON_STEPS):
        chances = probabilities(values, 1 / inverse)
        mean = (chances * values).sum(1)
        slope = float((mean - right).mean())
        curvature = float(((chances * values**2).sum(1) - mean**2).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else low
        moved = step if low < step < high else (low + high) / 2
        if abs(moved - inverse) < 1e-9 * inverse:
            break
        inverse = moved
    return 1 / inverse


def calibration_bins(chances: NDArray[np.floating], labels: NDArray[np.integer]) -> list[Bin]:
    """Rows by the probability of the label that is given, in BINS ranges of equal width; empty ones are left out."""
    confidence, is_right = chances.max(1), chances.argmax(1) == labels
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for number in np.unique(place):
        inside = place == number
        found.append(Bin(int(inside.sum()), float(confidence[inside].mean()), float(is_right[inside].mean())))
    return found


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error (Naeini et al., AAAI 2015): how far sureness and accuracy are apart, 0 to 1."""
    rows = sum(part.rows for part in bins)
    return sum(part.rows * abs(part.confidence - part.accuracy) for part in bins) / rows if rows else 0.0


def brier(chances: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Brier's score (Mon. Weather Rev. 78, 1950): mean squared distance from the right label, 0 to 2."""
    wrong = chances.astype(np.float64).copy()
    wrong[np.arange(len(labels)), labels] -= 1
    return float((wrong**2).sum(1).mean())
