"""Training a network of convolutions on pictures: Thimble against PEFT, the same base, A, B and head, rows and steps.

    python examples/07_digits.py demo/image
    python benchmarks/pictures.py demo/image

Each side runs in a process of its own, `--rounds` times in turns; `--channels-last` gives PEFT the other layout of
tensors.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.method import Method
from thimble.data.media.pictures import read_picture, to_pixels
from thimble.files.peft import save_adapter
from thimble.models.execution import ExecutionPlan

ROWS, RANK, RATE, WARM = 32, 16, 1e-3, 2  # of a step; steps that are not timed
HALF = (0.5, 0.5, 0.5)


def read(folder, size, steps):
    """For each step its pictures, float32 (rows, 3, size, size), and their digits."""
    paths = sorted((folder / "digits" / "train").rglob("*.png"))
    order = np.random.default_rng(0).permutation(np.arange(steps * ROWS) % len(paths))
    for start in range(0, steps * ROWS, ROWS):
        chosen = [paths[number] for number in order[start : start + ROWS]]
        pixels = np.stack([to_pixels(read_picture(path, size), HALF, HALF) for path in chosen])
        yield pixels, np.array([int(path.parent.name) for path in chosen])


def network(folder):
    """The base, with the same new head on both sides."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    model = __import__("07_efficientnet").build(str(folder / "efficientnet_lite0.safetensors"))
    torch.manual_seed(0)
    model[-1] = torch.nn.Linear(1280, 10)
    return model.eval()


def thimble_steps(given):
    model = network(given.folder)
    head = str(len(model) - 1)
    session = ModuleTorchSession(model, "labels", head)
    session.attach("all-pointwise", train_also=[head], rank=RANK, seed=0)
    save_adapter(session.fresh_adapter(), given.adapter)
    state = session.start(session.fresh_adapter(), Method(0.0, 1.0, 0.0, False, 1.0, 0, 0.999))
    plan = ExecutionPlan("dense", 1, 1 << 30, 1 << 30)
    for step, (pixels, digits) in enumerate(read(given.folder, given.size, given.steps)):
        work = Work([[ModuleBatch({"pixel_values": pixels}, {"labels": digits}, range(ROWS))]], ROWS)
        gradient = session.gradient(state, work, Objective(), plan, StepKey(0, step))
        state = session.apply(state, gradient, RATE)
        yield gradient.loss.mean


def peft_steps(given):
    import peft

    model = peft.PeftModel.from_pretrained(network(given.folder), given.adapter, is_trainable=True).eval()
    layout = torch.channels_last if given.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    for pixels, digits in read(given.folder, given.size, given.steps):
        made = model(torch.from_numpy(pixels).to(memory_format=layout))
        loss = torch.nn.functional.cross_entropy(made, torch.from_numpy(digits))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        yield float(loss.detach())


def measure(given):
    """Run one side, and print what it took."""
    losses, seconds, processor = [], [], []
    began, used = time.perf_counter(), time.process_time()
    for loss in {"thimble": thimble_steps, "peft": peft_steps}[given.side](given):
        losses.append(loss)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
        began, used = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timed = statistics.mean(seconds[WARM:]), statistics.mean(processor[WARM:])
    print(json.dumps({"seconds": timed[0], "processor": timed[1], "peak": peak, "losses": losses}))


parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--size", type=int, default=96, help="pixels of a side")
parser.add_argument("--channels-last", action="store_true", help="the layout of PEFT's tensors")
parser.add_argument("--side")
parser.add_argument("--adapter")
given = parser.parse_args()
if given.side:
    sys.exit(measure(given))
found = {"thimble": [], "peft": []}
with tempfile.TemporaryDirectory() as place:
    for side in [*found] * given.rounds:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--adapter", f"{place}/adapter"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ))
        found[side].append(json.loads(done.stdout))
        took = "{seconds:.2f} s a step, {processor:.2f} s of processor time".format(**found[side][-1])
        print(f"{side:<8} {took}, {found[side][-1]['peak'] / 1e6:,.0f} MB at most", flush=True)
ours, theirs = (
    {name: statistics.median(one[name] for one in found[side]) for name in ("seconds", "peak")} for side in found
)
apart = np.abs(np.subtract(found["thimble"][0]["losses"], found["peft"][0]["losses"])).max()
print(f"{theirs['seconds'] / ours['seconds']:.2f} times as fast, {ours['peak'] / theirs['peak']:.2f} of the memory")
print(f"losses of {given.steps} steps are at most {apart:.1e} apart")
