"""Philox against its known answers, and the masks that are drawn from it."""

import numpy as np
import pytest

from thimble.core.dropout import drop_threshold, keep_factor, keep_mask, philox

ROWS, TOKENS = np.array([5, 5, 5, 2, 2]), np.array([0, 1, 2, 0, 1])


def mask(rows=ROWS, tokens=TOKENS, key=(7, 3), layer=4, columns=10, rate=0.4):
    return keep_mask(key, layer, rows, tokens, columns, rate)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of the authors' Random123 library
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in line.split()] for line in (counter, key, words))
    assert philox(counter, key).tolist() == words
    assert philox([np.full((2, 1), counter[0]), *counter[1:]], key).tolist() == [[words]] * 2


def test_an_element_is_dropped_by_its_own_word():
    kept = mask()
    for t in range(len(ROWS)):
        for j in range(10):
            word = philox((j // 4, TOKENS[t], ROWS[t], 4), (7, 3))[j % 4]
            assert kept[t, j] == (word >= 0.4 * 2**32)


def test_a_mask_does_not_depend_on_which_rows_are_packed_together():
    order = np.array([3, 4, 0, 1, 2])
    np.testing.assert_array_equal(mask(ROWS[order], TOKENS[order]), mask()[order])
    np.testing.assert_array_equal(mask(ROWS[3:], TOKENS[3:]), mask()[3:])


def test_a_narrower_input_has_the_first_columns_of_a_wider_one():
    np.testing.assert_array_equal(mask(columns=7), mask(columns=32)[:, :7])


@pytest.mark.parametrize(
    "other", [{"key": (8, 3)}, {"key": (7, 4)}, {"layer": 5}, {"rows": ROWS + 1}, {"tokens": TOKENS + 1}], ids=str
)
def test_seed_step_layer_row_and_token_each_change_the_mask(other):
    assert (mask(columns=64, **other) != mask(columns=64)).mean() > 0.3


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9])
def test_the_share_that_stays_is_one_minus_the_rate_and_its_sum_keeps_its_mean(rate):
    tokens = np.arange(400)
    kept = mask(np.zeros_like(tokens), tokens, columns=100, rate=rate)
    assert kept.mean() == pytest.approx(1 - rate, abs=0.01)
    assert kept.mean() * keep_factor(rate) == pytest.approx(1, abs=0.05)


def test_bounds_are_exact():
    assert drop_threshold(0.0) == 0
    assert drop_threshold(0.5) == 1 << 31
    assert mask(rate=0.0).all()
    assert keep_factor(0.5) == np.float32(2)


def test_a_seed_and_a_row_beyond_32_bits_and_an_empty_batch_are_no_error():
    np.testing.assert_array_equal(mask(key=(7 + (1 << 32), 3)), mask())
    assert mask(ROWS[:0], TOKENS[:0]).shape == (0, 10)
