"""Choosing tokens: the shares asked for, the same stream for the same seed."""

import numpy as np
import pytest

from thimble.inference.sampling import NothingAllowedError, Sampler, SamplingOptions, log_probs

LOGITS = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 3


def draw(count=4000, **options):
    sampler = Sampler(SamplingOptions(1, **options))
    return np.array([sampler.choose(LOGITS) for _ in range(count)])


def test_temperature_zero_takes_the_likeliest():
    assert set(draw(3)) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_softmax_says(temperature):
    weights = np.exp(LOGITS / temperature)
    expected, found = weights / weights.sum(), np.bincount(draw(temperature=temperature), minlength=len(LOGITS)) / 4000
    likely = expected > 0.01
    np.testing.assert_allclose(found[likely], expected[likely], atol=0.03)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
def test_only_the_likeliest_that_make_up_top_p_are_drawn(top_p):
    shares = np.sort(np.exp(LOGITS) / np.exp(LOGITS).sum())[::-1]
    allowed = np.argsort(-LOGITS)[: np.searchsorted(np.cumsum(shares), top_p, "right") + 1]
    assert set(draw(temperature=1.0, top_p=top_p)) <= set(allowed.tolist())
    assert len(set(draw(temperature=1.0, top_p=1e-9))) == 1


def test_a_flat_distribution_is_looked_at_as_far_as_top_p_needs():
    sampler = Sampler(SamplingOptions(1, temperature=1.0, top_p=0.9))
    drawn = {sampler.choose(np.zeros(2000, np.float32)) for _ in range(4000)}
    assert 1500 < len(drawn) <= 1801


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    assert (draw(50, temperature=1.0, seed=7) == draw(50, temperature=1.0, seed=7)).all()
    assert (draw(50, temperature=1.0, seed=7) != draw(50, temperature=1.0, seed=8)).any()


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 5}, {"top_k": 1}, {"top_k": 2000}, {"min_p": 0.2}, {"top_k": 40, "top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.05}, {"top_k": 20, "top_p": 0.9, "min_p": 0.1}, {"top_k": 300, "top_p": 0.999},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_limits_leave_what_transformers_leaves(limits, temperature):
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    for name, kind in kinds.items():
        warpers += [kind(limits[name])] if name in limits else []
    shares = warpers(torch.zeros(1, 1, dtype=torch.long), torch.tensor(LOGITS)[None]).softmax(-1)[0].numpy()
    found = np.bincount(draw(temperature=temperature, **limits), minlength=len(LOGITS)) / 4000
    assert (found[shares == 0] == 0).all()
    np.testing.assert_allclose(found[shares > 0.01], shares[shares > 0.01], atol=0.03)


PROMPT, ANSWER = np.array([3, 7, 7, 20, 500], np.int32), [7, 41, 41, 999]


def adjusted(**options):
    """The logits that a token is chosen by after an answer has begun, as a sampler sees them."""
    sampler = Sampler(SamplingOptions(9, **options), PROMPT)
    for token in ANSWER:
        forced = np.full_like(LOGITS, -1e4)
        forced[token] = 1e4
        assert sampler.choose(forced) == token
    return sampler._adjusted(LOGITS)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_a_repetition_penalty_does_what_that_of_transformers_does(penalty):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = torch.tensor([*PROMPT.tolist(), *ANSWER])[None]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(LOGITS)[None])[0].numpy()
    np.testing.assert_allclose(adjusted(repetition_penalty=penalty), expected, rtol=1e-6)


def test_a_logit_bias_does_what_that_of_transformers_does():
    import torch
    from transformers import SequenceBiasLogitsProcessor

    bias = {0: 2.5, 7: -100.0, 999: 1.0}
    processor = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = processor(torch.tensor([ANSWER]), torch.tensor(LOGITS)[None])[0].numpy()
    np.testing.assert_allclose(adjusted(logit_bias=bias), expected, rtol=1e-6)


def test_presence_and_frequency_penalties_are_those_of_the_openai_api():
    """mu[j] - c[j] alpha_frequency - (c[j] > 0) alpha_presence, c counting the answer and not the prompt."""
    counts = np.bincount(ANSWER, minlength=len(LOGITS))
    expected = LOGITS - 0.5 * counts - 1.25 * (counts > 0)
    np.testing.assert_allclose(adjusted(presence_penalty=1.25, frequency_penalty=0.5), expected, rtol=1e-6)


def test_without_options_logits_are_not_even_copied():
    assert adjusted() is LOGITS


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-308, 5e-324, 1e308])
def test_any_temperature_draws_without_a_warning(temperature):
    tokens = {Sampler(SamplingOptions(9, temperature=temperature, seed=seed)).choose(LOGITS) for seed in range(20)}
    assert tokens == {int(LOGITS.argmax())} or temperature > 1


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 3.0, "top_k": 50, "top_p": 0.9}])
def test_only_what_a_mask_allows_is_chosen_and_it_is_told_the_answer_so_far(options):
    told, allowed = [], np.zeros(1000, bool)
    allowed[[5, 17, 300]] = True

    def mask(ids):
        told.append(list(ids))
        return None if len(ids) == 2 else allowed

    sampler = Sampler(SamplingOptions(9, mask=mask, **options))
    chosen = [sampler.choose(LOGITS) for _ in range(200)]
    assert set(chosen[:2] + chosen[3:]) <= {5, 17, 300}
    assert told == [chosen[:place] for place in range(200)]
    if not options:
        assert chosen[2] == LOGITS.argmax()


def test_a_bias_cannot_bring_back_what_a_mask_forbids():
    allowed = np.arange(1000) == 12
    sampler = Sampler(SamplingOptions(9, mask=lambda ids: allowed, logit_bias={11: 100.0}))
    assert sampler.choose(LOGITS) == 12


def test_a_mask_shorter_than_the_head_forbids_what_pads_it():
    logits = np.where(np.arange(1000) == 999, np.float32(50), LOGITS)
    sampler = Sampler(SamplingOptions(9, mask=lambda ids: np.ones(990, bool)))
    assert sampler.choose(logits) == LOGITS[:990].argmax()


def test_a_mask_that_allows_nothing_is_told():
    sampler = Sampler(SamplingOptions(9, mask=lambda ids: np.zeros(1000, bool)))
    with pytest.raises(NothingAllowedError):
        sampler.choose(LOGITS)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_log_probabilities_are_those_of_a_softmax_with_the_likeliest_first(count):
    import torch

    expected = torch.tensor(LOGITS).double().log_softmax(-1).numpy()
    found = log_probs(LOGITS, 11, count)
    assert found.chosen == pytest.approx(expected[11], abs=1e-5)
    assert [token for token, _ in found.top] == np.argsort(-LOGITS)[:count].tolist()
    np.testing.assert_allclose([value for _, value in found.top], np.sort(expected)[::-1][:count], atol=1e-5)
