"""What types of products cost of quality: short runs in each against runs in fp32, row by row.

Whatever an adapter was trained in, it is measured in fp32 on the base as it is in its file: two errors in one number
say nothing of either. Three tasks, paired seeds: the runs of one seed have the same A, rows, order and rates. A type is
proved if in 16 pairs or more of each task its loss is less than 0.5 % higher, by the upper bound of a one-sided 95 %
interval over seeds and rows. Results are kept after every run in int8_quality.json, so that a study that was stopped
goes on. Writes the table of docs/tuning.md; its last line is JSON.

Where the processor has no instructions for a type, products are made in float32 of the rounded numbers, and rounded:
that is what the instructions do, up to the order in which they add.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from initialisation import Rise, nats, relative_rise
from short_runs import Bench, Kept, made_tasks, take_steps

from thimble.backends.open import open_session
from thimble.backends.torch.compute import INT8_INSTRUCTIONS
from thimble.backends.torch.session import TorchSession
from thimble.data.batches import micro_batches
from thimble.models.execution import ExecutionPlan
from thimble.models.machine import processor

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "tuning.md"
BEGIN, END = "<!-- types: written by benchmarks/int8_quality.py -->", "<!-- end of types -->"
EXACT = "fp32"
WAYS = {
    EXACT: ("fp32", "file"), "bf16": ("bf16", "file"), "bf16-int8": ("bf16-int8", "file"),
    "int8, store file": ("int8", "file"), "int8, store int8": ("int8", "int8"),
}  # fmt: skip
STEPS = 24
SHAPES = {
    "mapping": (128, 256, 66),
    "documentation": (64, 256, 60),
    "labels": (128, 256, 80),
}  # row, step, rows measured
MEASURED_TOKENS = 512  # at once
LEAST_PAIRS, MOST_RISE = 16, 0.005
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
NARROW = (torch.bfloat16, torch.int8)


def made_in_float32(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A product that makes those of bf16 and int8 numbers in float32; sums of products of int8 are exact to 2^24."""

    def made(*factors: torch.Tensor, **options: Any) -> torch.Tensor:
        if factors[-1].dtype not in NARROW:
            return product(*factors, **options)
        out = factors[0] if len(factors) == 3 else options.pop("out", None)  # of addmm_ the first is what is added to
        wide = [each.float() for each in factors]
        found = torch.addmm(*wide, **options) if len(factors) == 3 else wide[0].mm(wide[1])
        return found.to(factors[-1].dtype) if out is None else out.copy_(found)

    return made


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Have the products that steps are made of go through `made_in_float32`, in every thread."""
    places = ((torch, "mm"), (torch, "_int_mm"), (torch.Tensor, "addmm_"))
    with ExitStack() as changed:
        for place, name in places:
            changed.enter_context(patch.object(place, name, made_in_float32(getattr(place, name))))
        yield


def has_instructions() -> bool:
    """Whether this processor multiplies bf16 and int8."""
    flags = processor()[1]
    return bool(flags & BF16_INSTRUCTIONS and flags & INT8_INSTRUCTIONS)


class Study:
    """Runs of every task in every type, with paired seeds."""

    def __init__(self, kept: Kept) -> None:
        self._kept, self._bench, self._places = kept, Bench(), made_tasks()
        self._sessions: dict[str, TorchSession] = {}

    def result(self, task: str, way: str, seed: int) -> dict[str, Any]:
        """A run, done now unless it was done before."""
        return self._kept.result({"task": task, "way": way, "seed": seed}, lambda: self._run(task, way, seed))

    def _run(self, task: str, way: str, seed: int) -> dict[str, Any]:
        seq_len, batch_tokens, count = SHAPES[task]
        options = {
            "data": str(self._places[task]), "seq_len": seq_len, "batch_tokens": batch_tokens, "max_steps": STEPS,
            "compute": "fp32", "store": "file", "seed": seed,
        }  # fmt: skip
        run_plan, exact, begun = self._bench.begin(options)
        if way not in self._sessions:
            self._sessions[way] = exact if way == EXACT else open_session(run_plan.model, *WAYS[way])
        session, began = self._sessions[way], time.process_time()
        with nullcontext() if way == EXACT or has_instructions() else products_in_float32():
            state = session.start(exact.adapter(begun), begun.method)
            for after, _ in take_steps(run_plan, session, state):
                state = after
        trained = exact.load(session.adapter(state))
        held = run_plan.examples.valid[:count]
        batches = micro_batches(held, MEASURED_TOKENS, shares_prefixes=exact.shares_prefixes)
        measuring = ExecutionPlan("file", 1, MEASURED_TOKENS, MEASURED_TOKENS)
        read = zip(batches, exact.row_losses(trained, batches, measuring), strict=True)
        by_row = dict(pair for batch, found in read for pair in zip(batch.numbers.tolist(), found, strict=True))
        found = [by_row[number] for number in range(len(held))]
        untouched, places = [row.nats for row in found], [row.tokens for row in found]
        return {
            "final": sum(untouched) / sum(places), "rate": run_plan.step_schedule.rate, "untouched": untouched,
            "places": places, "texts": [row.source for row in held], "seconds": time.process_time() - began,
            "has_instructions": has_instructions(),
        }  # fmt: skip


# ---- the table ------------------------------------------------------------------------------------------------------


def pairs(runs: Sequence[Mapping[str, Any]], task: str, way: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Runs of a task in a type, and those of the same seeds in fp32."""
    of = {(run["way"], run["seed"]): run for run in runs if run["task"] == task}
    return [(of[key], of[EXACT, key[1]]) for key in sorted(of) if key[0] == way and (EXACT, key[1]) in of]


def rises(runs: Sequence[Mapping[str, Any]], way: str) -> dict[str, tuple[int, Rise]]:
    """By task with two pairs or more: how many there are, and how much higher the loss is than that of fp32."""
    found = {task: list(zip(*pairs(runs, task, way), strict=True)) for task in SHAPES}
    return {
        task: (len(both[0]), relative_rise(nats(both[0]), nats(both[1])))
        for task, both in found.items() if both and len(both[0]) > 1
    }  # fmt: skip


def is_proved(found: Mapping[str, tuple[int, Rise]]) -> bool:
    """Whether every task has enough pairs and a rise whose upper bound is small enough."""
    enough = [count >= LEAST_PAIRS and rise.upper < MOST_RISE for count, rise in found.values()]
    return len(enough) == len(SHAPES) and all(enough)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """What each type does to each task."""
    page = [
        "| type | task | pairs | loss, over that of fp32 | at most (one-sided 95 %) | proved within 0.5 % |",
        "|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        found = {} if way == EXACT else rises(runs, way)
        proved = "yes" if is_proved(found) else "no"
        page += [
            f"| {way} | {task} | {count} | {rise.mean:+.2%} ({rise.low:+.2%} to {rise.high:+.2%}) | {rise.upper:+.2%} "
            f"| {proved} |" for task, (count, rise) in found.items()
        ]  # fmt: skip
    return "\n".join(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="run so many of them, from 0")
    parser.add_argument("--ways", nargs="+", default=list(WAYS)[1:-1], choices=list(WAYS), help="those to run")
    parser.add_argument("--table", action="store_true", help="write the table of what was run, and run nothing")
    options, kept = parser.parse_args(), Kept(HERE / "int8_quality.json")
    if not options.table:
        study = Study(kept)
        for seed, task, way in itertools.product(range(options.seeds), SHAPES, dict.fromkeys([EXACT, *options.ways])):
            study.result(task, way, seed)
    page = PAGE.read_text()
    PAGE.write_text(f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{table(kept.runs)}\n\n{page[page.index(END) :]}")
    found = {way: rises(kept.runs, way) for way in WAYS if way != EXACT}
    print(table(kept.runs))
    print(json.dumps({
        way: {task: {"pairs": count, "rise": rise.mean, "upper": rise.upper} for task, (count, rise) in of_way.items()}
        for way, of_way in found.items() if of_way
    }))  # fmt: skip


if __name__ == "__main__":
    main()
