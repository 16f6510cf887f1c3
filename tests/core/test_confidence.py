"""How sure a classifier is, and how sure it may be."""

import numpy as np
import pytest

from thimble.core.confidence import brier, calibration_bins, calibration_error, fit_temperature, probabilities


def drawn(temperature, rows=4000, classes=4, seed=0):
    """Logits that are honest once they are divided by the temperature, with labels drawn from them."""
    generator = np.random.default_rng(seed)
    honest = generator.normal(0, 2, (rows, classes))
    chances = probabilities(honest)
    labels = (chances.cumsum(1) > generator.random((rows, 1))).argmax(1)
    return honest * temperature, labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_of_drawn_labels_is_found_again(temperature):
    logits, labels = drawn(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.08)


def test_the_temperature_has_the_least_cross_entropy_of_a_fine_grid():
    logits, labels = drawn(1.7, rows=200, seed=3)

    def cross_entropy(temperature):
        return -np.log(probabilities(logits, temperature)[np.arange(200), labels]).mean()

    found = fit_temperature(logits, labels)
    assert all(cross_entropy(found) <= cross_entropy(other) for other in np.geomspace(0.2, 10, 400))


def test_where_every_row_is_right_or_wrong_the_temperature_stays_finite():
    logits = np.eye(3)[np.arange(60) % 3] * 4
    assert 0.01 <= fit_temperature(logits, np.arange(60) % 3) < 0.2
    assert fit_temperature(logits, (np.arange(60) + 1) % 3) == pytest.approx(100, rel=0.01)
    assert fit_temperature(np.zeros((60, 3)), np.arange(60) % 3) > 0
    assert fit_temperature(logits[:5], np.arange(5) % 3) == 1.0


def test_scaling_never_changes_a_label_and_mends_the_calibration_error():
    logits, labels = drawn(3.0)
    fitted = fit_temperature(logits[::2], labels[::2])
    before, after = probabilities(logits[1::2]), probabilities(logits[1::2], fitted)
    assert (before.argmax(1) == after.argmax(1)).all()
    errors = [calibration_error(calibration_bins(chances, labels[1::2])) for chances in (before, after)]
    assert errors[0] > 0.1
    assert errors[1] < 0.03


def test_calibration_error_of_a_table_worked_out_by_hand():
    chances = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    labels = np.array([0, 1, 0, 1])
    # two rows at 0.9, one right: 0.4 apart; two rows at 0.6, both right: 0.4 apart
    bins = calibration_bins(chances, labels)
    assert [(part.rows, part.confidence, part.accuracy) for part in bins] == [(2, 0.6, 1.0), (2, 0.9, 0.5)]
    assert calibration_error(bins) == pytest.approx(0.4)
    assert brier(chances, labels) == pytest.approx((0.02 + 1.62 + 0.32 + 0.32) / 4)
