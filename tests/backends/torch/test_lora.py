"""The trained layer: gradients against autograd in float64, laws of attaching, agreement with PEFT."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from families import hf_model, make_hf_folder
from samples import IDS, loss_curves, make_adapter, make_batch, peft_loss
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

FAMILIES = ("llama_bias", "qwen3", "gemma2", "gemma3", "phi3", "smollm3")


def peft_model(name, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(hf_model(name), folder, is_trainable=True)


def gradients_of(session):
    views = session._state.views(session._state.grads[0])
    return {path: (numbers.A, numbers.B) for path, numbers in views.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("recomputed", "is_streamed"), [(0, False), (1, False), (99, False), (0, True), (99, True)],
    ids=["kept", "half recomputed", "recomputed", "streamed", "streamed and recomputed"],
)  # fmt: skip
def test_loss_and_every_gradient_equal_those_of_peft(name, recomputed, is_streamed, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path / "base"))
    adapter, batch = make_adapter(base), make_batch()
    save_adapter(adapter, tmp_path / "adapter")
    model = peft_model(name, tmp_path / "adapter")
    loss = peft_loss(model, batch)
    loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    session = TorchSession(
        base,
        "fp32",
        ExecutionPlan("file" if is_streamed else "dense", checkpointed_blocks=recomputed, is_streamed=is_streamed),
    )
    session.train(adapter)
    found = session.gradients([[batch]], int((batch.labels >= 0).sum()))
    assert found.loss.mean == pytest.approx(float(loss.detach()), abs=1e-5)
    for path, sides in gradients_of(session).items():
        for side, gradient in zip("AB", sides, strict=True):
            reference = expected[f"base_model.model.{path}.lora_{side}.default.weight"]
            assert (gradient - reference).norm() <= 1e-4 * reference.norm(), (path, side)


@pytest.mark.parametrize("coarse", ["bf16", "int8"])
def test_gradients_of_coarser_types_point_the_same_way(coarse, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    adapter, batch = make_adapter(base), make_batch()
    flat = []
    for compute in ("fp32", coarse):
        session = TorchSession(base, compute, ExecutionPlan("dense"), sample=IDS)
        session.train(adapter)
        session.gradients([[batch]], 20)
        flat.append(session._state.grads[0])
    assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.99


def test_micro_batches_add_up_to_one_large_batch(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    adapter, whole = make_adapter(base), make_batch()
    parts = [
        SimpleNamespace(ids=whole.ids[a:b], labels=whole.labels[a:b], starts=np.array([0, b - a]))
        for a, b in ((0, 20), (20, 48))
    ]
    labels = int((whole.labels >= 0).sum())
    results = []
    for shares in ([[whole]], [parts], [parts[:1], parts[1:]]):  # at once, one after the other, side by side
        session = TorchSession(base, "fp32", ExecutionPlan("dense", num_shares=2))
        session.train(adapter)
        results.append((session.gradients(shares, labels).norm, session._state.grads[0].clone()))
    for norm, gradient in results[1:]:
        assert norm == pytest.approx(results[0][0], rel=1e-4)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-4, atol=1e-6)


def test_a_zero_b_leaves_the_base_bit_for_bit_and_so_does_switching_off(tmp_path):
    base = open_base(make_hf_folder("qwen2", tmp_path))
    session = TorchSession(base, "fp32", ExecutionPlan("dense"))
    bare = session.logits(IDS)
    session.attach(make_adapter(base, b_size=0.0))
    np.testing.assert_array_equal(session.logits(IDS), bare)
    session.attach(make_adapter(base))
    assert np.abs(session.logits(IDS) - bare).max() > 0.1
    session.switch(False)
    np.testing.assert_array_equal(session.logits(IDS), bare)


@pytest.mark.parametrize("name", FAMILIES)
def test_our_adapter_has_the_same_effect_in_peft(name, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path / "base"))
    adapter = make_adapter(base)
    save_adapter(adapter, tmp_path / "adapter")
    with torch.no_grad():
        model = peft_model(name, tmp_path / "adapter")
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    session = TorchSession(base, "fp32", ExecutionPlan("dense"))
    bare = session.logits(IDS)
    session.attach(load_adapter(tmp_path / "adapter"))
    np.testing.assert_allclose(session.logits(IDS), expected, atol=1e-4)
    assert np.abs(bare - expected).max() > 0.05


def test_an_adapter_made_by_peft_has_the_same_effect_here(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", use_rslora=True, init_lora_weights=False,
        rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(hf_model("llama"), config)
    with torch.no_grad():  # PEFT's random numbers are so large that rounding alone may pass the tolerance
        for name, parameter in model.named_parameters():
            parameter.mul_(0.3 if "lora_B" in name else 1.0)
    model.save_pretrained(tmp_path / "adapter")
    session = TorchSession(base, "fp32", ExecutionPlan("dense"))
    session.attach(load_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(session.logits(IDS), expected, atol=1e-4)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_rslora"]


@pytest.mark.parametrize("only", ["q_proj", "layers.1.mlp.down_proj", "v_proj"])
def test_adapters_on_some_layers_get_the_gradients_they_had_among_all(only, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    everything, batch = make_adapter(base, b_size=0.0), make_batch()
    some = Adapter({path: factors for path, factors in everything.layers.items() if only in path})
    found = []
    for adapter in (everything, some):
        session = TorchSession(base, "fp32", ExecutionPlan("dense"))
        session.train(adapter)
        session.gradients([[batch]], 20)
        found.append(gradients_of(session))
    assert some.layers
    for path in some.layers:
        torch.testing.assert_close(found[0][path][1], found[1][path][1])


def test_fifty_steps_follow_the_loss_curve_of_peft(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    adapter = make_adapter(base, b_size=0.0)
    save_adapter(adapter, tmp_path / "adapter")
    model = peft_model("llama", tmp_path / "adapter")
    session = TorchSession(base, "fp32", ExecutionPlan("dense"))
    session.train(adapter)
    ours, theirs = loss_curves(session, model, 50, 2e-3)
    assert ours[0] - ours[-1] > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_restoring_a_state_repeats_the_next_step_bit_for_bit(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    batch = make_batch()
    session = TorchSession(base, "fp32", ExecutionPlan("dense"))
    session.train(make_adapter(base))

    def step():
        session.apply(session.gradients([[batch]], 20), 1e-2, 1.0)
        return {name: values.copy() for name, values in session.state().items()}

    step()
    kept = step()
    first = step()
    session.restore(kept)
    second = step()
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
