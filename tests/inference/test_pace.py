"""How much is read beside answers: as much as stretches a step no more than it may."""

import pytest

from thimble.inference.pace import LEAST_TOKENS, MOST_STRETCH, Pace


def run(pace, steps, writing=0.03, token=0.001):
    """Steps of an engine that takes so many seconds to write and to read a token of a prompt."""
    for number in range(steps):
        tokens = pace.prompt_tokens if number % 2 else 0
        pace.note(writing + token * tokens, tokens)


@pytest.mark.parametrize(("writing", "token"), [(0.03, 0.001), (0.2, 0.001), (0.01, 0.0001), (0.02, 0.01)])
def test_a_step_is_stretched_no_more_than_it_may(writing, token):
    pace = Pace()
    run(pace, 40, writing, token)
    tokens = pace.prompt_tokens
    allowed = (MOST_STRETCH - 1) * writing / token
    assert tokens % LEAST_TOKENS == 0
    assert tokens <= max(LEAST_TOKENS, 1.05 * allowed)
    assert tokens >= min(allowed * 0.9 - LEAST_TOKENS, tokens)


def test_a_machine_that_becomes_slower_is_noticed():
    pace = Pace()
    run(pace, 40)
    before = pace.prompt_tokens
    run(pace, 60, token=0.004)
    assert pace.prompt_tokens <= before / 2


def test_there_is_always_some_progress():
    pace = Pace()
    run(pace, 40, writing=0.001, token=10)
    assert pace.prompt_tokens == LEAST_TOKENS
