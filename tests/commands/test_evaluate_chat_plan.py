"""The other commands on a tiny base."""

import json

import numpy as np
import pytest

import thimble
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError, InputError
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


def test_evaluating_as_json_gives_one_object(thimble, examples, tiny_base):
    code, out, _ = thimble("evaluate", examples, "--base", tiny_base, "--json", "--max-new-tokens", "2")
    assert code == 0
    assert json.loads(out)["results"][0]["name"] == "base"


def test_a_conversation_switches_adapters_and_forgets_on_request(tiny_base, adapter, monkeypatch):
    monkeypatch.setattr("thimble.data.encode.Encoder.prompt", lambda self, messages: np.array([5, 6, 7], np.int32))
    talk = thimble.chat(base=tiny_base, adapter=[adapter], temperature=0, max_new_tokens=6)
    assert talk.active == adapter
    pieces = []
    first = talk.ask("hello", pieces.append)
    assert "".join(pieces) == first
    talk.use("base")
    second = talk.ask("hello")
    assert first != second
    assert [turn["role"] for turn in talk.messages] == ["user", "assistant"] * 2
    talk.reset()
    assert talk.messages == []
    with pytest.raises(AdapterError, match="there is no adapter 'other' here: choose from base"):
        talk.use("other")


def test_a_plan_decides_what_a_run_would_and_writes_nothing(examples, tiny_base, tmp_path):
    before = set(tmp_path.iterdir())
    report = thimble.plan(examples, base=tiny_base, seq_len=64, batch_tokens=64, rank=4)
    assert set(tmp_path.iterdir()) == before
    assert report.steps >= 30
    assert report.seconds_per_step > 0
    assert report.memory["total"] == sum(size for name, size in report.memory.items() if name != "total")
    assert report.adapter_parameters > 0
    assert report.machine["flops"]["fp32"] > 0
    changes = {other.change.split()[0]: other for other in report.alternatives}
    assert changes["--rank"].memory_bytes < report.memory["total"]
    assert changes["--targets"].seconds_per_step < report.seconds_per_step


def test_what_a_plan_offers_instead_fits_the_budget(examples, tiny_base):
    needed = thimble.plan(examples, base=tiny_base).memory["total"]
    report = thimble.plan(examples, base=tiny_base, memory_budget=needed + 1000)
    assert report.alternatives
    assert all(other.memory_bytes <= needed + 1000 for other in report.alternatives)


def test_a_plan_refuses_what_train_would_refuse(tiny_base):
    with pytest.raises(InputError, match="--rank 0: expected at least 1"):
        thimble.plan("absent.jsonl", base=tiny_base, rank=0)


@pytest.mark.parametrize("init", ["kaiming", "pissa", "gradient:lora-ga"])
def test_what_a_plan_offers_is_what_a_plan_with_that_option_says(init, tiny_base, tmp_path):
    """Needs of the init and the longest row, here one of validation, count for alternatives as for the run."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is"}) for n in range(40)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "valid.jsonl").write_text(json.dumps({"prompt": "a longer row ", "completion": "word " * 90}))
    options = {"base": tiny_base, "init": init, "rank": 8, "compute": "fp32"}
    found = thimble.plan(folder, **options).alternatives
    assert {other.change.split()[0] for other in found} >= {"--targets", "--rank"}
    for other in found:
        name, value = other.change.split()
        again = thimble.plan(folder, **{**options, name.strip("-").replace("-", "_"): value})
        assert other.memory_bytes == again.memory["total"], other.change


def test_a_plan_offers_no_run_that_would_be_refused(examples, tiny_base):
    report = thimble.plan(examples, base=tiny_base, init="orthogonal", rank=2)
    assert not any(other.change == "--rank 1" for other in report.alternatives)
