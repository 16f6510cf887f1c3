"""Rows with adapters of their own: the loops give what products of matrices give, row by row."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from samples import DENSE, IDS, RANDOM, make_adapter, make_batch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.lora import Lora, project
from thimble.backends.torch.lora_rows import AdapterSpan, RowUpdates
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.core.method import Method
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import open_base

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"
SPANS = [(0, 1), (1, 4), (4, 5), (5, 7), (8, 9)]  # token 7 has no adapter, and 9 to 11 are padding


def with_magnitudes(session, adapter):
    lengths = {path: np.linalg.norm(session.file_weight(path), axis=1) for path in adapter.layers}
    layers = {path: replace(f, magnitude=lengths[path] * 1.1) for path, f in adapter.layers.items()}
    return replace(adapter, layers=layers)


def adapters_of(session, base):
    """Of several ranks, of some layers only, in delta form, with magnitudes, and without any layer."""
    plain = make_adapter(base, rank=5)
    origin = {path: replace(f, A=f.A * 1.1, B=f.B * 0.5) for path, f in plain.layers.items()}
    return [
        plain, make_adapter(base, rank=1, only="v_proj"), with_magnitudes(session, make_adapter(base, rank=16)),
        replace(plain, origin=origin), Adapter({}),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["smollm2", "qwen2"])  # the second with biases
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_rows_get_what_products_of_matrices_give(name, compute):
    base = open_base(GGUF / f"{name}.gguf")
    session = TorchSession(base, compute, "dense")
    active = [session.load(adapter) for adapter in adapters_of(session, base)]
    segments = [AdapterSpan(*span, adapter) for span, adapter in zip(SPANS, active, strict=True)]
    ranges = [(slice(s.start, s.stop), s.adapter.layers) for s in segments]
    updates, changed = RowUpdates(segments), 0
    for projection in session.decoder.projections[:4]:
        x = torch.from_numpy(RANDOM.standard_normal((12, projection.frozen.cols)).astype(np.float32))
        x = x.to(session.decoder.compute)
        with torch.no_grad():
            expected = project(x, projection, Lora(ranges=ranges)).float().clone()
            found = project(x, projection, Lora(rows=updates)).float().clone()
            bare = project(x, projection, Lora()).float().clone()
        atol = 1e-5 if compute == "fp32" else 0.02 * float(expected.abs().max())
        np.testing.assert_allclose(found, expected, atol=atol)
        for rows in (slice(7, 8), slice(8, 9), slice(9, 12)):
            assert torch.equal(found[rows], bare[rows])
        changed += int(not torch.equal(found[:1], bare[:1])) + int(not torch.equal(found[1:4], bare[1:4]))
    assert changed == 5  # the second adapter has values alone


def test_an_adapter_that_is_trained_on_is_followed():
    base = open_base(GGUF / "smollm2.gguf")
    session = TorchSession(base, "fp32", "dense")
    state = session.start(with_magnitudes(session, make_adapter(base)), Method())
    engine = Engine(session)
    for seed in range(3):
        number = engine.add(IDS[:9], SamplingOptions(3, logprobs=0), state.active)
        told = [token for _ in range(3) for token in engine.step()]
        rows = session.logits(np.array([*IDS[:9], *(token.id for token in told)], np.int32), state.active)[8:-1]
        for row, token in zip(torch.from_numpy(rows).log_softmax(-1), told, strict=True):
            assert token.request == number
            assert token.logprobs.chosen == pytest.approx(float(row[token.id]), abs=1e-4)
        work = Work([[make_batch()]], 20)
        state = session.apply(state, session.gradient(state, work, Objective(), DENSE, StepKey(0, seed)), 0.1)


def test_tables_are_kept_for_the_same_adapters_and_made_anew_for_others():
    base = open_base(GGUF / "smollm2.gguf")
    session = TorchSession(base, "fp32", "dense")
    one, other = (session.load(make_adapter(base, rank=rank)) for rank in (2, 3))
    first = RowUpdates([AdapterSpan(0, 1, one), AdapterSpan(1, 2, other)])
    again = first.moved([AdapterSpan(3, 5, one), AdapterSpan(5, 6, other)])
    assert again._tables is first._tables
    assert first.moved([AdapterSpan(0, 1, other), AdapterSpan(1, 2, one)]) is None
    assert first.moved([AdapterSpan(0, 1, one)]) is None
