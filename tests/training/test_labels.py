"""Runs whose answers are labels, and runs with too few rows or a metric that fails, from end to end on a tiny base."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import thimble
from run_reports import Page
from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import StepKey
from thimble.core.labels import AnswerCounts, balanced
from thimble.errors import InputError, RunError
from thimble.events import EventLog, ignore
from thimble.files.peft import load_adapter
from thimble.models.execution import ExecutionPlan
from thimble.report.terminal import render_evaluate, render_train
from thimble.training import sink
from thimble.training.control import Control
from thimble.training.tasks import text
from thimble.training.tasks.module_task import ModuleTask
from thimble.training.watch import Watch

QUICK = {"seq_len": 64, "batch_tokens": 128, "max_steps": 3, "max_new_tokens": 3, "compute": "fp32", "rank": 4}


@pytest.fixture
def tickets(tmp_path):
    path = tmp_path / "tickets.jsonl"
    labels = ["billing"] * 30 + ["shipping"] * 24 + ["other"] * 6
    rows = [{"prompt": f"{label[0]} {n} ", "completion": label} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_on_labels_says_so_and_reports_label_by_label(tiny_base, tickets, tmp_path):
    answers = tmp_path / "all answers.jsonl"
    report = thimble.train(
        tickets, base=tiny_base, out=str(tmp_path / "run"), valid_split=0.3, eval_rows=12, answers=str(answers), **QUICK
    )
    assert report.metric == "labels"
    assert set(report.metrics_after) == {"accuracy"}
    assert any(note.startswith("labels: 3 different answers in the training rows") for note in report.messages["note"])
    after = report.labels["after"]
    assert after["rows"] == sum(score["rows"] for score in after["labels"]) == 12
    assert {score["label"] for score in after["labels"] if score["rows"]} == {"billing", "shipping", "other"}
    assert {sample["reference"] for sample in report.samples} == {"billing", "shipping", "other"}
    assert sum(report.labels["training_rows"].values()) == 42
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 12
    assert set(lines[0]) == {"source", "asked", "reference", "before", "scores_before", "after", "scores_after"}
    shown = render_train(report)
    for words in ("did it work?", report.verdict["text"][:40], "expected \\ written", "macro F1", "always writing"):
        assert words in shown, words
    page = Page(Path(report.out, "report.html").read_text(encoding="utf-8"))
    for words in (
        report.verdict["text"],
        "label by label",
        "macro F1",
        "precision recall F1",
        *report.verdict["cautions"],
    ):
        assert " ".join(words.split()) in page.text, words
    saved = json.loads(Path(report.out, "report.json").read_text())
    assert saved["verdict"]["word"] == report.verdict["word"]
    assert "answers" not in Path(report.out, "config.yaml").read_text().replace("answers: null", "")


def test_evaluating_labels_compares_with_the_base_and_writes_every_answer(tiny_base, tickets, tmp_path):
    thimble.train(tickets, base=tiny_base, out=str(tmp_path / "run"), eval_rows=0, **QUICK)
    answers, metric = tmp_path / "new" / "answers.jsonl", tmp_path / "score.py"
    metric.write_text(
        "def score(answer, reference):\n    return {'long': len(answer)} if answer else {'empty': True}\n"
    )
    options = {"base": tiny_base, "adapter": [str(tmp_path / "run")], "eval_rows": 9, "max_new_tokens": 3}
    report = thimble.evaluate(tickets, answers=str(answers), **options)
    base, other = report.results
    assert report.metric == "labels"
    assert base.labels["majority"] == "billing"
    assert other.loss_comparison["rows"] == 32
    assert other.metric_comparisons["accuracy"]["rows"] == 9
    assert {answer["reference"] for answer in base.answers} == {"billing", "shipping", "other"}
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["model"] for line in lines] == ["base"] * 9 + [str(tmp_path / "run")] * 9
    assert any("trained on rows of this file" in warning for warning in report.messages["warning"])
    shown = render_evaluate(report)
    for words in ("against the base row by row", "loss: ", "accuracy: ", "expected \\ written"):
        assert words in shown, words
    again = thimble.evaluate(tickets, metric=f"{metric}:score", **options)
    assert set(again.results[1].scores) <= {"long", "empty"}
    assert sum(again.results[0].counts.values()) == 9
    assert "mean of" in render_evaluate(again)
    with pytest.raises(InputError, match="--answers is .* exists: name another file"):
        thimble.evaluate(tickets, answers=str(answers), **options)


@pytest.mark.parametrize(
    ("body", "words"),
    [("return reference['label']", "score.py line 2"), ("pass", "score.py line 1: score returned nothing")],
    ids=["raises", "returns nothing"],
)
def test_a_metric_that_always_fails_does_not_cost_the_result(tiny_base, tickets, tmp_path, body, words):
    (tmp_path / "score.py").write_text(f"def score(answer, reference):\n    {body}\n")
    run, metric = tmp_path / "run", f"{tmp_path}/score.py:score"
    with pytest.raises(RunError, match="the run is done, with its adapter and report in") as ended:
        thimble.train(tickets, base=tiny_base, out=str(run), metric=metric, eval_rows=2, **QUICK)
    assert words in str(ended.value)
    assert f"thimble evaluate {tickets} --adapter {run}" in str(ended.value)
    assert load_adapter(run).is_finite()
    assert json.loads((run / "report.json").read_text())["loss_after"]
    assert (run / "report.html").exists()
    with pytest.raises(RunError, match=r"losses do not depend on it: base \d"):
        thimble.evaluate(tickets, base=tiny_base, metric=metric, eval_rows=2, max_new_tokens=2)


def test_the_adapter_is_there_before_anything_is_measured(tiny_base, tickets, tmp_path, monkeypatch):
    """Whatever ends the process while the result is measured, the result is kept."""
    true, times = text.score_answers, []

    def score(*args):
        times.append((tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists())
        if len(times) == 2:
            raise SystemError("killed")
        return true(*args)

    monkeypatch.setattr(text, "score_answers", score)
    with pytest.raises(SystemError):
        thimble.train(tickets, base=tiny_base, out=str(tmp_path / "run"), eval_rows=2, **QUICK)
    assert times == [False, True]
    assert load_adapter(tmp_path / "run").is_finite()


def test_few_rows_stop_nothing_choose_nothing_and_carry_no_coloured_verdict(tiny_base, tmp_path):
    rows = [{"prompt": f"say {n} ", "completion": f"{n} it is, and a little more of it"} for n in range(30)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**QUICK, "max_steps": 20, "learning_rate": 0.02, "metric": "none"}
    report = thimble.train(tmp_path / "few.jsonl", base=tiny_base, out=str(tmp_path / "run"), **options)
    assert (report.steps, report.best_step) == (20, 20)
    assert (report.verdict["tone"], report.verdict["word"]) == ("unknown", "Too few rows to tell")
    assert any(
        "3 validation rows: too few to tell a gain from chance" in warning and "--valid-split 0.35" in warning
        for warning in report.messages["warning"]
    )
    assert not any("end the run" in decision for decision in report.messages["decision"])
    assert report.loss_train_after < report.loss_train_before
    steps = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "held_out_loss" not in steps
    shown = thimble.train(
        tmp_path / "few.jsonl", base=tiny_base, out=str(tmp_path / "asked"), eval_every_steps=2, **options
    )
    assert "held_out_loss" in (tmp_path / "asked" / "metrics.jsonl").read_text()
    assert (shown.steps, shown.best_step) == (20, 20)
    assert any("too few to stop by" in decision for decision in shown.messages["decision"])


def test_rows_that_are_also_trained_on_prove_nothing(tiny_base, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.dumps({"prompt": f"say {n} ", "completion": f"{n} it is"}) for n in range(12)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "valid.jsonl").write_text("\n".join(rows))
    options = {**QUICK, "max_steps": 20, "learning_rate": 0.02}
    report = thimble.train(folder, base=tiny_base, out=str(tmp_path / "run"), **options)
    assert report.loss_after < report.loss_before
    assert report.known_rows == report.validation_rows == 12
    assert report.verdict["tone"] == "unknown"
    assert "12 of 12 validation rows are also among the training rows" in " ".join(report.verdict["cautions"])


def test_an_adapter_that_cannot_be_written_yet_is_written_at_the_end(tiny_base, tickets, tmp_path, monkeypatch):
    true, times = sink.run_folder.publish_adapter, []

    def publish(*args):
        times.append(1)
        if len(times) == 1:
            raise OSError(28, "No space left on device")
        return true(*args)

    monkeypatch.setattr(sink.run_folder, "publish_adapter", publish)
    report = thimble.train(tickets, base=tiny_base, out=str(tmp_path / "run"), eval_rows=0, **QUICK)
    assert any("No space left on device); it is tried again at the end" in text for text in report.messages["warning"])
    assert load_adapter(tmp_path / "run").is_finite()


class ThreeRows:
    """A reading of three rows of two labels."""

    loss, unit, costs, valid_costs = "labels", "tokens", [1, 1, 1], [1, 1, 1]

    def batch(self, part, rows, key):
        classes = np.array([0, 1, 1])[rows]
        return ModuleBatch({"x": np.zeros((len(rows), 1), np.float32)}, {"labels": classes}, rows)


def test_rows_are_weighted_where_they_are_learned_from_and_not_where_they_are_measured():
    task = ModuleTask(ThreeRows(), Watch(), "base", class_weights=balanced(AnswerCounts(3, Counter("abb")), "ab"))
    [[batch]] = task.work([0, 1, 2], ExecutionPlan("dense", micro_tokens=8), StepKey(0, 0)).shares
    assert batch.targets["weights"].tolist() == [1.5, 0.75, 0.75]
    [measured] = task._batches(
        "valid", [0, 1, 2], ExecutionPlan("dense", micro_tokens=8), Control(EventLog(ignore)), ""
    )
    assert "weights" not in measured.targets
