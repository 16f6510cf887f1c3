"""Attention over packed rows, across tiles and padding, against float64 with masks: values and gradients."""

import numpy as np
import pytest
import torch

from thimble.backends.torch.attention import Angles, Asked, AttentionSpec, attend
from thimble.backends.torch.memory import Memory
from thimble.core.sizes import TILE
from thimble.data.prefixes import Segment, whole_rows

HEADS, KV_HEADS, DIM = 6, 2, 16
STARTS = [0, TILE + 70, TILE + 75, 2 * TILE + 140, 3 * TILE + 141]  # a row of five tokens, one of a tile + 1
TOKENS = STARTS[-1] + 6  # six of padding


def make_input(dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * DIM, generator=generator).to(dtype)
    grad = torch.randn(TOKENS, HEADS * DIM, generator=generator).to(dtype)
    turned = torch.rand(TOKENS, DIM // 2, generator=generator) * 6
    qkv[STARTS[-1] :] = 0
    grad[STARTS[-1] :] = 0
    return qkv, grad, Angles(turned.cos(), turned.sin())


def turn(x, angles):
    """Rotate heads (tokens, heads, dim)."""
    cos, sin = angles.cos.double()[:, None], angles.sin.double()[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def reference(qkv, spec, angles):
    q, k, v = qkv.view(TOKENS, -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
    q, k = turn(q, angles), turn(k, angles)
    k, v = (x.repeat_interleave(spec.group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    row = torch.from_numpy(np.searchsorted(STARTS, np.arange(TOKENS), side="right"))
    place = torch.arange(TOKENS)
    ago = place[:, None] - place[None]
    seen = (row[:, None] == row[None]) & (ago >= 0) & (ago < (spec.window or TOKENS))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).reshape(TOKENS, -1)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (None, 5.0), (TILE + 3, 5.0)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_values_and_gradients_are_those_of_float64(window, softcap, dtype, bound):
    spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5, window, softcap)
    qkv, grad, angles = make_input(dtype)
    exact = qkv.double().requires_grad_()
    expected = reference(exact, spec, angles)
    expected.backward(grad.double())
    qkv.requires_grad_()
    found = attend(qkv, spec, angles, whole_rows(STARTS), Memory(dtype))
    found.backward(grad)
    real = slice(0, STARTS[-1])
    assert (found[real].double() - expected[real]).norm() < bound * expected[real].norm()
    assert (qkv.grad[real].double() - exact.grad[real]).norm() < bound * exact.grad[real].norm()
    assert not qkv.grad[STARTS[-1] :].any()


def test_without_a_backward_pass_the_values_are_the_same():
    spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5)
    qkv, _, angles = make_input(torch.float32)
    kept = attend(qkv.clone().requires_grad_(), spec, angles, whole_rows(STARTS), Memory(torch.float32))
    with torch.no_grad():
        assert torch.equal(attend(qkv, spec, angles, whole_rows(STARTS), Memory(torch.float32)), kept)


PREFIX, OWN = TILE + 40, (TILE + 9, 130, 1)  # tokens of a shared prefix, and of the rows that begin with it


@pytest.mark.parametrize("is_all", [True, False], ids=["all", "some"])
@pytest.mark.parametrize("window", [None, 200, TILE + 100])
def test_a_shared_prefix_does_what_its_copies_do(window, is_all):
    """Three rows with copies of a prefix against one pack with the prefix in it once: some or all of its tokens."""
    spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5, window)
    generator = torch.Generator().manual_seed(0)
    ends = np.cumsum([PREFIX, *OWN])
    segments = [Segment(0, PREFIX), *(Segment(a, b, 0, PREFIX) for a, b in zip(ends, ends[1:], strict=False))]
    of_copies = np.concatenate([[*range(PREFIX), *range(one.start, one.end)] for one in segments[1:]])
    turned = torch.from_numpy(np.concatenate([np.arange(one.position, one.length) for one in segments]))
    turned = turned[:, None] / 50 ** torch.linspace(0, 1, DIM // 2)
    starts = [0, *np.cumsum([PREFIX + own for own in OWN])]
    qkv = torch.randn(ends[-1], (HEADS + 2 * KV_HEADS) * DIM, generator=generator)
    places = np.arange(ends[-1]) if is_all else np.array([3, PREFIX - 1, PREFIX, PREFIX + TILE + 8, ends[-1] - 1])
    weights = torch.randn(len(places), HEADS * DIM, generator=generator)

    shared, copied = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    asked = None if is_all else Asked(places, 8)
    one = attend(shared, spec, Angles(turned.cos(), turned.sin()), segments, Memory(torch.float32), asked)
    (one[: len(places)] * weights).sum().backward()
    turned = turned[of_copies]
    copies = attend(
        copied[of_copies], spec, Angles(turned.cos(), turned.sin()), whole_rows(starts), Memory(torch.float32)
    )
    found = np.array([np.flatnonzero(of_copies == place)[0] for place in places])  # the first of the copies
    (copies[found] * weights).sum().backward()
    assert (one[: len(places)] - copies[found]).norm() < 1e-6 * one.norm()
    assert (shared.grad - copied.grad).norm() < 1e-6 * shared.grad.norm()
