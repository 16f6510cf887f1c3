"""Run the lines of the table, several at a time, each in a process of its own."""

import argparse
import datetime
import functools
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import stress
from stress import (
    Line,
    arrow_files,
    canaries,
    columns,
    crash,
    csv_files,
    damage,
    data,
    files,
    foreign_files,
    memory,
    runs,
    schedules,
    server,
    storage,
    templates,
    traffic,
)
from thimble import __version__
from thimble.models.machine import processor

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- the table: written by make stress -->", "<!-- the end of the table -->"

# The longest first, so that none is left alone at the end.
TRIALS: dict[str, tuple[Callable[[int], Line], int]] = {
    "kill": (runs.kill_runs, 200),
    "kill_pictures": (runs.kill_runs_on_pictures, 100),
    "gguf": (files.fuzz_gguf, 1_000_000),
    "soak": (runs.soak, 24_000),
    "data": (data.fuzz_data, 100_000),
    "memory": (memory.memory_limits, 12),
    "cuts": (crash.power_cuts, 20_000),
    "safetensors": (files.fuzz_safetensors, 1_000_000),
    "gguf_adapters": (files.fuzz_gguf_adapter, 100_000),
    "templates": (templates.hostile_templates, 1_000),
    "stopped": (runs.stop_runs, 71),
    "numbers": (runs.bad_numbers, 100),
    "signals": (runs.signalled_runs, 50),
    "full_runs": (runs.full_runs, 50),
    "many_rows": (data.many_rows, 1_000_000),
    "stops": (storage.stopped_saves, 4),
    "publishes": (storage.publishes, 1_000),
    "adapters": (foreign_files.fuzz_adapter_config, 50_000),
    "adapter_tensors": (foreign_files.fuzz_adapter_tensors, 50_000),
    "bases": (foreign_files.fuzz_base_folder, 30_000),
    "tokenizers": (foreign_files.fuzz_tokenizers, 20_000),
    "gguf_metadata": (foreign_files.fuzz_gguf_metadata, 20_000),
    "columns": (columns.column_names, 50_000),
    "arrow": (arrow_files.fuzz_arrow, 20_000),
    "csv": (csv_files.csv_dialects, 50_000),
    "canaries": (canaries.canaries, 500),
    "server_bodies": (server.fuzz_bodies, 980_000),
    "server_requests": (server.made_requests, 20_000),
    "full": (storage.full_disks, 50),
    "flips": (damage.bit_flips, 1_000),
    "modes": (storage.modes, 1),
    "traffic": (traffic.traffic, 600),  # seconds
    "schedules": (schedules.random_schedules, 10_000),
    "whole_numbers": (schedules.whole_number_schedules, 2_000),
    "real_schedules": (schedules.real_schedules, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="stress", description=stress.__doc__)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--share", type=float, default=1.0, help="of the usual counts")
    parser.add_argument("--workers", type=int, default=2, help="lines at a time")
    parser.add_argument("--here", action="store_true", help="run one line in this process, and print it as JSON")
    options = parser.parse_args()
    if options.here:
        (name,) = options.only
        trial, count = TRIALS[name]
        print(json.dumps(asdict(trial(max(1, int(count * options.share))))))
        return
    cores: queue.Queue[int] = queue.Queue()  # one for each line at work: lines that share cores slow each other
    for core in sorted(os.sched_getaffinity(0))[: options.workers]:
        cores.put(core)
    began = time.perf_counter()
    with ThreadPoolExecutor(cores.qsize()) as pool:
        lines = list(pool.map(lambda name: _in_a_process(name, options.share, cores), options.only))
    table = "| what | tried | wrong | seconds | |\n|---|---|---|---|---|\n"
    table += "".join(f"| {x.name} | {x.tried:,} | {x.wrong:,} | {x.seconds:.0f} | {x.note} |\n" for x in lines)
    print(f"\n{table}")
    if options.share == 1 and options.only == list(TRIALS):
        _write_down(table, time.perf_counter() - began)
    sys.exit(any(line.wrong for line in lines))


def _write_down(table: str, seconds: float) -> None:
    """Put the table where the page of promises shows it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    _, _, after = rest.partition(f"{END}\n")
    name, cores = processor()[0], len(os.sched_getaffinity(0))
    how = f"{seconds / 60:.0f} minutes on {cores} cores of an {name}, thimble {__version__}"
    when = f"{datetime.date.today()}: {how}."
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{when}\n{END}\n{after}", encoding="utf-8")


def _in_a_process(name: str, share: float, cores: "queue.Queue[int]") -> Line:
    command = [sys.executable, "-m", "stress", "--here", "--only", name, "--share", str(share)]
    core = cores.get()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=functools.partial(os.sched_setaffinity, 0, {core}),
    )  # fmt: skip
    cores.put(core)
    *told, last = done.stdout.splitlines() or [""]
    line = Line(**json.loads(last)) if not done.returncode else Line(name, 0, 1, 0.0, f"exit code {done.returncode}")
    print(*told, f"{line.name}: {line.wrong} wrong of {line.tried:,} in {line.seconds:.0f} s; {line.note}", sep="\n")
    sys.stdout.flush()
    return line


if __name__ == "__main__":
    main()
