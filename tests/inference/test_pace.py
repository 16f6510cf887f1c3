"""How much is read beside answers: as much as stretches a step no more than it may."""

import numpy as np
import pytest

from thimble.inference.pace import FIRST_TOKENS, LEAST_TOKENS, MOST_STRETCH, MOST_TOKENS, Pace


def run(pace, steps, writing=0.03, token=0.001, first=0.0, answers=1, waiting=1):
    """Steps of an engine that takes so many seconds to write, to begin with prompts, and to read a token of them.

    Every fourth reads the end of a prompt, which is shorter.
    """
    for number in range(steps):
        tokens = pace.prompt_tokens(answers, answers, waiting) if number % 2 else 0
        tokens = tokens * 2 // 3 if number % 4 == 3 else tokens
        pace.note(writing + (first + token * tokens if tokens else 0.0), answers, answers, tokens)


@pytest.mark.parametrize(
    ("writing", "token", "first"),
    [(0.03, 0.001, 0), (0.2, 0.001, 0), (0.01, 0.0001, 0), (0.02, 0.01, 0), (0.14, 0.002, 0.07), (0.06, 0.001, 0.06)],
)
def test_a_step_is_stretched_no_more_than_it_may(writing, token, first):
    pace = Pace()
    run(pace, 200, writing, token, first)
    tokens = pace.prompt_tokens(1, 1, 1)
    allowed = ((MOST_STRETCH - 1) * writing - first) / token
    assert tokens % LEAST_TOKENS == 0
    assert tokens <= max(LEAST_TOKENS, 1.05 * allowed)
    assert tokens >= min(allowed * 0.9 - LEAST_TOKENS, tokens)


def test_a_machine_that_becomes_slower_is_noticed():
    pace = Pace()
    run(pace, 40)
    before = pace.prompt_tokens(1, 1, 1)
    run(pace, 60, token=0.004)
    assert pace.prompt_tokens(1, 1, 1) <= before / 2


def test_there_is_always_some_progress():
    pace = Pace()
    run(pace, 40, writing=0.001, token=10)
    assert pace.prompt_tokens(1, 1, 1) == LEAST_TOKENS


@pytest.mark.parametrize(("first", "token", "expected"), [(0.15, 0.004, 75), (0.5, 0.005, 200), (0.05, 0.01, 10)])
def test_a_pass_that_costs_much_whatever_it_reads_reads_enough_to_be_worth_it(first, token, expected):
    """It cannot be short, so most of it is to be reading."""
    pace = Pace()
    run(pace, 200, 0.018, token, first)
    assert expected / 1.3 <= pace.prompt_tokens(1, 1, 1) <= expected * 1.3 + LEAST_TOKENS


def test_two_measurements_beside_other_work_make_no_long_pause():
    """They say that a token costs hardly anything, which so few cannot know."""
    pace = Pace()
    for seconds, tokens in ((0.885, 0), (1.495, 32), (1.559, 64)):
        pace.note(seconds, 1, 1, tokens)
    assert pace.prompt_tokens(1, 1, 1) <= 96


def test_what_a_pass_costs_is_known_from_passes_of_one_length_too():
    pace = Pace()
    for _ in range(50):
        pace.note(0.02, 1, 1, 0)
        pace.note(0.2, 1, 1, 32)
    assert LEAST_TOKENS <= pace.prompt_tokens(1, 1, 1) <= 64


@pytest.mark.parametrize(("waiting", "answers", "times"), [(1, 7, 1), (3, 3, 1), (7, 1, 7), (6, 2, 3)])
def test_where_more_wait_for_an_answer_than_read_one_prompts_get_as_much_more_of_the_time(waiting, answers, times):
    pace = Pace()
    first = pace.prompt_tokens(answers, answers, waiting)
    assert first == times * FIRST_TOKENS  # before anything is known
    run(pace, 200, writing=0.02, token=0.001, answers=answers, waiting=waiting)
    tokens = pace.prompt_tokens(answers, answers, waiting)
    assert tokens == pytest.approx(min(times * 20 * (MOST_STRETCH - 1), MOST_TOKENS), abs=LEAST_TOKENS)


def test_prompts_that_end_with_a_few_tokens_do_not_keep_pieces_short():
    """How much longer a piece may become goes by the mean of those before."""
    pace = Pace()
    for number in range(60):
        tokens = (0, 1, 3)[number % 3]
        pace.note(0.03 + 0.001 * tokens, 7, 7, tokens)
    for _ in range(20):
        tokens = pace.prompt_tokens(7, 7, 1)
        pace.note(0.03 + 0.001 * tokens, 7, 7, tokens)
    assert tokens >= 0.9 * 30 * (MOST_STRETCH - 1) - LEAST_TOKENS


def read_beside(answers, prompt, seed):
    """Steps of an engine whose answers are written while a long prompt is read: how long those that only write take,
    and those that read as well. A token of a prompt takes longer the further behind it stands, and no step is exact.
    """
    random, pace, read, writing, both = np.random.default_rng(seed), Pace(), 0, [], []
    while read < prompt:
        tokens = min(pace.prompt_tokens(answers, answers, 1), prompt - read) if len(writing) == 40 else 0
        seconds = 0.013 + 0.0026 * answers + tokens * (0.00145 + 0.0013 * read / 900)
        seconds *= np.exp(0.06 * random.standard_normal())
        pace.note(seconds, answers, answers, tokens)
        (both if tokens else writing).append(seconds)
        read += tokens
    return writing, both


def test_those_who_read_an_answer_see_no_gap_of_over_three_times_the_usual_while_a_long_prompt_is_read():
    ratios, times = [], []
    for seed in range(40):
        writing, both = read_beside(7, 1000, seed)
        ratios.append(np.percentile(both, 99) / np.median(writing))
        times.append(sum(both))
    assert np.percentile(ratios, 95) <= 2.5  # so that there is room for what clients and networks add
    assert np.mean(times) <= 5  # 2.1 seconds of which are reading


def guessing(answers, guessed):
    """What a step takes that goes on with some answers and reads some guessed tokens for each."""
    return 0.01 + 0.001 * answers * (1 + guessed)


@pytest.mark.parametrize("answers", [1, 4, 16])
def test_guesses_and_further_answers_are_no_cost_of_prompts_and_make_no_longer_steps(answers):
    """Steps that only write guess now one token an answer, now three; measured were others beside 8 answers."""
    pace = Pace()
    for number in range(200):
        guessed = 1 + 2 * (number % 3 == 0)
        tokens = pace.prompt_tokens(8, 8 * (1 + guessed), 1) if number % 2 else 0
        pace.note(guessing(8, guessed) + 0.001 * tokens, 8, 8 * (1 + guessed), tokens)
    usual = guessing(answers, 1.5)
    for guessed in (0, 1, 3):
        tokens = pace.prompt_tokens(answers, answers * (1 + guessed), 1)
        step = guessing(answers, guessed) + 0.001 * tokens
        assert step <= max(1.15 * MOST_STRETCH * usual, guessing(answers, guessed) + 0.001 * LEAST_TOKENS)
        assert step >= 0.75 * MOST_STRETCH * usual or tokens >= 64
