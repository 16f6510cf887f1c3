import numpy as np
import pytest

from thimble.core.confidence import fit_temperature, probabilities
from thimble.core.cross_fitted import calibration, halves, thresholds


def drawn(rows, classes, heat, seed=0):
    """Logits whose softmax is right, made `heat` times surer, and labels drawn from what is right."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, classes)) * 1.5
    labels = np.array([random.choice(classes, p=chances) for chances in probabilities(logits)])
    return logits * heat, labels


def test_halves_share_every_label():
    labels = np.array([0] * 11 + [1] * 4 + [2])
    half = halves(labels)
    for label in (0, 1):
        counts = np.bincount(half[labels == label], minlength=2)
        assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("heat", [3.0, 0.3])
def test_probabilities_that_are_off_are_mended_on_rows_they_were_not_fitted_to(heat):
    found = calibration(*drawn(2000, 4, heat))
    assert found["temperature"] == pytest.approx(heat, rel=0.1)
    assert found["plain"]["error"] > 0.1
    assert found["scaled"]["error"] < 0.04
    assert found["scaled"]["brier"] < found["plain"]["brier"]
    assert sum(part["rows"] for part in found["scaled"]["bins"]) == found["rows"] == 2000


def test_no_row_is_judged_by_a_temperature_fitted_to_it():
    logits, labels = drawn(60, 3, 2.0)
    half = halves(labels)
    scaled = calibration(logits, labels)["scaled"]["bins"]
    plain = [
        probabilities(logits[half == fold], fit_temperature(logits[half != fold], labels[half != fold]))
        for fold in (0, 1)
    ]
    confidence = np.concatenate([chances.max(1) for chances in plain])
    assert sum(part["rows"] * part["confidence"] for part in scaled) == pytest.approx(confidence.sum())


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_few_rows_say_nothing(rows):
    logits, labels = drawn(rows, 2, 1.0) if rows else (np.zeros((0, 2)), np.zeros(0, np.int64))
    assert calibration(logits, labels) == {}
    assert thresholds(logits, labels) == {}


def test_logits_that_are_no_numbers_say_nothing():
    logits, labels = drawn(200, 2, 1.0)
    logits[3, 1] = np.nan
    assert calibration(logits, labels) == thresholds(logits, labels) == {}


def test_the_best_threshold_is_the_one_that_a_search_finds():
    logits, labels = drawn(400, 2, 1.0)
    logits[:, 1] -= 2.0  # the second class is said too seldom
    labels = (labels * (np.random.default_rng(1).random(400) < 0.6)).astype(int)
    found = thresholds(logits, labels)
    chance = probabilities(logits)[:, found["label"]]
    wanted = labels == found["label"]
    scores = {at: _f1(chance >= at, wanted) for at in np.linspace(0, 1, 2001)}
    assert _f1(chance >= found["best"]["threshold"], wanted) == pytest.approx(max(scores.values()), abs=0.002)
    assert found["label"] == 1
    at_half = next(row for row in found["rows"] if row["threshold"] == 0.5)
    assert at_half["accuracy"] == pytest.approx(((chance >= 0.5) == wanted).mean())
    assert found["best"]["f1"] > at_half["f1"]


def _f1(said, wanted):
    return 2 * (said & wanted).sum() / (said.sum() + wanted.sum())


def test_three_classes_have_no_threshold():
    assert thresholds(*drawn(200, 3, 1.0)) == {}
