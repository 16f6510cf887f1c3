"""The trained layer: gradients against autograd in float64, laws of attaching, agreement with PEFT."""

import json

import numpy as np
import pytest
import torch

from families import hf_model, make_hf_folder
from samples import IDS, Trainer, count, loss_curves, make_adapter, make_batch, peft_loss
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.data.batches import Batch
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

FAMILIES = ("llama_bias", "qwen3", "gemma2", "gemma3", "phi3", "smollm3")


def peft_model(name, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(hf_model(name), folder, is_trainable=True)


def gradients_of(trainer, gradient):
    return {path: (parts.A, parts.B) for path, parts in trainer.layers_of(gradient).items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("checkpointed", "is_streamed"), [(0, False), (1, False), (99, False), (0, True), (99, True)],
    ids=["kept", "half checkpointed", "checkpointed", "streamed", "streamed and checkpointed"],
)  # fmt: skip
def test_loss_and_every_gradient_equal_those_of_peft(name, checkpointed, is_streamed, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path / "base"))
    adapter, batch = make_adapter(base), make_batch()
    save_adapter(adapter, tmp_path / "adapter")
    model = peft_model(name, tmp_path / "adapter")
    loss = peft_loss(model, batch)
    loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    session = TorchSession(base, "fp32", "file" if is_streamed else "dense", is_streamed)
    trainer = Trainer(session, adapter, execution=ExecutionPlan("dense", checkpointed_blocks=checkpointed))
    found = trainer.gradient([[batch]], count(batch))
    assert found.loss.mean == pytest.approx(float(loss.detach()), abs=1e-5)
    for path, sides in gradients_of(trainer, found).items():
        for side, gradient in zip("AB", sides, strict=True):
            reference = expected[f"base_model.model.{path}.lora_{side}.default.weight"]
            assert (gradient - reference).norm() <= 1e-4 * reference.norm(), (path, side)


@pytest.mark.parametrize("coarse", ["bf16", "bf16-int8", "int8"])
def test_gradients_of_coarser_types_point_the_same_way(coarse, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    adapter, batch = make_adapter(base), make_batch()
    flat = []
    for compute in ("fp32", coarse):
        trainer = Trainer(TorchSession(base, compute, "dense", sample=IDS), adapter)
        flat.append(torch.from_numpy(trainer.gradient([[batch]], 20).flat))
    assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.99


def test_micro_batches_add_up_to_one_large_batch(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    adapter, whole = make_adapter(base), make_batch()
    parts = [
        Batch(whole.ids[a:b], whole.labels[a:b], np.array([0, b - a]), np.array([number]))
        for number, (a, b) in enumerate(((0, 20), (20, 48)))
    ]
    results = []
    for shares in ([[whole]], [parts], [parts[:1], parts[1:]]):  # at once, one after the other, in parallel
        trainer = Trainer(TorchSession(base), adapter, execution=ExecutionPlan("dense", num_shares=2))
        results.append(trainer.gradient(shares, count(whole)))
    for gradient in results[1:]:
        assert gradient.norm == pytest.approx(results[0].norm, rel=1e-4)
        np.testing.assert_allclose(gradient.flat, results[0].flat, rtol=1e-4, atol=1e-6)


def test_a_zero_b_leaves_the_base_bit_for_bit_and_so_does_an_empty_adapter(tmp_path):
    base = open_base(make_hf_folder("qwen2", tmp_path))
    session = TorchSession(base, "fp32", "dense")
    bare = session.logits(IDS)
    np.testing.assert_array_equal(session.logits(IDS, session.load(make_adapter(base, b_size=0.0))), bare)
    assert np.abs(session.logits(IDS, session.load(make_adapter(base))) - bare).max() > 0.1
    np.testing.assert_array_equal(session.logits(IDS, session.load(None)), bare)


@pytest.mark.parametrize("name", FAMILIES)
def test_our_adapter_has_the_same_effect_in_peft(name, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path / "base"))
    adapter = make_adapter(base)
    save_adapter(adapter, tmp_path / "adapter")
    with torch.no_grad():
        model = peft_model(name, tmp_path / "adapter")
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    session = TorchSession(base, "fp32", "dense")
    bare = session.logits(IDS)
    active = session.load(load_adapter(tmp_path / "adapter"))
    np.testing.assert_allclose(session.logits(IDS, active), expected, atol=1e-4)
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
    session = TorchSession(base, "fp32", "dense")
    active = session.load(load_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(session.logits(IDS, active), expected, atol=1e-4)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_rslora"]


@pytest.mark.parametrize("only", ["q_proj", "layers.1.mlp.down_proj", "v_proj"])
def test_adapters_on_some_layers_get_the_gradients_they_had_among_all(only, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    everything, batch = make_adapter(base, b_size=0.0), make_batch()
    some = Adapter({path: factors for path, factors in everything.layers.items() if only in path})
    found = []
    for adapter in (everything, some):
        trainer = Trainer(TorchSession(base), adapter)
        found.append(gradients_of(trainer, trainer.gradient([[batch]], 20)))
    assert some.layers
    for path in some.layers:
        torch.testing.assert_close(found[0][path][1], found[1][path][1])


def test_fifty_steps_follow_the_loss_curve_of_peft(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    adapter = make_adapter(base, b_size=0.0)
    save_adapter(adapter, tmp_path / "adapter")
    model = peft_model("llama", tmp_path / "adapter")
    ours, theirs = loss_curves(Trainer(TorchSession(base), adapter), model, 50, 2e-3)
    assert ours[0] - ours[-1] > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_restoring_a_state_repeats_the_next_step_bit_for_bit(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    batch, session = make_batch(), TorchSession(base)
    trainer = Trainer(session, make_adapter(base))

    def step():
        trainer.step(batch, 1e-2)
        return session.snapshot(trainer.state)

    step()
    kept = step()
    first = step()
    trainer.state = session.restore(trainer.state, kept)
    second = step()
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
