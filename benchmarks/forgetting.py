"""What keeps a run from forgetting, and what that costs of the task: KL on texts of the base, and a weaker update.

Four tasks, paired seeds: the runs of one seed have the same A, the same rows and the same order. Results are kept after
every run in forgetting.json, so that a study that was stopped goes on. Writes the table of docs/tuning.md.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from short_runs import Bench, Kept, take_steps, tasks

from thimble.backends.session import ActiveAdapter, Objective
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.labelled_rows import labelled
from thimble.backends.torch.lora import Lora
from thimble.backends.torch.loss import divergence_at
from thimble.backends.torch.session import TorchSession
from thimble.core.metrics import LossSum
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
SHAPES = {"labels": (128, 512, 24, 80), "documentation": (64, 256, 24, 24), "mapping": (128, 512, 30, 66),
          "tool calls": (512, 512, 24, 20)}  # fmt: skip
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
    "general 0.3": {"keep_general": 0.3, "keep_general_on": "general"},
}
# What is run, the most telling first.
ORDER = (PLAIN, "own 0.1", "own 0.3")


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


def main() -> None:
    study = Study(Kept(HERE / "forgetting.json"))
    for seed, task, way in itertools.product((0, 1), SHAPES, ORDER):
        study.result(task, way, seed)


if __name__ == "__main__":
    main()
