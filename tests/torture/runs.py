"""Runs that are killed and taken up again end as they would have."""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from torture import TINY, Line

STEPS = 12


def _train(folder: str, out: str, knobs: dict) -> None:
    """A short run with a checkpoint at every step; in a process of its own."""
    import thimble

    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    thimble.train(
        f"{folder}/mine.jsonl", base=str(TINY), out=out, seq_len=64, batch_tokens=64, max_steps=STEPS, max_new_tokens=2,
        eval_rows=0, compute="fp32", rank=4, dropout=0.1, checkpoint_every_steps=1, **knobs,
    )  # fmt: skip


def kill_runs(count: int) -> Line:
    """Kill runs at random moments, resume them, and compare what they end with to the unbroken run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["thimble.verbs.train", "thimble.torch_backend.session", "matplotlib.figure"])
    began, dice, wrong = time.perf_counter(), random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(12)]
        Path(folder, "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def run(out: str, knobs: dict, seconds: float | None = None) -> int | None:
            process = context.Process(target=_train, args=(folder, out, knobs))
            process.start()
            process.join(seconds)
            if process.exitcode is None and process.pid:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            return process.exitcode

        run(f"{folder}/warm", {})
        started = time.perf_counter()
        run(f"{folder}/whole", {})
        whole_seconds, expected = time.perf_counter() - started, _ending(f"{folder}/whole")
        killed = 0
        for number in range(count):
            out = f"{folder}/run-{number}"
            killed += run(out, {}, dice.uniform(0.2, 1.0) * whole_seconds) == -signal.SIGKILL
            is_same = run(out, {"resume": True}) == 0 and _ending(out) == expected
            wrong += not is_same
    note = f"{killed} were killed before their end"
    return Line("runs killed and resumed", count, wrong, time.perf_counter() - began, note)


def _ending(out: str) -> tuple[bytes, list]:
    """Adapter, optimiser and losses of a finished run."""
    rows = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_bytes")} for row in rows]
    state = Path(out, "checkpoints", f"step-{STEPS:08d}", "state.safetensors").read_bytes()
    return Path(out, "adapter", "adapter_model.safetensors").read_bytes() + state, kept
