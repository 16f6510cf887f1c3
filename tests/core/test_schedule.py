"""The learning rate over a run."""

import pytest

from thimble.core.schedule import default_beta2, default_rate, learning_rate


def test_the_rate_rises_then_falls_to_a_tenth():
    rates = [learning_rate(1.0, step / 100, 0.1) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert min(rates) > 0


def test_a_constant_rate_stays():
    assert learning_rate(1.0, 0.99, 0.1, "constant") == 1.0


DEMO_TARGET_TOKENS = 317  # of a step: 417 rows in 58 steps, of 44 target tokens each


def test_wide_bases_and_steps_of_few_target_tokens_get_smaller_rates():
    assert default_rate("llama", 2048, 500) < default_rate("llama", 576, 500) < default_rate("llama", 576, 2000)
    assert default_rate("llama", 576, 2000) == pytest.approx(2 * default_rate("llama", 576, 500), rel=0.03)


def test_steps_of_a_few_labels_have_no_lower_rate_than_those_of_short_answers():
    assert default_rate("llama", 576, 2) == default_rate("llama", 576, 400) < default_rate("llama", 576, 500)


def test_the_rate_of_the_demo_is_that_of_400_target_tokens():
    assert default_rate("llama", 576, DEMO_TARGET_TOKENS) == pytest.approx(7.1e-4, rel=0.02)


def test_short_runs_forget_squared_gradients_sooner():
    assert (default_beta2(30), default_beta2(999), default_beta2(1000)) == (0.95, 0.95, 0.999)
