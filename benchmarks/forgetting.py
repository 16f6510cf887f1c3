"""What keeps a run from forgetting, and what that costs of the task: KL on texts of the base, and a weaker update.

Four tasks, paired seeds: the runs of one seed have the same A, the same rows and the same order. Results are kept after
every run in forgetting.json, so that a study that was stopped goes on. Writes the tables of docs/tuning.md.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from short_runs import Bench, Kept, take_steps, tasks

from thimble.backends.session import ActiveAdapter, Objective
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.labelled_rows import labelled
from thimble.backends.torch.lora import Lora
from thimble.backends.torch.loss import divergence_at
from thimble.backends.torch.session import TorchSession
from thimble.core.metrics import LossSum
from thimble.core.significance import bootstrap, share_interval
from thimble.data.batches import Batch, micro_batches
from thimble.data.encode import IGNORED, Row
from thimble.data.examples import general_rows
from thimble.events import EventLog, ignore
from thimble.models.execution import ExecutionPlan
from thimble.training.control import Control
from thimble.training.plan import RunPlan
from thimble.training.strength import STRENGTHS, choose_strength
from thimble.training.tasks.text import text_task

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "tuning.md"
BEGIN, END = "<!-- forgetting: written by benchmarks/forgetting.py -->", "<!-- end of forgetting -->"
# Longest row, tokens of a step, steps, and validation rows, half of which choose the strength.
SHAPES = {"labels": (128, 512, 24, 80), "documentation": (64, 256, 24, 40), "mapping": (128, 512, 30, 66),
          "tool calls": (512, 512, 24, 24)}  # fmt: skip
OWN_TEXTS = 60  # that are measured, two of each beginning
MICRO_TOKENS = 512  # measured at once
GENERAL_TOKENS = 256  # of a row of general text at most
PLAIN = "plain"
WAYS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {"keep_general": 0.0},
    "own 0.1": {"keep_general": 0.1},
    "own 0.3": {"keep_general": 0.3},
    "own 0.5": {"keep_general": 0.5},
    "own 0.1, every step": {"keep_general": 0.1, "keep_general_every_steps": 1},
    "general 0.5": {"keep_general": 0.5, "keep_general_on": "general"},
}
FIRST = (PLAIN, "own 0.3", "own 0.5")  # what is run unless others are named, the most telling first


class Found(NamedTuple):
    """What a model gives of the rows of a batch, at their labels."""

    hidden: torch.Tensor  # (labels, hidden)
    rows: np.ndarray  # int64 (labels,), the row of each
    nats: np.ndarray  # float32 (labels,), cross-entropy
    right: np.ndarray  # bool (labels,), whether the label is the likeliest token


@torch.no_grad()
def read(decoder: Decoder, batch: Batch, lora: Lora, shares_prefixes: bool) -> Found:
    """Read a batch."""
    found = labelled(decoder, batch, lora, shares_prefixes)
    places = np.flatnonzero(found.labels != IGNORED)
    hidden, labels = found.hidden[torch.from_numpy(places)], torch.from_numpy(found.labels[places].astype(np.int64))
    logits = decoder.logits(hidden, torch.float32)
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return Found(hidden, found.rows, nats.numpy(), (logits.argmax(1) == labels).numpy())


class Texts:
    """Rows that models are measured on, and what the base makes of them."""

    def __init__(self, session: TorchSession, rows: Sequence[Row]) -> None:
        self._session, self._count = session, len(rows)
        self._batches = micro_batches(rows, MICRO_TOKENS, shares_prefixes=session.shares_prefixes)
        self._execution = ExecutionPlan("dense", 1, MICRO_TOKENS, MICRO_TOKENS)
        self._base = self._read(session.load(None))

    def _read(self, active: ActiveAdapter) -> list[Found]:
        return list(self._session.of_batches(read, active, self._batches, self._execution))

    def base(self) -> dict[str, list[float]]:
        """The base by its rows; see `measure`."""
        return self._by_row(self._base)

    def measure(self, active: ActiveAdapter) -> dict[str, list[float]]:
        """By rows: `nats` and `places`, `right` if every likeliest token is the label, `kl` from the base in nats."""
        return self._by_row(self._read(active))

    def _by_row(self, found: Sequence[Found]) -> dict[str, list[float]]:
        sums = np.zeros((4, self._count))  # nats, places, wrong, kl
        for batch, base, model in zip(self._batches, self._base, found, strict=True):
            kl, _ = divergence_at(self._session.decoder, base.hidden, model.hidden)
            values = (model.nats, np.ones(len(kl)), ~model.right, kl)
            for total, each in zip(sums, values, strict=True):
                np.add.at(total, batch.numbers[model.rows], each)
        nats, places, wrong, kl = sums
        return {
            "nats": nats.tolist(), "places": places.tolist(), "right": (wrong == 0).astype(int).tolist(),
            "kl": kl.tolist(),
        }  # fmt: skip


class Study:
    """Runs of every task in every way, with paired seeds."""

    def __init__(self, kept: Kept) -> None:
        self._kept, self._bench, self._places = kept, Bench(), tasks()
        self._texts: dict[str, Texts] = {}
        self._objectives: dict[str, list[Objective]] = {}

    def result(self, task: str, way: str, seed: int) -> dict[str, Any]:
        """A run, done now unless it was done before."""
        return self._kept.result({"task": task, "way": way, "seed": seed}, lambda: self._run(task, way, seed))

    def _run(self, task: str, way: str, seed: int) -> dict[str, Any]:
        seq_len, batch_tokens, steps, rows = SHAPES[task]
        options = {
            "data": str(self._places[task]), "seq_len": seq_len, "batch_tokens": batch_tokens, "max_steps": steps,
            "compute": "fp32", "store": "dense", "seed": seed, **WAYS[way],
        }  # fmt: skip
        run_plan, session, begun = self._bench.begin(options)
        objectives, began = self._objectives_of(run_plan, session, way), time.process_time()
        state = list(take_steps(run_plan, session, begun, objectives))[-1][0]
        seconds = time.process_time() - began
        trained = session.adapter(state)
        held = self._texts_of(task, session, run_plan.examples.valid[:rows])
        by_strength = {
            strength: held.measure(session.load(trained.at_strength(strength)))
            for strength in (STRENGTHS if way == PLAIN else (1.0,))
        }
        strength = choose_strength({key: _choosing(value) for key, value in by_strength.items()})[0]
        full = self._forgetting(run_plan, session, session.load(trained))
        weaker = (
            full if strength == 1 else self._forgetting(run_plan, session, session.load(trained.at_strength(strength)))
        )
        nats, places = np.sum(by_strength[1.0]["nats"]), np.sum(by_strength[1.0]["places"])
        return {
            "final": float(nats / places), "rate": run_plan.step_schedule.rate, "seconds": seconds, "base": held.base(),
            "strengths": {f"{key:g}": value for key, value in by_strength.items()}, "strength": strength, **full,
            "weaker": weaker,
        }  # fmt: skip

    def _forgetting(self, run_plan: RunPlan, session: TorchSession, active: ActiveAdapter) -> dict[str, Any]:
        """General text and texts that the base wrote, by row."""
        rows = general_rows(run_plan.model, run_plan.config.replace(seq_len=GENERAL_TOKENS))
        general = self._texts_of("general", session, rows)
        if "own" not in self._texts:
            writer, control = text_task(run_plan).writer, Control(EventLog(ignore))
            texts = writer.measuring(session, rows, run_plan.execution, control)
            self._texts["own"] = Texts(session, texts[:OWN_TEXTS])
        return {
            "general_before": general.base()["nats"], "general": general.measure(active),
            "own": self._texts["own"].measure(active),
        }  # fmt: skip

    def _texts_of(self, name: str, session: TorchSession, rows: Sequence[Row]) -> Texts:
        if name not in self._texts:
            self._texts[name] = Texts(session, rows)
        return self._texts[name]

    def _objectives_of(self, run_plan: RunPlan, session: TorchSession, way: str) -> list[Objective]:
        """What the steps minimise; what the base makes of the texts is the same for all tasks."""
        if way not in self._objectives:
            execution, control = run_plan.execution, Control(EventLog(ignore))
            self._objectives[way] = text_task(run_plan).objectives(session, execution, control)
        return self._objectives[way]


def _choosing(measured: Mapping[str, list[float]]) -> list[LossSum]:
    """The losses of the rows that choose the strength: every other one."""
    return [
        LossSum(nats, int(places)) for nats, places in zip(measured["nats"][::2], measured["places"][::2], strict=True)
    ]


# ---- the table ------------------------------------------------------------------------------------------------------


class Pair:
    """The runs of a task in one way and the plain ones, of the seeds that both have, row by row over all of them."""

    def __init__(self, runs: Sequence[Mapping[str, Any]], task: str, way: str) -> None:
        of = {(run["way"], run["seed"]): run for run in runs if run["task"] == task}
        seeds = sorted(seed for name, seed in of if name == way and (PLAIN, seed) in of)
        self.task, self.way, self.seeds = task, way, seeds
        self.runs, self.plain = [of[way, seed] for seed in seeds], [of[PLAIN, seed] for seed in seeds]

    def task_change(self) -> tuple[float, float, float]:
        """The change of the validation loss as a share of the plain one, with its 95 % interval over rows."""
        after, plain, places = (
            total(runs, lambda run, name=name: run["strengths"]["1"][name])
            for runs, name in ((self.runs, "nats"), (self.plain, "nats"), (self.plain, "places"))
        )
        mean = plain.sum() / places.sum()
        low, high = bootstrap(after - plain, places)
        return float((after - plain).sum() / places.sum() / mean), low / mean, high / mean

    def right(self) -> tuple[int, int, int]:
        """Rows that are right here alone, in the plain run alone, and all rows, over the seeds."""
        pairs = [
            (here, there)
            for run, plain in zip(self.runs, self.plain, strict=True)
            for here, there in zip(run["strengths"]["1"]["right"], plain["strengths"]["1"]["right"], strict=True)
        ]
        return sum(here > there for here, there in pairs), sum(here < there for here, there in pairs), len(pairs)

    def seconds(self) -> float:
        """Processor time of the steps, as a multiple of that of plain ones."""
        return float(sum(run["seconds"] for run in self.runs) / sum(run["seconds"] for run in self.plain))


def total(runs: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], Sequence[float]]) -> NDArray[np.float64]:
    """What runs have of each row, added up over the runs."""
    return np.sum([of(run) for run in runs], axis=0)


def rise(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """The rise of perplexity on general text as a share, with its 95 % interval over rows."""
    change = total(runs, lambda run: np.subtract(run["general"]["nats"], run["general_before"]))
    places = total(runs, lambda run: run["general"]["places"])
    return tuple(math.expm1(nats) for nats in (change.sum() / places.sum(), *bootstrap(change, places)))


def divergence(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """KL(base ‖ tuned) on texts of the base, nats a token, with its 95 % interval over texts."""
    kl, places = (total(runs, lambda run, name=name: run["own"][name]) for name in ("kl", "places"))
    return float(kl.sum() / places.sum()), *bootstrap(kl, places)


def share(values: tuple[float, float, float]) -> str:
    """A change and its interval, in per cent."""
    return f"{values[0]:+.1%} ({values[1]:+.1%} to {values[2]:+.1%})"


def ways_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each way of keeping answers does to each task."""
    page = [
        "| task | answers kept | seeds | validation loss against plain | rows right | perplexity of general text "
        "| KL from the base on its texts | processor time of a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, way in itertools.product(SHAPES, WAYS):
        pair = Pair(runs, task, way)
        if not pair.seeds:
            continue
        right, rows = (sum(sum(run["strengths"]["1"]["right"]) for run in pair.runs), pair.right()[2])
        kl = divergence(pair.runs)
        page.append(
            f"| {task} | {way} | {len(pair.seeds)} | {'' if way == PLAIN else share(pair.task_change())} "
            f"| {right} of {rows} | {share(rise(pair.runs))} | {kl[0]:.3f} ({kl[1]:.3f} to {kl[2]:.3f}) "
            f"| {pair.seconds():.2f} |"
        )
    return page


def pooled(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Over all tasks: how much less is forgotten, and whether the task suffers."""
    page = [
        "| answers kept | tasks | KL, as a share of plain | rows right, in points | validation loss |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        pairs = [pair for pair in (Pair(runs, task, way) for task in SHAPES) if pair.seeds]
        if way == PLAIN or not pairs:
            continue
        ratio = math.exp(np.mean([math.log(divergence(p.runs)[0] / divergence(p.plain)[0]) for p in pairs]))
        better, worse, rows = (sum(each) for each in zip(*(pair.right() for pair in pairs), strict=True))
        low, high = share_interval(better, worse, rows)
        loss = float(np.mean([pair.task_change()[0] for pair in pairs]))
        points = f"{100 * (better - worse) / rows:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        page.append(f"| {way} | {len(pairs)} | {ratio:.2f} | {points} | {loss:+.1%} |")
    return page


def strength_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `--strength auto` chooses after plain runs by half of the rows, and what that costs on the other half."""
    page = [
        "| task | seed | strength | loss of the other rows | right of them | perplexity of general text | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in (run for run in runs if run["way"] == PLAIN):
        full, weaker = (run["strengths"][f"{strength:g}"] for strength in (1.0, run["strength"]))
        nats, less, right, fewer = (sum(found[name][1::2]) for name in ("nats", "right") for found in (full, weaker))
        kl, kl_weaker = (divergence([each])[0] for each in (run, run["weaker"]))
        page.append(
            f"| {run['task']} | {run['seed']} | {run['strength']:g} | {less / nats - 1:+.1%} | {right} -> {fewer} of "
            f"{len(full['nats'][1::2])} | {rise([run])[0]:+.1%} -> {rise([run['weaker']])[0]:+.1%} "
            f"| {kl:.3f} -> {kl_weaker:.3f} |"
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="run so many of them, from 0")
    parser.add_argument("--ways", nargs="+", default=list(FIRST), choices=list(WAYS), help="those to run")
    parser.add_argument("--table", action="store_true", help="write the table of what was run, and run nothing")
    options = parser.parse_args()
    kept = Kept(HERE / "forgetting.json")
    if not options.table:
        study = Study(kept)
        for seed, task, way in itertools.product(range(options.seeds), SHAPES, options.ways):
            study.result(task, way, seed)
    tables = (ways_table(kept.runs), pooled(kept.runs), strength_table(kept.runs))
    table = "\n\n".join("\n".join(lines) for lines in tables)
    page = PAGE.read_text()
    PAGE.write_text(f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{table}\n\n{page[page.index(END) :]}")
    print(table)


if __name__ == "__main__":
    main()
