"""What the probabilities of a classifier are worth: its temperature and its thresholds, judged on other rows than those
they were fitted to.

Rows are halved, label by label. What is fitted on one half is judged on the other, and the other way round, so that
every row is judged and none by what was fitted to it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.confidence import (
    LEAST_ROWS,
    brier,
    calibration_bins,
    calibration_error,
    fit_temperature,
    probabilities,
)

SHOWN_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)

Logits = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]


def halves(labels: Labels) -> NDArray[np.int64]:
    """0 or 1 for each row, the rows of each label taken in turn."""
    half = np.zeros(len(labels), np.int64)
    for number, label in enumerate(np.unique(labels)):
        rows = np.flatnonzero(labels == label)
        half[rows] = (np.arange(len(rows)) + number) % 2  # labels of one row do not all land in one half
    return half


def calibration(logits: Logits, labels: Labels) -> dict[str, Any]:
    """How honest probabilities are, as they are and divided by a temperature; empty if there are too few rows.

    Args:
        logits: (rows, classes), not NaN or Inf.
        labels: Numbers of the right classes, (rows,).

    Returns:
        `rows`, `temperature` (fitted on all of them, for use on further rows), and of the probabilities as they are
        (`plain`) and cross-fitted (`scaled`): `error`, the expected calibration error, `brier`, and `bins`, each with
        rows, confidence and accuracy.
    """
    half = halves(labels)
    if min(np.bincount(half, minlength=2)) < LEAST_ROWS or not np.isfinite(logits).all():
        return {}
    scaled = np.empty(logits.shape, np.float64)
    for fold in (0, 1):
        temperature = fit_temperature(logits[half != fold], labels[half != fold])
        scaled[half == fold] = probabilities(logits[half == fold], temperature)
    return {
        "rows": len(labels),
        "temperature": fit_temperature(logits, labels),
        "plain": _judged(probabilities(logits), labels),
        "scaled": _judged(scaled, labels),
    }


def _judged(chances: NDArray[np.float64], labels: Labels) -> dict[str, Any]:
    bins = calibration_bins(chances, labels)
    return {
        "error": calibration_error(bins),
        "brier": brier(chances, labels),
        "bins": [part._asdict() for part in bins],
    }


def thresholds(logits: Logits, labels: Labels) -> dict[str, Any]:
    """What other thresholds than one half would give of two classes; empty for more, or if there are too few rows.

    Args:
        logits: (rows, 2), not NaN or Inf.
        labels: 0 or 1, (rows,).

    Returns:
        `label`, the number of the rarer class, which is looked for; `rows`, of SHOWN_THRESHOLDS the `threshold` with
        `precision`, `recall` and `f1` of that class and the `accuracy`; and `best`, the same of the threshold with
        the highest F1 on the other half of the rows, the `threshold` itself being the best one on all.
    """
    half = halves(labels)
    if logits.shape[1] != 2 or min(np.bincount(half, minlength=2)) < LEAST_ROWS or not np.isfinite(logits).all():
        return {}
    rarer = int(2 * labels.sum() <= len(labels))
    is_rarer, chance = labels == rarer, probabilities(logits)[:, rarer]
    if not 0 < is_rarer.sum() < len(labels):
        return {}
    said = np.empty(len(labels), bool)
    for fold in (0, 1):
        said[half == fold] = chance[half == fold] >= _best(chance[half != fold], is_rarer[half != fold])
    rows = [{"threshold": at} | _shares(chance >= at, is_rarer) for at in SHOWN_THRESHOLDS]
    return {
        "label": rarer, "rows": rows,
        "best": {"threshold": _best(chance, is_rarer)} | _shares(said, is_rarer),
    }  # fmt: skip


def _best(chance: NDArray[np.float64], is_wanted: NDArray[np.bool_]) -> float:
    """The threshold with the highest F1, between two probabilities that occur; of equals the nearest to 0.5."""
    order = np.argsort(-chance, kind="stable")
    found = np.cumsum(is_wanted[order])
    f1 = 2 * found / (np.arange(1, len(order) + 1) + is_wanted.sum())
    sorted_chance = chance[order]
    is_end = np.append(sorted_chance[1:] < sorted_chance[:-1], True)  # a threshold parts no equal probabilities
    below = np.append(sorted_chance[1:], 0.0)
    cuts = (sorted_chance + below)[is_end] / 2
    best = f1[is_end].max()
    among = cuts[f1[is_end] >= best - 1e-12]
    return float(among[np.argmin(np.abs(among - 0.5))])


def _shares(said: NDArray[np.bool_], is_wanted: NDArray[np.bool_]) -> dict[str, float]:
    right = int((said & is_wanted).sum())
    return {
        "precision": right / max(int(said.sum()), 1),
        "recall": right / max(int(is_wanted.sum()), 1),
        "f1": 2 * right / max(int(said.sum() + is_wanted.sum()), 1),
        "accuracy": float((said == is_wanted).mean()),
    }
