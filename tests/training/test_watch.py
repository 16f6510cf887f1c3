"""What validation rows are for: some choose the step that is kept, others judge."""

import json

import pytest

import thimble
from thimble.training.watch import LEAST_APART, MOST_CHOOSING, part_rows

QUICK = {"seq_len": 64, "batch_tokens": 128, "max_new_tokens": 3, "compute": "fp32", "rank": 4, "metric": "none"}


@pytest.mark.parametrize(("rows", "chosen"), [(0, 0), (39, 39), (40, 20), (60, 20), (90, 30), (5000, MOST_CHOOSING)])
def test_rows_choose_or_judge_where_there_are_enough(rows, chosen):
    unseen = list(range(0, 3 * rows, 3))
    choosing, judging = part_rows(unseen)
    assert len(choosing) == chosen
    if rows < LEAST_APART:
        assert choosing == judging == unseen
    else:
        assert sorted(choosing + judging) == unseen
        gaps = [later - earlier for earlier, later in zip(choosing, choosing[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 3, "evenly spread"


def rows_of(tmp_path, count):
    rows = [{"prompt": f"say {n} ", "completion": f"{n} it is, and a little more of it"} for n in range(count)]
    path = tmp_path / f"{count}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("held", "untouched"), [(50, 30), (39, 0)])
def test_a_run_judges_by_rows_that_choose_nothing(tiny_base, tmp_path, held, untouched):
    report = thimble.train(
        rows_of(tmp_path, 100), base=tiny_base, out=str(tmp_path / "run"), valid_split=held / 100, max_steps=8,
        eval_every_steps=2, learning_rate=0.02, **QUICK,
    )  # fmt: skip
    assert (report.validation_rows, report.untouched_rows) == (held, untouched)
    assert report.loss_comparison["rows"] == (untouched or 32)
    (told,) = (text for text in report.messages["decision"] if text.startswith("validation loss: "))
    assert ("if the loss of 10 other rows rose too" in told) == bool(untouched)


def test_where_nothing_is_watched_all_rows_judge(tiny_base, tmp_path):
    report = thimble.train(
        rows_of(tmp_path, 100), base=tiny_base, out=str(tmp_path / "run"), valid_split=0.5, max_steps=8,
        eval_every_steps=0, **QUICK,
    )  # fmt: skip
    assert (report.untouched_rows, report.loss_comparison["rows"]) == (0, 32)
