"""Runs that are killed, stopped, starved and fed bad numbers: they end as they would have, or say that they failed."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stress import TINY, Line
from stress.storage import Failing

STEPS = 12
PICTURE_STEPS = 150  # shorter ones
KNOBS: dict[str, Any] = {
    "base": str(TINY), "seq_len": 64, "batch_tokens": 64, "max_new_tokens": 2, "eval_rows": 0, "compute": "fp32",
    "rank": 4, "dropout": 0.1,
}  # fmt: skip


@contextlib.contextmanager
def examples(count: int = 12) -> Iterator[Path]:
    """A folder with a file of examples."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(count)]
        Path(folder, "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield Path(folder)


def ending(out: Path, last: int = STEPS) -> tuple[bytes, list[dict[str, Any]]]:
    """Adapter and optimiser state of a finished run, and its log without what a clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_bytes")} for row in rows]
    state = (out / "checkpoints" / f"step-{last:08d}" / "state.safetensors").read_bytes()
    return (out / "adapter" / "adapter_model.safetensors").read_bytes() + state, kept


# ---- killed and stopped ---------------------------------------------------------------------------------------------


def _train(folder: Path, out: Path, options: dict[str, Any]) -> None:
    """A short run with a checkpoint at every step; in a process of its own."""
    import thimble

    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    thimble.train(folder / "mine.jsonl", out=str(out), max_steps=STEPS, checkpoint_every_steps=1, **KNOBS, **options)


def _train_on_pictures(folder: Path, out: Path, options: dict[str, Any]) -> None:
    """The same on pictures, with a network of the user's own."""
    import thimble

    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    thimble.train(
        folder / "pictures", base=f"{folder / 'net.py'}:build", out=str(out), max_steps=PICTURE_STEPS,
        checkpoint_every_steps=1, rank=4, batch_rows=8, image_size=12, augment="shift", dropout=0.1, **options,
    )  # fmt: skip


NET = """import torch
from torch import nn


def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2)
    return nn.Sequential(*layers)
"""


@contextlib.contextmanager
def pictures() -> Iterator[Path]:
    """A folder with pictures of two classes and a file that makes a network."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "net.py").write_text(NET)
        for number in range(40):
            place = Path(folder, "pictures", "bright" if number % 2 else "dark")
            place.mkdir(parents=True, exist_ok=True)
            noise = random.Random(number).randbytes(12 * 12 * 3)
            shade = Image.frombytes("RGB", (12, 12), bytes(value // 2 + 60 * (number % 2) for value in noise))
            shade.save(place / f"{number}.png")
        yield Path(folder)


def kill_runs(count: int) -> Line:
    """Kill runs at random moments, some of them again when they are resumed, and compare with the uninterrupted run."""
    with examples() as folder:
        return _kill(count, folder, _train, "runs killed and resumed")


def kill_runs_on_pictures(count: int) -> Line:
    """The same of runs on pictures."""
    with pictures() as folder:
        return _kill(count, folder, _train_on_pictures, "runs on pictures killed and resumed", PICTURE_STEPS)


def _kill(
    count: int, folder: Path, train: Callable[[Path, Path, dict[str, Any]], None], name: str, last: int = STEPS
) -> Line:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["thimble.commands.train", "thimble.backends.torch.session", "matplotlib.figure"])
    began, dice, wrong, killed = time.perf_counter(), random.Random(0), 0, Counter[str]()

    def run(out: Path, options: dict[str, Any], seconds: float | None = None) -> int | None:
        process = context.Process(target=train, args=(folder, out, options))
        process.start()
        process.join(seconds)
        if process.exitcode is None and process.pid:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        return process.exitcode

    run(folder / "warm", {})
    started = time.perf_counter()
    run(folder / "whole", {})
    seconds, expected = time.perf_counter() - started, ending(folder / "whole", last)
    for number in range(count):
        out = folder / f"run-{number}"
        for again in range(1 + number % 3):
            code = run(out, {"resume": True} if again else {}, dice.uniform(0.3, 0.95) * seconds)
            killed[_place(out) if code == -signal.SIGKILL else "not at all: it had ended"] += 1
        wrong += run(out, {"resume": True}) != 0 or ending(out, last) != expected
    places = ", ".join(f"{times} {place}" for place, times in killed.most_common())
    return Line(name, count, wrong, time.perf_counter() - began, f"killed: {places}")


def _place(out: Path) -> str:
    """How far a run was when it was killed."""
    if list((out / "checkpoints").glob(".*.tmp")):
        return "while saving"
    if not (out / "metrics.jsonl").exists():
        return "before training"
    return "while training" if not (out / "adapter").exists() else "while publishing"


def stop_runs(count: int) -> Line:
    """Stop a run of 60 steps after every step, and at 2, 3 and 10 steps of one run; resume; each row once an epoch."""
    import thimble

    began, wrong, dice = time.perf_counter(), 0, random.Random(1)
    options = {**KNOBS, "max_steps": 60, "checkpoint_every_steps": 7, "rank": 2}
    patterns = [[step] for step in range(1, 60)]
    patterns += [sorted(dice.sample(range(1, 60), times)) for times in (2, 3, 10) for _ in range(4)]
    with examples() as folder, watched_rows() as rows:

        def run(out: Path, stops: list[int]) -> list[tuple[str, ...]]:
            seen: list[tuple[str, ...]] = []
            for number, step in enumerate([*stops, 60]):
                rows.clear()
                stop = _Stop(step)
                thimble.train(
                    folder / "mine.jsonl",
                    out=str(out),
                    resume=number > 0,
                    on_event=stop.on_event,
                    should_stop=stop,
                    **options,
                )
                seen += rows
            return seen

        whole = run(folder / "whole", [])
        expected = ending(folder / "whole", 60)
        wrong += not _once_an_epoch(whole, 12 - 1)  # one is held out
        for number, stops in enumerate(itertools.islice(patterns, count)):
            out = folder / f"run-{number}"
            wrong += run(out, stops) != whole or ending(out, 60) != expected
    tried = min(count, len(patterns))
    note = "59 places, then 2, 3 and 10 stops in a run; each row once an epoch"
    return Line("runs stopped and resumed", tried, wrong, time.perf_counter() - began, note)


class _Stop:
    """Asks a run to stop after a step; not after the last one, which ends it."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    def on_event(self, event: Any) -> None:
        self.done = event.data["step"] if event.kind == "step" else self.done

    def __call__(self) -> bool:
        return self.step < 60 and self.done >= self.step


@contextlib.contextmanager
def watched_rows() -> Iterator[list[tuple[str, ...]]]:
    """Where the rows of each step came from, while this lasts."""
    from thimble.training.tasks.text import TextTask

    seen: list[tuple[str, ...]] = []
    whole = TextTask.work

    def work(task: Any, rows: Any, *more: Any) -> Any:
        seen.append(tuple(task.rows[number].source for number in rows))
        return whole(task, rows, *more)

    TextTask.work = work  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        TextTask.work = whole  # type: ignore[method-assign]


def _once_an_epoch(steps: list[tuple[str, ...]], rows: int) -> bool:
    """Whether every epoch that was finished held each row exactly once."""
    flat = list(itertools.chain(*steps))
    epochs = [flat[start : start + rows] for start in range(0, len(flat) - rows + 1, rows)]
    return len(epochs) > 2 and all(len(set(epoch)) == rows for epoch in epochs)


def full_runs(count: int) -> Line:
    """Let the disk be full at byte k of a run; it goes on or says so, and with room again ends as it would have."""
    import thimble
    from thimble.errors import RunError

    began, wrong, ended = time.perf_counter(), 0, Counter[str]()
    options = {**KNOBS, "max_steps": STEPS, "checkpoint_every_steps": 4}
    with examples() as folder:

        def run(out: Path, room: float, **more: Any) -> tuple[int, str]:
            with Failing(out.parent, room=room) as disk:
                try:
                    thimble.train(folder / "mine.jsonl", out=str(out), **options, **more)
                except (OSError, RunError) as error:
                    return disk.written, f"said {type(error).__name__}"
            return disk.written, "ended without some checkpoints" if disk.failed else "ended"

        whole, _ = run(folder / "whole" / "run", math.inf)
        expected = ending(folder / "whole" / "run")
        for number in range(count):
            out = folder / f"{number}" / "run"
            ended[run(out, number * whole // count)[1]] += 1
            (out / "report.json").unlink(missing_ok=True)  # of a run that ended with holes: taken up all the same
            wrong += run(out, math.inf, resume=out.exists())[1] != "ended" or ending(out) != expected
    note = ", ".join(f"{times} {what}" for what, times in ended.most_common())
    return Line("runs on a disk that is full at some byte", count, wrong, time.perf_counter() - began, note)


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
MOST_SECONDS_TO_END = 5.0


def signalled_runs(count: int) -> Line:
    """Send a signal to a command at some moment of its training; it ends in time, with its code, and can go on."""
    began, dice, wrong, slowest = time.perf_counter(), random.Random(3), 0, 0.0
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**KNOBS, "max_steps": 100_000}.items()]
    with examples() as folder:
        for number in range(count):
            out, sent = folder / f"run-{number}", list(SIGNALS)[number % 2]
            command = [sys.executable, "-m", "thimble", "train", "mine.jsonl", "--out", str(out), *flags]
            with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
                for line in process.stderr or ():
                    if b"step 1/" in line:
                        break
                time.sleep(dice.uniform(0, 0.5))
                process.send_signal(sent)
                asked = time.perf_counter()
                process.communicate()
            slowest = max(slowest, time.perf_counter() - asked)
            wrong += process.returncode != SIGNALS[sent] or not _can_go_on(out)
    wrong += slowest > MOST_SECONDS_TO_END
    return Line("runs asked to end by a signal", count, wrong, time.perf_counter() - began, f"slowest {slowest:.1f} s")


def _can_go_on(out: Path) -> bool:
    from thimble.files.peft import load_adapter
    from thimble.training.checkpoint import latest_checkpoint

    found = latest_checkpoint(out)
    return found is not None and found.step > 0 and load_adapter(out).is_finite()


# ---- bad numbers ----------------------------------------------------------------------------------------------------

PLACES = ("loss", "gradient", "activation", "weight", "moment")


def bad_numbers(count: int) -> Line:
    """Put NaN or infinity somewhere into a step, once or from then on; nothing bad is learned or published."""
    import thimble
    from thimble.errors import RunError
    from thimble.files.peft import load_adapter

    began, dice, wrong, ended = time.perf_counter(), random.Random(2), 0, Counter[str]()
    told: list[str] = []
    with examples() as folder:
        for number in range(count):
            place, value = PLACES[number % len(PLACES)], dice.choice([math.nan, math.inf, -math.inf])
            is_for_good, out = number % 4 == 3, folder / f"run-{number}"
            told.clear()
            with poisoned(place, value, dice.randint(2, STEPS), is_for_good) as applied:
                try:
                    thimble.train(
                        folder / "mine.jsonl", out=str(out), max_steps=2 * STEPS, **KNOBS,
                        on_event=lambda event: told.append(event.text) if event.kind == "warning" else None,
                    )  # fmt: skip
                    ended["went on to their end"] += 1
                    wrong += is_for_good  # it cannot have
                except RunError:
                    ended["failed honestly"] += 1
                    wrong += not is_for_good
            is_told = any("was left out: " in text or "back to the last good adapter" in text for text in told)
            wrong += not is_told or not all(applied) or not load_adapter(out).is_finite()
    note = ", ".join(f"{times} {what}" for what, times in ended.most_common())
    return Line("NaN or infinity in a step", count, wrong, time.perf_counter() - began, note)


@contextlib.contextmanager
def poisoned(place: str, value: float, step: int, is_for_good: bool) -> Iterator[list[bool]]:
    """Put a number into one place of a step; gives for each update that was made whether it was a finite one."""
    from thimble.backends.torch.session import TorchSession

    gradient, apply, taken, applied = TorchSession.gradient, TorchSession.apply, [0], list[bool]()

    def bad_gradient(session: Any, state: Any, *args: Any) -> Any:
        taken[0] += 1
        if taken[0] != step and not (is_for_good and taken[0] > step):
            return gradient(session, state, *args)
        if place in ("weight", "moment"):
            numbers = state.active.flat if place == "weight" else state.optimiser._mean
            numbers[len(numbers) // 3] = value
            session._refreshed(state)
            return gradient(session, state, *args)
        if place == "gradient":
            found = gradient(session, state, *args)
            found.flat[len(found.flat) // 2] = value
            return found
        with _poisoned_pass(session, place, value):
            return gradient(session, state, *args)

    def watched_apply(session: Any, state: Any, found: Any, *more: Any) -> Any:
        applied.append(math.isfinite(found.loss.mean) and math.isfinite(found.norm))
        return apply(session, state, found, *more)

    TorchSession.gradient, TorchSession.apply = bad_gradient, watched_apply  # type: ignore[method-assign]
    try:
        yield applied
    finally:
        TorchSession.gradient, TorchSession.apply = gradient, apply  # type: ignore[method-assign]


@contextlib.contextmanager
def _poisoned_pass(session: Any, place: str, value: float) -> Iterator[None]:
    """One forward and backward pass with a bad loss or a bad activation in it."""
    owner, name = (session, "_label_loss") if place == "loss" else (session.decoder, "hidden")
    whole: Callable[..., Any] = getattr(owner, name)

    def bad(*args: Any, **more: Any) -> Any:
        found = whole(*args, **more)
        if place == "loss":
            return found * value
        return found.index_fill(-1, found.new_tensor([5], dtype=int), value)  # of every token: not all have a label

    setattr(owner, name, bad)
    try:
        yield
    finally:
        delattr(owner, name)


# ---- hours of steps -------------------------------------------------------------------------------------------------

SETTLED = 0.2  # of the steps: what is made once is made by then
MOST_GROWN_BYTES = 20_000_000


def soak(count: int) -> Line:
    """Train a tiny model for as many steps as a day's work takes; memory and open files stay as they are."""
    import thimble

    began, seen = time.perf_counter(), list[tuple[int, int, int]]()

    def hear(event: Any) -> None:
        if event.kind == "step" and event.data["step"] % 50 == 0:
            seen.append((event.data["step"], _resident_bytes(), len(os.listdir("/proc/self/fd"))))

    with examples(40) as folder:
        rows = [{"prompt": "word " * (n % 23), "completion": "done " * (1 + n % 7)} for n in range(200)]
        (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        thimble.train(
            folder / "mine.jsonl", out=str(folder / "run"), on_event=hear, max_steps=count, eval_every_steps=50,
            patience=0, checkpoint_every_minutes=0.02, learning_rate=1e-5, **KNOBS,
        )  # fmt: skip
    settled = [row for row in seen if row[0] >= SETTLED * count]
    grown, files = (settled[-1][at] - settled[0][at] for at in (1, 2))
    note = f"memory {grown / 1e6:+.1f} MB, open files {files:+d} from step {settled[0][0]:,} to {settled[-1][0]:,}"
    return Line(
        "steps in one run", count, int(grown > MOST_GROWN_BYTES) + (files > 0), time.perf_counter() - began, note
    )


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
