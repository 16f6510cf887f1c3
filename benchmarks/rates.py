"""Which learning rate is best, and is it the default? Four tasks, two sizes of step, rates 1.8 apart.

First in strides of two, further out while the best lies at the edge, then the two neighbours of the best. LoRA+ is run
on two of the tasks, for the factor that its default rate has. Results are kept after every run in
rates.json, so that a study that was stopped goes on. Writes the tables of docs/tuning.md.
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from short_runs import Bench, Kept, best_power, tasks

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "tuning.md"
BEGIN, END = "<!-- rates: written by benchmarks/rates.py -->", "<!-- end of rates -->"
FIRST, STEP = 1e-4, 1.8  # the grid of rates: FIRST · STEP^power
STEPS, EVAL_TOKENS = 24, 800
# Longest row, tokens of a small and of a large step, and powers to begin with; a row of tool calls has about 265.
SHAPES = {"labels": (128, 64, 256, (1, 3, 5)), "documentation": (64, 64, 256, (3, 5, 7)),
          "mapping": (128, 64, 256, (1, 3, 5)), "tool calls": (512, 256, 768, (1, 3, 5))}  # fmt: skip
LORA_PLUS = {"documentation": (4.0, 16.0), "mapping": (4.0, 16.0)}  # ratios tried, with small steps


@dataclass(frozen=True)
class Setting:
    """A task with a size of step and a ratio of LoRA+."""

    task: str
    data: Path
    batch_tokens: int
    lora_plus: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """As options of `thimble train`."""
        return {
            "data": str(self.data), "batch_tokens": self.batch_tokens, "seq_len": SHAPES[self.task][0],
            "max_steps": STEPS, "lora_plus": self.lora_plus, "compute": "fp32", "store": "dense",
        }  # fmt: skip


class Study:
    """Runs at the rates of the grid."""

    def __init__(self, kept: Kept) -> None:
        self._kept, self._bench = kept, Bench()

    def result(self, setting: Setting, power: int, seed: int = 0) -> dict[str, Any]:
        """A run at one rate."""
        key = {
            "task": setting.task, "batch_tokens": setting.batch_tokens, "lora_plus": setting.lora_plus,
            "steps": STEPS, "power": power, "seed": seed,
        }  # fmt: skip
        options = {**setting.options, "learning_rate": FIRST * STEP**power, "seed": seed}
        return self._kept.result(key, lambda: self._bench.train(options, EVAL_TOKENS))

    def default(self, setting: Setting) -> float:
        """The default rate of a setting."""
        return self._bench.plan(setting.options).step_schedule.rate

    def search(self, setting: Setting, is_fine: bool) -> int:
        """The power of the best rate of a setting; a new run for each rate that is missing."""

        def loss(power: int) -> float:
            return float(self.result(setting, power)["final"])

        best = best_power(loss, SHAPES[setting.task][3], stride=2)
        return best_power(loss, (best - 1, best, best + 1)) if is_fine else best

    def line(self, setting: Setting) -> dict[str, Any]:
        """What the runs of a setting say, those that were done: nothing until a best rate lies between two others."""
        runs = [run for run in self._kept.runs if run["steps"] == STEPS and run["seed"] == 0 and all(
            run[name] == getattr(setting, name) for name in ("task", "batch_tokens", "lora_plus"))]  # fmt: skip
        runs.sort(key=lambda run: run["power"])
        best = min(runs, key=lambda run: run["final"], default=None)
        if best is None or best in (runs[0], runs[-1]):
            return {}
        default = self.default(setting)
        return {
            "setting": setting, "runs": runs, "best": best, "default": default, "ratio": default / best["rate"],
            "at_default": between([(run["power"], run["final"]) for run in runs], math.log(default / FIRST, STEP)),
        }  # fmt: skip


def between(points: list[tuple[int, float]], place: float) -> float:
    """A value at a place on the grid, by a straight line between its neighbours; NaN beyond the grid."""
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return math.nan


def as_page(lines: list[dict[str, Any]]) -> str:
    """The table for people."""
    page = [
        BEGIN,
        "",
        "| task | LoRA+ | tokens a step | target tokens | loss before | loss after, by rate | best rate | default rate "
        "| default / best | loss at the default | general text before | and after, by rate |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        setting, best = line["setting"], line["best"]
        cells = [
            setting.task, f"{setting.lora_plus:g}", str(setting.batch_tokens), f"{best['target_tokens']:.0f}",
            f"{best['curve'][0][1]:.3f}", ", ".join(f"{run['rate']:.1e}: {run['final']:.3f}" for run in line["runs"]),
            f"{best['rate']:.1e}", f"{line['default']:.1e}", f"{line['ratio']:.2f}",
            f"{line['at_default']:.3f} ({line['at_default'] / best['final'] - 1:+.1%})",
            f"{best['general_before']:.3f}",
            ", ".join(f"{run['rate']:.1e}: {run['general']:.3f}" for run in line["runs"]),
        ]  # fmt: skip
        page.append(f"| {' | '.join(cells)} |")
    return "\n".join([*page, "", END])


def settings(places: dict[str, Path], is_large: bool) -> list[Setting]:
    """All tasks with steps of one size."""
    return [Setting(task, places[task], shape[2] if is_large else shape[1]) for task, shape in SHAPES.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="write the table of what was run, and run nothing")
    is_table_only = parser.parse_args().table
    places, study = tasks(), Study(Kept(HERE / "rates.json"))
    plus = [Setting(task, places[task], SHAPES[task][1], ratio) for task, found in LORA_PLUS.items() for ratio in found]
    chosen = [*settings(places, is_large=False), *settings(places, is_large=True), *plus]
    for is_fine, setting in () if is_table_only else itertools.product((False, True), chosen):
        study.search(setting, is_fine)
    table = as_page(list(filter(None, map(study.line, chosen))))
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN)] + table + page[page.index(END) + len(END) :])
    print(table)


if __name__ == "__main__":
    main()
