"""Learning rate as a pure function of the step, and the defaults that follow from the length of a run."""

import math

# Peak rate for adapters on all linear layers with alpha 32, at width 2000 for Llama-like bases and for so many target
# tokens a step, growing with their root: the noise of a gradient is that of the tokens it is taken over. The dependence
# on width is that of published sweeps (Schulman et al., LoRA Without Regret, 2025, and the sweeps behind it), which
# found half as much for longer runs; the values are our own (docs/tuning.md).
REFERENCE_RATE = 1e-3
REFERENCE_WIDTH = 2000
REFERENCE_TARGET_TOKENS = 5600
LEAST_TARGET_TOKENS = 400  # fewer do not lower the rate: what short answers teach first, their form, is no noise
WIDTH_EXPONENT = {"llama": 0.78, "qwen2": 0.08, "qwen3": 0.08}
UNKNOWN_EXPONENT = 0.4
MANY_ROWS = 50  # fewer are known by heart after as many epochs at a lower rate, and less is forgotten for them
FINAL_SHARE = 0.1
SHORT_RUN_STEPS, SHORT_RUN_BETA2, BETA2 = 1000, 0.95, 0.999


def default_rate(family: str, hidden_size: int, target_tokens: float, factor: float = 1.0) -> float:
    """Peak learning rate when the user names none, rounded to two digits.

    `target_tokens` are those of a step, as the mean of the run; for `factor` see `method_rates`.
    """
    exponent = WIDTH_EXPONENT.get(family, UNKNOWN_EXPONENT)
    share = min(max(target_tokens, LEAST_TARGET_TOKENS) / REFERENCE_TARGET_TOKENS, 1.0)
    rate = factor * REFERENCE_RATE * (REFERENCE_WIDTH / hidden_size) ** exponent * math.sqrt(share)
    return float(f"{rate:.1e}")


def few_rows_factor(rows: int) -> float:
    """What few training rows take off the default rate: √(rows / `MANY_ROWS`), at most 1."""
    return min(1.0, math.sqrt(rows / MANY_ROWS))


def default_beta2(steps: float) -> float:
    """AdamW's β₂ for a run of so many steps: 0.999 remembers about 1,000 squared gradients, more than a short run has.

    The published rates that `default_rate` builds on were found with 0.95.
    """
    return SHORT_RUN_BETA2 if steps < SHORT_RUN_STEPS else BETA2


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
