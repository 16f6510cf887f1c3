"""Variations on plain LoRA: delta form, DoRA, dropout, LoRA+, a frozen A; PEFT is the oracle where it has them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from families import hf_model, make_hf_folder
from samples import IDS, RANDOM, Trainer, count, loss_curves, make_adapter, make_batch, peft_loss
from thimble.backends.torch.lora import Dropout
from thimble.backends.torch.session import TorchSession
from thimble.core import inits
from thimble.core.adapter import Adapter
from thimble.core.dropout import keep_factor, keep_mask
from thimble.core.lowrank import delta, merge
from thimble.core.method import Method
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"


def with_magnitude(adapter, base):
    """The adapter with the magnitudes that training begins with, a little moved."""
    layers = {}
    for path, factors in adapter.layers.items():
        lengths = np.linalg.norm(base.weights[f"{path}.weight"].read(), axis=1)
        moved = (lengths * RANDOM.uniform(0.9, 1.1, len(lengths))).astype(np.float32)
        layers[path] = replace(factors, magnitude=moved)
    return Adapter(layers)


def pissa(base, rank=4):
    """A start in delta form, moved away from its origin."""
    origin = {
        path: inits.pissa(inits.LayerData(path, shape, rank, 2.0, weight=base.weights[f"{path}.weight"].read()))
        for path, shape in base.spec.linear_shapes().items()
    }
    layers = {
        path: replace(start, B=start.B + 0.02 * RANDOM.standard_normal(start.B.shape).astype(np.float32))
        for path, start in origin.items()
    }
    return Adapter(layers, origin=origin), Adapter(origin, origin=origin)


def peft_logits(name, folder):
    from peft import PeftModel

    with torch.no_grad():
        model = PeftModel.from_pretrained(hf_model(name), folder)
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()


# ---- delta form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_start_in_delta_form_leaves_the_base_as_it_is(compute, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    _, start = pissa(base)
    session = TorchSession(base, compute, "dense")
    bare = session.logits(IDS)
    np.testing.assert_allclose(session.logits(IDS, session.load(start)), bare, atol=1e-5 if compute == "fp32" else 0.03)
    np.testing.assert_array_equal(session.logits(IDS, session.load(None)), bare)


def test_a_delta_form_is_saved_as_a_plain_adapter_with_the_same_effect_in_peft(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    moved, _ = pissa(base)
    save_adapter(moved, tmp_path / "adapter")
    session = TorchSession(base)
    bare = session.logits(IDS)
    ours = session.logits(IDS, session.load(moved))
    saved = session.load(load_adapter(tmp_path / "adapter"))
    np.testing.assert_allclose(session.logits(IDS, saved), ours, atol=1e-5)
    np.testing.assert_allclose(peft_logits("llama", tmp_path / "adapter"), ours, atol=1e-4)
    assert np.abs(ours - bare).max() > 0.05


def test_a_small_update_is_not_rounded_away_beside_its_start(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    _, start = pissa(base)
    moved = {path: replace(f, B=f.B * np.float32(1.001)) for path, f in start.layers.items()}
    logits = []
    for compute in ("fp32", "bf16"):
        session = TorchSession(base, compute, "dense")
        bare = session.logits(IDS)
        active = session.load(Adapter(moved, origin=start.layers))
        factors = next(iter(active.layers.values()))
        logits.append(factors.scale * (factors.B.float() @ factors.A.float()))
        assert np.abs(session.logits(IDS, active) - bare).max() > 0
    assert (logits[1] - logits[0]).norm() < 0.01 * logits[0].norm()


def test_training_in_delta_form_is_training_on_a_base_without_the_piece(tmp_path):
    """PEFT takes B₀ A₀ out of W: the same losses, step by step."""
    from peft import LoraConfig, get_peft_model

    base = open_base(make_hf_folder("llama", tmp_path))
    _, start = pissa(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=True, task_type="CAUSAL_LM")
    model = get_peft_model(hf_model("llama"), config)
    with torch.no_grad():
        for path, factors in start.layers.items():
            layer = model.get_submodule(f"base_model.model.{path}")
            layer.lora_A["default"].weight.copy_(torch.from_numpy(factors.A))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(factors.B))
            layer.get_base_layer().weight -= torch.from_numpy(delta(factors))
    ours, theirs = loss_curves(Trainer(TorchSession(base), start), model, 20, 1e-3)
    assert ours[0] - ours[-1] > 0.3
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_weight_decay_pulls_back_to_the_start(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    _, start = pissa(base)
    far, batches = {}, [make_batch() for _ in range(10)]
    for decay in (0.0, 5.0):
        trainer = Trainer(TorchSession(base), start, Method(weight_decay=decay))
        for batch in batches:
            trainer.step(batch, 1e-2)
        moved = trainer.adapter
        far[decay] = sum(np.abs(f.A - start.layers[p].A).sum() for p, f in moved.layers.items())
    assert far[5.0] < 0.9 * far[0.0]


# ---- DoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "phi3"])
@pytest.mark.parametrize("checkpointed", [0, 99])
def test_dora_has_the_loss_and_gradients_of_peft(name, checkpointed, tmp_path):
    base = open_base(make_hf_folder(name, tmp_path / "base"))
    adapter, batch = with_magnitude(make_adapter(base), base), make_batch()
    save_adapter(adapter, tmp_path / "adapter")
    from peft import PeftModel

    model = PeftModel.from_pretrained(hf_model(name), tmp_path / "adapter", is_trainable=True)
    loss = peft_loss(model, batch)
    loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    trainer = Trainer(TorchSession(base), adapter, execution=ExecutionPlan("dense", checkpointed_blocks=checkpointed))
    found = trainer.gradient([[batch]], count(batch))
    assert found.loss.mean == pytest.approx(float(loss.detach()), abs=1e-5)
    for path, parts in trainer.layers_of(found).items():
        for side, gradient in (("A.default", parts.A), ("B.default", parts.B)):
            reference = expected[f"base_model.model.{path}.lora_{side}.weight"]
            assert (gradient - reference).norm() <= 2e-4 * reference.norm(), (path, side)
        reference = expected[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
        assert (parts.magnitude - reference).norm() <= 2e-4 * reference.norm(), path


def test_dora_gives_the_logits_of_peft_and_of_the_merged_weights(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    adapter = with_magnitude(make_adapter(base), base)
    save_adapter(adapter, tmp_path / "adapter")
    session = TorchSession(base)
    ours = session.logits(IDS, session.load(load_adapter(tmp_path / "adapter")))
    np.testing.assert_allclose(peft_logits("llama", tmp_path / "adapter"), ours, atol=1e-4)
    model = hf_model("llama")
    with torch.no_grad():
        for path, factors in adapter.layers.items():
            weight = model.get_submodule(path).weight
            weight.copy_(torch.from_numpy(merge(weight.numpy(), factors)))
        merged = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(merged, ours, atol=1e-4)


def test_dora_keeps_its_row_lengths_while_a_and_b_move(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    trainer = Trainer(TorchSession(base), with_magnitude(make_adapter(base), base))
    for _ in range(3):
        trainer.step(make_batch(), 1e-2)
    ours = trainer.logits(IDS)
    save_adapter(trainer.adapter, tmp_path / "adapter")
    np.testing.assert_allclose(peft_logits("llama", tmp_path / "adapter"), ours, atol=1e-4)


def test_magnitudes_that_were_learned_are_kept_and_rows_of_zeros_stay(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    session = TorchSession(base)
    learned = with_magnitude(make_adapter(base), base)
    again = session.with_magnitudes(learned)
    for path, factors in learned.layers.items():
        np.testing.assert_array_equal(again.layers[path].magnitude, factors.magnitude)
    projection = session.decoder.projections[0]
    projection.frozen.dense[0] = 0
    fresh = session.with_magnitudes(make_adapter(base, b_size=0.0))
    path = next(iter(projection.columns))
    assert fresh.layers[path].magnitude[0] == 0
    trainer = Trainer(session, fresh)
    for _ in range(2):
        trainer.step(make_batch(), 1e-3)
    assert trainer.state.active.layers[path].row_rates[0] * trainer.adapter.layers[path].magnitude[0] == 0


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [0, 99])
def test_gradients_under_dropout_are_the_slope_of_the_loss(checkpointed, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    adapter, batch = make_adapter(base), make_batch()
    execution = ExecutionPlan("dense", checkpointed_blocks=checkpointed)
    trainer = Trainer(TorchSession(base), adapter, Method(dropout=0.4), execution)
    first = trainer.gradient([[batch]], 20)
    again = trainer.gradient([[batch]], 20)
    assert again.loss == first.loss  # the step has not moved on, nor has what is left out
    here, losses = trainer.session.snapshot(trainer.state)["adapter"], []
    for sign in (1, -1):
        moved = here + sign * 1e-3 * first.flat / np.float32(first.norm)
        trainer.state = trainer.session.restore(trainer.state, {"adapter": moved})
        losses.append(trainer.gradient([[batch]], 20).loss.nats / 20)
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(first.norm, rel=0.02)


def test_dropout_differs_between_steps_and_rests_outside_of_training(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    adapter, batch = make_adapter(base), make_batch()
    session = TorchSession(base)
    dropping, plain = Trainer(session, adapter, Method(dropout=0.4)), Trainer(session, adapter)
    rests, other = (next(session.losses(one.state.active, [batch], one.execution)) for one in (dropping, plain))
    assert rests == other
    losses = [dropping.step(batch, 0.0).loss.mean for _ in range(2)]
    assert losses[0] != losses[1]


def test_dropout_leaves_out_what_the_mask_says():
    rows, tokens = np.array([3, 3, 0, 7]), np.array([5, 6, 0, 1])
    x = torch.from_numpy(RANDOM.standard_normal((4, 21)).astype(np.float32))
    found = Dropout(0.3, (11, 4), rows, tokens).apply(x, 9, torch.empty_like(x))
    kept = keep_mask((11, 4), 9, rows, tokens, 21, 0.3)
    np.testing.assert_array_equal(found.numpy(), np.where(kept, x.numpy() * keep_factor(0.3), np.float32(0)))
    assert 0 < kept.sum() < kept.size


def test_layers_without_a_gradient_are_named(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    trainer = Trainer(TorchSession(base), make_adapter(base))
    path = "model.layers.1.mlp.down_proj"
    assert set(trainer.session.unmoved_layers(trainer.state)) == set(base.spec.linear_shapes())
    gradient = trainer.gradient([[make_batch()]], 20)
    parts = trainer.layers_of(gradient)[path]
    parts.A.zero_(), parts.B.zero_()
    state = trainer.session.apply(trainer.state, gradient, 1e-3)
    assert trainer.session.unmoved_layers(state) == [path]


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_lora_plus_and_a_frozen_a_move_what_they_should(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path))
    adapter, batch = make_adapter(base), make_batch()
    moved = {}
    for name, method in {"plain": Method(), "plus": Method(lora_plus=4.0), "frozen": Method(freezes_a=True)}.items():
        trainer = Trainer(TorchSession(base), adapter, method)
        trainer.step(batch, 1e-3)
        moved[name] = trainer.adapter.layers
    for path, start in adapter.layers.items():
        plain, plus, frozen = (moved[name][path] for name in ("plain", "plus", "frozen"))
        np.testing.assert_allclose(plus.B - start.B, 4 * (plain.B - start.B), atol=1e-6)
        np.testing.assert_array_equal(plus.A, plain.A)
        np.testing.assert_array_equal(frozen.A, start.A)
        assert not np.array_equal(plain.A, start.A)
        assert not np.array_equal(frozen.B, start.B)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("file", ["llama_q8_0", "phi3", "gemma3"])
def test_a_weight_of_the_file_is_the_same_for_every_compute_type(file, compute):
    base = open_base(GGUF / f"{file}.gguf")
    session = TorchSession(base, compute, "int8" if compute == "int8" else "file", sample=IDS)
    for path in list(base.spec.linear_shapes())[:7]:
        expected = base.weights[f"{path}.weight"].read()
        np.testing.assert_allclose(session.file_weight(path), expected, atol=1e-6)
        kept = session.kept_weight(path)
        assert np.linalg.norm(kept - expected) < (0.03 if compute == "int8" else 0.005) * np.linalg.norm(expected)
