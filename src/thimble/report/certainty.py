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
    plain, scaled = (percent(calibration[name]["error"]) for name in ("plain", "scaled"))
    temperature = calibration["temperature"]
    halved = f"fitted on one half of the {calibration['rows']:,} rows and judged on the other"
    if calibration["scaled"]["error"] >= calibration["plain"]["error"]:
        return (
            f"Expected calibration error {plain}. Logits divided by a temperature, {halved}, give {scaled}: that "
            "brings nothing here, use the probabilities as they are."
        )
    return (
        f"The model is {'too sure of itself' if temperature > 1 else 'less sure than it may be'}: expected calibration "
        f"error {plain}, and {scaled} after logits are divided by a temperature, {halved}. For further rows divide by "
        f"{number(temperature, 2)}."
    )


def _threshold_rows(thresholds: Mapping[str, Any]) -> Rows:
    names = ("precision", "recall", "f1", "accuracy")
    rows: Rows = [("threshold", "precision", "recall", "F1", "accuracy")]
    for row in thresholds["rows"]:
        rows.append((f"{row['threshold']:.2f}", *(f"{row[name]:.2f}" for name in names)))
    return rows


def _threshold_note(thresholds: Mapping[str, Any]) -> str:
    best = thresholds["best"]
    return (
        f"“{thresholds['name']}”, the rarer label, is said where its probability is at least the threshold. F1 is best "
        f"at {best['threshold']:.2f} on these rows; a threshold chosen so on one half of them gives precision "
        f"{best['precision']:.2f}, recall {best['recall']:.2f} and F1 {best['f1']:.2f} on the other."
    )
