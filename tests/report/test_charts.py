"""The charts of the page: drawn of any log, small, and in the colours of the page."""

import json
from pathlib import Path

from run_reports import STATES, full_report, render, steps
from thimble.report.charts import draw_charts


def test_rows_of_a_json_log_with_gaps_are_drawn(tmp_path: Path) -> None:
    rows = json.loads(json.dumps(steps(30)).replace("9.8", "null", 1))
    rows[4]["loss"], rows[5]["grad_norm"] = None, None
    del rows[6]["learning_rate"]
    _, page = render(tmp_path, full_report(steps=30), rows)
    assert "NaN or Inf at step 5" in page.text


def test_a_long_run_is_thinned_out(tmp_path: Path) -> None:
    text, page = render(tmp_path, *STATES["long"])
    assert len(text) < 120_000
    assert "means of 23 steps" in page.text


def test_colours_are_those_of_the_page() -> None:
    charts = draw_charts(*STATES["full"])
    assert "var(--accent)" in charts["loss"]
    assert "#0" not in charts["loss"], "a stand-in is left"


def test_validation_during_training_and_the_best_step_are_named(tmp_path: Path) -> None:
    rows = [row | ({"held_out_loss": 0.4} if row["step"] % 10 == 0 else {}) for row in steps(130)]
    _, page = render(tmp_path, full_report(best_step=112), rows)
    assert "validation during training, on some of the rows; best step: 112" in page.text


def test_a_log_of_one_step_has_no_curve() -> None:
    assert draw_charts(full_report(steps=1), steps(1)) is None
