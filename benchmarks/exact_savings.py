"""What is not computed because it changes nothing, against an earlier source tree: CPU seconds, alternating.

    git worktree add /tmp/before 94f6456
    python benchmarks/exact_savings.py prefix last-8 --before /tmp/before

`prefix`: rows that share 300 tokens and have 150 of their own, 50 of them targets. `last-8`: adapters on the last eight
blocks, rows of 150 tokens, 50 of them targets. Three epochs each on the default base. Seconds are those of the whole
process, user and system, between the first event of training and the last step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
WORDS = "time year people way day man thing woman life child world school state family student group country".split()
OPTIONS = {"prefix": {}, "last-8": {"targets": ("last-8",)}}


def write_rows(case: str, path: Path, count: int) -> None:
    """Chat rows: of `prefix` with a long system text in common."""
    system = " ".join(WORDS[n * n % len(WORDS)] for n in range(275)) if case == "prefix" else "Answer."
    with path.open("w") as file:
        for number in range(count):
            asked, answer = (
                " ".join(WORDS[(number * 7 + n * n * step + n) % len(WORDS)] for n in range(length))
                for step, length in ((3, 85), (5, 48))
            )
            roles = ("system", system), ("user", f"{number}: {asked}"), ("assistant", answer)
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n")


def train(case: str, rows: int, epochs: float) -> None:
    """One run; prints what it took."""
    import thimble

    began = last = 0.0

    def on_event(event: Any) -> None:
        nonlocal began, last
        if (event.kind, event.text) == ("stage", "training"):
            began = time.process_time()
        if event.kind == "step":
            last = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(case, data, rows)
        report = thimble.train(
            str(data), out=f"{folder}/run", epochs=epochs, valid_split=0.0, seed=1, on_event=on_event, **OPTIONS[case]
        )
    print(json.dumps({"seconds": last - began, "whole": time.process_time(), "tokens": report.tokens}))


def measured(tree: Path, case: str, rows: int, epochs: float) -> dict[str, float]:
    """What a run takes with the source of a tree."""
    run = [sys.executable, __file__, case, "--rows", str(rows), "--epochs", str(epochs), "--run"]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def main() -> None:
    """Compare, or with `--run` be one of the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=OPTIONS)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        train(options.cases[0], options.rows, options.epochs)
        return
    for case in options.cases:
        found = {"before": [], "now": []}
        for _ in range(options.rounds):
            for name, tree in (("before", options.before), ("now", HERE)):
                found[name].append(measured(tree, case, options.rows, options.epochs))
        for key in ("seconds", "whole"):
            before, now = (statistics.median(run[key] for run in found[name]) for name in found)
            print(f"{case}, {key}: {before:.1f} s before, {now:.1f} s now, {before / now:.2f}x")


if __name__ == "__main__":
    main()
