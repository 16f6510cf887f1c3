"""Does the start of A and B matter? Every start at its own best learning rate, on two tasks, over paired seeds.

A start is tried at learning rates 1.78 apart, from its default upwards, with one seed; more are added while the best
lies at the edge. The best rate is then run with five seeds that share data, order and validation rows with those of
Kaiming's. What a start reads to calibrate is charged to it. Results are kept after every run, so that a run that was
stopped goes on; `--reduced` is a version of under twenty minutes. Writes initialisation.json, its chart and its part of
RESULTS.md.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from run import write_results
from short_runs import Bench, Kept, best_power, tasks

from thimble.core.method import INITS

HERE = Path(__file__).parent
ARMS = ("kaiming", "pissa", "milora", "corda", "eva", "gradient", "gradient:lora-ga")
FEWER = ("kaiming", "pissa", "gradient")  # on the second task, so that all of it takes about an hour
STEP = 1.78  # between learning rates: five to a decade and a quarter, as in arXiv:2602.04998
MOST_EXTRA = 3  # rates beyond the first ones
TASKS = ("tool calls", "documentation")
BETA2 = 0.95  # of AdamW; results of runs with 0.999, and the default rates of then, stay in the file and are left out
BATCH_TOKENS, EVAL_TOKENS, CALIBRATION_STEPS = 1024, 3000, 4
PASSES = {"inputs": 0.4, "gradients": 2.0}  # cost of a calibration token, in tokens that are learned from


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        arms: Starts, of which the second task has those in FEWER.
        steps: Of a run.
        eval_every: Steps between measurements.
        rates: Powers of STEP around a start's default rate.
        seeds: At the best rate.
    """

    arms: tuple[str, ...] = ARMS
    steps: int = 24
    eval_every: int = 6
    rates: tuple[int, ...] = (0, 1, 2)
    seeds: int = 5


REDUCED = Size(FEWER, steps=12, eval_every=4, seeds=3)


# ---- the protocol ---------------------------------------------------------------------------------------------------


class Study:
    """Runs of every start: those that were done, and those that are missing."""

    def __init__(self, kept: Kept, size: Size) -> None:
        self.kept, self.size, self._bench = kept, size, Bench()

    def result(self, task: str, arm: str, power: int, seed: int) -> dict[str, Any]:
        """A run at the default rate times STEP^power, with what the start reads to calibrate charged to it."""
        key = {"task": task, "arm": arm, "power": power, "seed": seed, "steps": self.size.steps, "beta2": BETA2}
        options = {
            "data": str(tasks()[task]), "init": arm, "seed": seed, "max_steps": self.size.steps, "seq_len": 640,
            "batch_tokens": BATCH_TOKENS, "calibration_steps": CALIBRATION_STEPS, "adam_beta2": BETA2,
        }  # fmt: skip

        def run() -> dict[str, Any]:
            usual = self._bench.plan(options)
            rate = usual.step_schedule.rate * STEP**power
            done = self._bench.train({**options, "learning_rate": rate}, EVAL_TOKENS, self.size.eval_every)
            read = [row for step in range(CALIBRATION_STEPS) for row in usual.step_schedule.rows(step)]
            charged = int(sum(len(usual.examples.train[row].ids) for row in read) * PASSES.get(INITS[arm].needs, 0))
            return {**done, "curve": [(charged + tokens, loss) for tokens, loss in done["curve"]]}

        return self.kept.result(key, run)

    def best_power(self, task: str, arm: str) -> int:
        """The learning rate of an arm with the lowest final loss, with one seed."""
        return best_power(
            lambda power: float(self.result(task, arm, power, 0)["final"]), self.size.rates, most_extra=MOST_EXTRA
        )


def compare(study: Study, task: str) -> list[dict[str, Any]]:
    """One line an arm: against Kaiming at its own best rate, seed by seed."""
    size = study.size
    arms = [arm for arm in size.arms if task == TASKS[0] or arm in FEWER]
    at_best = {arm: study.best_power(task, arm) for arm in arms}
    runs = {arm: [study.result(task, arm, power, seed) for seed in range(size.seeds)] for arm, power in at_best.items()}
    lines = []
    for arm in arms:
        speed = [math.log(tokens_to(run["curve"], other["final"]) / tokens_to(other["curve"], other["final"]))
                 for run, other in zip(runs[arm], runs["kaiming"], strict=True)]  # fmt: skip
        loss, general = (
            [run[name] - other[name] for run, other in zip(runs[arm], runs["kaiming"], strict=True)]
            for name in ("final", "general")
        )
        lines.append({
            "edge": " (edge)" if at_best[arm] == max(size.rates) + MOST_EXTRA else "",
            "task": task, "arm": arm, "rate": runs[arm][0]["rate"], "power": at_best[arm],
            "final": statistics.mean(run["final"] for run in runs[arm]), "speed": speed, "loss": loss,
            "general": general, "p_speed": p_value(speed), "p_loss": p_value(loss),
        })  # fmt: skip
    for name in ("p_speed", "p_loss"):
        holm([line for line in lines if line["arm"] != "kaiming"], name)
    return lines


def tokens_to(curve: list[list[float]], target: float) -> float:
    """Tokens until the loss first reaches a target, by straight lines between measurements and beyond the last."""
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if low <= target:
            return before + (after - before) * min(1.0, (high - target) / max(high - low, 1e-9))
    (before, high), (after, low) = curve[-2:]
    slope = (high - low) / (after - before)
    return min(4 * after, after + (low - target) / slope) if slope > 0 else 4 * after


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t."""
    n = len(values)
    spread = statistics.stdev(values) / math.sqrt(n)
    t = next(t for t in np.arange(1.9, 13, 0.001) if _tail(t, n - 1) <= 0.05)
    return statistics.mean(values), float(t) * spread


def p_value(values: list[float]) -> float:
    """Two-sided p of a mean of zero, by Student's t."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return _tail(abs(statistics.mean(values)) / spread, len(values) - 1) if spread else 1.0


def _tail(t: float, freedom: int) -> float:
    """Two-sided tail of Student's t, by the substitution x = √ν tan θ."""
    angles = np.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20001)
    density = np.cos(angles) ** (freedom - 1)
    whole = math.sqrt(math.pi) * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2)
    return float(2 * np.trapezoid(density, angles) / whole)


def holm(lines: list[dict[str, Any]], name: str) -> None:
    """Correct p values for their number (Holm, 1979)."""
    worst = 0.0
    for rank, line in enumerate(sorted(lines, key=lambda line: line[name])):
        worst = max(worst, min(1.0, line[name] * (len(lines) - rank)))
        line[name] = worst


# ---- writing --------------------------------------------------------------------------------------------------------


def as_page(lines: list[dict[str, Any]], size: Size) -> str:
    """The table for people."""
    page = [
        "## Where A and B begin",
        "",
        f"Written by `benchmarks/initialisation.py`: SmolLM2-135M-Instruct, rank 16 on all linear layers, {size.steps} "
        f"steps of {BATCH_TOKENS} tokens; each start at its own best of {len(size.rates) + 1} or more learning rates "
        f"(1.78 apart), then {size.seeds} paired seeds; mean and 95 % interval of the difference to Kaiming, p by "
        "Student's t with Holm's correction. Tokens a start reads to calibrate are charged to it. (edge): the highest "
        "rate tried.",
        "",
        "| task | start | best rate | × the default then | final loss | loss against Kaiming | p "
        "| tokens to Kaiming's final loss | p | general text |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        cells = [
            line["task"],
            line["arm"],
            f"{line['rate']:.1e}",
            f"{STEP ** line['power']:.2f}{line['edge']}",
            f"{line['final']:.4f}",
        ]
        if line["arm"] == "kaiming":
            cells += ["", "", "", "", ""]
        else:
            loss, speed, general = (interval(line[name]) for name in ("loss", "speed", "general"))
            low, high = math.exp(speed[0] - speed[1]) - 1, math.exp(speed[0] + speed[1]) - 1
            cells += [
                f"{loss[0]:+.4f} ± {loss[1]:.4f}", f"{line['p_loss']:.3f}",
                f"{math.exp(speed[0]) - 1:+.0%} ({low:+.0%} to {high:+.0%})", f"{line['p_speed']:.3f}",
                f"{general[0]:+.4f} ± {general[1]:.4f}",
            ]  # fmt: skip
        page.append(f"| {' | '.join(cells)} |")
    return "\n".join([*page, "", "![Validation loss over tokens, by start](initialisation.svg)", ""])


def draw(study: Study, lines: list[dict[str, Any]], size: Size) -> None:
    """Validation loss over tokens at each start's best rate, and final loss over the rate."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(line["task"] for line in lines))
    figure, axes = pyplot.subplots(len(names), 2, figsize=(10, 3.6 * len(names)), layout="constrained", squeeze=False)
    colours = dict(zip(ARMS, pyplot.get_cmap("tab10").colors, strict=False))
    for (curves, rates), name in zip(axes, names, strict=True):
        own = [
            run for run in study.kept.runs if (run["task"], run["steps"], run.get("beta2")) == (name, size.steps, BETA2)
        ]
        for line in (line for line in lines if line["task"] == name):
            arm = line["arm"]
            best = [run["curve"] for run in own if run["arm"] == arm and run["power"] == line["power"]]
            mean = np.mean(best, 0)
            curves.plot(mean[:, 0] / 1000, mean[:, 1], color=colours[arm], label=arm)
            tried = sorted((run["rate"], run["final"]) for run in own if run["arm"] == arm and run["seed"] == 0)
            rates.plot(*zip(*tried, strict=True), "o-", color=colours[arm], markersize=3)
        curves.set(title=f"{name}, best rate, mean of seeds", xlabel="thousand tokens", ylabel="validation loss")
        rates.set(title=f"{name}, one seed", xlabel="learning rate", ylabel="final validation loss", xscale="log")
        lowest = min(run["final"] for run in own)
        rates.set_ylim(lowest - 0.02, lowest + 0.4)
        for side in (curves, rates):
            side.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(HERE / "initialisation.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reduced", action="store_true", help="fewer starts, rates, seeds and steps")
    options = parser.parse_args()
    size = REDUCED if options.reduced else Size()
    study, lines = Study(Kept(HERE / "initialisation.json"), size), []
    for task in TASKS:
        lines += compare(study, task)
        (HERE / "initialisation.md").write_text(as_page(lines, size))
        draw(study, lines, size)
    write_results([])
    print((HERE / "initialisation.md").read_text())


if __name__ == "__main__":
    main()
