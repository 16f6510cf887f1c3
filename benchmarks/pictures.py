"""Training a network of convolutions on pictures: Thimble against PEFT, the same base, A, B and head, rows and steps.

    python examples/07_digits.py demo/image
    python benchmarks/pictures.py demo/image

Each side runs in a process of its own, `--rounds` times in turns; `--channels-last` gives PEFT the other layout of
tensors.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from sides import run

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.method import Method
from thimble.data.media.pictures import read_picture, to_pixels
from thimble.files.peft import save_adapter
from thimble.models.execution import ExecutionPlan

ROWS, RANK, RATE = 32, 16, 1e-3
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=96, help="pixels of a side")
    parser.add_argument("--channels-last", action="store_true", help="the layout of PEFT's tensors")
    run(parser, {"thimble": thimble_steps, "peft": peft_steps})
