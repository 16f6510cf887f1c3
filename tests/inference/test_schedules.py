"""A few hundred requests of `make stress`'s random schedules; and what is merged answers as what is served."""

import numpy as np
import pytest

from families import make_hf_folder
from samples import IDS, make_adapter
from stress.schedules import random_schedules, whole_number_schedules
from thimble.backends.torch.session import TorchSession
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import open_base
from thimble.models.merged import write_merged


@pytest.mark.parametrize("seed", [1, 2])
def test_each_request_gets_what_it_gets_alone_in_any_schedule(seed):
    line = random_schedules(160, seed)
    assert (line.tried, line.wrong) == (160, 0), line.note
    assert " 0 tokens of prompts" not in line.note


@pytest.mark.parametrize("cache_type", ["float", "int8"])
def test_each_request_in_whole_numbers_gets_what_it_gets_in_an_engine_of_its_own(cache_type):
    line = whole_number_schedules(80, 3, cache_type=cache_type)
    assert (line.tried, line.wrong) == (80, 0), line.note
    assert "within 0e+00 of the request alone" in line.note
    assert " 0 tokens of prompts" not in line.note


def test_an_adapter_answers_as_the_model_it_is_merged_into(tmp_path):
    """Beside requests with another adapter and without any."""
    base = open_base(make_hf_folder("llama_tied", tmp_path / "base"))
    adapter, other = make_adapter(base), make_adapter(base, rank=2)
    (tmp_path / "merged").mkdir()
    write_merged(base, adapter.layers, tmp_path / "merged", lambda layer: None)
    merged, session = TorchSession(open_base(tmp_path / "merged")), TorchSession(base)
    engine, options = Engine(session, keeps_prefixes=True), SamplingOptions(12, logprobs=0)
    number = engine.add(IDS[:20], options, session.load(adapter))
    for active in (session.load(other), session.load(None)):
        engine.add(IDS[:20], options, active)
    told = [token for _ in range(40) for token in engine.step() if token.request == number]
    ids = np.array([*IDS[:20], *(token.id for token in told)], np.int32)
    rows = merged.logits(ids)[19:-1].astype(np.float64)
    shares = rows - rows.max(1, keepdims=True)
    shares -= np.log(np.exp(shares).sum(1, keepdims=True))
    assert len(told) == 12
    for row, token in zip(shares, told, strict=True):
        assert row[token.id] >= row.max() - 1e-4
        assert token.logprobs.chosen == pytest.approx(row[token.id], abs=1e-4)
