"""Less memory than a run would like: it takes less, or is refused; it is never killed by the system without a word."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stress import Line

CGROUP = Path("/sys/fs/cgroup")
SHARES = (0.6, 1.1)  # of the memory planned, the ends of what is tried
ALLOWED = 1.1  # of the budget, since a plan is right within a tenth
FLAGS = ("--max-steps", "2", "--eval-rows", "0", "--valid-split", "0", "--json")
ENDINGS = {0: "trained", 2: "refused", 3: "failed honestly"}


def memory_limits(count: int) -> Line:
    """Train the default base with a budget, and where the system allows it with a limit, of 0.6 to 1.1 of the plan."""
    began, wrong, ended = time.perf_counter(), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"prompt": "please say it again, and slowly: " * 40, "completion": f"{n} it is " * 30} for n in range(16)
        ]
        (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        _thimble(folder, "train", "--out", "first")  # loops that are compiled for the first time take memory too
        _, plan = _thimble(folder, "plan")
        planned = plan["memory"]["total"]
        for number in range(count):
            share = SHARES[0] + (SHARES[1] - SHARES[0]) * (number // 2) / max(1, (count - 1) // 2)
            budget, out = int(planned * share), ("--out", f"run-{number}")
            if number % 2:
                with _limited(budget) as group:
                    code, report = _thimble(folder, "train", *out, group=group)
            else:
                code, report = _thimble(folder, "train", *out, "--memory-budget", str(budget))
                wrong += report.get("peak_memory_bytes", 0) > ALLOWED * budget
            ended[ENDINGS.get(code, f"ended with {code}")] += 1
            wrong += code not in ENDINGS
    how = "by budget and control group" if _group_folder() else "by budget"
    note = f"{how}, plan {planned / 1e9:.2f} GB: " + ", ".join(f"{times} {what}" for what, times in ended.most_common())
    return Line("runs with too little memory", count, wrong, time.perf_counter() - began, note)


def _thimble(folder: Path, command: str, *flags: str, group: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Run a command in a process of its own, in a control group; its exit code and what it says."""

    def enter() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-m", "thimble", command, "mine.jsonl", *FLAGS, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, preexec_fn=enter, check=False)
    with contextlib.suppress(ValueError):
        return done.returncode, json.loads(done.stdout)
    return done.returncode, {}


def _group_folder() -> Path | None:
    """Where control groups of memory are made, if this user may make one."""
    place = next((path for path in (CGROUP / "memory", CGROUP) if (path / "cgroup.procs").exists()), None)
    return place if place and os.access(place, os.W_OK) else None


@contextlib.contextmanager
def _limited(most_bytes: int) -> Iterator[Path | None]:
    """A control group that may take so much memory; None where none can be made."""
    place = _group_folder()
    group = place / f"thimble-stress-{os.getpid()}" if place else None
    if group:
        group.mkdir()
        name = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
        (group / name).write_text(str(most_bytes))
    try:
        yield group
    finally:
        if group:
            group.rmdir()
