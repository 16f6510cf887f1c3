"""Compiled elementwise loops against float64: values and gradients."""

import numpy as np
import pytest
import torch

from thimble.backends.torch import fused
from thimble.backends.torch.elementwise import Gated, RmsNorm
from thimble.backends.torch.frozen import as_numpy

ROWS, SIZE = 37, 101
TYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def near(found, expected, bound):
    return float((found.double() - expected).norm() / expected.norm()) < bound


def gradient_of(function, x, grad):
    """Value and gradient in float64."""
    exact = x.detach().double().requires_grad_()
    value = function(exact)
    value.backward(grad.double())
    return value.detach(), exact.grad


@TYPES
def test_normalisation(dtype, bound):
    x, grad = draw(ROWS, SIZE, scale=3).to(dtype), draw(ROWS, SIZE, seed=1).to(dtype)
    norm = RmsNorm(1 + draw(SIZE, seed=2), 1e-5)
    value, slope = gradient_of(
        lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double(), x, grad
    )
    assert near(norm.forward(x), value, bound)
    assert near(norm.backward(x, grad), slope, bound)


@TYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gating(activation, dtype, bound):
    x, grad = draw(ROWS, 2 * SIZE, scale=3).to(dtype), draw(ROWS, SIZE, seed=1).to(dtype)
    activate = {
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
    }[activation]
    value, slope = gradient_of(lambda x: activate(x[:, :SIZE]) * x[:, SIZE:], x, grad)
    assert near(Gated(activation).forward(x), value, bound)
    assert near(Gated(activation).backward(x, grad), slope, bound)


@TYPES
@pytest.mark.parametrize("cap", [None, 8.0])
def test_cross_entropy(cap, dtype, bound):
    logits = draw(ROWS, SIZE, scale=6).to(dtype)
    targets = torch.randint(0, SIZE, (ROWS,), generator=torch.Generator().manual_seed(3))
    exact = logits.double().requires_grad_()
    bent = torch.tanh(exact / cap) * cap if cap else exact
    expected = torch.nn.functional.cross_entropy(bent, targets, reduction="none")
    expected.sum().backward()
    losses, array = np.empty(ROWS, np.float32), as_numpy(logits)
    if cap:
        fused.bend(0, ROWS, array, np.float32(cap))
    fused.cross_entropy(0, ROWS, array, targets.numpy(), np.float32(1 / cap if cap else 0), losses, True)
    assert near(torch.from_numpy(losses), expected.detach(), bound)
    assert near(logits, exact.grad, bound)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(value):
    logits = draw(2, SIZE)
    logits[1, 17] = value
    losses = np.empty(2, np.float32)
    fused.cross_entropy(0, 2, logits.numpy(), np.array([3, 3]), np.float32(0), losses, False)
    assert np.isfinite(losses[0])
    assert not np.isfinite(losses[1])
