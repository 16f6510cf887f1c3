"""Frozen products in int8 against the same products in float."""

from pathlib import Path

import numpy as np
import pytest
import torch

from samples import Trainer, count, make_adapter, make_batch
from thimble.backends.torch.frozen import DenseMatrix, FrozenLinear, Int8Matrix
from thimble.backends.torch.int8 import Int8Gradient, Int8Linear, Watched
from thimble.backends.torch.memory import Memory
from thimble.backends.torch.session import TorchSession
from thimble.core.method import Method
from thimble.models.base import open_base

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"
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


# ---- gradients alone -------------------------------------------------------------------------------------------------


def test_rounded_gradients_leave_the_forward_product_to_the_bit():
    layer, _, x = make_layer()
    expected, found = (
        layer.forward(x, torch.empty(TOKENS, OUT)),
        Int8Gradient(layer).forward(x, torch.empty(TOKENS, OUT)),
    )
    assert torch.equal(found, expected)


def test_a_rounded_gradient_is_off_by_no_more_than_the_rounding_of_weight_and_gradient():
    layer, _, _ = make_layer()
    grad = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(1))
    grad[:, 5] *= 40
    found = Int8Gradient(layer).input_grad(grad, torch.empty(TOKENS, IN)).double()
    weight, grad = layer.matrices[0].dense.double(), grad.double()
    row_step = weight.abs().amax(1) / 127  # s of each row; g s has a step of its own for each token
    step = (grad * row_step).abs().amax(1, keepdim=True) / 127
    whole = (weight / row_step[:, None]).abs().sum(0)
    bound = 0.501 * ((grad.abs() * row_step).sum(1, keepdim=True) + step * (whole + OUT / 2))
    error = (found - grad @ weight).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-3, "they were rounded"


def test_a_gradient_that_is_not_finite_stays_so():
    layer, _, _ = make_layer()
    grad = torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(1))
    grad[5, 7] = float("nan")
    found = Int8Gradient(layer).input_grad(grad, torch.empty(TOKENS, IN))
    assert not torch.isfinite(found[5]).any()
    assert torch.isfinite(found[[4, 6]]).all()


def test_weights_that_are_kept_as_int8_are_not_copied():
    weights = [open_base(GGUF / "llama_q8_0.gguf").weights[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    layer = FrozenLinear([Int8Matrix(weight) for weight in weights], None, Memory(torch.float32))
    expected, size = layer.decoded(slice(0, layer.rows)).clone(), layer.resident_bytes
    rounded = Int8Gradient(layer)
    assert torch.equal(rounded.decoded(slice(0, layer.rows)), expected)
    assert torch.equal(rounded.q.float() * torch.from_numpy(rounded.scale)[:, None], expected)
    assert rounded.resident_bytes == size == rounded.q.nbytes + rounded.scale.nbytes
    assert all(np.shares_memory(matrix.q, rounded.q.numpy()) for matrix in rounded.matrices)
    dense = Int8Gradient(FrozenLinear([DenseMatrix(expected)], None, Memory(torch.float32)))
    assert dense.resident_bytes == expected.nbytes + size, "of others there are two copies, and both are counted"


@pytest.mark.parametrize("store", ["dense", "int8", "file"])
def test_a_session_rounds_gradients_once_training_begins(store):
    """Losses are those of bf16 to the bit; gradients differ, and point where those of fp32 do."""
    base, batch = open_base(GGUF / "llama_q8_0.gguf"), make_batch()
    adapter, losses, flat, kinds = make_adapter(base), {}, {}, {}
    for compute in ("fp32", "bf16", "bf16-int8"):
        session = TorchSession(base, compute, store)
        assert not any(isinstance(one.frozen, Int8Gradient) for one in session.decoder.projections)
        found = Trainer(session, adapter).gradient([[batch]], count(batch))
        losses[compute], flat[compute] = found.loss.mean, torch.from_numpy(found.flat)
        kinds[compute] = {type(one.frozen) for one in session.decoder.projections}
        trained = [one.frozen for one in session.decoder.projections]
        session.start(adapter, Method())
        assert [one.frozen for one in session.decoder.projections] == trained, "nothing is rounded again"
    assert kinds == {"fp32": {FrozenLinear}, "bf16": {FrozenLinear}, "bf16-int8": {Int8Gradient}}
    assert losses["bf16-int8"] == losses["bf16"]
    assert not torch.equal(flat["bf16-int8"], flat["bf16"])
    assert torch.cosine_similarity(flat["fp32"], flat["bf16-int8"], dim=0) > 0.99
