"""Frozen layers: products in windows, and buffers that are used again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from thimble.backends.torch.frozen import DenseMatrix, FrozenLinear, Neighbours, load_matrix
from thimble.backends.torch.memory import Memory
from thimble.core.sizes import WINDOW_ROWS
from thimble.models.base import open_base

BASE = Path(__file__).parents[2] / "fixtures" / "gguf" / "llama_wide_mixed.gguf"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_gradients_through_a_weight_of_several_windows_are_those_of_float64(dtype, bound):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * WINDOW_ROWS + 40, 24, generator=generator).to(dtype)
    grad = torch.randn(7, len(weight), generator=generator).to(dtype)
    layer = FrozenLinear([DenseMatrix(weight)], None, Memory(dtype))
    found = layer.input_grad(grad, torch.empty(7, 24, dtype=dtype))
    expected = grad.double() @ weight.double()
    assert (found.double() - expected).norm() < bound * expected.norm()


def test_streamed_weights_give_the_same_products_bit_for_bit():
    base = open_base(BASE)
    names = [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]
    found = []
    for is_streamed in (False, True):
        memory = Memory(torch.float32)
        layer = FrozenLinear([load_matrix(base.weights[name], "file", torch.float32) for name in names], None, memory)
        if is_streamed:
            layer.neighbours = Neighbours(layer, layer)
        x = torch.randn(5, layer.cols, generator=torch.Generator().manual_seed(0))
        y = layer.forward(x, torch.empty(5, layer.rows))
        found.append((y, layer.input_grad(y, torch.empty(5, layer.cols))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("store", ["file", "int8", "dense"])
def test_rows_looked_up_are_the_rows_decoded(store):
    weight = open_base(BASE).weights["model.layers.0.self_attn.q_proj.weight"]  # its rows lie in another order
    matrix = load_matrix(weight, store, torch.float32)
    index = np.array([3, 0, 17, 3])
    rows, every = torch.empty(4, matrix.cols), torch.empty(matrix.rows, matrix.cols)
    matrix.decode(index, rows)
    matrix.decode(slice(0, matrix.rows), every)
    assert torch.equal(rows, every[index])
    part = torch.empty(5, matrix.cols)
    matrix.decode(slice(2, 7), part)
    assert torch.equal(part, every[2:7])


def test_buffers_are_used_again_and_those_of_earlier_blocks_are_left_alone():
    memory = Memory(torch.float32)
    first, second = memory.keep(4, 3), memory.keep(4, 3)
    first.fill_(1), second.fill_(2)
    memory.begin(after=1)
    assert memory.keep(4, 3).data_ptr() == second.data_ptr()
    assert (first == 1).all()
    memory.begin()
    assert memory.keep(4, 3).data_ptr() == first.data_ptr()
    assert memory.scratch("a", 4, 3).data_ptr() != memory.scratch("b", 4, 3).data_ptr()
    assert memory.scratch("a", 2, 3).data_ptr() == memory.scratch("a", 4, 3).data_ptr()
