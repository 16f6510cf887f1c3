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


def test_questions_of_validation_rows_that_training_rows_answer_otherwise_are_told(tiny_base, tmp_path):
    rows = [json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is"}) for n in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "valid.jsonl").write_text("\n".join([rows[3].replace("it is", "again"), rows[5].replace("5", "55")]))
    told = thimble.plan(tmp_path, base=tiny_base, compute="fp32", seq_len=64, rank=4).messages["warning"]
    rows += rows[:2]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    notes = thimble.plan(tmp_path, base=tiny_base, compute="fp32", seq_len=64, rank=4).messages["note"]
    assert "2 of 14 training rows repeat one before them: learned as often" in notes
    assert any("the question of 1 validation row (valid.jsonl line 1) is in training rows too" in text for text in told)


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


def better_in_something(report) -> bool:
    total, seconds = report.memory["total"], report.seconds_per_step
    return all(it.memory_bytes < total or it.seconds_per_step < seconds for it in report.alternatives)


@pytest.mark.parametrize(
    "options", [{}, {"compute": "fp32"}, {"store": "int8"}, {"store": "dense"}, {"rank": 1}], ids=str
)
def test_nothing_is_offered_that_is_worse_in_everything(examples, tiny_base, options):
    assert better_in_something(thimble.plan(examples, base=tiny_base, **options))


# ---- another machine ------------------------------------------------------------------------------------------------


def test_a_plan_for_another_machine_scales_what_was_measured_and_says_so(examples, tiny_base):
    here = thimble.plan(examples, base=tiny_base)
    cores = 4 * here.machine["cores"]
    there = thimble.plan(examples, base=tiny_base, machine=f"cores={cores},memory=8GB")
    assert there.machine["cores"] == cores
    assert there.machine["flops"]["fp32"] == pytest.approx(4 * here.machine["flops"]["fp32"])
    assert there.machine["copy_bytes"] == here.machine["copy_bytes"]
    assert there.available_bytes == 7_400_000_000
    assert (here.machine["is_estimate"], there.machine["is_estimate"]) == (False, True)
    [told] = [text for text in there.messages["warning"] if text.startswith("planned for ")]
    assert f"{cores} cores like those of" in told
    assert there.seconds_per_step < here.seconds_per_step
    assert better_in_something(there)


def test_a_machine_of_more_memory_than_this_one_may_be_planned_for(examples, tiny_base):
    assert thimble.plan(examples, base=tiny_base, machine={"memory": "9 TB"}).available_bytes == 9e12 - 600e6


@pytest.mark.parametrize("options", [{}, {"memory_budget": "4GB"}])
def test_a_run_that_does_not_fit_another_machine_is_refused(examples, tiny_base, options):
    with pytest.raises(InputError, match=r"--machine leaves 0\.10 GB"):
        thimble.plan(examples, base=tiny_base, machine="cores=1,memory=700MB", **options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cores=0", "cores=0: expected a whole number from 1 to 1024"),
        ("cores=many", "cores=many: expected a whole number"),
        ("memory=much", "expected a size such as 4GB"),
        ("disk=1GB", "expected cores, memory or both, each once"),
        ("cores=2,cores=4", "each once"),
        ("8GB", "expected cores, memory or both"),
    ],
)
def test_a_machine_that_is_none_is_refused(given, said, tiny_base, examples):
    with pytest.raises(InputError, match=said):
        thimble.plan(examples, base=tiny_base, machine=given)


def test_this_machine_is_measured_again_when_that_is_asked_for(examples, tiny_base, monkeypatch, tmp_path):
    from thimble.backends.torch import compute

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    races = []
    monkeypatch.setattr(compute, "race", lambda: races.append(1) or {"fp32": 1e11})
    monkeypatch.setattr(compute.LoadMeter, "share", lambda self: 0.0)
    thimble.plan(examples, base=tiny_base)
    thimble.plan(examples, base=tiny_base)
    assert len(races) == 1
    thimble.plan(examples, base=tiny_base, remeasure=True)
    assert len(races) == 2, "once, not for every alternative"


@pytest.mark.parametrize("targets", ["", []])
def test_a_run_that_adapts_nothing_is_refused(tiny_base, targets):
    with pytest.raises(InputError, match="--targets '': names no layer to adapt"):
        thimble.plan([{"prompt": "a", "completion": "b"}] * 3, base=tiny_base, targets=targets)


def test_a_warm_up_that_is_longer_than_the_run_is_told(tiny_base):
    rows = [{"prompt": f"a {n}", "completion": "b"} for n in range(9)]
    found = thimble.plan(rows, base=tiny_base, max_steps=2, warmup_steps=50)
    assert any("--warmup-steps is 50, more than the 2 steps of the run" in text for text in found.messages["warning"])
