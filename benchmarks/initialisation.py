"""Does the start of A and B matter, and does it matter which layers get rank? Paired seeds, rows that chose nothing.

Every arm of a contest is first tried at learning rates 1.78 apart from its default on, with two seeds that are never
used again; more rates are added while the best lies at the edge. At its best rate it is then run with eight other
seeds, which share data, order and rows with those of the first arm. Losses are those of rows that chose nothing, in
float32, on the original base; pieces of one text count as one row. What a start reads to calibrate is charged to it in
the column of tokens.

Results are kept after every run, so it may be stopped at any time and goes on where it was (`timeout 20m python
benchmarks/initialisation.py`): about five hours of one core with AVX2. Writes
initialisation.json, its chart and its part of RESULTS.md from those that are complete.
"""

import argparse
import contextlib
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from run import write_results
from short_runs import Bench, Kept, best_power, tasks

from thimble.core.method import INITS
from thimble.core.significance import t_quantile

HERE = Path(__file__).parent
BEGIN, END = "<!-- inits: written by benchmarks/initialisation.py -->", "<!-- end of inits -->"
CHART = "inits.svg"
STEP = 1.78  # between learning rates: five to a decade and a quarter, as in arXiv:2602.04998
RATES, MOST_EXTRA = (0, 1, 2, 3), 3  # powers of STEP times an arm's default, and rates beyond them
TUNING_SEEDS, SEEDS = (100, 101), range(8)
STEPS, EVAL_EVERY, CALIBRATION_STEPS, BETA2 = 24, 8, 4, 0.95
UNTOUCHED = (200, 10_000)  # most rows that choose nothing, and their tokens
# Longest row, tokens of a step, and tokens of the validation rows that are watched.
SHAPES = {"mapping": (128, 192, 400), "documentation": (48, 128, 800), "tool calls": (512, 256, 1000)}
PASSES = {"inputs": 0.4, "gradients": 2.0}  # cost of a calibration token, in tokens that are learned from
SAME = 0.02  # losses that differ by less than this share count as equal
DRAWS = 10_000  # of the bootstrap
NORMAL = 1.96  # the quantile of a normal distribution that Student's t of many seeds has
RANK_4 = 1_221_120  # parameters of rank 4 on all linear layers of the base


@dataclass(frozen=True)
class Contest:
    """What is compared on a task.

    Attributes:
        task: Its name.
        title: What differs.
        arms: Options of `thimble train` by name; the first arm is what the others are compared with.
    """

    task: str
    title: str
    arms: Mapping[str, Mapping[str, Any]]


def starts(rank: int) -> dict[str, dict[str, Any]]:
    """The starts that are compared, at one rank."""
    inits = ("kaiming", "gradient:whitened", "pissa")
    return {init: {"init": init, "rank": rank, "alpha": 2.0 * rank} for init in inits}


CONTESTS = (
    Contest("documentation", "starts, rank 16", starts(16)),
    Contest("mapping", "starts, rank 16", starts(16)),
    Contest("tool calls", "starts, rank 16", starts(16)),
    Contest("mapping", "starts, rank 1", starts(1)),
    Contest("mapping", "ranks, mean 4", {
        "rank 4": {"rank": 4, "alpha": 8.0}, "rank auto": {"rank": "auto", "rank_budget": RANK_4, "alpha": 8.0},
    }),
)  # fmt: skip


# ---- the protocol ---------------------------------------------------------------------------------------------------


class Study:
    """Runs of every arm: those that were done, and those that are missing."""

    def __init__(self, kept: Kept, may_run: bool) -> None:
        self.kept, self._may_run, self._bench, self._places = kept, may_run, Bench(), tasks()

    def result(self, contest: Contest, arm: str, power: int, seed: int) -> dict[str, Any]:
        """A run at the arm's default rate times STEP^power; a LookupError if it is missing and none may be made."""
        key = {"task": contest.task, "contest": contest.title, "arm": arm, "power": power, "seed": seed}
        seq_len, batch_tokens, watched = SHAPES[contest.task]
        options = {
            "data": str(self._places[contest.task]), "seed": seed, "max_steps": STEPS, "seq_len": seq_len,
            "batch_tokens": batch_tokens, "calibration_steps": CALIBRATION_STEPS, "adam_beta2": BETA2,
            "compute": "fp32", "store": "dense", **contest.arms[arm],
        }  # fmt: skip

        def run() -> dict[str, Any]:
            if not self._may_run:
                raise LookupError
            usual = self._bench.plan(options)
            rate = usual.step_schedule.rate * STEP**power
            every, untouched = (EVAL_EVERY, UNTOUCHED) if seed in SEEDS else (0, (0, 0))
            done = self._bench.train({**options, "learning_rate": rate}, watched, every, untouched)
            is_auto = contest.arms[arm]["rank"] == "auto"
            needs = "gradients" if is_auto else INITS[contest.arms[arm].get("init", "kaiming")].needs
            read = [row for step in range(CALIBRATION_STEPS) for row in usual.step_schedule.rows(step)]
            charged = int(sum(len(usual.examples.train[row].ids) for row in read) * PASSES.get(needs, 0))
            return {**done, "curve": [(charged + tokens, loss) for tokens, loss in done["curve"]]}

        return self.kept.result(key, run)

    def best_power(self, contest: Contest, arm: str) -> int:
        """The learning rate of an arm with the lowest final loss of the rows that are watched, a mean of two seeds."""
        return best_power(
            lambda power: statistics.mean(self.result(contest, arm, power, seed)["final"] for seed in TUNING_SEEDS),
            RATES, most_extra=MOST_EXTRA,
        )  # fmt: skip

    def compare(self, contest: Contest) -> list[dict[str, Any]]:
        """One line an arm: against the first, each at its own best rate, seed by seed and row by row."""
        at_best = {arm: self.best_power(contest, arm) for arm in contest.arms}
        runs = {arm: [self.result(contest, arm, power, seed) for seed in SEEDS] for arm, power in at_best.items()}
        first = next(iter(runs.values()))
        lines = []
        for number, (arm, own) in enumerate(runs.items()):
            speed = [math.log(tokens_to(run["curve"], other["final"]) / tokens_to(other["curve"], other["final"]))
                     for run, other in zip(own, first, strict=True)]  # fmt: skip
            lines.append({
                "contest": contest, "arm": arm, "power": at_best[arm], "runs": own, "speed": speed,
                "is_first": not number,
                "general": [run["general"] - other["general"] for run, other in zip(own, first, strict=True)],
                "rise": relative_rise(nats(own), nats(first)),
            })  # fmt: skip
        holm([line for line in lines if not line["is_first"]])
        return lines


@dataclass
class Rise:
    """How much higher the loss of untouched rows is than that of the first arm, as a share of it."""

    mean: float
    low: float  # 95 % interval
    high: float
    upper: float  # the upper end of its 90 % interval: what it is below with 95 % confidence
    most: float  # the further end of that: below SAME the two count as equal (two one-sided tests)
    p: float  # two-sided; corrected by `holm`

    @property
    def verdict(self) -> str:
        """What can be concluded."""
        if self.p <= 0.05:
            told = "worse" if self.mean > 0 else "better"
            return f"{told}, by less than {SAME:.0%}" if self.most < SAME else told
        return "equal" if self.most < SAME else "not known"


def nats(runs: list[dict[str, Any]]) -> NDArray[np.float64]:
    """(seeds, texts): the loss of every untouched text, summed over the target tokens of its rows."""
    number = {text: number for number, text in enumerate(dict.fromkeys(runs[0]["texts"]))}
    return np.array([np.bincount([number[text] for text in run["texts"]], run["untouched"]) for run in runs])


def relative_rise(own: NDArray[np.float64], first: NDArray[np.float64]) -> Rise:
    """By a bootstrap that draws seeds and texts, both with replacement (Owen, 2007: the pigeonhole bootstrap).

    A bootstrap of few seeds is too narrow; what is drawn is spread by what Student's t of as many seeds is wider than
    a normal distribution.
    """
    seeds, texts = own.shape
    random = np.random.default_rng(0)
    by_seed = random.multinomial(seeds, [1 / seeds] * seeds, DRAWS)
    by_text = random.multinomial(texts, [1 / texts] * texts, DRAWS)
    difference, base = (((by_seed @ values) * by_text).sum(1) for values in (own - first, first))
    mean = float((own - first).sum() / first.sum())
    wider = t_quantile(0.025, seeds - 1) / NORMAL * math.sqrt(seeds / (seeds - 1))
    drawn = mean + wider * (difference / base - mean)
    low, high, ten, ninety = np.quantile(drawn, (0.025, 0.975, 0.05, 0.95))
    p = 2 * min((drawn <= 0).mean(), (drawn >= 0).mean())
    most, p = max(abs(ten), abs(ninety)), min(1.0, max(p, 1 / DRAWS))
    return Rise(mean, low, high, ninety, most, p)


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
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), t_quantile(0.025, len(values) - 1) * spread


def holm(lines: list[dict[str, Any]]) -> None:
    """Correct p values for their number (Holm, 1979)."""
    worst = 0.0
    for rank, line in enumerate(sorted(lines, key=lambda line: line["rise"].p)):
        worst = max(worst, min(1.0, line["rise"].p * (len(lines) - rank)))
        line["rise"].p = worst


# ---- writing --------------------------------------------------------------------------------------------------------


def as_page(lines: list[dict[str, Any]]) -> str:
    """The table for people."""
    complete = [line["contest"] for line in lines]
    missing = [f"{each.task} ({each.title})" for each in CONTESTS if each not in complete]
    page = [
        BEGIN,
        "",
        f"SmolLM2-135M-Instruct, all linear layers, float32, {STEPS} steps "
        f"({', '.join(f'{task}: {tokens} tokens a step' for task, (_, tokens, _) in SHAPES.items())}), "
        f"each arm at its own best of {len(RATES)} or more learning rates ({STEP} apart, {len(TUNING_SEEDS)} seeds), "
        f"then {len(SEEDS)} paired seeds. The loss is that of untouched rows, of texts that chose nothing; its rise "
        f"over the first arm has a 95 % interval by a bootstrap over seeds and texts, and p is corrected by Holm's "
        f"method for the arms of a contest. Equal: the 90 % interval lies within ±{SAME:.0%}. Tokens a start reads to "
        "calibrate are charged to it. (edge): the last rate tried. Nothing is said here of longer runs, of other bases "
        "or of arms that are not in the table.",
        *(["", f"Not run yet: {'; '.join(missing)}."] if missing else []),
        "",
        "| task | compared | arm | best rate | × the default | loss | against the first | p | which is "
        "| tokens to the first one's final loss | general text |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*page, *map(_row, lines), "", f"![Validation loss over tokens, by arm]({CHART})", "", END])


def _row(line: Mapping[str, Any]) -> str:
    contest, runs, rise = line["contest"], line["runs"], line["rise"]
    edge = " (edge)" if line["power"] in (min(RATES) - MOST_EXTRA, max(RATES) + MOST_EXTRA) else ""
    cells = [
        contest.task, contest.title, line["arm"], f"{runs[0]['rate']:.1e}", f"{STEP ** line['power']:.2f}{edge}",
        f"{nats(runs).sum() / (sum(runs[0]['places']) * len(runs)):.4f}",
    ]  # fmt: skip
    if line["is_first"]:
        return f"| {' | '.join(cells)} | | | | | |"
    speed, general = interval(line["speed"]), interval(line["general"])
    low, high = math.exp(speed[0] - speed[1]) - 1, math.exp(speed[0] + speed[1]) - 1
    cells += [
        f"{rise.mean:+.1%} ({rise.low:+.1%} to {rise.high:+.1%})", f"{rise.p:.3f}", rise.verdict,
        f"{math.exp(speed[0]) - 1:+.0%} ({low:+.0%} to {high:+.0%})", f"{general[0]:+.4f} ± {general[1]:.4f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def draw(study: Study, lines: list[dict[str, Any]]) -> None:
    """Validation loss over tokens at each arm's best rate, and final loss over the rate."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    contests = list(dict.fromkeys((line["contest"].task, line["contest"].title) for line in lines))
    figure, axes = pyplot.subplots(
        len(contests), 2, figsize=(10, 3.2 * len(contests)), layout="constrained", squeeze=False
    )
    for (curves, rates), (task, title) in zip(axes, contests, strict=True):
        for line in (line for line in lines if (line["contest"].task, line["contest"].title) == (task, title)):
            mean = np.mean([run["curve"] for run in line["runs"]], 0)
            curves.plot(mean[:, 0] / 1000, mean[:, 1], label=line["arm"])
            tried = sorted(
                (run["rate"], run["final"]) for run in study.kept.runs if run["seed"] == TUNING_SEEDS[0]
                and (run["task"], run.get("contest"), run["arm"]) == (task, title, line["arm"])
            )  # fmt: skip
            rates.plot(*zip(*tried, strict=True), "o-", markersize=3)
        curves.set(title=f"{task}, {title}: mean of seeds", xlabel="thousand tokens", ylabel="validation loss",
                   yscale="log")  # fmt: skip
        rates.set(title="one seed", xlabel="learning rate", ylabel="final validation loss", xscale="log", yscale="log")
        for side in (curves, rates):
            side.spines[["top", "right"]].set_visible(False)
        curves.legend(fontsize=8, frameon=False)
    figure.savefig(HERE / CHART)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="write the page of what was run, and run nothing")
    study = Study(Kept(HERE / "initialisation.json"), may_run=not parser.parse_args().table)
    lines: list[dict[str, Any]] = []
    for contest in CONTESTS:
        with contextlib.suppress(LookupError):  # not complete
            lines += study.compare(contest)
    if lines:
        page = (HERE / "initialisation.md").read_text()
        before, after = page[: page.index(BEGIN)], page[page.index(END) + len(END) :]
        (HERE / "initialisation.md").write_text(before + as_page(lines) + after)
        draw(study, lines)
        write_results([])
    print(as_page(lines))


if __name__ == "__main__":
    main()
