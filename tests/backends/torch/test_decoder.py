"""The decoder against transformers, for every family, from Hugging Face folders and from GGUF."""

from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, GGUF_FILES, hf_model, hf_model_of_gguf, make_hf_folder
from thimble.backends.torch.session import TorchSession
from thimble.models.base import open_base

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
    packed = decoder.logits(decoder.hidden(IDS, decoder.pack(starts))).numpy()
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
