"""Choosing tokens: the shares asked for, the same stream for the same seed."""

import numpy as np
import pytest

from thimble.inference.sampling import Sampler, SamplingOptions

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
