"""Modules of any kind in training: against PEFT and plain torch, which do the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.method import Method
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.execution import ExecutionPlan

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
PLAN = ExecutionPlan("dense", 1, 1 << 20, 1 << 20)


def tiny_vit():
    torch.manual_seed(3)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def pictures(rows, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.normal(size=(rows, 3, 16, 16)).astype(np.float32)
    return ModuleBatch({"pixel_values": pixels}, {"labels": random.integers(3, size=rows)}, list(range(rows)))


def attached(module, loss="labels", head="classifier", **options):
    session = ModuleTorchSession(module, loss, head)
    session.attach(train_also=[head] if head else [], rank=4, alpha=8, seed=5, **options)
    return session


def trained(session, batches, rate=1e-3, parts=1):
    """Losses of some steps; each batch is cut into so many micro-batches."""
    state, losses = session.start(session.fresh_adapter(), Method(max_grad_norm=1e9)), []
    for step, batch in enumerate(batches):
        cut = [split(batch, part, parts) for part in range(parts)]
        work = Work([cut], len(batch.numbers))
        gradient = session.gradient(state, work, Objective(), PLAN, StepKey(0, step))
        losses.append(gradient.loss.mean)
        state = session.apply(state, gradient, rate)
    return state, losses


def split(batch, part, parts):
    rows = slice(part * len(batch.numbers) // parts, (part + 1) * len(batch.numbers) // parts)
    inputs, targets = ({name: values[rows] for name, values in of.items()} for of in (batch.inputs, batch.targets))
    return ModuleBatch(inputs, targets, batch.numbers[rows])


def test_twenty_steps_are_those_of_peft_and_the_folder_opens_there(tmp_path):
    session = attached(tiny_vit())
    save_adapter(session.fresh_adapter(), tmp_path / "initial")
    batches = [pictures(6, seed) for seed in range(20)]
    model = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path / "initial", is_trainable=True).eval()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    expected = []
    for batch in batches:
        made = model(torch.from_numpy(batch.inputs["pixel_values"])).logits
        loss = functional.cross_entropy(made, torch.from_numpy(batch.targets["labels"]))
        expected.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    state, losses = trained(session, batches, rate=3e-3)
    assert np.abs(np.array(losses) - expected).max() < 1e-4
    assert losses[-1] != pytest.approx(losses[0], abs=1e-3)
    save_adapter(session.adapter(state), tmp_path / "trained")
    reopened = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path / "trained").eval()
    (ours,) = session.outputs(state.active, iter([pictures(5, 99)]), PLAN)
    theirs = reopened(torch.from_numpy(pictures(5, 99).inputs["pixel_values"])).logits.detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-5


def test_micro_batches_come_to_the_same_gradient():
    losses = [
        trained(attached(tiny_vit()), [pictures(6, seed) for seed in range(4)], parts=parts)[1] for parts in (1, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_base_is_still_there_and_other_values_are_put_in_for_a_while():
    bare = tiny_vit().eval()
    session = attached(tiny_vit())
    head = session.module.classifier.weight.detach().numpy().copy()
    initial = session.fresh_adapter()
    state, _ = trained(session, [pictures(6, seed) for seed in range(3)], rate=1e-2)
    pixels = pictures(4, 7)
    with torch.no_grad():
        expected = bare(torch.from_numpy(pixels.inputs["pixel_values"])).logits.numpy()
    now = session.snapshot(state)["adapter"].copy()
    (base,), (begun,), (learned,) = (
        session.outputs(active, iter([pixels]), PLAN)
        for active in (session.load(None), session.load(initial), state.active)
    )
    assert (base == expected).all()
    assert np.abs(begun - expected).max() < 1e-6
    assert np.abs(learned - expected).max() > 1e-3
    assert (session.snapshot(state)["adapter"] == now).all()
    assert (initial.replaced["classifier.weight"] == head).all()
    again = session.load(session.adapter(state))
    assert (next(session.outputs(again, iter([pixels]), PLAN)) == learned).all()


def test_what_comes_to_the_head_makes_its_logits():
    session = attached(tiny_vit())
    batch = pictures(5)
    (features,) = session.head_inputs(iter([batch]), PLAN)
    head = session.module.classifier
    (logits,) = session.outputs(session.load(None), iter([batch]), PLAN)
    made = features @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    assert features.shape == (5, 16)
    assert np.abs(made - logits).max() < 1e-5


class Embedder(nn.Module):
    """Embeds tokens and mixes them; as a text encoder gives its hidden states."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        return torch.tanh(self.mix(self.embed(input_ids)))


def pairs(count, seed=0):
    random = np.random.default_rng(seed)
    ids, mask = random.integers(20, size=(2 * count, 5)), np.ones((2 * count, 5), np.int64)
    mask[:, 3:] = random.integers(2, size=(2 * count, 1))
    places = {"pair": np.arange(2 * count).reshape(2, count).T, "content": np.arange(2 * count)}
    return ModuleBatch({"input_ids": ids, "attention_mask": mask}, places, list(range(count)))


def test_pairs_are_told_apart_from_all_others_of_their_step_whatever_its_parts():
    batch = pairs(6)
    ids, mask = (torch.from_numpy(batch.inputs[name]) for name in ("input_ids", "attention_mask"))
    module = Embedder()
    hidden = module(ids, mask)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    first, second = functional.normalize(mean, dim=1).chunk(2)
    cosines, own = first @ second.T / 0.05, torch.arange(6)
    expected = (functional.cross_entropy(cosines, own) + functional.cross_entropy(cosines.T, own)) / 2
    found = []
    for most in (PLAN.micro_tokens, 10):
        session = attached(Embedder(), "pairs", "")
        state = session.start(session.fresh_adapter(), Method())
        plan = replace(PLAN, micro_tokens=most)
        found.append(session.gradient(state, Work([[batch]], 6), Objective(), plan, StepKey(0, 0)))
    assert found[0].loss.mean == pytest.approx(float(expected.detach()), abs=1e-5)
    assert found[1].loss.mean == pytest.approx(found[0].loss.mean, abs=1e-5)
    assert found[0].norm > 0.01
    assert np.abs(found[0].flat - found[1].flat).max() < 1e-6


def test_tokens_are_learned_as_transformers_counts_their_loss():
    torch.manual_seed(2)
    config = transformers.T5Config(
        vocab_size=30,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    module = transformers.T5ForConditionalGeneration(config).eval()
    random = np.random.default_rng(0)
    ids, labels = random.integers(2, 30, size=(3, 6)), random.integers(2, 30, size=(3, 4))
    labels[1, 2:] = -100
    with torch.no_grad():
        expected = float(module(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss)
    given = {"prompt": np.zeros((3, 1), np.int64), "most": np.full(3, 5)}
    session = attached(module, "tokens", "")
    (rows,) = session.losses(
        session.load(None), iter([ModuleBatch({"input_ids": ids}, {"labels": labels, **given}, [0, 1, 2])]), PLAN
    )
    assert [row.tokens for row in rows] == [4, 2, 4]
    assert sum(row.nats for row in rows) / 10 == pytest.approx(expected, abs=1e-5)
    (written,) = session.outputs(session.load(None), iter([ModuleBatch({"input_ids": ids}, given, [0, 1, 2])]), PLAN)
    assert written.shape == (3, 5)


def test_dropout_is_a_function_of_the_step(tmp_path):
    def norm(step):
        session = attached(tiny_vit(), dropout=0.3)
        adapter = session.fresh_adapter()
        state = session.start(adapter, Method(dropout=0.3))
        state = session.restore(state, {"adapter": session.snapshot(state)["adapter"] + 0.02})
        work = Work([[pictures(6)]], 6)
        return session.gradient(state, work, Objective(), PLAN, StepKey(0, step)).flat

    assert (norm(1) == norm(1)).all()
    assert (norm(1) != norm(2)).any()


def test_an_adapter_of_peft_is_used_as_it_is(tmp_path):
    torch.manual_seed(9)
    model = peft.get_peft_model(tiny_vit(), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear",
                                modules_to_save=["classifier"], init_lora_weights=False)).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    session = ModuleTorchSession(tiny_vit(), "labels", "classifier")
    adapter = load_adapter(tmp_path)
    session.attach(adapter=adapter)
    (ours,) = session.outputs(session.load(adapter), iter([pictures(4)]), PLAN)
    theirs = model(torch.from_numpy(pictures(4).inputs["pixel_values"])).logits.detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-5
