"""Short training runs whose results are kept: what the studies of learning rates and of inits are made of."""

import json
import math
import pydoc
import random
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thimble.backends.session import Objective, Session, StepKey, TrainState
from thimble.backends.torch.session import TorchSession
from thimble.config.train import TrainConfig
from thimble.core.method import Method, parse_init
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches
from thimble.data.encode import Row
from thimble.events import EventLog, ignore
from thimble.training.initialise import Initialization, initialise
from thimble.training.plan import RunPlan, plan_run
from thimble.training.tasks.text import text_task

HERE = Path(__file__).parent
DEMO_DATA = HERE.parent / "demo" / "data"
MADE = HERE / "models"
GENERAL_ROWS = 6  # of general text, to see what is forgotten
MEASURED_TOKENS = 512  # of a micro-batch that is only measured
MOST_LOSS = 99.0  # stands for a loss that is NaN or Inf
# Modules of the standard library whose documentation makes a task of plain text, and those that are held out.
MODULES = ("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "email", "fractions", "ftplib", "heapq",
           "http.client", "itertools", "json", "logging", "multiprocessing", "optparse", "pathlib", "pickle", "queue",
           "random", "re", "shelve", "smtplib", "socket", "sqlite3", "ssl", "statistics", "subprocess", "tarfile",
           "tempfile", "textwrap", "threading", "unittest", "urllib.request", "zipfile")  # fmt: skip
HELD_OUT_MODULES = ("calendar", "configparser", "functools", "ipaddress", "shutil", "uuid")
# A code of the synthetic mapping: what is asked names three of them, and the answer is their letters in reverse order.
CODES = {"amber": "Q", "basalt": "K", "cedar": "X", "dune": "V", "ember": "J", "fjord": "W", "grove": "Z", "heron": "P"}
# Phrases about one topic each, from which messages to be labelled are put together.
TOPICS = {
    "delivery": ("the parcel is late", "the courier never came", "the box was torn", "tracking shows nothing new",
                 "an item is missing from the shipment", "it went to the wrong house"),
    "billing": ("my card was charged twice", "the refund has not arrived", "the invoice lacks our VAT number",
                "the price differs from the order", "I need a receipt", "a fee appeared that I did not agree to"),
    "account": ("I cannot sign in", "the reset link does not work", "I want another e-mail address",
                "my profile vanished", "the code for two-step login never comes", "please delete my data"),
    "technical": ("the app crashes on start", "the screen stays black", "the update broke the search",
                  "sound is missing in videos", "it says error 502", "the export hangs at 90 percent"),
}  # fmt: skip
OPENINGS = ("Hello,", "Hi there,", "Good morning,", "Dear team,", "Please help:", "Once again:", "To whom it concerns:")
CLOSINGS = ("What now?", "Thanks.", "This is urgent.", "Can you look into it?", "I am waiting.", "Kind regards.")


# ---- tasks ----------------------------------------------------------------------------------------------------------


def tasks() -> dict[str, Path]:
    """Folders of rows by task: tool calls, plain text, an invented mapping, and labels."""
    if not DEMO_DATA.exists():
        sys.exit("the data of the demo is missing: run `python examples/01_tool_calling.py demo/data` first")
    return {"tool calls": DEMO_DATA, **made_tasks()}


def made_tasks() -> dict[str, Path]:
    """Those of them that are made here: plain text, an invented mapping, and labels."""
    made = {"documentation": _documentation, "mapping": _mapping, "labels": _labels}
    for name, rows in made.items():
        for split in ("train", "valid"):
            path = MADE / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(split)))
    return {name: MADE / name for name in made}


def _documentation(split: str) -> Iterator[dict[str, str]]:
    for name in MODULES if split == "train" else HELD_OUT_MODULES:
        text = pydoc.plain(pydoc.render_doc(name))[:12000]
        pieces = (text[start : start + 1500] for start in range(0, len(text), 1500))
        yield from ({"text": piece} for piece in pieces if piece.strip())


def _mapping(split: str) -> Iterator[dict[str, str]]:
    """Each way to name three codes, in an order that a seed gives; a fifth of them are held out."""
    names = [(one, two, three) for one in CODES for two in CODES for three in CODES if len({one, two, three}) == 3]
    random.Random(0).shuffle(names)
    fifth = len(names) // 5
    for chosen in names[fifth:] if split == "train" else names[:fifth]:
        letters = "-".join(CODES[name] for name in reversed(chosen))
        yield {"prompt": f"Code for {', '.join(chosen)}?", "completion": letters}


def _labels(split: str) -> Iterator[dict[str, str]]:
    """Messages of an opening, a phrase and a closing; phrases of validation rows are not among the training rows."""
    rows = [
        {"prompt": f"{opening} {phrase}. {closing}", "completion": topic}
        for topic, phrases in TOPICS.items()
        for phrase in (phrases[2:] if split == "train" else phrases[:2])
        for opening in OPENINGS
        for closing in CLOSINGS
    ]
    random.Random(0).shuffle(rows)
    return iter(rows)


# ---- runs -----------------------------------------------------------------------------------------------------------


class Bench:
    """The base, loaded once, and the training runs that are made with it."""

    def __init__(self) -> None:
        self._session: TorchSession | None = None
        self._initial: tuple[tuple[Any, ...], Initialization | None] = ((), None)
        self._measured: dict[tuple[Any, ...], float] = {}  # losses of the base

    def plan(self, options: Mapping[str, Any]) -> RunPlan:
        """The run that these options of `thimble train` make."""
        config = TrainConfig.build({"eval_rows": 0, "eval_every_steps": 0, **options})
        return plan_run(config, EventLog(ignore), needs_folder=False)

    def begin(self, options: Mapping[str, Any]) -> tuple[RunPlan, TorchSession, TrainState]:
        """The run of some options before its first step."""
        run_plan = self.plan(options)
        config = run_plan.config
        self._session = self._session or TorchSession(run_plan.model.base, config.compute, run_plan.execution.store)
        method = Method(lora_plus=config.lora_plus, seed=config.seed, beta2=config.adam_beta2 or 0.0)
        return run_plan, self._session, self._session.start(self._begun(run_plan, self._session).adapter, method)

    def train(
        self, options: Mapping[str, Any], eval_tokens: int, eval_every_steps: int = 0,
        untouched: tuple[int, int] = (0, 0),
    ) -> dict[str, Any]:  # fmt: skip
        """Train once; the losses are taken on the first `eval_tokens` tokens of the validation rows.

        The curve is (tokens read in training, validation loss), before the first step, every few steps, and at the end.
        `untouched` are most validation rows of other texts, and about their tokens, that the result is measured on too.
        """
        began, (run_plan, session, begun) = time.perf_counter(), self.begin(options)
        state, config, schedule, execution = begun, run_plan.config, run_plan.step_schedule, run_plan.execution
        held = list(_first(run_plan.examples.valid, eval_tokens))
        apart = _spread(run_plan.examples.valid, {row.source for row in held}, *untouched)
        general = run_plan.general[:GENERAL_ROWS]
        measuring = replace(execution, micro_tokens=max(MEASURED_TOKENS, *(len(row.ids) for row in held)))

        def loss(rows: Sequence[Row]) -> float:
            batches = micro_batches(rows, measuring.micro_tokens)
            mean = sum(session.losses(state.active, batches, measuring), LossSum()).mean
            return mean if math.isfinite(mean) else MOST_LOSS

        before = (config.data, config.seq_len, eval_tokens, config.init, config.seed)
        for key, rows in ((before, held), ((config.seq_len,), general)):
            if key not in self._measured:
                self._measured[key] = loss(rows)
        tokens, curve, steps = 0, [(0, self._measured[before])], schedule.total_steps or 0
        for step, (after, read) in enumerate(take_steps(run_plan, session, begun)):
            state, tokens = after, tokens + read
            if step + 1 == steps or (eval_every_steps and (step + 1) % eval_every_steps == 0):
                curve.append((tokens, loss(held)))
        batches = micro_batches(apart, measuring.micro_tokens)
        read = zip(batches, session.row_losses(state.active, batches, measuring), strict=True)
        by_row = dict(pair for batch, found in read for pair in zip(batch.numbers.tolist(), found, strict=True))
        last = [by_row[number] for number in range(len(apart))]
        return {
            **({"untouched": [row.nats for row in last], "places": [row.tokens for row in last],
                "texts": [row.source for row in apart]} if apart else {}),
            "rate": schedule.rate, "target_tokens": schedule.target_tokens, "curve": curve, "final": curve[-1][1],
            "general_before": self._measured[config.seq_len,], "general": loss(general),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip

    def _begun(self, run_plan: RunPlan, session: Session) -> Initialization:
        """The adapter before the first step, found once for runs that differ in nothing but their rate."""
        config = run_plan.config
        key = (config.data, config.init, config.seed, config.rank, config.batch_tokens, config.calibration_steps)
        if self._initial[0] != key:
            made = initialise(
                parse_init(config.init), config, run_plan.sizes, run_plan.calibration_data(), session, EventLog(ignore)
            )
            self._initial = (key, made)
        found = self._initial[1]
        assert found is not None
        return found


def take_steps(
    run_plan: RunPlan, session: Session, state: TrainState, objectives: Sequence[Objective] = (Objective(),)
) -> Iterator[tuple[TrainState, int]]:
    """Take the steps of a run, whose objectives take turns: after each the state, and the tokens it read."""
    schedule, execution, task = run_plan.step_schedule, run_plan.execution, text_task(run_plan)
    for step in range(schedule.total_steps or 0):
        rows, key = schedule.rows(step), StepKey(run_plan.config.seed, step)
        objective = objectives[step % len(objectives)]
        gradient = session.gradient(state, task.work(rows, execution, key), objective, execution, key)
        state = session.apply(state, gradient, schedule.rate_at(step, 0.0))
        yield state, sum(task.costs[row] for row in rows)


def _first(rows: Sequence[Row], tokens: int) -> Iterator[Row]:
    for row in rows:
        if tokens <= 0:
            return
        yield row
        tokens -= len(row.ids)


def _spread(rows: Sequence[Row], but: Container[str], most: int, tokens: int) -> list[Row]:
    """At most so many rows, of about so many tokens, evenly spread over those that come from other texts than `but`."""
    others = [row for row in rows if row.source not in but]
    count = min(most, len(others), int(tokens * len(others) / max(1, sum(len(row.ids) for row in others))))
    return [others[int((place + 0.5) * len(others) / count)] for place in range(count)]


class Kept:
    """Runs that were done, in a JSON file, by what they are: a study that was stopped goes on where it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []

    def result(self, key: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A run, done now unless it was done before."""
        for done in self.runs:
            if all(done.get(name) == value for name, value in key.items()):
                return done
        done = {**key, **run()}
        self.runs.append(done)
        runs = ",\n".join(json.dumps(run) for run in self.runs)
        self._path.write_text(f'{{"runs": [\n{runs}\n]}}\n')
        told = ", ".join(f"{name} {value}" for name, value in key.items())
        print(f"{told}: loss {done['final']:.4f} at {done['rate']:.2g}, {done['seconds']:.0f} s", flush=True)
        return done


def best_power(loss: Callable[[int], float], first: Sequence[int], stride: int = 1, most_extra: int = 3) -> int:
    """The power of a learning rate with the lowest loss, looked for further out while it is at the edge."""
    powers = list(first)
    for _ in range(most_extra + 1):
        best = min(powers, key=loss)
        if best not in (min(powers), max(powers)):
            break
        powers.append(best + (stride if best == max(powers) else -stride))
    return min(powers, key=loss)
