"""Beginnings in common are read once, and whatever was kept, a request gets what it gets alone in a cold engine."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samples import make_adapter
from thimble.backends.torch.kv_cache import BLOCK_TOKENS
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import open_base

TINY = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"
TEXT = np.random.default_rng(8).integers(3, 290, 100).astype(np.int32)
FOUR = SamplingOptions(4)


@pytest.fixture(scope="module")
def session():
    return TorchSession(open_base(TINY), "fp32", "dense")


@pytest.fixture(scope="module")
def adapter():
    return make_adapter(open_base(TINY))


def answers(engine, *requests, options=FOUR):
    """The answers to requests (prompt, adapter) that come together, and their tokens from the cache."""
    numbers = [engine.add(prompt, options, adapter) for prompt, adapter in requests]
    written, cached = {number: [] for number in numbers}, {}
    while not engine.is_idle:
        for token in engine.step():
            written[token.request] += [] if token.id is None else [token.id]
            if token.finish:
                cached[token.request] = token.usage.cached_tokens
                assert token.usage.completion_tokens == len(written[token.request])
    return [written[number] for number in numbers], [cached[number] for number in numbers]


def cold(session, prompt, adapter, options=FOUR):
    (answer,), _ = answers(Engine(session), (prompt, adapter), options=options)
    return answer


def test_a_prompt_that_was_read_is_not_read_again_but_for_its_last_token(session):
    engine, bare = Engine(session, cache_tokens=4000, keeps_prefixes=True), session.load(None)
    first, none = answers(engine, (TEXT, bare))
    again, cached = answers(engine, (TEXT, bare))
    assert none == [0]
    assert cached == [len(TEXT) - 1]
    assert first == again == [cold(session, TEXT, bare)]


def test_whole_blocks_and_the_beginning_of_the_next_are_taken_over(session):
    engine, bare = Engine(session, cache_tokens=4000, keeps_prefixes=True), session.load(None)
    answers(engine, (TEXT, bare))
    for common in (5, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 9, 2 * BLOCK_TOKENS):
        other = np.concatenate([TEXT[:common], (TEXT[common:] + 1) % 290])
        found, cached = answers(engine, (other, bare))
        assert cached == [common]
        assert found == [cold(session, other, bare)]
    found, cached = answers(engine, (TEXT, bare))  # the blocks that were copied are what they were
    assert (found, cached) == ([cold(session, TEXT, bare)], [len(TEXT) - 1])


def test_the_next_turn_of_a_conversation_takes_over_the_answer_too(session):
    engine, bare = Engine(session, cache_tokens=4000, keeps_prefixes=True), session.load(None)
    (answer,), _ = answers(engine, (TEXT[:50], bare), options=SamplingOptions(20))
    turn = np.array([*TEXT[:50], *answer, 7, 8, 9], np.int32)
    found, cached = answers(engine, (turn, bare))
    assert cached == [50 + 20 - 1]  # its last token was written, and not read
    assert found == [cold(session, turn, bare)]


def test_nothing_is_shared_between_adapters_and_all_of_it_between_equal_ones(session, adapter):
    engine = Engine(session, cache_tokens=4000, keeps_prefixes=True)
    path, factors = next(iter(adapter.layers.items()))
    rescaled = replace(adapter, layers={path: replace(f, scale=1.0) for path, f in adapter.layers.items()})
    others = [None, Adapter({path: factors}), rescaled]
    answers(engine, (TEXT, session.load(adapter)))
    for other in others:
        active = session.load(other)
        found, cached = answers(engine, (TEXT, active))
        assert cached == [0]
        assert found == [cold(session, TEXT, active)]
    again = session.load(replace(adapter, notes={"name": "another"}))  # loaded anew, by whatever name
    assert answers(engine, (TEXT, again)) == ([cold(session, TEXT, again)], [len(TEXT) - 1])


def test_requests_that_come_together_and_begin_alike_read_it_once(session, adapter):
    active, asked = session.load(adapter), []

    class Counting(TorchSession):
        def forward(self, passes, cache, num_workers):
            asked.extend(len(one.ids) for one in passes)
            return super().forward(passes, cache, num_workers)

    counting = Counting(open_base(TINY), "fp32", "dense")
    engine = Engine(counting, cache_tokens=4000, keeps_prefixes=True, prefill_tokens=BLOCK_TOKENS)
    prompts = [np.concatenate([TEXT[:96], TEXT[n : n + 3]]) for n in range(6)]
    found, cached = answers(engine, *((prompt, active) for prompt in prompts), options=SamplingOptions(1))
    assert sum(asked) < 96 + 6 * 10
    assert sorted(cached)[1] == 96
    assert found == [cold(session, prompt, active, SamplingOptions(1)) for prompt in prompts]


def test_what_is_kept_makes_room_and_then_is_read_again(session):
    engine, bare = Engine(session, keeps_prefixes=True, cache_tokens=5 * BLOCK_TOKENS), session.load(None)
    other = TEXT[::-1].copy()
    for prompt, expected in ((TEXT, 0), (other, 0), (TEXT, 0)):
        found, cached = answers(engine, (prompt, bare))
        assert found == [cold(session, prompt, bare)]
        assert cached[0] < len(TEXT) - 1 or expected


def test_what_is_kept_takes_no_more_than_its_share_and_what_is_used_most_stays(session):
    """As if a thousand customers came once each, beside one who comes all the time."""
    engine = Engine(session, cache_tokens=4000, keeps_prefixes=True, kept_tokens=10 * BLOCK_TOKENS)
    bare, regular = session.load(None), TEXT[: 2 * BLOCK_TOKENS + 1]
    answers(engine, (regular, bare))
    for number in range(40):
        answers(engine, (np.roll(TEXT, number + 1), bare))
        found, cached = answers(engine, (regular, bare))
        assert cached == [len(regular) - 1]
        assert engine.load.unused_tokens <= 10 * BLOCK_TOKENS
    assert found == [cold(session, regular, bare)]
    assert engine._blocks.count <= 10 + -(-(len(TEXT) + FOUR.max_new_tokens) // BLOCK_TOKENS)


def test_what_many_took_at_once_is_given_back_once_all_are_over_and_what_is_kept_stays(session):
    engine, bare = (
        Engine(session, cache_tokens=4000, keeps_prefixes=True, kept_tokens=4 * BLOCK_TOKENS),
        session.load(None),
    )
    given_back, discard = [], engine._cache.discard
    engine._cache.discard = lambda blocks: (given_back.extend(blocks), discard(blocks))
    answers(engine, *((np.roll(TEXT, number), bare) for number in range(6)))
    assert len(given_back) == engine._blocks.count - 4
    (answer,), (cached,) = answers(engine, (np.roll(TEXT, 5), bare))
    assert answer == cold(session, np.roll(TEXT, 5), bare)
    assert cached == len(TEXT) - 1


@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_what_a_cancelled_request_had_read_can_be_used(session, after):
    engine, bare = Engine(session, cache_tokens=4000, keeps_prefixes=True, prefill_tokens=40), session.load(None)
    number = engine.add(TEXT, SamplingOptions(20), bare)
    for _ in range(after):
        engine.step()
    used = engine.load.used_tokens
    assert used
    engine.cancel(number)
    assert engine.load == engine.load._replace(waiting=0, running=0, used_tokens=0)
    assert engine.load.unused_tokens >= min(40 * after, len(TEXT)) - BLOCK_TOKENS
    found, cached = answers(engine, (TEXT, bare))
    assert cached == [min(40 * after, len(TEXT) - 1)]
    assert found == [cold(session, TEXT, bare)]


def test_long_and_short_rotary_embeddings_share_nothing(tmp_path):
    """LongRoPE turns the tokens of a request that may grow long otherwise, from the first one on."""
    base = open_base(TINY.with_name("phi3_longrope.gguf"))
    session = TorchSession(base, "fp32", "dense")
    long_from = next(rope.long_from for rope in base.spec.ropes if rope is not None)
    engine, bare, prompt = (
        Engine(session, cache_tokens=4000, keeps_prefixes=True),
        session.load(None),
        TEXT[: long_from - 8],
    )
    for tokens, expected in ((4, 0), (40, 0), (5, len(prompt) - 1), (41, len(prompt) - 1)):
        options = SamplingOptions(tokens)
        found, cached = answers(engine, (prompt, bare), options=options)
        assert cached == [expected]
        assert found == [cold(session, prompt, bare, options)]
