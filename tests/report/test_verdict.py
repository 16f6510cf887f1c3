"""What is claimed of a run: never more than was measured."""

from typing import Any

import pytest

from run_reports import STATES, full_report, steps
from thimble.report.verdict import forgetting, interval, judge


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


def test_the_interval_is_wilsons() -> None:
    assert [interval(0.0, 200), interval(0.475, 200), interval(1.0, 10)] == [
        "0–2\u202f%",
        "41–54\u202f%",
        "72–100\u202f%",
    ]
