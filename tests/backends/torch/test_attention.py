"""Attention over packed rows, across tiles and padding, against float64 with masks: values and gradients."""

import numpy as np
import pytest
import torch

from thimble.backends.torch.attention import Angles, AttentionSpec, attend
from thimble.backends.torch.memory import Memory
from thimble.core.sizes import TILE

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
    found = attend(qkv, spec, angles, STARTS, Memory(dtype))
    found.backward(grad)
    real = slice(0, STARTS[-1])
    assert (found[real].double() - expected[real]).norm() < bound * expected[real].norm()
    assert (qkv.grad[real].double() - exact.grad[real]).norm() < bound * exact.grad[real].norm()
    assert not qkv.grad[STARTS[-1] :].any()


def test_without_a_backward_pass_the_values_are_the_same():
    spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5)
    qkv, _, angles = make_input(torch.float32)
    kept = attend(qkv.clone().requires_grad_(), spec, angles, STARTS, Memory(torch.float32))
    with torch.no_grad():
        assert torch.equal(attend(qkv, spec, angles, STARTS, Memory(torch.float32)), kept)
