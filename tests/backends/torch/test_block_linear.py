"""Frozen layers that multiply the blocks of the file: within the rounding of their input, and only of that."""

from pathlib import Path

import numpy as np
import pytest
import torch

from samples import Trainer, count, make_adapter, make_batch
from thimble.backends.torch import frozen
from thimble.backends.torch.block_linear import BlockLinear
from thimble.backends.torch.frozen import FileMatrix, FrozenLinear, Int8Matrix
from thimble.backends.torch.memory import Memory
from thimble.backends.torch.session import TorchSession
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"
TOKENS = 70  # more than are multiplied at once
QKV = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]  # q and k in an order of their own


def layer_of(names=QKV, file="llama_wide_mixed", bias=None):
    weights = [open_base(GGUF / f"{file}.gguf").weights[name] for name in names]
    matrices = [FileMatrix(weight, torch.float32) for weight in weights]
    return FrozenLinear(matrices, bias, Memory(torch.float32)), np.concatenate([weight.read() for weight in weights])


def inputs(cols, rows=TOKENS):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def forward(layer, x):
    return layer.forward(x, torch.full((len(x), layer.rows), float("nan")))


def test_a_product_is_off_by_no_more_than_the_rounding_of_its_input():
    bias = torch.randn(layer_of()[0].rows, generator=torch.Generator().manual_seed(1))
    layer, weights = layer_of(bias=bias)
    x = inputs(layer.cols)
    found = forward(BlockLinear(layer), x).double().numpy()
    wide = weights.astype(np.float64)
    step = np.abs(x.double().numpy()).reshape(TOKENS, -1, 32).max(-1).repeat(32, 1) / 127
    error = np.abs(found - x.double().numpy() @ wide.T - bias.double().numpy())
    assert (error <= 0.5001 * step @ np.abs(wide).T + 1e-5).all()
    assert error.max() > 1e-4, "the input was rounded"


def test_windows_of_rows_make_the_same_product(monkeypatch):
    layer, _ = layer_of()
    x = inputs(layer.cols)
    whole = forward(BlockLinear(layer), x)
    monkeypatch.setattr(
        frozen, "windows", lambda rows, cols: [slice(at, min(at + 20, rows)) for at in range(0, rows, 20)]
    )
    assert torch.equal(forward(BlockLinear(layer), x), whole)


def test_gradients_of_inputs_are_the_float_ones_to_the_bit():
    layer, _ = layer_of()
    grad = inputs(layer.rows)
    expected = layer.input_grad(grad, torch.empty(TOKENS, layer.cols)).clone()
    assert torch.equal(BlockLinear(layer).input_grad(grad, torch.empty(TOKENS, layer.cols)), expected)


def test_a_row_that_is_not_finite_stays_so():
    layer, _ = layer_of()
    x = inputs(layer.cols)
    x[5, 7], x[6, 40] = float("nan"), float("inf")
    found = forward(BlockLinear(layer), x)
    assert not torch.isfinite(found[[5, 6]]).any()
    assert torch.isfinite(found[[4, 7]]).all()


def test_only_layers_that_are_blocks_throughout_are_multiplied_so():
    layer, _ = layer_of()
    assert BlockLinear.fits(layer)
    floats, _ = layer_of(file="smollm3")
    assert not BlockLinear.fits(floats)
    assert not BlockLinear.fits(FrozenLinear([*layer.matrices[:2], *floats.matrices[2:]], None, layer.memory))
    rounded = Int8Matrix(open_base(GGUF / "llama_wide_mixed.gguf").weights[QKV[0]])
    assert not BlockLinear.fits(FrozenLinear([rounded], None, layer.memory))


def gradient_of(session, adapter, batch, **how):
    trainer = Trainer(session, adapter, execution=ExecutionPlan("file", **how))
    found = trainer.gradient([[batch]], count(batch))
    return found.loss.mean, torch.from_numpy(found.flat)


@pytest.mark.parametrize("file", ["llama_wide_mixed", "llama_q8_0"])
def test_a_gradient_over_blocks_points_where_that_of_fp32_does(file):
    base, batch = open_base(GGUF / f"{file}.gguf"), make_batch()
    adapter = make_adapter(base)
    (exact, float_one), (loss, found) = (
        gradient_of(TorchSession(base, compute, "file"), adapter, batch) for compute in ("fp32", "int8")
    )
    assert loss == pytest.approx(exact, rel=0.01)
    assert loss != exact, "activations were rounded"
    assert torch.cosine_similarity(float_one, found, dim=0) > 0.99


def test_streaming_and_checkpointing_change_nothing():
    base, batch = open_base(GGUF / "llama_wide_mixed.gguf"), make_batch()
    adapter = make_adapter(base)
    loss, flat = gradient_of(TorchSession(base, "int8", "file"), adapter, batch)
    streamed = gradient_of(TorchSession(base, "int8", "file", is_streamed=True), adapter, batch, checkpointed_blocks=99)
    assert streamed[0] == loss
    assert torch.equal(streamed[1], flat)
