"""The keys of reports: for one release the old ones stand beside the new ones, and both are read."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import thimble
from thimble.report.keys import RENAMED, to_json_dict, with_new_keys
from thimble.training.result import TrainReport


@dataclass
class Inner:
    target_tokens: int
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Outer:
    messages: dict[str, list[str]]
    results: list[Inner]
    config: dict[str, Any]
    loss: float = math.nan


def test_a_report_carries_old_and_new_keys_with_the_same_values():
    report = TrainReport(
        messages={"note": ["x"]}, rollbacks=2, best_step=7, target_tokens=9, metrics_rows=4,
        metrics_before={"exact match": 0.25}, metrics_after={"exact match": 0.5}, initialization={"seconds": 1.5},
    )  # fmt: skip
    values = to_json_dict(report)
    names = {
        "told": "messages", "returns": "rollbacks", "kept_step": "best_step", "label_tokens": "target_tokens",
        "task_rows": "metrics_rows", "task_before": "metrics_before", "task_after": "metrics_after",
        "start": "initialization",
    }  # fmt: skip
    for old, new in names.items():
        assert values[old] == values[new] == getattr(report, new), old


def test_the_reports_inside_a_report_carry_old_keys_too_and_free_objects_do_not():
    report = Outer({}, [Inner(3, {"rollbacks": 1.0})], {"messages": 1})
    values = to_json_dict(report)
    assert values["results"] == [{"target_tokens": 3, "label_tokens": 3, "scores": {"rollbacks": 1.0}}]
    assert values["config"] == {"messages": 1}
    assert values["loss"] is None, "JSON has no NaN"


def test_old_keys_are_read_as_new_ones_and_new_ones_win():
    assert with_new_keys({"told": 1, "returns": 2, "steps": 3}) == {"messages": 1, "rollbacks": 2, "steps": 3}
    assert with_new_keys({"told": 1, "messages": 2}) == {"messages": 2}
    assert with_new_keys({"messages": 2, "told": 1}) == {"messages": 2}


def test_no_old_key_is_a_key_of_its_own_today():
    assert not set(RENAMED.values()) & set(RENAMED)
    assert not set(RENAMED.values()) & set(TrainReport.__dataclass_fields__)


def test_every_command_prints_old_and_new_keys(thimble, tiny_base, examples):
    _, out, _ = thimble("plan", examples, "--base", tiny_base, "--json")
    values = json.loads(out)
    assert values["told"] == values["messages"]
    assert values["label_tokens_per_epoch"] == values["target_tokens_per_epoch"]
    _, out, _ = thimble("evaluate", examples, "--base", tiny_base, "--json", "--eval-rows", "1")
    values = json.loads(out)
    assert values["told"] == values["messages"]
    assert [row["label_tokens"] for row in values["results"]] == [row["target_tokens"] for row in values["results"]]


def test_report_json_carries_old_and_new_keys(tiny_base, examples, tmp_path):
    thimble.train(examples, base=tiny_base, out=str(tmp_path / "run"), max_steps=2, eval_rows=0)
    text = (tmp_path / "run" / "report.json").read_text()
    values = json.loads(text, parse_constant=lambda word: refuse(word))
    assert values["told"] == values["messages"] != {}
    assert values["label_tokens"] == values["target_tokens"] > 0
    assert values["kept_step"] == values["best_step"] == 2


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")
