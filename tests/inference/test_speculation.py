"""Guesses of how a request goes on: what they are, and how long they are where they pay."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thimble.backends.torch.session import TorchSession
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.inference.speculation import FIRST_COST, MOST_DRAFTED, PROBE_EVERY, Drafter, Speculation, TokenCost
from thimble.models.base import open_base

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf"
FREE = 0.0


def test_what_followed_before_is_guessed_to_follow_again():
    assert Drafter([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4]).draft(FREE, most=3) == [5, 6, 7]


def test_the_longer_agreement_counts_more_and_the_latest_one_most():
    history = [9, 1, 2, 3, 4, 50, 0, 3, 4, 60, 9, 1, 2, 3, 4]
    assert Drafter(history).draft(FREE, most=1) == [50]
    assert Drafter([3, 4, 50, 3, 4, 60, 8, 3, 4]).draft(FREE, most=1) == [60]


def test_a_guess_goes_on_into_itself():
    assert Drafter([7, 1, 2, 1, 2, 1, 2]).draft(FREE, most=5) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("history", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5, 6]])
def test_nothing_is_guessed_of_what_is_new(history):
    assert Drafter(history).draft(FREE) == []


def test_tokens_that_are_added_one_by_one_are_known_as_well():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, 200).tolist()
    whole, parts = Drafter(tokens), Drafter(tokens[:50])
    for token in tokens[50:]:
        parts.add([token])
    assert whole.draft(FREE) == parts.draft(FREE) != []


def test_a_guess_is_longest_where_tokens_are_free_and_none_where_they_cost_all():
    drafter = Drafter([1, 2] * 20)
    drafter.note(8, 8)
    assert len(drafter.draft(FREE)) == MOST_DRAFTED
    lengths = [len(drafter.draft(cost)) for cost in (0.0, 0.05, 0.2, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 0


def test_guesses_that_are_wrong_become_short_and_end_and_are_tried_again_much_later():
    drafter = Drafter([1, 2] * 20)
    for _ in range(20):
        drafter.note(4, 0)
    assert drafter.draft(FIRST_COST) == []
    drafter.add([1, 2] * (PROBE_EVERY // 2))
    assert len(drafter.draft(FIRST_COST)) == 1
    for _ in range(20):
        drafter.note(1, 1)
    assert len(drafter.draft(FIRST_COST)) > 1


def test_beside_many_requests_a_guess_has_to_pay_for_all_of_them():
    drafter = Drafter([1, 2] * 20)
    assert len(drafter.draft(0.1, rows=1)) > len(drafter.draft(0.1, rows=16)) == 0


def test_the_cost_of_a_token_is_found_from_times():
    cost, rng = TokenCost(), np.random.default_rng(0)
    assert cost.share(1) == FIRST_COST
    for _ in range(200):
        tokens = int(rng.integers(1, 10))
        cost.note(tokens, (4.0 + 0.5 * tokens) * rng.uniform(0.99, 1.01))
    assert cost.share(1) == pytest.approx(0.5 / 4.5, rel=0.15)
    assert cost.share(8) == pytest.approx(0.5 / 8, rel=0.15)


def test_a_cost_is_never_negative_and_follows_what_changes():
    cost = TokenCost()
    for tokens in (1, 5) * 20:
        cost.note(tokens, 2.0 - 0.1 * tokens)
    assert cost.share(1) == 0
    for tokens in (1, 5) * 40:
        cost.note(tokens, 1.0 * tokens)
    assert cost.share(1) == pytest.approx(1.0, rel=0.05)


# ---- in the engine ---------------------------------------------------------------------------------------------------

NOTE = Speculation.note
PROMPTS = [
    np.array(([*range(5, 5 + length), 7 + length] * 9)[: 8 + 3 * length], np.int32) for length in (1, 2, 3, 5, 7)
]  # that repeat themselves, so that there is something to guess


@pytest.fixture(scope="module", params=["float", "int8"])
def session(request):
    return TorchSession(open_base(GGUF / "llama_wide_mixed.gguf"), "fp32", "file", decode=request.param)


def answers(session, most_guessed, options, monkeypatch, slots=3):
    """Answers to all prompts, several at a time, and how many guessed tokens were right."""
    right = []
    monkeypatch.setattr(TorchSession, "independent_tokens", property(lambda self: most_guessed))
    monkeypatch.setattr(Speculation, "note", lambda self, *what: (NOTE(self, *what), right.append(what[2])) and None)
    engine, base = Engine(session, max_slots=slots), session.load(None)
    found = {engine.add(prompt, replace(options, seed=seed), base): [] for seed, prompt in enumerate(PROMPTS)}
    while not engine.is_idle:
        for token in engine.step():
            found[token.request].append((token.id, token.finish))
    return list(found.values()), sum(right)


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(40),
        SamplingOptions(40, stop_ids=frozenset(range(60, 90))),
        SamplingOptions(40, temperature=0.6, top_p=0.9),
        SamplingOptions(40, temperature=1.0, top_k=4),
    ],
    ids=["greedy", "stops", "sampled", "top_k"],
)
def test_answers_are_the_same_with_and_without_guesses(session, options, slots, monkeypatch):
    with_guesses, _ = answers(session, 16, options, monkeypatch, slots)
    without, right = answers(session, 0, options, monkeypatch, slots)
    assert with_guesses == without
    assert right == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_are_taken_as_far_as_they_are_right(session, temperature, monkeypatch):
    """Guesses by an oracle that errs now and then: all of them right, some, the first one wrong."""
    options = SamplingOptions(40, temperature=temperature, stop_ids=frozenset(range(100, 104)))
    without, _ = answers(session, 0, options, monkeypatch)
    known = [[*prompt, *(token for token, _ in answer)] for prompt, answer in zip(PROMPTS, without, strict=True)]
    rng = np.random.default_rng(0)

    def oracle(self, cost, rows=1, most=0):
        whole = next(tokens for tokens in known if tokens[: len(self.history)] == self.history)
        guess = [token or 0 for token in whole[len(self.history) :][:most]][: int(rng.integers(0, 6))]
        return [token if rng.random() < 0.8 else 7 for token in guess]

    with monkeypatch.context() as patch:
        patch.setattr(Drafter, "draft", oracle)
        found, right = answers(session, 16, options, patch)
    assert found == without
    assert right > sum(map(len, without)) / 4
