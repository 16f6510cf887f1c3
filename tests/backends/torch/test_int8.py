"""Frozen products in int8 against the same products in float."""

import numpy as np
import torch

from thimble.backends.torch.frozen import DenseMatrix, FrozenLinear
from thimble.backends.torch.int8 import Int8Linear, Watched
from thimble.backends.torch.memory import Memory

TOKENS, OUT, IN = 96, 130, 64


def make_layer(hot_columns=()):
    """A layer with random weights, its int8 twin, and an input with some columns far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(OUT, IN, generator=generator), torch.randn(TOKENS, IN, generator=generator)
    for column in hot_columns:
        x[:, column] *= 60
    layer = FrozenLinear([DenseMatrix(weight)], torch.randn(OUT, generator=generator), Memory(torch.float32))
    watched = Watched(layer)
    watched.forward(x, torch.empty(TOKENS, OUT))
    return layer, Int8Linear(watched), x


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_products_and_gradients_are_within_a_percent_of_the_float_ones():
    layer, whole, x = make_layer()
    expected, found = torch.empty(TOKENS, OUT), torch.empty(TOKENS, OUT)
    assert error(whole.forward(x, found), layer.forward(x, expected)) < 0.01
    grad = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(1))
    back, back_whole = torch.empty(TOKENS, IN), torch.empty(TOKENS, IN)
    assert error(whole.input_grad(grad, back_whole), layer.input_grad(grad, back)) < 0.01


def test_columns_far_larger_than_others_cost_little_because_they_are_smoothed():
    layer, whole, x = make_layer(hot_columns=(3, 17))
    expected, found = layer.forward(x, torch.empty(TOKENS, OUT)), whole.forward(x, torch.empty(TOKENS, OUT))
    plain = (torch.round(x / (x.abs().amax(1, keepdim=True) / 127)) * (x.abs().amax(1, keepdim=True) / 127)) @ (
        layer.matrices[0].dense.t()
    ) + layer.bias
    x_small = x.clone()
    x_small[:, [3, 17]] = 0  # what the other columns contribute is what plain int8 loses
    small = x_small @ layer.matrices[0].dense.t()
    assert float((found - expected).norm() / small.norm()) < 0.5 * float((plain - expected).norm() / small.norm())


def test_a_row_that_is_not_finite_stays_so():
    _, whole, x = make_layer()
    x[5, 7] = float("nan")
    found = whole.forward(x, torch.empty(TOKENS, OUT))
    assert not torch.isfinite(found[5]).any()
    assert torch.isfinite(found[[4, 6]]).all()


def test_columns_that_the_sample_never_used_are_left_as_they_are():
    layer, _, x = make_layer()
    x[:, 9] = 0
    watched = Watched(layer)
    watched.forward(x, torch.empty(TOKENS, OUT))
    whole = Int8Linear(watched)
    assert whole.divisor[9] == 1
    assert np.isfinite(whole.divisor).all()
