"""DoRA as plain LoRA: exact at full rank, as near as can be below, and the error told is the true one."""

import numpy as np
import pytest

from families import make_hf_folder
from samples import make_adapter
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, delta, merge
from thimble.models.base import open_base
from thimble.models.dora import without_magnitudes


@pytest.fixture
def dora(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    layers = {}
    for path, f in make_adapter(base).layers.items():
        lengths = np.linalg.norm(base.weights[f"{path}.weight"].read(), axis=1)
        lengths *= 1 + 0.3 * np.random.default_rng(len(path)).standard_normal(len(lengths))
        layers[path] = Factors(f.A, f.B, f.scale, lengths.astype("f4"))
    return base, Adapter(layers, "mine")


def test_at_full_rank_it_is_the_same_function(dora):
    base, adapter = dora
    plain, errors = without_magnitudes(adapter, base, 1000)
    assert not plain.has_magnitudes
    assert max(errors.values()) < 1e-5
    for path, factors in adapter.layers.items():
        weight = base.weights[f"{path}.weight"].read()
        np.testing.assert_allclose(weight + delta(plain.layers[path]), merge(weight, factors), atol=1e-5)


def test_at_a_lower_rank_the_error_is_the_least_there_can_be_and_is_told(dora):
    base, adapter = dora
    plain, errors = without_magnitudes(adapter, base, 3)
    for path, factors in adapter.layers.items():
        weight = base.weights[f"{path}.weight"].read()
        change = merge(weight, factors) - weight
        values = np.linalg.svd(change, compute_uv=False)
        assert plain.layers[path].rank == 3
        assert errors[path] == pytest.approx(np.linalg.norm(values[3:]) / np.linalg.norm(values), rel=1e-3)
        found = np.linalg.norm(change - delta(plain.layers[path])) / np.linalg.norm(change)
        assert errors[path] == pytest.approx(found, rel=1e-5)
        assert errors[path] > 0.01


def test_layers_without_magnitudes_stay_as_they_are(dora):
    base, adapter = dora
    path, other = list(adapter.layers)[:2]
    bare = Factors(adapter.layers[other].A, adapter.layers[other].B, 2.0)
    plain, errors = without_magnitudes(Adapter({path: adapter.layers[path], other: bare}), base, 2)
    assert plain.layers[other] is bare
    assert list(errors) == [path]
