"""`thimble evaluate` on a tiny base."""

import json
import shutil

import numpy as np
import pytest

import thimble
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.files.peft import save_adapter
from thimble.models.base import open_base


@pytest.fixture
def adapter(tiny_base, tmp_path):
    shapes = open_base(tiny_base).spec.linear_shapes()
    random = np.random.default_rng(0)
    layers = {
        path: Factors(
            random.standard_normal((2, fan_in)).astype("f4"), random.standard_normal((fan_out, 2)).astype("f4"), 0.1
        )
        for path, (fan_out, fan_in) in shapes.items()
    }
    save_adapter(Adapter(layers), tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_base_and_adapters_are_measured_on_the_same_rows(examples, tiny_base, adapter):
    report = thimble.evaluate(examples, base=tiny_base, adapter=[adapter], max_new_tokens=4, metric="exact")
    base, other = report.results
    assert (base.name, other.name) == ("base", adapter)
    assert base.target_tokens == other.target_tokens > 0
    assert base.loss != other.loss
    assert base.perplexity == pytest.approx(np.exp(base.loss))
    assert set(base.scores) == {"exact match"}


def test_answers_side_by_side_name_adapters_that_are_called_alike(thimble, examples, tiny_base, adapter, tmp_path):
    names = ["tickets-1", "tickets-2", "a/adapter", "b/adapter"]
    for name in names:
        shutil.copytree(adapter, tmp_path / name)
    flags = [word for name in names for word in ("--adapter", name)]
    code, out, _ = thimble("evaluate", examples, "--base", tiny_base, *flags, "--max-new-tokens", "2")
    assert code == 0
    shown = out[out.index("asked:") :].splitlines()[2:7]
    assert [line.split(":")[0].strip() for line in shown] == ["base", *names]


def test_evaluating_as_json_gives_one_object(thimble, examples, tiny_base):
    code, out, _ = thimble("evaluate", examples, "--base", tiny_base, "--json", "--max-new-tokens", "2")
    assert code == 0
    assert json.loads(out)["results"][0]["name"] == "base"
