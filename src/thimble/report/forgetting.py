"""What a run made the model forget: how far its perplexity on general text rose, and how sure that is."""

import math
from collections.abc import Mapping
from typing import Any

from thimble.report.formatting import is_number, percent, signed_percent

LITTLE, SOME, MOST = 0.02, 0.10, 1.0  # rise of perplexity on general text
MOST_NATS = 700.0  # exp of more overflows


def perplexity(loss: Any) -> float:
    """Perplexity of a loss in nats; NaN if there is none."""
    return math.exp(min(loss, MOST_NATS)) if is_number(loss) else math.nan


def forgetting(report: Mapping[str, Any]) -> tuple[str, str]:
    """How much was forgotten: `nothing`, `little`, `some`, `much`, `unclear` or empty, and a sentence."""
    rise = general_rise(report)
    if math.isnan(rise):
        return "", "Not measured."
    low, high = rise_interval(report)
    within = f" (95 % interval: {signed_percent(low)} to {signed_percent(high)})" if is_number(low) else ""
    change = f"perplexity on a small general sample {'rose' if rise >= 0 else 'fell'} by {percent(abs(rise))}{within}"
    if (rise >= LITTLE and low <= 0) or (rise < LITTLE and high >= SOME):
        return "unclear", f"What it forgot is unclear: {change}."
    if rise < -LITTLE:
        return "nothing", f"Forgot nothing: {change}."
    if rise < LITTLE:
        return "little", f"Forgot little or nothing: {change}."
    if rise < SOME:
        return "some", f"Forgot some: {change}. {_advice(report)}"
    return "much", f"Forgot much: {change}. {_advice(report)}"


def _advice(report: Mapping[str, Any]) -> str:
    """What forgets less, the way that was measured to cost the task least first (docs/tuning.md)."""
    keeping = "A larger --keep-general" if report["config"].get("keep_general") else "--keep-general 0.3"
    return f"{keeping}, fewer steps or a lower learning rate forget less."


def moved(report: Mapping[str, Any]) -> tuple[str, str]:
    """The share of places at which the model still goes on as the base, and a sentence; empty if not measured."""
    found = report.get("divergence") or {}
    if not found:
        return "", ""
    within = f"{percent(found['same_low'])} to {percent(found['same_high'])}"
    nats = f"{found['kl']:.3g} nats a token (95 % interval: {found['kl_low']:.3g} to {found['kl_high']:.3g})"
    return percent(found["same"]), (
        f"Of {found['places']:,} places in {found['texts']} texts that the base wrote, those at which both find the "
        f"same token likeliest (95 % interval: {within}). KL divergence from the base: {nats}."
    )


def general_rise(report: Mapping[str, Any]) -> float:
    """The rise of perplexity on general text, as a share; NaN if it was not measured."""
    before, after = report["general_before"], report["general_after"]
    return perplexity(after - before) - 1 if is_number(before) and is_number(after) else math.nan


def rise_interval(report: Mapping[str, Any]) -> tuple[float, float]:
    """Its 95 % interval over the rows of general text; NaN in reports of older releases."""
    compared = report.get("general_comparison") or {}
    gains = compared.get("high"), compared.get("low")  # of the loss: a gain is a fall
    low, high = (perplexity(-gain) - 1 if is_number(gain) else math.nan for gain in gains)
    return low, high
