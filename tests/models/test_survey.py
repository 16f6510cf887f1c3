"""The layers of a base or an adapter as a whole: which blocks are measured, and means over what was found."""

import numpy as np
import pytest

from samples import make_adapter
from thimble.core.adapter import Adapter
from thimble.errors import ConfigError
from thimble.models import survey
from thimble.models.base import open_base
from thimble.models.inspection import InitShares
from thimble.models.survey import Subject, by_movement, choose_blocks, grouped, summary


def share(layer, energy, kaiming, block=0):
    return InitShares(layer, layer.rsplit(".", 1)[-1], block, 4, energy, kaiming, 0.5, 1.0)


def test_shares_count_by_the_energy_of_their_layers():
    rows = [share("a.q_proj", 1.0, 0.1), share("b.q_proj", 3.0, 0.5, block=1)]
    assert summary(rows)["kaiming"] == pytest.approx((0.1 + 3 * 0.5) / 4)
    assert grouped(rows, "block")["1"]["kaiming"] == 0.5
    assert grouped(rows, "kind").keys() == {"q_proj"}
    assert summary([share("a.q_proj", 0.0, 0.0)])["gradient"] == 0.0
    assert summary([]) == {"layers": 0}


def test_of_a_large_base_an_even_spread_of_blocks_is_chosen(tiny_base, monkeypatch):
    base = open_base(tiny_base.replace("smollm2", "smollm3"))
    assert choose_blocks(base, [], ()) == ([0, 1, 2, 3, 4], 5)
    monkeypatch.setattr(survey, "MOST_OPERATIONS", 1.0)
    assert choose_blocks(base, [], ()) == ([0, 2, 4], 5)
    assert choose_blocks(base, [], ("3", "1")) == ([1, 3], 5)
    with pytest.raises(ConfigError, match="--blocks 7, x: expected some of 0, 1"):
        choose_blocks(base, [], ("7", "1", "x"))


def test_layers_are_measured_in_the_order_of_the_model_and_zeros_are_unmoved(tiny_base):
    base = open_base(tiny_base)
    adapter = make_adapter(base)
    zero, *others = adapter.layers
    still = {path: type(f)(f.A, f.B * (path != zero), f.scale) for path, f in reversed(adapter.layers.items())}
    subject = Subject("adapter", ["a"], base, [Adapter(still)])
    assert subject.layers() == list(base.spec.linear_shapes())
    rows = [subject.measure(layer)[0] for layer in subject.layers()]
    moved, unmoved = by_movement(rows)
    assert unmoved == [zero]
    assert set(moved) == set(others)
    norms = {row.layer: row.relative_norm for row in rows}
    assert np.all(np.diff([norms[layer] for layer in moved]) <= 0)
