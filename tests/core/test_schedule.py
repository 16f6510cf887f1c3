"""The learning rate over a run."""

import pytest

from thimble.core.schedule import default_rate, learning_rate


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [learning_rate(1.0, step / 100, 0.1) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert min(rates) > 0


def test_a_constant_rate_stays():
    assert learning_rate(1.0, 0.99, 0.1, "constant") == 1.0


def test_wide_bases_and_small_batches_get_smaller_rates():
    assert default_rate("llama", 2048, 16) < default_rate("llama", 576, 16) < default_rate("llama", 576, 64)
    assert default_rate("llama", 576, 16) == pytest.approx(2 * 4.7e-4, rel=0.02)  # twice the published one
