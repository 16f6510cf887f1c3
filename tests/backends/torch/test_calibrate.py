"""Moments and sketches against dense ones made by autograd through the model of transformers."""

import numpy as np
import pytest
import torch

from families import hf_model, make_hf_folder
from samples import make_batch, peft_loss
from thimble.backends.torch.calibrate import captured_energy, input_moments, sketch_gradients
from thimble.backends.torch.session import TorchSession
from thimble.models.base import open_base

NAME = "llama_bias"


@pytest.fixture
def session(tmp_path):
    return TorchSession(open_base(make_hf_folder(NAME, tmp_path)), "fp32", "dense")


def dense(batches):
    """By layer path: the gradient of its weight, inputs (tokens, in) and gradients of its outputs, of all batches."""
    model, seen = hf_model(NAME), {}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in path}

    def watch(path, layer):
        def forward(_module, inputs, output):
            seen.setdefault(path, ([], []))[0].append(inputs[0].detach()[0])
            output.register_hook(lambda grad: seen[path][1].append(grad[0]))

        layer.register_forward_hook(forward)

    for path, layer in layers.items():
        watch(path, layer)
    for batch in batches:
        (peft_loss(model, batch) * (batch.labels >= 0).sum()).backward()
    return {
        path: (layers[path].weight.grad.numpy(), torch.cat(x).numpy(), torch.cat(sorted_like(g, x)).numpy())
        for path, (x, g) in seen.items()
    }


def sorted_like(grads, inputs):
    """Gradients arrive in any order; rows have different lengths, so their lengths tell them apart."""
    by_length = {}
    for grad in grads:
        by_length.setdefault(len(grad), []).append(grad)
    return [by_length[len(x)].pop(0) for x in inputs]


def test_moments_are_those_of_the_inputs(session):
    batches = [make_batch(), make_batch((0, 11, 48))]
    expected = dense(batches)
    seen = []
    for paths, moments in input_moments(session.decoder, batches):
        for path in paths:
            x = expected[path][1]
            np.testing.assert_allclose(moments.square, x.T @ x, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(moments.total, x.sum(0), rtol=1e-4, atol=1e-3)
            assert moments.count == len(x) == 96
            seen.append(path)
    assert seen == list(session.decoder.spec.linear_shapes())


@pytest.mark.parametrize("checkpointed", [0, 99])
def test_a_sketch_finds_the_main_directions_of_the_gradient(session, checkpointed):
    batches = [make_batch()]
    expected = dense(batches)
    sketches = sketch_gradients(session.decoder, batches, dict.fromkeys(expected, 20), checkpointed_blocks=checkpointed)
    for path, sketch in sketches.items():
        gradient, x, _ = expected[path]
        values = np.linalg.svd(gradient, compute_uv=False)
        energy = np.square(sketch.values[:20]).sum() / np.square(values[:20]).sum()
        assert 0.93 < energy < 1.0001, path
        made = (sketch.left * sketch.values) @ sketch.right
        projected = gradient @ sketch.right.T @ sketch.right
        np.testing.assert_allclose(made, projected, atol=1e-4 * np.abs(gradient).max())
        low = x @ sketch.right.T
        np.testing.assert_allclose(sketch.answer, low.T @ low / len(x), rtol=1e-3, atol=1e-4)
        assert sketch.input_square == pytest.approx(np.square(x).sum(1).mean(), rel=1e-4)


def test_a_weighted_sketch_finds_the_main_inputs_weighted_by_their_gradients(session):
    batches = [make_batch()]
    expected = dense(batches)
    for path, sketch in sketch_gradients(
        session.decoder, batches, dict.fromkeys(expected, 8), is_weighted=True
    ).items():
        _, x, grads = expected[path]
        moment = x.T @ (np.square(grads).sum(1, keepdims=True) * x)
        best = np.linalg.eigvalsh(moment.astype(np.float64))[-8:].sum()
        found = np.trace(sketch.right[:8] @ moment @ sketch.right[:8].T)
        assert 0.9 * best < found <= best * 1.0001, path


def test_captured_energy_is_the_share_of_the_dense_gradient(session):
    batches = [make_batch()]
    expected = dense(batches)
    path = "model.layers.0.mlp.up_proj"
    gradient = expected[path][0]
    vt = np.linalg.svd(gradient, full_matrices=False)[2].astype(np.float32)
    found = captured_energy(session.decoder, batches, {"best": {path: vt[:4]}, "worst": {path: vt[-4:]}})
    values = np.linalg.svd(gradient, compute_uv=False)
    parts, whole = found["best"][path]
    assert whole == pytest.approx((values**2).sum(), rel=1e-3)
    np.testing.assert_allclose(parts, values[:4] ** 2, rtol=1e-3)
    assert found["worst"][path][0].sum() < 0.05 * parts.sum()
