"""Numbers as text: nothing that was not measured looks like a number, and no share is rounded to all or nothing."""

import math

import pytest

from thimble.report.formatting import (
    NONE,
    THIN,
    amount,
    clip,
    clock,
    duration,
    number,
    percent,
    size,
    small_percent,
    table,
)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, True, "3"])
def test_what_was_not_measured_is_no_number(value):
    assert {number(value), percent(value), size(value), duration(value)} == {NONE}


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0, "0"),
        (0.0004, "0.1"),
        (0.05, "5.0"),
        (0.405, "40"),
        (0.99, "99"),
        (0.995, "99.5"),
        (0.9999, "99.9"),
        (1, "100"),
    ],
)
def test_zero_and_a_hundred_percent_are_kept_for_what_is_exactly_that(share, shown):
    assert percent(share) == f"{shown}{THIN}%"


@pytest.mark.parametrize(
    ("seconds", "words", "on_a_clock"),
    [
        (0.2, "under a second", "0 s"), (1, "1 second", "1 s"), (45, "45 seconds", "45 s"), (187, "3 minutes", "3:07"),
        (3729, "62 minutes", "1:02:09"), (7325, f"2{THIN}h 2{THIN}min", "2:02:05"),
    ],
)  # fmt: skip
def test_durations_in_words_and_on_a_clock(seconds, words, on_a_clock):
    assert (duration(seconds), clock(seconds)) == (words, on_a_clock)


def test_numbers_sizes_and_amounts():
    assert [number(1234.5), number(2.5e7), number(0.5, 1)] == ["1,234.500", "2.50e+07", "0.5"]
    assert [size(98_400_000, " "), size(1_880_000_000, " ")] == ["98 MB", "1.88 GB"]
    assert [amount(884_480), amount(4_884_480), amount(1_240_000_000)] == ["884,480", "4.9 million", "1.24 billion"]
    assert [small_percent(0.0312), small_percent(2e-6), small_percent(0)] == ["3.12%", "2e-06", "0.00%"]


def test_a_table_is_aligned_and_a_text_is_clipped_to_one_line():
    assert table([("", "a"), ("name", "10")]) == "         a\n  name  10"
    assert clip("one\ntwo  three", 10) == "one tw ..."
    assert clip("one\ntwo", 10) == "one two"
