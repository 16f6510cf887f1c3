"""What rolls a run back, and what ends it."""

import json
import math

import numpy as np
import pytest

from thimble.core.metrics import LossSum
from thimble.training.guard import (
    IN_A_ROW,
    MAX_ROLLBACKS,
    SPIKES_IN_A_ROW,
    Guard,
    Memorisation,
    Plateau,
    Verdict,
    has_clearly_risen,
)


def steady(guard, count=40, low=2.0):
    for number in range(count):
        assert guard.judge(low + 0.1 * (number % 3), 1.0) is Verdict.TAKE


@pytest.mark.parametrize(
    ("loss", "norm", "why"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (2.0, math.nan, "the gradient norm is nan"),
        (30.0, 1.0, "the loss rose from 2.00 to 30.00"),
    ],
)
def test_a_bad_step_is_left_out_and_two_in_a_row_roll_the_run_back(loss, norm, why):
    guard = Guard()
    steady(guard)
    assert guard.judge(loss, norm) is Verdict.SKIP
    assert guard.why == why
    assert guard.judge(2.1, 1.0) is Verdict.TAKE
    assert guard.judge(loss, norm) is Verdict.SKIP
    assert guard.judge(loss, norm) is Verdict.ROLLBACK
    assert guard.rate == 0.5


def test_a_single_spike_is_trained_on_and_several_in_a_row_roll_the_run_back():
    guard = Guard()
    steady(guard)
    assert guard.judge(3.2, 1.0) is Verdict.TAKE
    assert guard.why == "the loss jumped from about 2.10 to 3.20"
    assert guard.judge(2.1, 1.0) is Verdict.TAKE
    losses = [8.0 * 1.5**number for number in range(SPIKES_IN_A_ROW)]
    guard = Guard(first=100.0)
    steady(guard)
    assert [guard.judge(loss, 1.0) for loss in losses] == [Verdict.TAKE] * (SPIKES_IN_A_ROW - 1) + [Verdict.ROLLBACK]


@pytest.mark.parametrize("share", [0.02, 0.05, 0.08, 0.2])
def test_hard_rows_among_easy_ones_raise_no_alarm(share):
    for seed in range(10):
        random, guard = np.random.default_rng(seed), Guard()
        for _ in range(2000):
            loss = random.normal(1.5 if random.random() < share else 0.3, 0.05)
            assert guard.judge(loss, 1.0) is Verdict.TAKE


def test_a_run_that_keeps_leaving_the_road_is_given_up():
    guard = Guard()
    steady(guard)
    verdicts = [guard.judge(math.nan, 1.0) for _ in range(IN_A_ROW * (MAX_ROLLBACKS + 1))]
    assert verdicts[-1] is Verdict.GIVE_UP
    assert verdicts.count(Verdict.ROLLBACK) == MAX_ROLLBACKS


def test_uneven_rows_and_a_falling_loss_raise_no_alarm():
    guard = Guard()
    for number in range(200):
        loss = 3.0 * math.exp(-number / 30) + 0.4 + 0.4 * ((number * 7919) % 13) / 13
        assert guard.judge(loss, 1.0 + 30 * (number % 17 == 0)) is Verdict.TAKE


def test_the_end_comes_when_patience_does():
    plateau = Plateau(patience=2)
    assert [plateau.add(step, [loss] * 4) for step, loss in enumerate([3.0, 2.0, 2.1, 1.9, 2.0])] == [
        True, True, False, True, False,
    ]  # fmt: skip
    assert not plateau.is_over
    plateau.add(5, [1.95] * 4)
    assert plateau.is_over
    assert (plateau.best, plateau.best_step) == (1.9, 3)


@pytest.mark.parametrize("rows", [3, 5, 10, 40])
def test_a_clear_rise_is_one_that_chance_brings_in_one_of_forty_cases(rows):
    random = np.random.default_rng(rows)
    risen = [has_clearly_risen(random.normal(1, 0.5, rows), random.normal(1, 0.5, rows)) for _ in range(4000)]
    assert sum(risen) / 4000 == pytest.approx(0.025, abs=0.008)
    assert has_clearly_risen([1.0, 2.0, 3.0], [1.1, 2.12, 3.1])
    assert not has_clearly_risen([1.0, 2.0], [1.1, math.nan])


def test_noise_among_rows_ends_nothing_and_a_rise_of_all_rows_does():
    random, ended = np.random.default_rng(0), 0
    rows = random.normal(1.0, 0.5, 16)
    for _ in range(100):  # runs of nine measurements, as a run makes
        plateau = Plateau(patience=3)
        for step in range(9):
            plateau.add(step, list(rows + random.normal(0, 0.1, 16)))
            ended += plateau.is_over
            if plateau.is_over:
                break
    assert ended <= 5
    plateau = Plateau(patience=3)
    plateau.add(0, list(rows))
    for step in range(1, 4):
        plateau.add(step, list(rows + 0.1 + random.normal(0, 0.05, 16)))
    assert plateau.is_over


def test_without_patience_there_is_no_end():
    plateau = Plateau(patience=0)
    for step in range(20):
        plateau.add(step, [1.0 + step] * 4)
    assert not plateau.is_over


def test_state_survives_json():
    guard, plateau, again = Guard(), Plateau(patience=2), Plateau(patience=2)
    assert repr(Guard.restored(json.loads(json.dumps(guard.state(), allow_nan=False)))) == repr(guard)
    again.add(3, [1.0, 2.0])
    again.restore(json.loads(json.dumps(plateau.state(), allow_nan=False)))
    assert again == plateau


def test_other_rows_than_those_of_the_best_measurement_begin_anew():
    """A run that is resumed by a release that watches other rows."""
    plateau = Plateau(patience=1)
    plateau.add(1, [1.0, 1.0, 1.0])
    assert plateau.add(2, [2.0, 2.0])
    assert (plateau.best, plateau.best_step, plateau.is_over) == (2.0, 2, False)


def test_a_measurement_that_is_not_finite_is_passed_over():
    plateau = Plateau(patience=1)
    assert plateau.add(1, [1.0, 2.0])
    for bad in ([math.nan, 1.0], [math.inf, 1.0], [math.nan, math.nan]):
        assert not plateau.add(2, bad)
    assert (plateau.best, plateau.since, plateau.is_over) == (1.5, 0, False)


# ---- rows that are known by heart -----------------------------------------------------------------------------------


def passes(memorisation, *losses, tokens=10):
    """Passes over the data in two steps each, with these mean losses; whether the run is over after each."""
    for loss in losses:
        memorisation.add(LossSum(1.5 * loss * tokens, tokens), ends_epoch=False)
        memorisation.add(LossSum(0.5 * loss * tokens, tokens), ends_epoch=True)
        yield memorisation.is_over


def test_two_passes_in_a_row_below_the_limit_end_the_run():
    assert list(passes(Memorisation(0.05), 1.0, 0.04, 0.2, 0.04, 0.03)) == [False, False, False, False, True]


def test_a_pass_is_judged_when_it_ends_and_as_a_whole():
    memorisation = Memorisation(0.05)
    list(passes(memorisation, 0.01))
    memorisation.add(LossSum(0.0, 10), ends_epoch=False)
    assert not memorisation.is_over
    memorisation.add(LossSum(2.0, 10), ends_epoch=True)
    assert not memorisation.is_over
    assert list(passes(memorisation, 0.01, 0.01)) == [False, True]


def test_without_a_limit_and_without_a_valid_loss_nothing_is_known_by_heart():
    assert not any(passes(Memorisation(), 0.0, 0.0, 0.0))
    assert not any(passes(Memorisation(0.05), math.nan, math.nan, math.nan))


def test_a_pass_that_is_interrupted_goes_on():
    whole, first, second = Memorisation(0.05), Memorisation(0.05), Memorisation(0.05)
    for memorisation in (whole, first):
        list(passes(memorisation, 0.04))
        memorisation.add(LossSum(0.9, 10), ends_epoch=False)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    for memorisation in (whole, second):
        memorisation.add(LossSum(0.0, 10), ends_epoch=True)
    assert second == whole
    assert second.is_over


def test_a_run_of_an_earlier_release_does_not_end_by_a_rule_it_did_not_have():
    memorisation = Memorisation(0.05)
    memorisation.restore({})
    assert not any(passes(memorisation, 0.0, 0.0, 0.0))
