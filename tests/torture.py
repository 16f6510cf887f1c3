"""`make torture`: what a run and its files must survive, tried many times over; prints a line for each and its count.

Each trial is small, so that there can be many: a tiny base, a few steps, files of some kilobytes.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TINY = HERE / "fixtures" / "gguf" / "smollm2.gguf"
SLOW_SECONDS = 0.1


@dataclass
class Line:
    """One line of the table.

    Attributes:
        name: What was tried.
        tried: How often.
        wrong: How often it went wrong.
        seconds: What it took.
        note: More to say.
    """

    name: str
    tried: int
    wrong: int
    seconds: float
    note: str = ""


# ---- files from strangers -------------------------------------------------------------------------------------------


def mutated(whole: bytes, dice: random.Random, header: int) -> bytes:
    """A file with something wrong in its first `header` bytes, or cut short, or with bytes too many."""
    found = bytearray(whole)
    for _ in range(dice.randint(1, 4)):
        place, kind = dice.randrange(min(header, len(found)) or 1), dice.randrange(7)
        if kind == 0:
            found[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            found[place] = dice.randrange(256)
        elif kind == 2:  # a number, perhaps a length or an offset
            value = dice.choice([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, dice.getrandbits(64)])
            width = dice.choice([1, 4, 8])
            found[place : place + width] = (value % 256**width).to_bytes(width, "little")
        elif kind == 3:
            del found[place : place + dice.randint(1, 64)]
        elif kind == 4:
            found[place:place] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 16)))
        elif kind == 5:  # another piece of the header here
            other = dice.randrange(min(header, len(found)) or 1)
            found[place : place + 16] = found[other : other + 16]
        else:
            del found[dice.randrange(len(found)) :]
        if not found:
            break
    return bytes(found)


def fuzz_files(name: str, whole: bytes, suffix: str, header: int, count: int, read: Callable[[Path], object]) -> Line:
    """Read mutated files: each is refused with an error of ours, or read; nothing else, and quickly."""
    from thimble.errors import InputError

    dice, wrong, slow, refused = random.Random(0), [], 0, 0
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for number in range(count):
            path = Path(folder) / f"{number}{suffix}"
            path.write_bytes(mutated(whole, dice, header))
            started = time.perf_counter()
            try:
                read(path)
            except InputError:
                refused += 1
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
            slow += time.perf_counter() - started > SLOW_SECONDS
            path.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    for text in sorted(set(wrong))[:10]:
        print("   ", text[:200])
    note = f"{refused} refused, {slow} took over {SLOW_SECONDS} s, memory grew by {grown:.0f} MB"
    return Line(name, count, len(wrong) + slow, time.perf_counter() - began, note)


def fuzz_safetensors(count: int) -> Line:
    from thimble.core.tensorfile import open_tensors, write_safetensors

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_safetensors(path, {f"layer.{n}": np.ones((3, 4), np.float32) for n in range(6)}, {"format": "pt"})
        whole = path.read_bytes()

    def read(path: Path) -> None:
        file = open_tensors(path)
        for name in file.tensors:
            file.read(name)

    return fuzz_files("mutated safetensors", whole, ".safetensors", 600, count, read)


def fuzz_gguf(count: int) -> Line:
    from thimble.core.base import open_base

    whole = TINY.read_bytes()
    header = len(whole) - sum(w.info.nbytes for w in open_base(TINY).weights.values())
    return fuzz_files("mutated GGUF", whole, ".gguf", header, count, lambda path: open_base(path))


def fuzz_adapter_config(count: int) -> Line:
    from thimble.core.adapter import Adapter, load_adapter, save_adapter
    from thimble.core.lowrank import Factors

    with tempfile.TemporaryDirectory() as folder:
        adapter = Adapter({"model.layers.0.mlp.up_proj": Factors(np.ones((2, 4), "f4"), np.ones((3, 2), "f4"), 1.0)})
        save_adapter(adapter, Path(folder))
        config, weights = (Path(folder) / n for n in ("adapter_config.json", "adapter_model.safetensors"))
        whole, kept = config.read_bytes(), weights.read_bytes()

        def read(path: Path) -> None:
            config.write_bytes(path.read_bytes())
            weights.write_bytes(kept)
            load_adapter(folder)

        return fuzz_files("mutated adapter configs", whole, ".json", len(whole), count, read)


def fuzz_rows(count: int) -> Line:
    from thimble.data.records import read_dataset

    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return fuzz_files("mutated data files", whole, ".jsonl", len(whole), count, lambda path: read_dataset(str(path)))


# ---- killed runs ----------------------------------------------------------------------------------------------------

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


TRIALS: dict[str, tuple[Callable[[int], Line], int]] = {
    "safetensors": (fuzz_safetensors, 1_000_000),
    "gguf": (fuzz_gguf, 1_000_000),
    "adapters": (fuzz_adapter_config, 100_000),
    "rows": (fuzz_rows, 100_000),
    "kill": (kill_runs, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--share", type=float, default=1.0, help="of the usual counts")
    options = parser.parse_args()
    lines = []
    for name in options.only:
        trial, count = TRIALS[name]
        line = trial(max(1, int(count * options.share)))
        print(f"{line.name}: {line.wrong} wrong of {line.tried:,} in {line.seconds:.0f} s; {line.note}", flush=True)
        lines.append(line)
    sys.exit(any(line.wrong for line in lines))


if __name__ == "__main__":
    main()
