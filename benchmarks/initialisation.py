"""Does the start of A and B matter? Every start at its own best learning rate, on two tasks, over paired seeds.

A start is tried at learning rates 1.78 apart, from its default upwards, with one seed; more are added while the best
lies at the edge. The best rate is then run with five seeds that share data, order and validation rows with those of
Kaiming's. What a start reads to calibrate is charged to it. Results are kept after every run, so that a run that was
stopped goes on; `--reduced` is a version of under twenty minutes. Writes initialisation.json, its chart and its part of
RESULTS.md.
"""

import argparse
import json
import math
import pydoc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from run import write_results

from thimble.backends.open import open_session
from thimble.backends.torch.session import TorchSession
from thimble.config.train import TrainConfig
from thimble.core.method import INITS
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches, shares
from thimble.events import EventLog, ignore
from thimble.training.initialise import Initialization, initialise
from thimble.training.plan import RunPlan, plan_run

HERE = Path(__file__).parent
DEMO_DATA = HERE.parent / "demo" / "data"
ARMS = ("kaiming", "pissa", "milora", "corda", "eva", "gradient", "gradient:lora-ga")
FEWER = ("kaiming", "pissa", "gradient")  # on the second task, so that all of it takes about an hour
STEP = 1.78  # between learning rates: five to a decade and a quarter, as in arXiv:2602.04998
MOST_EXTRA = 3  # rates beyond the first ones
BATCH_TOKENS, EVAL_ROWS, CALIBRATION_STEPS = 1024, 12, 4
PASSES = {"inputs": 0.4, "gradients": 2.0}  # cost of a calibration token, in tokens that are learned from
# Modules of the standard library whose documentation makes a task of plain text, and those that are held out.
MODULES = ("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "email", "fractions", "ftplib", "heapq",
           "http.client", "itertools", "json", "logging", "multiprocessing", "optparse", "pathlib", "pickle", "queue",
           "random", "re", "shelve", "smtplib", "socket", "sqlite3", "ssl", "statistics", "subprocess", "tarfile",
           "tempfile", "textwrap", "threading", "unittest", "urllib.request", "zipfile")  # fmt: skip
HELD_OUT_MODULES = ("calendar", "configparser", "functools", "ipaddress", "shutil", "uuid")


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


# ---- tasks ----------------------------------------------------------------------------------------------------------


def tasks() -> dict[str, Path]:
    """Tool calls with the loss on the answers, and documentation as plain text."""
    folder = HERE / "models" / "documentation"
    for split, modules in (("train", MODULES), ("valid", HELD_OUT_MODULES)):
        folder.mkdir(parents=True, exist_ok=True)
        texts = (pydoc.plain(pydoc.render_doc(name)) for name in modules)
        lines = (json.dumps({"text": text[start : start + 1500]}) for text in texts for start in range(0, 12000, 1500)
                 if text[start : start + 1500].strip())  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {"tool calls": DEMO_DATA, "documentation": folder}


class Task:
    """A task with the base loaded for it."""

    def __init__(self, name: str, data: Path, size: Size) -> None:
        self.name, self.data, self.size = name, data, size
        self.arms = [arm for arm in size.arms if data == DEMO_DATA or arm in FEWER]
        self.session: TorchSession | None = None
        self.starts: dict[tuple[str, int], Initialization] = {}

    def plan(self, arm: str, seed: int, rate: float | None = None) -> RunPlan:
        """A run of this task."""
        config = TrainConfig.build({
            "data": str(self.data), "init": arm, "seed": seed, "learning_rate": rate, "max_steps": self.size.steps,
            "batch_tokens": BATCH_TOKENS, "seq_len": 640, "eval_rows": 0, "eval_every_steps": 0,
            "calibration_steps": CALIBRATION_STEPS,
        })  # fmt: skip
        return plan_run(config, EventLog(ignore), needs_folder=False)

    def run(self, arm: str, power: int, seed: int) -> dict[str, Any]:
        """Train once; what became of it."""
        began = time.perf_counter()
        rate = self.plan(arm, seed).step_schedule.rate * STEP**power
        run_plan = self.plan(arm, seed, rate)
        self.session = self.session or open_session(run_plan.model, run_plan.config.compute, run_plan.execution.store)
        if (arm, seed) not in self.starts:
            self.starts = {key: start for key, start in self.starts.items() if key[0] == arm}
            self.starts[arm, seed] = initialise(
                INITS[arm], run_plan.config, run_plan.sizes, run_plan.calibration_data(), self.session, EventLog(ignore)
            )
        self.session.train(self.starts[arm, seed].adapter)
        looked = sum(
            len(run_plan.examples.train[n].ids)
            for s in range(CALIBRATION_STEPS)
            for n in run_plan.step_schedule.rows(s)
        )
        tokens = int(looked * PASSES.get(INITS[arm].needs, 0))
        curve = [(tokens, self._loss(run_plan, run_plan.examples.valid[:EVAL_ROWS]))]
        for step in range(self.size.steps):
            rows = [run_plan.examples.train[number] for number in run_plan.step_schedule.rows(step)]
            parts = shares(rows, run_plan.execution.num_shares, run_plan.execution.micro_tokens)
            gradients = self.session.gradients(parts, sum(row.target_tokens for row in rows))
            self.session.apply(gradients, run_plan.step_schedule.rate_at(step, 0.0), 1.0)
            tokens += sum(len(row.ids) for row in rows)
            if (step + 1) % self.size.eval_every == 0:
                curve.append((tokens, self._loss(run_plan, run_plan.examples.valid[:EVAL_ROWS])))
        general = self._loss(run_plan, run_plan.general)
        return {
            "task": self.name, "arm": arm, "power": power, "seed": seed, "rate": rate, "curve": curve,
            "final": curve[-1][1], "general": general, "steps": self.size.steps,
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip

    def _loss(self, run_plan: RunPlan, rows: Any) -> float:
        assert self.session is not None
        mean = sum(self.session.losses(micro_batches(rows, run_plan.execution.micro_tokens)), LossSum()).mean
        return mean if math.isfinite(mean) else 99.0


# ---- the protocol ---------------------------------------------------------------------------------------------------


class Study:
    """Runs that were done, and those that are missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def result(self, task: Task, arm: str, power: int, seed: int) -> dict[str, Any]:
        """A run, done now unless it was done before."""
        key = {"task": task.name, "arm": arm, "power": power, "seed": seed, "steps": task.size.steps}
        for run in self.runs:
            if all(run[name] == value for name, value in key.items()):
                return run
        run = task.run(arm, power, seed)
        print(
            f"{task.name}, {arm}: rate {run['rate']:.2g}, seed {seed}: {run['final']:.4f}, {run['seconds']} s",
            flush=True,
        )
        self.runs.append(run)
        self.path.write_text(json.dumps({"runs": self.runs}, indent=1) + "\n")
        return run

    def best_power(self, task: Task, arm: str) -> int:
        """The learning rate of an arm with the lowest final loss, looked for further out while it is at the edge."""
        powers = list(task.size.rates)
        for _ in range(MOST_EXTRA + 1):
            finals = {power: self.result(task, arm, power, 0)["final"] for power in powers}
            best = min(finals, key=lambda power: finals[power])
            if best not in (min(powers), max(powers)):
                break
            powers.append(best + (1 if best == max(powers) else -1))
        return best


def compare(study: Study, task: Task) -> list[dict[str, Any]]:
    """One line an arm: against Kaiming at its own best rate, seed by seed."""
    at_best = {arm: study.best_power(task, arm) for arm in task.arms}
    runs = {
        arm: [study.result(task, arm, power, seed) for seed in range(task.size.seeds)] for arm, power in at_best.items()
    }
    lines = []
    for arm in task.arms:
        speed = [math.log(tokens_to(run["curve"], other["final"]) / tokens_to(other["curve"], other["final"]))
                 for run, other in zip(runs[arm], runs["kaiming"], strict=True)]  # fmt: skip
        loss, general = (
            [run[name] - other[name] for run, other in zip(runs[arm], runs["kaiming"], strict=True)]
            for name in ("final", "general")
        )
        lines.append({
            "edge": " (edge)" if at_best[arm] == max(task.size.rates) + MOST_EXTRA else "",
            "task": task.name, "arm": arm, "rate": runs[arm][0]["rate"], "power": at_best[arm],
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
        own = [run for run in study.runs if run["task"] == name and run["steps"] == size.steps]
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
    if not DEMO_DATA.exists():
        sys.exit("the data of the demo is missing: run `python examples/01_tool_calling.py demo/data` first")
    study, lines = Study(HERE / "initialisation.json"), []
    for name, data in tasks().items():
        lines += compare(study, Task(name, data, size))
        (HERE / "initialisation.md").write_text(as_page(lines, size))
        draw(study, lines, size)
    write_results([])
    print((HERE / "initialisation.md").read_text())


if __name__ == "__main__":
    main()
