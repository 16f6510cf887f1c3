"""The decoder against transformers, for every family, from Hugging Face folders and from GGUF."""

from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, GGUF_FILES, hf_model, hf_model_of, hf_model_of_gguf, make_hf_folder
from thimble.backends.torch.loss import divergence
from thimble.backends.torch.session import TorchSession
from thimble.data.batches import Batch
from thimble.data.prefixes import whole_rows
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"
IDS = np.random.default_rng(1).integers(3, 290, 40).astype(np.int32)  # longer than every window


def reference(model, ids=IDS):
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


@pytest.mark.parametrize("is_legacy", [False, True], ids=["config5", "config4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_folder_gives_the_logits_of_transformers(name, is_legacy, tmp_path):
    make_hf_folder(name, tmp_path, legacy_config=is_legacy)
    logits = TorchSession(open_base(tmp_path), "fp32", "dense").logits(IDS)
    np.testing.assert_allclose(logits, reference(hf_model(name)), atol=1e-4)


@pytest.mark.parametrize("file", GGUF_FILES)
def test_gguf_gives_the_logits_of_transformers(file):
    logits = TorchSession(open_base(GGUF / f"{file}.gguf"), "fp32", "file").logits(IDS)
    np.testing.assert_allclose(logits, reference(hf_model_of_gguf(file)), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_longrope", "qwen3"])
def test_packed_rows_do_not_see_each_other(name, tmp_path):
    make_hf_folder(name, tmp_path)
    session = TorchSession(open_base(tmp_path), "fp32", "dense")
    decoder, starts = session.decoder, np.array([0, 13, 14, 40])
    packed = decoder.logits(decoder.hidden(IDS, decoder.pack(whole_rows(starts)))).numpy()
    for start, end in zip(starts, starts[1:], strict=False):
        np.testing.assert_allclose(packed[start:end], session.logits(IDS[start:end]), atol=2e-5)


@pytest.mark.parametrize("store", ["file", "int8", "dense"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_every_store_and_compute_type_stays_near_the_file(store, compute):
    base = open_base(GGUF / "llama_wide_mixed.gguf")
    exact = TorchSession(base, "fp32", "file").logits(IDS)
    logits = TorchSession(base, compute, store).logits(IDS)
    bound = {("fp32", "file"): 0, ("fp32", "dense"): 1e-5}.get((compute, store), 0.05)
    assert np.abs(logits - exact).max() <= bound * np.abs(exact).max()


@pytest.mark.parametrize("seed", range(4))
def test_large_key_biases_cost_bf16_nothing(seed, tmp_path):
    """Qwen2.5's keys have biases of some hundreds, in the slow pairs of the rotary embedding."""
    config, random = FAMILIES["qwen2"](), np.random.default_rng(seed)
    config.update({"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1})  # heads of 32
    model = hf_model_of(config, seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[[13, 15, 30, 31]] = torch.tensor([-200.0, 200.0, 200.0, -200.0])
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    ids, starts = random.integers(3, 290, 4 * 96).astype(np.int32), np.arange(0, 4 * 96 + 1, 96)
    labels = np.roll(ids, -1)
    labels[starts[1:] - 1] = -100
    batch, losses = Batch(ids, labels, starts, np.arange(4)), {}
    for compute in ("fp32", "bf16"):
        session = TorchSession(open_base(tmp_path), compute, "dense")
        (loss,) = session.losses(session.load(None), [batch], ExecutionPlan("dense"))
        losses[compute] = loss.mean
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-3)


def test_a_small_divergence_is_not_lost_in_bf16(tmp_path):
    make_hf_folder("llama", tmp_path)
    decoder = TorchSession(open_base(tmp_path), "bf16", "dense").decoder
    base_hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16() * 8
    hidden = (base_hidden.float() * (1 + 0.02 * torch.linspace(-1, 1, 32))).bfloat16()

    def log_probs(x):
        x = x.double()
        x = x / (x.square().mean(1, keepdim=True) + decoder.norm.eps).sqrt() * decoder.norm.weight
        return (x @ decoder.head.dense.double().t()).log_softmax(1)

    wanted, found = log_probs(base_hidden), log_probs(hidden)
    expected = float((wanted.exp() * (wanted - found)).sum())
    assert float(divergence(decoder, hidden, base_hidden, 1.0)) == pytest.approx(expected, rel=1e-3)
