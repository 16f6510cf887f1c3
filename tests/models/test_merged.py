"""Merged weights row by row, and sums by kind; whole folders are merged in tests/commands/test_merge.py."""

import numpy as np
import pytest

from families import make_hf_folder
from samples import make_adapter
from thimble.core.lowrank import Factors, merge
from thimble.errors import BaseModelError
from thimble.files.blocks import dequantize
from thimble.models import merged
from thimble.models.base import open_base
from thimble.models.merged import MergedLayer, by_kind, check_mergeable, merged_rows, other_files

PATH = "model.layers.1.mlp.up_proj"


def row(name, norm=1.0, error=0.0, rank=4, dtype="BF16"):
    return MergedLayer(name, dtype, rank, 0, 10 * rank, 0, 40 * rank, 0, norm, error)


def test_rows_come_in_windows_and_their_cost_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(merged, "WINDOW_VALUES", 100)
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    weight, factors, done = base.weights[f"{PATH}.weight"], make_adapter(base).layers[PATH], []
    pieces = []
    for piece in merged_rows(PATH, weight, factors, done.append):
        assert not done
        pieces.append(bytes(piece))
    found = dequantize(np.frombuffer(b"".join(pieces), np.uint8), "F32", weight.shape)
    np.testing.assert_allclose(found, merge(weight.read(), factors), atol=1e-6)
    assert len(pieces) > 1
    (cost,) = done
    assert cost.norm == pytest.approx(np.linalg.norm(found - weight.read()), rel=1e-5)
    assert (cost.name, cost.dtype, cost.rank_before, cost.rank_after) == (PATH, "F32", factors.rank, 0)
    assert 0 < cost.error < 1e-5


def test_an_update_of_nothing_costs_nothing(tmp_path):
    base, done = open_base(make_hf_folder("llama", tmp_path / "base")), []
    weight = base.weights[f"{PATH}.weight"]
    nothing = Factors(np.zeros((1, weight.shape[1]), "f4"), np.zeros((weight.shape[0], 1), "f4"), 1.0)
    pieces = list(merged_rows(PATH, weight, nothing, done.append))
    assert b"".join(map(bytes, pieces)) == weight.raw().tobytes()
    assert (done[0].norm, done[0].error) == (0, 0)


def test_kinds_are_summed_in_the_order_they_come_and_errors_by_their_length():
    kinds = by_kind([row("a.q_proj", 3.0, 0.1), row("a.up_proj", 4.0, 0.2, rank=8), row("b.q_proj", 0.0, 0.0)])
    assert [kind.kind for kind in kinds] == ["q_proj", "up_proj", "all"]
    assert [kind.layers for kind in kinds] == [2, 1, 3]
    assert kinds[-1].error == pytest.approx(((3 * 0.1) ** 2 + (4 * 0.2) ** 2) ** 0.5 / 5)
    assert (kinds[-1].worst_layer, kinds[-1].rank_before, kinds[-1].bytes_before) == ("a.up_proj", [4, 8], 640)
    assert by_kind([]) == []


def test_the_size_of_all_that_is_written_is_known_before(tmp_path):
    folder = make_hf_folder("llama", tmp_path / "base")
    (folder / "modeling_llama.py").write_text("import os")
    size = check_mergeable(open_base(folder), [PATH])
    files = [*folder.glob("*.safetensors"), *other_files(folder)]
    assert size == sum(path.stat().st_size for path in files)
    assert folder / "modeling_llama.py" not in files


def test_a_gguf_file_cannot_be_merged_into(tiny_base):
    with pytest.raises(BaseModelError, match="is a GGUF file"):
        check_mergeable(open_base(tiny_base), [PATH])
