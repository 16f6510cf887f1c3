"""What is claimed of a run: never more than was measured."""

import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from run_reports import STATES, full_report, steps
from thimble.core.labels import score_labels
from thimble.core.significance import compare, sign_test
from thimble.report.forgetting import forgetting
from thimble.report.formatting import percent
from thimble.report.verdict import interval, judge


def verdict(report: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> str:
    said = judge(report, steps(20) if rows is None else rows)
    return f"{said.word}. {said.text}"


def task(before: float, after: float, rows: int = 200, **changes: Any) -> dict[str, Any]:
    values = {"metrics_before": {"exact match": before}, "metrics_after": {"exact match": after}, "metrics_rows": rows}
    return full_report(**values | changes)


@pytest.mark.parametrize(
    ("report", "start", "words"),
    [
        (full_report(), "Partly.", ["right” went from 0 to 95; 105 are still not right", "2.094 to 0.312"]),
        (task(0.1, 0.995), "Yes.", ["from 20 to 199; 1 is still not right"]),
        (task(0.1, 1.0), "Yes.", ["from 20 to 200. The"]),
        (task(0.1, 0.6), "Mostly.", ["from 20 to 120"]),
        (task(0.5, 0.2), "No.", ["got worse"]),
        (task(0.5, 0.5), "No.", ["no better"]),
        (task(0.2, 0.4, rows=10), "Unclear.", ["may be chance"]),
        (task(0.97, 0.98), "There was little to learn.", ["good at it"]),
        (task(0.1, 0.9, loss_after=2.5), "Yes.", ["The validation loss rose from 2.094 to 2.500"]),
        (task(0.1, 0.9, general_after=3.4), "Yes.", ["It forgot much of its general knowledge"]),
        (task(0.1, 0.9, general_after=2.98), "Yes.", ["It forgot some of its general knowledge"]),
        (
            task(0.0, 0.0, metrics_before={"valid JSON": 0.0, "all fields right": 0.0},
                 metrics_after={"valid JSON": 0.9, "all fields right": 0.0}),
            "Partly.", ["“valid JSON” clearly rose, but “all fields right” went from 0 to 0"],
        ),
        (STATES["no metric"][0], "Yes, by the loss.", ["only its answers can show"]),
        (full_report(metrics_after={}, metrics_before={}, loss_after=2.2), "No.", ["rose from 2.094 to 2.200"]),
        (full_report(metrics_after={}, metrics_before={}, loss_after=2.0935), "No change.", ["hardly changed"]),
        (STATES["no validation"][0], "Not measured.", ["There are no validation rows"]),
        (STATES["interrupted"][0], "Not measured.", ["stopped before the result was measured"]),
        (STATES["no step"][0], "Nothing was trained.", ["No step was taken"]),
    ],
)  # fmt: skip
def test_the_verdict_claims_what_was_measured(report: dict[str, Any], start: str, words: list[str]) -> None:
    said = verdict(report)
    assert said.startswith(start)
    for word in words:
        assert word in said


def test_transcripts_that_are_none_are_counted() -> None:
    details = {"CER": 0.2, "empty": 2, "in circles": 0, "cut off": 1}
    cautions = judge(task(0.1, 0.6, task_details=details), steps(20)).cautions
    expected = "Among the texts written after training: 2 empty; 1 cut off at --max-new-tokens."
    assert expected in cautions
    assert not judge(task(0.1, 0.6, task_details={"empty": 0, "in circles": 0, "cut off": 0}), steps(20)).cautions


@pytest.mark.parametrize(
    ("name", "why"),
    [("diverged", "step 23: the loss was NaN or Inf"), ("risen", "the loss had risen from 2.01 to 31.70")],
)
def test_a_diverged_run_says_why_and_claims_nothing(name: str, why: str) -> None:
    said = verdict(*STATES[name])
    assert said.startswith("No. Training diverged")
    assert why in said
    assert "quality was not measured" in said


@pytest.mark.parametrize(
    ("after", "said"),
    [(2.931, "little"), (2.945, "little"), (2.98, "some"), (3.2, "much"), (2.8, "nothing"), (1e9, "much")],
)
def test_forgetting_in_words(after: float, said: str) -> None:
    word, sentence = forgetting(full_report(general_after=after))
    assert word == said
    assert sentence.startswith(f"Forgot {said}")


def general(rise: float, spread: float) -> dict[str, Any]:
    """Forty rows of general text, whose losses rose by about so much."""
    rises = math.log1p(rise) + np.random.default_rng(0).permutation(np.linspace(-spread, spread, 40))
    changes = {"general_before": 3.0, "general_after": 3.0 + float(rises.mean())}
    return changes | {"general_comparison": asdict(compare(list(-rises)))}


@pytest.mark.parametrize(
    ("weight", "advised"), [(0.0, "--keep-general 0.3, fewer steps"), (0.3, "A larger --keep-general, fewer steps")]
)
def test_what_forgets_less_is_advised_by_what_was_tried(weight: float, advised: str) -> None:
    report = full_report(general_after=3.4)
    report["config"] = report["config"] | {"keep_general": weight}
    assert f". {advised} or a lower learning rate forget less." in forgetting(report)[1]


@pytest.mark.parametrize(
    ("rise", "spread", "word"),
    [
        (0.001, 0.01, "little"), (0.05, 0.05, "some"), (0.3, 0.2, "much"), (-0.1, 0.1, "nothing"),
        (0.12, 1.0, "unclear"), (0.05, 1.0, "unclear"), (0.01, 0.9, "unclear"), (-0.05, 1.5, "unclear"),
    ],
)  # fmt: skip
def test_forgetting_is_told_as_surely_as_the_rows_allow(rise: float, spread: float, word: str) -> None:
    report = full_report(**general(rise, spread))
    said, sentence = forgetting(report)
    assert said == word
    low, high = (
        float(text) / 100 for text in re.search(r"interval: (\S+?)\u202f% to (\S+?)\u202f%\)", sentence).groups()
    )
    assert low <= rise <= high
    assert any(sentence in text for text in judge(report, steps(20)).cautions) == (word in ("some", "much", "unclear"))


def test_a_change_of_answers_carries_its_interval() -> None:
    report = task(0.1, 0.5, 30)
    report["metric_comparisons"] = {"exact match": compared(12, 0, 30) | {"low": 0.21, "high": 0.57}}
    assert "from 3 to 15 (95 % interval of the change: +21 to +57 points of a hundred)" in verdict(report)


def test_the_interval_is_wilsons() -> None:
    assert [interval(0.0, 200), interval(0.475, 200), interval(1.0, 10)] == [
        "0–2\u202f%",
        "41–54\u202f%",
        "72–100\u202f%",
    ]


# ---- what few rows can carry ----------------------------------------------------------------------------------------


def compared(better: int, worse: int, rows: int) -> dict[str, Any]:
    """Answers of which so many rose and fell."""
    found = {"rows_before": rows, "rows_after": rows, "rows": rows, "better": better, "worse": worse}
    return found | {"chance": sign_test(better, worse), "chance_worse": sign_test(worse, better)}


def by_loss(**changes: Any) -> dict[str, Any]:
    """A run without a metric, whose loss fell on all of 30 rows."""
    values = {
        "metrics_before": {},
        "metrics_after": {},
        "metrics_rows": 0,
        "loss_comparison": asdict(compare([0.5] * 30)),
    }
    return full_report(**values | changes)


@pytest.mark.parametrize(
    ("rows", "better", "worse", "tone", "word"),
    [
        (3, 3, 0, "unknown", "Too few rows to tell"),
        (7, 7, 0, "unknown", "Too few rows to tell"),
        (8, 8, 0, "good", "Yes"),
        (30, 6, 0, "mixed", "Partly"),
        (30, 5, 0, "mixed", "Unclear"),
        (30, 9, 4, "mixed", "Unclear"),
        (30, 0, 6, "bad", "No"),
    ],
)
def test_answers_are_compared_row_by_row(rows: int, better: int, worse: int, tone: str, word: str) -> None:
    before = 0.0 if not worse else worse / rows
    report = task(before, before + (better - worse) / rows, rows)
    report["metric_comparisons"] = {"exact match": compared(better, worse, rows)}
    said = judge(report, steps(20))
    assert (said.tone, said.word) == (tone, word)


def test_a_result_chosen_among_many_steps_needs_a_clearer_gain() -> None:
    report = task(0.0, 6 / 30, 30, metric_comparisons={"exact match": compared(6, 0, 30)}, steps=20)
    watched = [{**row, "held_out_loss": 1.0} for row in steps(20)]
    assert judge(report | {"best_step": 20}, watched).word == "Partly"
    assert judge(report | {"best_step": 10}, watched).word == "Unclear"


def test_without_rows_to_compare_nothing_is_claimed_by_the_loss() -> None:
    assert judge(by_loss(), steps(20)).tone == "good"
    for rows in (0, 1, 7):
        said = judge(by_loss(loss_comparison=asdict(compare([0.5] * rows))), steps(20))
        assert (said.tone, said.word) == ("unknown", "Too few rows to tell")


@pytest.mark.parametrize("is_metric", [True, False])
@pytest.mark.parametrize(("rise", "is_in_word"), [(0.05, False), (0.5, False), (17.63, True)])
def test_what_was_forgotten_stands_with_the_verdict(is_metric: bool, rise: float, is_in_word: bool) -> None:
    general = {"general_before": 3.0, "general_after": 3.0 + math.log(1 + rise)}
    report = task(0.1, 1.0, **general) if is_metric else by_loss(**general)
    said = judge(report, steps(20))
    assert said.tone == ("good" if rise < 0.1 else "mixed")
    assert ("forgot much" in said.word) == is_in_word
    assert any(f"perplexity on a small general sample rose by {percent(rise)}" in text for text in said.cautions)


def test_a_lower_loss_in_a_language_that_the_base_hardly_knows_is_not_shown_in_green() -> None:
    said = judge(by_loss(token_ratio=1.79), steps(20))
    assert said.tone == "mixed"
    assert any("1.8 times the tokens of English" in text for text in said.cautions)
    assert judge(by_loss(token_ratio=1.3), steps(20)).cautions == ()
    right = judge(task(0.1, 1.0, token_ratio=1.79), steps(20))
    assert (right.tone, len(right.cautions)) == ("good", 1), "answers that are right are right"


@pytest.mark.parametrize(
    ("train_after", "valid_after", "is_recall"),
    [(0.1, 2.0, True), (0.1, 2.2, True), (1.5, 1.6, False), (2.05, 2.09, False)],
)
def test_recall_of_training_rows_is_told_from_learning(train_after: float, valid_after: float, is_recall: bool) -> None:
    report = by_loss(loss_train_before=2.1, loss_train_after=train_after, loss_after=valid_after)
    assert any("learned the training rows by heart" in text for text in judge(report, steps(20)).cautions) == is_recall


def test_always_writing_the_most_frequent_label_is_no_success() -> None:
    scores = asdict(score_labels([("a", "a")] * 18 + [("b", "a")] * 2, {"a": 90, "b": 10}))
    report = full_report(
        metrics_before={"accuracy": 0.0}, metrics_after={"accuracy": 0.9}, metrics_rows=20,
        metric_comparisons={"accuracy": compared(18, 0, 20)}, labels={"after": scores, "training_rows": {"a": 90}},
    )  # fmt: skip
    said = judge(report, steps(20))
    assert (said.tone, said.word) == ("mixed", "Partly")
    assert any("Always writing “a” would be right in 90" in text for text in said.cautions)


@pytest.mark.parametrize(("rows", "is_told"), [(1, False), (7, False), (8, True)])
def test_a_few_validation_rows_do_not_tell_that_training_rows_were_learned_by_heart(rows: int, is_told: bool) -> None:
    apart = asdict(compare([-0.1] * rows))
    report = full_report(loss_train_before=8.4, loss_train_after=2.9, loss_base=7.0, loss_before=7.0, loss_after=7.1,
                         loss_comparison=apart)  # fmt: skip
    assert any("learned the training rows by heart" in text for text in judge(report, steps(20)).cautions) == is_told
