"""Learning rate as a pure function of the step; knows no optimiser."""

import math

# Peak rate for adapters on all linear layers with alpha 32, at width 2000 and 128 rows a step for Llama-like bases,
# growing with the root of the batch. The form is that of published sweeps, which found 5e-4 (Schulman et al., LoRA
# Without Regret, 2025, and the sweeps behind it); for the short runs that one machine makes, twice as much did better
# (benchmarks/RESULTS.md and LOG.md, 2026-11-26).
REFERENCE_RATE = 1e-3
REFERENCE_WIDTH = 2000
REFERENCE_ROWS = 128
WIDTH_EXPONENT = {"llama": 0.78, "qwen2": 0.08, "qwen3": 0.08}
UNKNOWN_EXPONENT = 0.4
FINAL_SHARE = 0.1


def default_rate(family: str, hidden_size: int, rows_per_step: float, factor: float = 1.0) -> float:
    """Peak learning rate when the user names none, rounded to two digits; for `factor` see `method_rates`."""
    exponent = WIDTH_EXPONENT.get(family, UNKNOWN_EXPONENT)
    rows = min(max(rows_per_step, 1.0), REFERENCE_ROWS)
    rate = factor * REFERENCE_RATE * (REFERENCE_WIDTH / hidden_size) ** exponent * math.sqrt(rows / REFERENCE_ROWS)
    return float(f"{rate:.1e}")


def learning_rate(peak: float, done: float, warmup: float, kind: str = "cosine") -> float:
    """The rate when a share `done` of a run is done and a share `warmup` of it is to rise linearly; never zero.

    Kind `cosine` falls to a tenth of the peak, `constant` stays.

    >>> learning_rate(1.0, 0.0, 0.0), learning_rate(1.0, 1.0, 0.0), learning_rate(1.0, 0.05, 0.1)
    (1.0, 0.1, 0.5)
    """
    if done < warmup:
        return peak * max(done, 1e-3 * warmup) / warmup
    if kind == "constant":
        return peak
    progress = min(1.0, (done - warmup) / max(1e-9, 1.0 - warmup))
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))
