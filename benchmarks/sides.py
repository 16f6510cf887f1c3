"""Two sides of a comparison, Thimble and PEFT, each in a process of its own, in turns."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

WARM = 2  # steps that are not timed
Steps = Callable[[argparse.Namespace], Iterator[float]]  # takes the options, and gives the loss of each step


def run(parser: argparse.ArgumentParser, sides: Mapping[str, Steps]) -> None:
    """Compare the steps of `thimble` with those of `peft`: time, peak memory, losses; adds the options it needs.

    The first side writes its initial adapter to `--adapter`, where the other finds it. The last line is a JSON object.
    """
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        measure(sides[given.side](given))
        return
    found: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as place:
        for side in [*sides] * given.rounds:
            command = [sys.executable, *sys.argv, "--side", side, "--adapter", f"{place}/adapter"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[side].append(json.loads(done.stdout))
            took = "{seconds:.2f} s a step, {processor:.2f} s of processor time".format(**found[side][-1])
            print(f"{side:<8} {took}, {found[side][-1]['peak'] / 1e6:,.0f} MB at most", flush=True)
    ours, theirs = (
        {name: statistics.median(one[name] for one in found[side]) for name in ("seconds", "peak")}
        for side in ("thimble", "peft")
    )
    told = {
        "steps_per_second": 1 / ours["seconds"], "peak_bytes": ours["peak"],
        "speed": theirs["seconds"] / ours["seconds"], "memory": ours["peak"] / theirs["peak"],
        "losses_apart": float(np.abs(np.subtract(found["thimble"][0]["losses"], found["peft"][0]["losses"])).max()),
    }  # fmt: skip
    print(json.dumps(told))


def measure(steps: Iterator[float]) -> None:
    """Take the steps, and print what they took."""
    losses, seconds, processor = [], [], []
    began, used = time.perf_counter(), time.process_time()
    for loss in steps:
        losses.append(loss)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
        began, used = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timed = statistics.mean(seconds[WARM:]), statistics.mean(processor[WARM:])
    print(json.dumps({"seconds": timed[0], "processor": timed[1], "peak": peak, "losses": losses}))
