"""`thimble plan` on a tiny base: what it says is what a run does, and what it offers is what a plan with it says."""

import json

import pytest

import thimble
from thimble.errors import InputError


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
