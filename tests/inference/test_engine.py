"""Requests to tokens: whatever runs beside it, a request gets what it would get alone."""

from pathlib import Path

import numpy as np
import pytest

from families import make_hf_folder
from samples import IDS, RANDOM, make_adapter
from thimble.backends.torch.kv_cache import BLOCK_TOKENS, KvCache
from thimble.backends.torch.session import TorchSession
from thimble.core.metrics import LossSum
from thimble.data.batches import pack
from thimble.data.encode import Row
from thimble.errors import DataError
from thimble.inference.batch import Request, answer_all
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

TINY = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"
NINE = SamplingOptions(9)


@pytest.fixture(scope="module")
def session():
    return TorchSession(open_base(TINY), "fp32", "file")


@pytest.fixture(scope="module")
def adapters(session):
    base = open_base(TINY)
    return [session.load(None), session.load(make_adapter(base)), session.load(make_adapter(base, rank=2))]


def alone(session, prompt, adapter, options=NINE):
    """The greedy answer by reading everything anew for each token."""
    ids, answer = list(prompt), []
    while len(answer) < options.max_new_tokens:
        token = int(session.logits(np.array(ids, np.int32), adapter)[-1].argmax())
        if token in options.stop_ids:
            break
        answer.append(token)
        ids.append(token)
    return answer


def run(engine, answers=None, losses=None):
    """Steps until nothing is left; answers by request."""
    answers = {} if answers is None else answers
    while not engine.is_idle:
        for token in engine.step():
            answers.setdefault(token.request, [])
            answers[token.request] += [] if token.id is None else [token.id]
            if losses is not None and token.loss:
                losses.append(token.loss)
    return answers


@pytest.mark.parametrize("is_interactive", [True, False])
@pytest.mark.parametrize("prefill_tokens", [4, 1024])
def test_requests_with_other_adapters_beside_them_get_what_they_get_alone(
    session, adapters, is_interactive, prefill_tokens
):
    prompts = [IDS[: 3 + number % 11] + number % 2 for number in range(21)]
    engine = Engine(
        session, num_workers=2, max_slots=13, prefill_tokens=prefill_tokens, is_interactive=is_interactive
    )  # fmt: skip
    options = [SamplingOptions(3 + number % 7, frozenset(range(0, 300, 7))) for number in range(len(prompts))]
    numbers = [
        engine.add(prompt, option, adapters[number % 3])
        for number, (prompt, option) in enumerate(zip(prompts, options, strict=True))
    ]
    answers = run(engine)
    for number, (prompt, option) in enumerate(zip(prompts, options, strict=True)):
        assert answers[numbers[number]] == alone(session, prompt, adapters[number % 3], option), number


@pytest.mark.parametrize(
    "name", ["llama_tied", "gemma2", "gemma3", "qwen3", "smollm3", "phi3_partial_rope", "phi3_longrope"]
)
@pytest.mark.parametrize("prefill_tokens", [5, 1024])
def test_answers_of_every_family_equal_reading_everything_again(name, prefill_tokens, tmp_path):
    session = TorchSession(open_base(make_hf_folder(name, tmp_path)))
    bare, ids = session.load(None), RANDOM.integers(3, 290, 40).astype(np.int32)  # longer than every window
    engine = Engine(session, prefill_tokens=prefill_tokens)
    prompts = [ids[:7], ids[7:12], ids[12:29]]
    numbers = [engine.add(prompt, NINE, bare) for prompt in prompts]
    answers = run(engine)
    for prompt, answer in zip(prompts, map(answers.get, numbers), strict=True):
        for place in range(len(answer)):
            before = np.array([*prompt, *answer[:place]], np.int32)
            if name == "phi3_longrope":  # a request that may grow long turns as a long one from its first token
                continue
            logits = session.logits(before)[-1]
            assert logits[answer[place]] > logits.max() - 1e-4, (place, int(logits.argmax()))
    assert [len(answer) for answer in answers.values()] == [9, 9, 9]


def test_an_answer_goes_on_while_a_long_prompt_is_read(session, adapters):
    engine = Engine(session, prefill_tokens=4)
    first = engine.add(IDS[:3], SamplingOptions(30), adapters[0])
    engine.step()
    engine.add(IDS[:40], NINE, adapters[1])
    for _ in range(5):  # the prompt takes ten steps
        assert [token.request for token in engine.step()] == [first]


def test_prompts_come_first_where_nobody_waits(session, adapters):
    engine = Engine(session, prefill_tokens=4, is_interactive=False)
    engine.add(IDS[:3], SamplingOptions(30), adapters[0])
    engine.add(IDS[:40], NINE, adapters[1])
    first = [token for _ in range(10) for token in engine.step()]
    assert len(first) == 1  # the token that reading its prompt gave


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_request_that_is_cancelled_gets_nothing_more_and_changes_nothing(session, adapters, after):
    engine = Engine(session, prefill_tokens=8)
    numbers = [engine.add(IDS[:n], NINE, adapters[0]) for n in (5, 20, 9)]
    answers = {}
    for _ in range(after):
        for token in engine.step():
            answers.setdefault(token.request, []).append(token.id)
    engine.cancel(numbers[1])
    had = list(answers.get(numbers[1], []))
    run(engine, answers)
    assert answers.get(numbers[1], []) == had
    assert answers[numbers[0]] == alone(session, IDS[:5], adapters[0])
    assert answers[numbers[2]] == alone(session, IDS[:9], adapters[0])


@pytest.mark.parametrize("prefill_tokens", [6, 40])
def test_rows_are_read_once_for_their_loss_and_their_answer(session, adapters, prefill_tokens):
    rows = [Row(IDS[a:b], np.roll(IDS, -1)[a:b], "") for a, b in ((0, 12), (5, 30), (20, 29), (7, 40))]
    engine = Engine(session, num_workers=2, prefill_tokens=prefill_tokens, is_interactive=False)
    numbers = [
        engine.add(row.ids[:prompt], NINE, adapters[1], (row.ids, row.labels))
        for row, prompt in zip(rows, (7, 11, 3, 30), strict=True)
    ]
    losses = []
    answers = run(engine, losses=losses)
    loss = sum(losses, LossSum())
    expected = sum(session.losses(adapters[1], [pack([row]) for row in rows], ExecutionPlan("file")), LossSum())
    assert loss.tokens == expected.tokens
    assert loss.nats == pytest.approx(expected.nats, rel=1e-5)
    for row, prompt, number in zip(rows, (7, 11, 3, 30), numbers, strict=True):
        assert answers[number] == alone(session, row.ids[:prompt], adapters[1])


def test_the_cache_holds_no_more_tokens_than_it_may(session, adapters, monkeypatch):
    asked, reserve = [], KvCache.reserve

    def recorded(self, blocks):
        asked.append(blocks)
        reserve(self, blocks)

    monkeypatch.setattr(KvCache, "reserve", recorded)
    engine = Engine(session, cache_tokens=3 * BLOCK_TOKENS, is_interactive=False)
    for _ in range(9):
        engine.add(IDS[:11], NINE, adapters[0])
    answers = run(engine)
    assert max(asked) == 3  # of twenty tokens each
    assert len(answers) == 9
    assert all(answer == alone(session, IDS[:11], adapters[0]) for answer in answers.values())


def test_a_single_request_is_run_whatever_it_needs(session, adapters):
    engine = Engine(session, cache_tokens=BLOCK_TOKENS, keeps_prefixes=True)
    for _ in range(2):
        number = engine.add(np.resize(IDS, 70), NINE, adapters[1])
        assert run(engine)[number] == alone(session, np.resize(IDS, 70), adapters[1])


def test_no_request_leaves_the_context(session, adapters):
    engine = Engine(session)
    with pytest.raises(DataError, match="the prompt has 128 tokens: the context of the base is 128"):
        engine.add(np.resize(IDS, 128), NINE, adapters[0])
    assert engine.is_idle
    numbers = [engine.add(np.resize(IDS, tokens), NINE, adapters[0]) for tokens in (127, 120, 119)]
    ends = {}
    answers: dict[int, list[int]] = {}
    while not engine.is_idle:
        for token in engine.step():
            answers.setdefault(token.request, []).append(token.id)
            ends |= {token.request: token.finish} if token.finish else {}
    assert [len(answers[number]) for number in numbers] == [1, 8, 9]
    assert set(ends.values()) == {"length"}


def test_a_batch_is_fed_as_slots_fall_free_and_gives_every_request_its_own_answer(session, adapters, monkeypatch):
    monkeypatch.setattr("thimble.inference.batch.MOST_KNOWN", 3)
    prompts = [IDS[: 3 + number % 5] for number in range(12)]
    requests = (Request(100 + n, prompt, SamplingOptions(2 + n % 4)) for n, prompt in enumerate(prompts))
    engine, most, written = Engine(session, is_interactive=False), 0, {}
    for ended in answer_all(engine, requests, adapters[1]):
        most = max(most, len(engine._waiting) + len(engine._reading) + len(engine._writing) + len(ended))
        written |= {key: ids for key, ids, _ in ended}
    assert most == 3
    assert sorted(written) == list(range(100, 112))
    for number, prompt in enumerate(prompts):
        assert written[100 + number] == alone(session, prompt, adapters[1], SamplingOptions(2 + number % 4))


def shares_of(session, ids, adapter):
    """Log-probabilities after each token, float64 (T, vocabulary)."""
    logits = session.logits(np.array(ids, np.int32), adapter).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("is_interactive", [True, False])
@pytest.mark.parametrize("keeps_prefixes", [True, False])
def test_log_probabilities_of_prompts_are_those_of_reading_them_alone(
    session, adapters, is_interactive, keeps_prefixes, monkeypatch
):
    """Beside others, in several parts, again where an earlier request had read them, and before any option."""
    monkeypatch.setattr("thimble.inference.engine.TOLD_TOKENS", 16)
    engine = Engine(session, 2, 4, is_interactive=is_interactive, keeps_prefixes=keeps_prefixes)
    ids = RANDOM.integers(3, 290, 70).astype(np.int32)
    prompts = [ids, ids[:1], ids, ids[:40], ids[:2], ids, ids[30:]]
    told = SamplingOptions(3, temperature=0.5, seed=1, logit_bias={7: 100.0}, logprobs=2, prompt_logprobs=2)
    kinds = [SamplingOptions(5), told, told, told, told, told, SamplingOptions(5, logprobs=0)]
    numbers = [
        engine.add(prompt, options, adapters[number % 3])
        for number, (prompt, options) in enumerate(zip(prompts, kinds, strict=True))
    ]
    tokens = []
    while not engine.is_idle:
        tokens += engine.step()
    for place, (number, prompt, options) in enumerate(zip(numbers, prompts, kinds, strict=True)):
        own = [token for token in tokens if token.request == number]
        assert [token.prompt is not None for token in own] == [options is told] + [False] * (len(own) - 1)
        if options is not told:
            continue
        shares = shares_of(session, prompt, adapters[place % 3])
        assert len(own[0].prompt) == len(prompt) - 1
        for row, token, found in zip(shares, prompt[1:], own[0].prompt, strict=False):
            assert found.chosen == pytest.approx(row[token], abs=1e-4)
            assert [value for _, value in found.top] == pytest.approx(np.sort(row)[::-1][:2], abs=1e-4)
        assert own[0].id == 7  # by its bias
        assert own[0].logprobs.chosen == pytest.approx(shares[-1][7], abs=1e-4)


def test_a_token_that_ends_an_answer_is_told_with_its_log_probability(session, adapters):
    engine = Engine(session)
    engine.add(IDS[:5], SamplingOptions(3, stop_ids=frozenset(range(320)), logprobs=0), adapters[0])
    (token,) = engine.step()
    shares = shares_of(session, IDS[:5], adapters[0])[-1]
    assert (token.id, token.finish, token.stopped_by) == (None, "stop", int(shares.argmax()))
    assert token.logprobs.chosen == pytest.approx(shares.max(), abs=1e-4)
