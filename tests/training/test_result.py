"""report.json is read again: that of this release and that of the one before."""

import hashlib
import json
import math

import thimble
from thimble.report.keys import RENAMED, to_json_dict
from thimble.training.result import TrainReport, read_report

OLD = {
    "status": "done", "out": "run", "steps": 30, "label_tokens": 90, "task_before": {"exact match": 0.0},
    "task_after": {"exact match": 0.5}, "task_rows": 4, "start": {"seconds": 2.0}, "kept_step": 20, "returns": 1,
    "told": {"decision": ["compute: fp32"], "note": [], "warning": []}, "loss_after": None, "unknown": 1,
}  # fmt: skip


def test_a_report_of_the_release_before_is_read():
    report = read_report(OLD)
    assert (report.target_tokens, report.metrics_rows, report.best_step, report.rollbacks) == (90, 4, 20, 1)
    assert report.metrics_before == {"exact match": 0.0}
    assert report.metrics_after == {"exact match": 0.5}
    assert report.initialization == {"seconds": 2.0}
    assert report.messages["decision"] == ["compute: fp32"]
    assert math.isnan(report.loss_after)


def test_a_report_that_is_written_is_read_as_it_was():
    report = TrainReport(steps=3, target_tokens=7, rollbacks=1, messages={"note": ["x"]}, loss_base=2.0)
    again = read_report(json.loads(json.dumps(to_json_dict(report))))
    assert to_json_dict(again) == to_json_dict(report)
    assert math.isnan(again.loss_after)


def test_resuming_a_finished_run_gives_its_report_also_from_the_release_before(tiny_base, examples, tmp_path):
    out = tmp_path / "run"
    report = thimble.train(examples, base=tiny_base, out=str(out), max_steps=2, eval_rows=0)
    (out / "report.json").write_text(json.dumps(_with_old_keys_only(to_json_dict(report))))
    again = thimble.train(examples, base=tiny_base, out=str(out), resume=True)
    assert to_json_dict(again) == to_json_dict(report)


def test_a_checkpoint_of_the_release_before_is_resumed_to_the_same_adapter(tiny_base, examples, tmp_path):
    options = {"base": tiny_base, "max_steps": 4, "checkpoint_every_steps": 2, "eval_rows": 2}
    whole = thimble.train(examples, out=str(tmp_path / "whole"), **options)
    steps: list[int] = []
    cut = tmp_path / "cut"
    thimble.train(
        examples, out=str(cut), **options, on_event=lambda event: steps.append(1) if event.kind == "step" else None,
        should_stop=lambda: len(steps) >= 2,
    )  # fmt: skip
    (cut / "report.json").unlink()
    before = json.loads((cut / "before.json").read_text())
    (cut / "before.json").write_text(json.dumps(_with_old_keys_only(before)))
    [folder] = (cut / "checkpoints").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["progress"] = _with_old_keys_only(manifest["progress"])
    seal = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": seal}))
    resumed = thimble.train(examples, base=tiny_base, out=str(cut), resume=True)
    assert (resumed.target_tokens, resumed.loss_after) == (whole.target_tokens, whole.loss_after)
    assert resumed.metrics_before == whole.metrics_before


def _with_old_keys_only(values: dict) -> dict:
    return {RENAMED.get(key, key): value for key, value in values.items() if key not in RENAMED.values()}
