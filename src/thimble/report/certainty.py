"""How far the probabilities of a classifier can be believed, and what other thresholds would give, for the page."""

from collections.abc import Mapping
from typing import Any

from thimble.report.charts import draw_reliability
from thimble.report.formatting import number, percent

Rows = list[tuple[str, ...]]


def certainty_of(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Calibration and thresholds as the template shows them; None if neither was measured."""
    details = report.get("task_details") or {}
    calibration, thresholds = details.get("calibration"), details.get("thresholds")
    if not calibration:
        return None
    return {
        "chart": draw_reliability(calibration),
        "summary": _summary(calibration),
        "thresholds": _threshold_rows(thresholds) if thresholds else [],
        "note": _threshold_note(thresholds) if thresholds else "",
    }


def _summary(calibration: Mapping[str, Any]) -> str:
    plain, scaled = calibration["plain"], calibration["scaled"]
    temperature = calibration["temperature"]
    way = (
        "too sure of itself"
        if temperature > 1.05
        else "not sure enough"
        if temperature < 0.95
        else "about as sure as it is right"
    )
    helped = scaled["error"] < plain["error"]
    return (
        f"The model is {way}: expected calibration error {percent(plain['error'])}, and {percent(scaled['error'])} "
        "after logits are divided by a temperature, fitted on one half of the "
        f"{calibration['rows']:,} rows and judged on the other. On all of them it is {number(temperature, 2)}"
        + ("." if helped else ", which brings nothing here: use the probabilities as they are.")
    )


def _threshold_rows(thresholds: Mapping[str, Any]) -> Rows:
    names = ("precision", "recall", "f1", "accuracy")
    rows: Rows = [("threshold", "precision", "recall", "F1", "accuracy")]
    for row in thresholds["rows"]:
        rows.append((f"{row['threshold']:.2f}", *(f"{row[name]:.2f}" for name in names)))
    best = thresholds["best"]
    rows.append((f"{best['threshold']:.2f} (best F1)", *(f"{best[name]:.2f}" for name in names)))
    return rows


def _threshold_note(thresholds: Mapping[str, Any]) -> str:
    return (
        f"“{thresholds['name']}”, the rarer label, is said where its probability is at least the threshold. The last "
        "line is honest about its choice: the threshold is taken on one half of the rows and judged on the other."
    )
