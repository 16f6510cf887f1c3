"""Whole runs on a tiny base: what they leave behind, how they end, and that they can be repeated."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

import thimble
from thimble.backends.torch.session import TorchSession
from thimble.config.sources import build_config
from thimble.config.train import TrainConfig
from thimble.core.metrics import LossSum
from thimble.errors import InputError, RunError
from thimble.files.peft import load_adapter
from thimble.training import memory_plan

QUICK = {
    "seq_len": 64,
    "batch_tokens": 64,
    "max_steps": 6,
    "max_new_tokens": 4,
    "learning_rate": 0.01,
    "compute": "fp32",
}


def steps(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = ("seconds", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


def bytes_of(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def train(examples, tiny_base, tmp_path):
    def run(name, **options):
        return thimble.train(examples, base=tiny_base, out=str(tmp_path / name), **{**QUICK, **options})

    return run


def test_a_run_learns_and_leaves_everything_behind(train, tmp_path):
    report = train("run", max_steps=30)
    assert report.status == "done"
    assert report.loss_before == report.loss_base
    assert report.loss_after < report.loss_before - 0.5
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "adapter",
        "before.json",
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
        "report.json",
    }
    assert {"step", "loss", "learning_rate", "tokens", "seconds", "peak_memory_bytes"} <= set(
        json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert len(manifest["base"]["sha256"]) == 64
    assert manifest["data"]
    assert set(manifest["result"]) == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def test_the_adapter_comes_with_a_card_that_stays_as_its_owner_changes_it(train, tmp_path):
    for name in ("one", "two"):
        train(name, max_steps=4)
    one, two = ((tmp_path / name / "adapter" / "README.md").read_text() for name in ("one", "two"))
    assert one == two, "it says nothing of the time, the place or the speed"
    assert str(tmp_path) not in one
    card = ModelCard(one)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert f"| {report['loss_base']:.3f} | {report['loss_after']:.3f} |" in card.text
    assert f"{report['training_rows']} rows to learn from, {report['validation_rows']} held out" in card.text
    assert all(digest in card.text for digest in manifest["data"].values())
    (tmp_path / "one" / "adapter" / "README.md").write_text("Mine.\n")
    train("one", max_steps=4, resume=True)
    assert (tmp_path / "one" / "adapter" / "README.md").read_text() == "Mine.\n"


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(train, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(name, seed=seed)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert steps(tmp_path / "one") == steps(tmp_path / "two")
    assert bytes_of(tmp_path / "one") != bytes_of(tmp_path / "three")


def test_a_run_can_be_repeated_from_its_folder(train, tmp_path):
    train("one")
    thimble.train(None, config=str(tmp_path / "one" / "config.yaml"), out=str(tmp_path / "two"))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_a_run_that_diverges_keeps_the_last_good_adapter_and_says_so(train, tmp_path):
    with pytest.raises(RunError, match="training diverged at step .* The last good adapter is kept in"):
        train("run", learning_rate=1e3, max_steps=40)
    assert load_adapter(tmp_path / "run").is_finite()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["status"] == "diverged"
    assert (tmp_path / "run" / "report.html").exists()


def test_a_run_that_is_nan_for_good_ends_and_keeps_the_last_good_adapter(train, tmp_path, monkeypatch):
    true = TorchSession.gradient

    def gradient(self, state, work, objective, execution, key):
        found = true(self, state, work, objective, execution, key)
        return SimpleNamespace(loss=LossSum(math.nan, 1), norm=found.norm) if key.step >= 3 else found

    monkeypatch.setattr(TorchSession, "gradient", gradient)
    with pytest.raises(RunError, match="diverged at step 11: the loss is nan"):
        train("run", max_steps=40)
    assert load_adapter(tmp_path / "run").is_finite()
    assert any(factors.B.any() for factors in load_adapter(tmp_path / "run").layers.values())


def test_validation_rows_that_are_trained_on_are_warned_of(tiny_base, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is"}) for n in range(12)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "valid.jsonl").write_text("\n".join([rows[3], rows[3].replace("3", "33"), rows[5]]))
    report = thimble.train(folder, base=tiny_base, out=str(tmp_path / "run"), **QUICK)
    (warning,) = (text for text in report.messages["warning"] if "also among the training rows" in text)
    assert "2 validation rows (valid.jsonl line 1, valid.jsonl line 3)" in warning
    assert "valid.jsonl line 1" in warning


def test_an_interrupted_run_keeps_what_was_learned(train, tmp_path):
    taken = []
    report = train(
        "run", max_steps=50, on_event=lambda e: taken.append(e) if e.kind == "step" else None,
        should_stop=lambda: len(taken) >= 3,
    )  # fmt: skip
    assert (report.status, report.steps) == ("interrupted", 3)
    assert any(np.abs(factors.B).max() > 0 for factors in load_adapter(tmp_path / "run").layers.values())


def test_a_base_that_is_cut_off_while_it_is_read_ends_the_run_and_keeps_what_was_learned(examples, tiny_base, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(tiny_base, base)

    def cut(event):
        if event.kind == "step" and event.data["step"] == 2:
            with base.open("r+b") as file:
                file.truncate(base.stat().st_size - 1)

    with pytest.raises(RunError, match="became shorter while it was read, after step 2: what was learned"):
        thimble.train(examples, base=str(base), out=str(tmp_path / "run"), on_event=cut, **QUICK)
    assert any(np.abs(factors.B).max() > 0 for factors in load_adapter(tmp_path / "run").layers.values())
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "interrupted"


def test_a_resumed_run_ends_with_the_same_adapter_and_log(train, tmp_path):
    train("whole", max_steps=9)
    taken = []
    train(
        "broken", max_steps=9, checkpoint_every_steps=2,
        on_event=lambda e: taken.append(e) if e.kind == "step" else None, should_stop=lambda: len(taken) >= 5,
    )  # fmt: skip
    report = train("broken", max_steps=9, checkpoint_every_steps=2, resume=True)
    assert report.status == "done"
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "broken")
    assert steps(tmp_path / "whole") == steps(tmp_path / "broken")


def test_few_rows_that_are_known_by_heart_end_the_run_where_a_resumed_one_ends_too(train, tmp_path):
    options = {"max_steps": 150, "batch_tokens": 512}
    whole = train("whole", **options)
    losses = {row["step"]: row["loss"] for row in steps(tmp_path / "whole")}
    assert max(losses[whole.steps], losses[whole.steps - 1]) < 0.05 < losses[1]
    assert whole.steps < 150
    assert any("the training loss of 2 epochs in a row is below 0.05" in text for text in whole.messages["decision"])
    assert any(f"ended: after step {whole.steps} of 150" in text for text in whole.messages["decision"])
    taken = []
    train(
        "broken", **options, on_event=lambda e: taken.append(e) if e.kind == "step" else None,
        should_stop=lambda: len(taken) >= whole.steps - 1,
    )  # fmt: skip
    report = thimble.train(out=str(tmp_path / "broken"), resume=True)
    assert (report.status, report.steps) == ("done", whole.steps)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "broken")
    assert train("patient", **{**options, "patience": 0, "max_steps": whole.steps + 3}).steps == whole.steps + 3


@pytest.mark.parametrize(
    ("length", "beta2"),
    [
        ({"max_steps": 6}, 0.95),
        ({"max_steps": 5000}, 0.999),
        ({"max_steps": 6, "adam_beta2": 0.98}, 0.98),
        ({"max_steps": None, "max_minutes": 1e-4}, 0.95),
        ({"max_steps": None, "max_minutes": 1e4}, 0.999),
    ],
)
def test_the_optimiser_follows_the_steps_that_are_planned_and_is_kept(train, tmp_path, length, beta2):
    train("run", **length, should_stop=lambda: True)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["adam_beta2"] == beta2
    longer = build_config(TrainConfig, {"out": str(tmp_path / "run"), "resume": True, "max_steps": 9000})
    assert longer.adam_beta2 == beta2


def test_the_beta2_that_is_kept_is_the_one_trained_with(train, tmp_path):
    slow, quick = (train(name, adam_beta2=beta2).adapter for name, beta2 in (("slow", 0.999), ("quick", 0.95)))
    assert bytes_of(Path(slow).parent) != bytes_of(Path(quick).parent)
    assert bytes_of(Path(train("default").adapter).parent) == bytes_of(Path(quick).parent)


def test_resuming_a_finished_run_returns_its_report(train):
    first = train("run")
    again = train("run", resume=True)
    assert again.loss_after == first.loss_after
    assert again.steps == first.steps


def test_resuming_without_a_checkpoint_starts_from_the_beginning_and_says_so(train):
    report = train("run", resume=True)
    assert report.status == "done"
    assert any("no valid checkpoint" in note for note in report.messages["note"])


def test_resuming_with_damaged_checkpoints_alone_starts_from_the_beginning_with_a_warning(train, tmp_path):
    train("run", checkpoint_every_steps=3)
    (tmp_path / "run" / "report.json").unlink()
    for state in (tmp_path / "run" / "checkpoints").glob("step-*/state.safetensors"):
        state.write_bytes(state.read_bytes()[:-1])
    report = train("run", resume=True)
    assert report.steps == 6
    assert any("(step-00000006, step-00000003 found, but damaged)" in text for text in report.messages["warning"])


def test_a_damaged_checkpoint_is_passed_over(train, tmp_path):
    from thimble.training.checkpoint import latest_checkpoint

    train("run", checkpoint_every_steps=2)
    assert latest_checkpoint(tmp_path / "run").step == 6
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "state.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert latest_checkpoint(tmp_path / "run").step == 4


def test_plain_text_is_cut_into_rows_and_some_are_held_out(tiny_base, tmp_path):
    (tmp_path / "book.txt").write_text("the tool sewed and sewed until the thread was gone. " * 60)
    report = thimble.train(tmp_path / "book.txt", base=tiny_base, out=str(tmp_path / "run"), **QUICK)
    assert report.loss_after < report.loss_before


def test_long_rows_are_truncated_and_counted(tiny_base, tmp_path):
    rows = [{"prompt": "word " * 200, "completion": "done"}, *({"prompt": f"{n}", "completion": "x"} for n in range(6))]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = thimble.train(tmp_path / "long.jsonl", base=tiny_base, out=str(tmp_path / "run"), valid_split=0, **QUICK)
    assert any("1 training row longer than --seq-len (14%) lost" in warning for warning in report.messages["warning"])
    assert math.isnan(report.loss_before)


def test_a_metric_of_the_users_own_is_reported(train, tmp_path):
    (tmp_path / "score.py").write_text("def length(answer, reference):\n    return {'characters': len(answer)}\n")
    report = train("run", metric=f"{tmp_path}/score.py:length")
    assert set(report.metrics_after) == {"characters"}


def test_activation_checkpointing_gives_the_same_adapter(train, tmp_path, monkeypatch):
    train("kept")
    plans = memory_plan.execution_plans
    monkeypatch.setattr(
        memory_plan, "execution_plans", lambda *a: [replace(plan, checkpointed_blocks=a[3]) for plan in plans(*a)]
    )
    train("checkpointed")
    assert bytes_of(tmp_path / "kept") == bytes_of(tmp_path / "checkpointed")


def test_a_run_on_named_columns_is_resumed_and_measured_with_the_same(tmp_path, tiny_base):
    data, out = tmp_path / "mails.csv", str(tmp_path / "run")
    data.write_text("Betreff,der Text,Klasse\n" + "".join(f"say {n},now,{n} it is\n" for n in range(12)))
    named = {"prompt_template": "{Betreff} {der Text}: ", "completion_column": "klasse"}
    first = thimble.train(data, base=tiny_base, out=out, eval_rows=0, **named, **QUICK)
    assert thimble.train(data, base=tiny_base, out=out, resume=True).loss_after == first.loss_after
    report = thimble.evaluate(data, base=tiny_base, adapter=[out], max_new_tokens=1, compute="fp32", **named)
    assert report.results[0].answers[0]["reference"].endswith("it is")
    by_run = thimble.evaluate(data, base=tiny_base, adapter=[out], max_new_tokens=1, compute="fp32")
    assert [result.loss for result in by_run.results] == [result.loss for result in report.results]
    with pytest.raises(
        InputError, match=r"the columns are Betreff, der Text, Klasse.* add --prompt-template '{Betreff}"
    ):
        thimble.evaluate(data, base=tiny_base)


def test_a_run_on_the_upper_blocks_runs_the_lower_ones_once_and_is_resumed_bit_for_bit(train, tmp_path, monkeypatch):
    from thimble.backends.torch.features import Features

    kept, put = [], Features.put
    monkeypatch.setattr(
        Features, "put", lambda self, batch, hidden: kept.append(batch.tokens) or put(self, batch, hidden)
    )
    options = {
        "epochs": 3.0,
        "max_steps": None,
        "batch_tokens": 64,
        "targets": ("last-1",),
        "checkpoint_every_steps": 1,
    }
    whole = train("whole", **options)
    assert sum(kept) == whole.tokens / 3
    assert any("run once" in text for text in whole.messages["decision"])
    taken = []
    train(
        "broken", **options, on_event=lambda e: taken.append(e) if e.kind == "step" else None,
        should_stop=lambda: len(taken) >= whole.steps // 2 + 1,
    )  # fmt: skip
    assert train("broken", **options, resume=True).steps == whole.steps
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "broken")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("tmp")]


def test_a_disk_without_room_for_features_is_told_and_the_run_goes_on(train, monkeypatch):
    from thimble.backends.torch import features

    monkeypatch.setattr(features, "MOST_BYTES", 10)
    report = train("run", epochs=2.0, max_steps=None, targets=("last-1",))
    assert report.status == "done"
    assert any("are free on the disk" in text for text in report.messages["note"])


def stopped(train, **options):
    """A run that was stopped after two steps, with what was measured before them."""
    taken = []
    train(
        "run", **options, on_event=lambda e: taken.append(e) if e.kind == "step" else None,
        should_stop=lambda: len(taken) >= 2,
    )  # fmt: skip


def test_answers_that_are_measured_otherwise_when_a_run_goes_on_are_measured_otherwise_before_it_too(train, tmp_path):
    (tmp_path / "mine.py").write_text("def long(answer, reference):\n    return len(answer) > 2\n")
    whole = train("whole", eval_rows=2)
    stopped(train, eval_rows=0, metric="none")
    found = train("run", eval_rows=2, metric=f"{tmp_path}/mine.py:long", resume=True)
    assert found.metrics_rows == 1
    assert found.metrics_before.keys() == found.metrics_after.keys()
    assert found.metrics_after
    assert (found.loss_base, found.loss_before) == (whole.loss_base, whole.loss_before)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "run")


def test_a_run_that_goes_on_with_other_options_says_that_it_ends_otherwise(train):
    stopped(train)
    found = train("run", learning_rate=0.02, warmup_steps=3, max_steps=5, resume=True)
    told = [text for text in found.messages["warning"] if "it counts from here on" in text]
    assert [text.split(":")[0] for text in told] == [
        "--learning-rate is 0.02, and the run began with 0.01", "--warmup-steps is 3, and the run began with 1",
        "--max-steps is 5, and the run began with 6",
    ]  # fmt: skip


def test_a_run_that_goes_on_as_it_began_says_nothing_of_options(train):
    stopped(train)
    assert not any("it counts from here on" in text for text in train("run", resume=True).messages["warning"])
