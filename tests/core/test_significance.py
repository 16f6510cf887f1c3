"""Chance, against tables and against what can be counted by hand."""

import math

import numpy as np
import pytest

from thimble.core.significance import (
    MOST_EXACT,
    bootstrap,
    compare,
    fisher,
    is_clear,
    share_interval,
    sign_test,
    t_quantile,
    wilson,
)


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
    assert sign_test(np.int64(60), np.int64(4)) == sign_test(60, 4) < 1e-12, "counts of arrays end at 64 bits"


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


# ---- intervals ------------------------------------------------------------------------------------------------------


def covered(draw, truth, count=400):
    """How often an interval holds the truth."""
    found = [draw(np.random.default_rng(seed)) for seed in range(count)]
    return sum(low <= truth <= high for low, high in found) / count


@pytest.mark.parametrize("rows", [8, 30, 120])
def test_an_interval_of_a_mean_holds_it_in_nineteen_of_twenty_cases(rows):
    assert covered(lambda random: bootstrap(random.normal(0.3, 1, rows)), 0.3) == pytest.approx(0.95, abs=0.025)
    skewed = covered(lambda random: bootstrap(random.exponential(1, rows)), 1.0)
    assert 0.86 <= skewed <= 0.975, "of few rows that lie far to one side it holds it less often"


def test_an_interval_of_a_ratio_holds_it_where_rows_are_of_uneven_length():
    def draw(random):
        tokens = random.integers(5, 200, 40)
        return bootstrap(tokens * random.normal(0.5, 0.3, 40), tokens)

    assert covered(draw, 0.5) == pytest.approx(0.95, abs=0.025)
    tokens = np.array([5, 50, 500, 5, 50, 500, 5, 50, 500])
    assert bootstrap(0.25 * tokens, tokens) == pytest.approx((0.25, 0.25)), "every row rose by as much a token"


def test_an_interval_does_not_depend_on_the_order_of_rows_and_is_the_same_each_time():
    values = np.random.default_rng(1).normal(0.1, 1, 40)
    assert bootstrap(values) == bootstrap(values) == bootstrap(values[::-1])
    for few in ([], [0.3]):
        assert all(map(math.isnan, bootstrap(few)))


@pytest.mark.parametrize(("up", "down", "rows"), [(0.02, 0.02, 30), (0.3, 0.05, 30), (0.5, 0.1, 100), (0.05, 0.3, 12)])
def test_an_interval_of_paired_shares_holds_their_difference(up, down, rows):
    def draw(random):
        better, worse, _ = random.multinomial(rows, [up, down, 1 - up - down])
        return share_interval(better, worse, rows)

    assert covered(draw, up - down, 1000) >= 0.935


def test_the_interval_of_paired_shares_is_that_of_the_paper():
    """Bonett and Price: of 25 rows 9 rose and 2 fell."""
    up, down = 10 / 27, 3 / 27
    half = 1.96 * math.sqrt((up + down - (up - down) ** 2) / 27)
    assert share_interval(9, 2, 25) == pytest.approx((up - down - half, up - down + half))
    low, high = share_interval(8, 0, 8)
    assert (low > 0.3, high) == (True, 1.0)


def test_a_comparison_carries_its_interval():
    found = compare([2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0], [2, 4, 6, 8, 10, 12, 14, 16])
    assert (found.low, found.high) == pytest.approx((1.0, 1.0))
    assert found.rows == found.better == 8
