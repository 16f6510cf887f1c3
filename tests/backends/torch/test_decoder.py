"""The decoder against transformers, for every family, from Hugging Face folders and from GGUF."""

from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, GGUF_FILES, hf_model, hf_model_of_gguf, make_hf_folder
from thimble.backends.torch.session import TorchSession
from thimble.core.metrics import LossSum
from thimble.data.batches import pack
from thimble.data.encode import Row
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


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gemma3", "qwen3", "smollm3", "phi3_partial_rope"])
def test_generation_with_cache_equals_reading_everything_again(name, tmp_path):
    make_hf_folder(name, tmp_path)
    session = TorchSession(open_base(tmp_path), "fp32", "dense")
    prompts = [IDS[:7], IDS[7:12], IDS[12:29]]
    for prompt, answer in zip(prompts, session.generate(prompts, 9, frozenset()), strict=True):
        ids = list(prompt)
        for token in answer:
            logits = session.logits(np.asarray(ids, np.int32))[-1]
            assert logits[token] > logits.max() - 1e-4, (token, int(logits.argmax()))
            ids.append(token)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3"])
def test_rows_read_for_loss_and_answer_at_once_give_what_two_readings_give(name, tmp_path):
    make_hf_folder(name, tmp_path)
    session = TorchSession(open_base(tmp_path), "fp32", "dense")
    rows = [Row(IDS[a:b], np.roll(IDS, -1)[a:b], "") for a, b in ((0, 12), (5, 30), (20, 29), (7, 40))]
    prompts = [7, 11, 3, 30]
    stop = frozenset(range(0, 290, 7))  # some answers end early, so that rows leave the cache
    loss, answers = session.answer(rows, prompts, 40, 9, stop)
    expected = sum(session.losses([pack([row]) for row in rows]), LossSum())
    assert loss.tokens == expected.tokens
    assert loss.nats == pytest.approx(expected.nats, rel=1e-5)
    alone = [session.generate([row.ids[:n]], 9, stop)[0] for row, n in zip(rows, prompts, strict=True)]
    assert answers == alone
    assert len({len(answer) for answer in answers}) > 1


@pytest.mark.parametrize("store", ["file", "int8", "dense"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_every_store_and_compute_type_stays_near_the_file(store, compute):
    base = open_base(GGUF / "llama_wide_mixed.gguf")
    exact = TorchSession(base, "fp32", "file").logits(IDS)
    logits = TorchSession(base, compute, store).logits(IDS)
    bound = {("fp32", "file"): 0, ("fp32", "dense"): 1e-5}.get((compute, store), 0.05)
    assert np.abs(logits - exact).max() <= bound * np.abs(exact).max()
