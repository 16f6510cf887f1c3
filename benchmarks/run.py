"""`make bench`: Thimble against its peers on this machine, alternating in one run; writes RESULTS.md and results.json.

Every contestant is a process of its own, so that peak memory is the kernel's figure for it alone. Rounds alternate, and
ratios are taken between medians of the same run. `--only NAME` runs one row.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROUNDS = 3


def run_contestant(*arguments: str) -> dict:
    """Run one program of this folder; it prints one JSON object on its last line."""
    command = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def medians(rounds: list[dict]) -> dict[str, float]:
    """Median of each number over rounds."""
    return {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}


def training_row(labels: str, goals: tuple[float, float]) -> list[dict]:
    """Tokens per second and peak memory of one training step, against the best of PEFT's settings."""
    settings = {"thimble bf16": ("train_thimble.py", "bf16"), "thimble fp32": ("train_thimble.py", "fp32"),
                "peft bf16": ("train_peft.py", "bf16"), "peft fp32": ("train_peft.py", "fp32")}  # fmt: skip
    found: dict[str, list[dict]] = {name: [] for name in settings}
    for _ in range(ROUNDS):
        for name, (program, dtype) in settings.items():
            found[name].append(run_contestant(program, "--dtype", dtype, "--labels", labels))
            print(f"  {name}: {found[name][-1]}", flush=True)
    result = {name: medians(rounds) for name, rounds in found.items()}
    best = max((name for name in result if name.startswith("peft")), key=lambda name: result[name]["tokens_per_second"])
    small = min((name for name in result if name.startswith("peft")), key=lambda name: result[name]["peak_bytes"])
    what = f"SmolLM2-135M, 4x512 tokens, rank 16 on all linear layers, {float(labels):.0%} of tokens labelled"
    rows = []
    for ours, goal_bf16 in (("thimble bf16", True), ("thimble fp32", False)):
        speed = result[ours]["tokens_per_second"] / result[best]["tokens_per_second"]
        memory = result[ours]["peak_bytes"] / result[small]["peak_bytes"]
        goal = goals if goal_bf16 else (None, None)
        rows.append(row(f"tokens/s, {ours}: {what}", best, speed, goal[0], result[ours]["tokens_per_second"]))
        rows.append(row(f"peak memory, {ours}: {what}", small, memory, goal[1], result[ours]["peak_bytes"] / 1e6))
    return rows


def start_row() -> list[dict]:
    """Seconds from process start to the end of the first optimiser step, evaluation before training not counted."""
    from make_rows import ten_rows

    times = []
    for _ in range(ROUNDS + 1):  # the first one warms caches and is dropped
        with tempfile.TemporaryDirectory() as folder:
            ten_rows(Path(folder) / "ten.jsonl")
            command = ["-m", "thimble", "train", f"{folder}/ten.jsonl", "--max-steps", "1", "--valid-split", "0",
                       "--eval-rows", "0", "--out", f"{folder}/run", "--json"]  # fmt: skip
            began = time.time()
            subprocess.run([sys.executable, "-c", FIRST_STEP, *command], check=True, capture_output=True, cwd=folder)
            times.append(float((Path(folder) / "first_step").read_text()) - began)
    return [
        row(
            "seconds from start to the end of the first step, SmolLM2 GGUF, warm",
            "-",
            statistics.median(times[1:]),
            6.0,
            0.0,
        )
    ]


# Runs `thimble train` in this process and notes when the first step is logged, less what the evaluation took.
FIRST_STEP = """
import sys, time, thimble.verbs.train as t
spent, before, step = [0.0], t._Run.measure_before, t._Run._step
def timed(self):
    began = time.time(); before(self); spent[0] = time.time() - began
def noted(self, *a):
    row = step(self, *a); open("first_step", "w").write(str(time.time() - spent[0])); return row
t._Run.measure_before, t._Run._step = timed, noted
sys.argv = sys.argv[2:]
from thimble.cli import run
run()
"""


def help_row() -> list[dict]:
    """Seconds of `thimble --help`."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "thimble", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return [row("seconds of thimble --help", "-", statistics.median(times), 0.3, 0.0)]


def row(name: str, peer: str, ratio: float, goal: float | None, value: float) -> dict:
    """One line of the table."""
    return {
        "name": name,
        "peer": peer,
        "ratio": round(ratio, 3),
        "goal": goal,
        "value": round(value, 1),
        "runs": ROUNDS,
    }


def gemm_rates() -> dict[str, float]:
    """What this machine multiplies, GFLOP/s, so that figures of different machines can be set side by side."""
    sys.path.insert(0, str(HERE.parent / "src"))
    import torch

    from thimble.torch_backend.compute import use_fast_fp32

    use_fast_fp32()
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.ones(2048, 2048, dtype=dtype)
        times = []
        for _ in range(8):
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        rates[name] = round(2 * 2048**3 / min(times) / 1e9)
    return rates


def write_results(rows: list[dict]) -> None:
    """Write the table for people and the numbers behind it; rows of an earlier run that were not measured now stay."""
    import torch

    with Path("/proc/cpuinfo").open() as lines:
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    machine = {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "gemm_gflops": gemm_rates(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    old = json.loads((HERE / "results.json").read_text())["rows"] if (HERE / "results.json").exists() else []
    measured = {line["name"] for line in rows}
    rows = [line for line in old if line["name"] not in measured] + rows
    (HERE / "results.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    lines = ["# Results", "", "Written by `make bench`; ratios of medians, contestants alternating in one run.", ""]
    lines += [f"Machine: {json.dumps(machine)}", "", "| what | against | ratio or figure | goal | ours |"]
    lines += ["|---|---|---|---|---|"]
    for line in rows:
        goal = "" if line["goal"] is None else f"{line['goal']:g}"
        lines.append(f"| {line['name']} | {line['peer']} | {line['ratio']:g} | {goal} | {line['value'] or ''} |")
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


ROWS = {
    "labels-all": lambda: training_row("1.0", (1.5, 0.6)),
    "labels-some": lambda: training_row("0.4", (1.5, 0.6)),
    "start": start_row,
    "help": help_row,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    chosen, ROUNDS = options.only, options.rounds
    table = []
    for name, measure in ROWS.items():
        if chosen in (None, name):
            print(f"{name} ...", flush=True)
            table += measure()
    write_results(table)
