"""Chance, against tables and against what can be counted by hand."""

import math

import numpy as np
import pytest

from thimble.core.significance import MOST_EXACT, compare, fisher, is_clear, sign_test, t_quantile, wilson


@pytest.mark.parametrize(
    ("chance", "freedom", "value"),
    [(0.05, 1, 6.314), (0.025, 10, 2.228), (0.01, 29, 2.462), (0.001, 6, 5.208), (0.005, 7, 3.499),
     (0.025, 1000, 1.962)],
)  # fmt: skip
def test_quantiles_of_t_are_those_of_the_tables(chance, freedom, value):
    assert t_quantile(chance, freedom) == pytest.approx(value, abs=6e-4)


def test_the_sign_test_counts_coins():
    assert sign_test(6, 0) == 1 / 64
    assert sign_test(5, 1) == 7 / 64
    assert sign_test(0, 0) == sign_test(0, 9) == 1.0
    assert sign_test(1200, 700) < 1e-20


def test_signs_are_flipped_one_by_one_where_rows_are_few_and_by_draws_where_they_are_many():
    few = compare([0.1] * 8)
    assert (few.chance, few.chance_worse, few.better, few.worse) == (2**-8, 1.0, 8, 0)
    assert math.isnan(few.t)
    values = np.random.default_rng(0).normal(0.3, 1, MOST_EXACT + 1)
    many = compare(list(values))
    signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
    assert many.chance == pytest.approx(float((signs @ values >= values.sum()).mean()), abs=0.01)
    assert compare(list(reversed(values))) == many, "the order of rows says nothing"


def test_a_mean_that_hangs_on_skewness_is_not_clear_and_a_large_one_is():
    """Many small gains and one loss as large as all of them: what is seen of a mean near zero looks like a gain."""
    random = np.random.default_rng(0)
    small = 0.1 + random.normal(0, 0.01, 29)
    assert not is_clear(compare([*small, -2.0]))
    assert is_clear(compare([*small, -0.05]))
    assert is_clear(compare([*small, -0.3]))


@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 30, [math.nan] * 20])
def test_nothing_is_clear_without_differences(values):
    assert not is_clear(compare(values))


def test_fishers_tea():
    """Eight cups, four each way, all told right: 1 of 70."""
    assert fisher(0, 4, 4) == pytest.approx(1 / 70)
    assert fisher(3, 2, 10) == 1.0


def test_wilson():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 1)[0] == 0.0
