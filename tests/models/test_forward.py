"""The reference forward pass against transformers, for every family, and the same page run by another array library."""

from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, GGUF_FILES, hf_model, hf_model_of_gguf, make_hf_folder
from thimble.backends.tape import OPS, Var, gradients
from thimble.core.dropout import keep_mask
from thimble.models.base import open_base
from thimble.models.forward import Layout, Ops, Update, cross_entropy, divergence, hidden, layout, logits

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf"
RANDOM = np.random.default_rng(1)
IDS = RANDOM.integers(3, 290, 40).astype(np.int64)  # longer than every window, and than the short range of LongRoPE
STARTS = np.array([0, 13, 14, 40])
TORCH = Ops(
    exp=torch.exp,
    tanh=torch.tanh,
    sqrt=torch.sqrt,
    mean=lambda x: x.mean(-1, keepdim=True),
    sum=torch.sum,
    log_softmax=lambda x: torch.log_softmax(x, -1),
    where=torch.where,
    concatenate=lambda parts: torch.cat(list(parts), -1),
    stop_gradient=torch.Tensor.detach,
)


def read_weights(base):
    return {name: weight.read().astype(np.float64) for name, weight in base.weights.items()}


def our_logits(base, ids=IDS, starts=None, adapter=None):
    weights = read_weights(base)
    rows = layout(base.spec, np.array([0, len(ids)]) if starts is None else starts)
    return logits(OPS, base.spec, weights, hidden(OPS, base.spec, weights, ids, rows, adapter))


def their_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def random_adapter(base, rank=3, is_delta=False, has_magnitude=False):
    """An update of every layer, as arrays."""
    adapter = {}
    for path, (fan_out, fan_in) in base.spec.linear_shapes().items():
        a, b = RANDOM.standard_normal((rank, fan_in)) / fan_in**0.5, RANDOM.standard_normal((fan_out, rank)) * 0.1
        origin = (a + 0.1 * RANDOM.standard_normal(a.shape), b * 0.5) if is_delta else None
        adapter[path] = Update(a, b, 1.5, RANDOM.uniform(0.5, 1.5, fan_out) if has_magnitude else None, origin)
    return adapter


def update_weight(weight, update):
    """W + scale · (B A − B₀ A₀), its rows at the lengths of the magnitude."""
    total = weight + update.scale * update.B @ update.A
    if update.origin:
        total = total - update.scale * update.origin[1] @ update.origin[0]
    if update.magnitude is None:
        return total
    return total * (update.magnitude / np.linalg.norm(total, axis=1))[:, None]


# ---- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_legacy", [False, True], ids=["config5", "config4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_logits_of_transformers(name, is_legacy, tmp_path):
    make_hf_folder(name, tmp_path, legacy_config=is_legacy)
    ours, model = our_logits(open_base(tmp_path)), hf_model(name)
    np.testing.assert_allclose(ours, their_logits(model), atol=1e-4)
    # Nearer in float64; transformers normalises, rotates and takes the softmax in float32 even then.
    np.testing.assert_allclose(ours, their_logits(model.double()), atol=2e-5)


@pytest.mark.parametrize("file", GGUF_FILES)
def test_a_gguf_gives_the_logits_of_transformers(file):
    ours = our_logits(open_base(GGUF / f"{file}.gguf"))
    np.testing.assert_allclose(ours, their_logits(hf_model_of_gguf(file)), atol=1e-4)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_longrope", "qwen3", "smollm3"])
def test_rows_laid_end_to_end_do_not_see_each_other(name, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path))
    together = our_logits(base, starts=STARTS)
    alone = [our_logits(base, IDS[start:end]) for start, end in zip(STARTS, STARTS[1:], strict=False)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-12)


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_an_empty_adapter_and_one_with_b_of_zero_are_the_bare_base_bit_for_bit(tmp_path):
    base = open_base(make_hf_folder("gemma2", tmp_path))
    still = {path: update._replace(B=update.B * 0) for path, update in random_adapter(base).items()}
    np.testing.assert_array_equal(our_logits(base, adapter=still), our_logits(base))
    np.testing.assert_array_equal(our_logits(base, adapter={}), our_logits(base))


def test_an_adapter_at_its_origin_is_the_bare_base_bit_for_bit(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    start = {path: update._replace(origin=(update.A, update.B)) for path, update in random_adapter(base).items()}
    np.testing.assert_array_equal(our_logits(base, adapter=start), our_logits(base))


@pytest.mark.parametrize("has_magnitude", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("is_delta", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("name", ["llama_bias", "phi3", "gemma3"])
def test_an_adapter_is_what_merging_it_into_the_weights_gives(name, is_delta, has_magnitude, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path))
    adapter = random_adapter(base, 3, is_delta, has_magnitude)
    weights = read_weights(base)
    for path, update in adapter.items():
        weights[f"{path}.weight"] = update_weight(weights[f"{path}.weight"], update)
    rows = layout(base.spec, np.array([0, len(IDS)]))
    merged = logits(OPS, base.spec, weights, hidden(OPS, base.spec, weights, IDS, rows))
    np.testing.assert_allclose(our_logits(base, adapter=adapter), merged, atol=1e-10)
    assert np.abs(merged - our_logits(base)).max() > 0.01


def test_a_row_without_a_length_keeps_its_rate(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    path = "model.layers.0.mlp.up_proj"
    update = random_adapter(base, has_magnitude=True)[path]
    weights = read_weights(base)
    weights[f"{path}.weight"][0] = update.B[0] = 0
    rows = layout(base.spec, np.array([0, len(IDS)]))
    assert np.isfinite(hidden(OPS, base.spec, weights, IDS, rows, {path: update})).all()


@pytest.mark.parametrize("name", ["llama_bias", "phi3"])
def test_dropout_reads_the_input_of_every_group_once_and_by_its_number(name, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path))
    weights, seen = read_weights(base), []

    def drop(x, group):
        seen.append((group, x.shape[1]))
        return x * 0.0

    rows, adapter = layout(base.spec, np.array([0, len(IDS)])), random_adapter(base)
    found = hidden(OPS, base.spec, weights, IDS, rows, adapter, drop)
    spec = base.spec
    widths = (spec.hidden_size, spec.q_size, spec.hidden_size, spec.intermediate_size)
    assert seen == [(4 * block + k, width) for block in range(spec.num_layers) for k, width in enumerate(widths)]
    np.testing.assert_array_equal(found, hidden(OPS, base.spec, weights, IDS, rows))  # A alone reads what is dropped
    del adapter["model.layers.1.mlp.down_proj"]
    seen.clear()
    hidden(OPS, base.spec, weights, IDS, rows, adapter, drop)
    assert [group for group, _ in seen] == list(range(7))  # nobody reads the last


# ---- another array library -------------------------------------------------------------------------------------------


def objective(ops, base, weights, adapter, to_array):
    """A loss with every part of the page in it."""
    angles, seen = layout(base.spec, STARTS)
    rows = Layout(tuple(pair and (to_array(pair[0]), to_array(pair[1])) for pair in angles), tuple(map(to_array, seen)))
    tokens = np.arange(len(IDS))

    def drop(x, group):
        return x * to_array(keep_mask((1, 2), group, tokens // 20, tokens % 20, x.shape[1], 0.3) / 0.7)

    bare = logits(ops, base.spec, weights, hidden(ops, base.spec, weights, IDS, rows))
    scores = logits(ops, base.spec, weights, hidden(ops, base.spec, weights, IDS, rows, adapter, drop))
    return cross_entropy(ops, scores[5:], IDS[:-5]) + divergence(ops, scores[:5], bare[:5]) * 3.0


@pytest.mark.parametrize("name", ["llama_bias", "smollm3", "gemma2", "gemma3", "qwen3", "phi3_longrope"])
def test_the_same_page_in_torch_has_the_same_loss_and_gradients(name, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path))
    adapter, weights = random_adapter(base, is_delta=True, has_magnitude=True), read_weights(base)
    ours = {path: u._replace(A=Var(u.A), B=Var(u.B), magnitude=Var(u.magnitude)) for path, u in adapter.items()}
    loss = objective(OPS, base, weights, ours, lambda x: x)
    found = gradients(loss, [leaf for u in ours.values() for leaf in (u.A, u.B, u.magnitude)])

    def trained(x):
        return torch.from_numpy(x).requires_grad_()

    theirs = {
        path: Update(trained(u.A), trained(u.B), u.scale, trained(u.magnitude), tuple(map(torch.from_numpy, u.origin)))
        for path, u in adapter.items()
    }
    tensors = {key: torch.from_numpy(weight) for key, weight in weights.items()}
    expected = objective(TORCH, base, tensors, theirs, torch.from_numpy)
    expected.backward()
    assert float(loss.value) == pytest.approx(float(expected.detach()), rel=1e-12)
    leaves = [leaf for u in theirs.values() for leaf in (u.A, u.B, u.magnitude)]
    for gradient, leaf in zip(found, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), atol=1e-10 * float(leaf.grad.abs().max()))
