"""States and adapters that tell which one they are, and the run folder that holds them."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.files.peft import load_adapter
from thimble.training.checkpoint import FOLDER, KEPT, Checkpoint, clear_unfinished, latest_checkpoint, save_checkpoint
from thimble.training.run_folder import STEPS, publish_adapter

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where syncing takes no time


def state_of(step: int) -> dict[str, Any]:
    random_numbers = np.random.default_rng(step)
    return {"adapter": random_numbers.standard_normal(3000, np.float32), "step": np.array([step], np.float32)}


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, step, state_of(step), {"tokens": 10 * step, "loss": step / 7}, {"base": f"b{step}"})


def is_step(found: Checkpoint | None, step: int) -> bool:
    """Whether a checkpoint is the one of this step, to the bit."""
    if found is None or found.step != step or found.progress != {"tokens": 10 * step, "loss": step / 7}:
        return False
    expected = state_of(step)
    are_same = all(np.array_equal(found.state[name], array) for name, array in expected.items())
    return found.state.keys() == expected.keys() and are_same and found.origin == {"base": f"b{step}"}


def adapter_of(number: int) -> Adapter:
    """An adapter of a rank, a scale and numbers of its own."""
    rank = 2 + number % 2
    factors = Factors(np.full((rank, 64), number, "f4"), np.full((64, rank), number, "f4"), (1 + number % 1000) / rank)
    return Adapter({f"model.layers.{layer}.mlp.up_proj": factors for layer in range(3)}, notes={"number": str(number)})


def publish(folder: Path, number: int) -> None:
    publish_adapter(folder, adapter_of(number))


def number_of(adapter: Adapter) -> int | None:
    """Which adapter it is; None if it is a mixture."""
    number = int(adapter.notes["number"])
    expected = adapter_of(number).layers
    if adapter.layers.keys() != expected.keys():
        return None
    for path, factors in adapter.layers.items():
        other = expected[path]
        if factors.scale != other.scale or not np.array_equal(factors.A, other.A):
            return None
        if not np.array_equal(factors.B, other.B):
            return None
    return number


def read_number(folder: Path) -> int | None:
    """The number of the adapter in a run folder; None if it cannot be read whole."""
    try:
        return number_of(load_adapter(folder))
    except Exception:
        return None


def is_tidy(folder: Path) -> bool:
    """Whether a run folder holds nothing but what it should."""
    steps = [path.name.startswith("step-") for path in (folder / FOLDER).iterdir()]
    rest = {path.name for path in folder.iterdir()} - {FOLDER, "adapter", STEPS}
    return all(steps) and len(steps) <= KEPT and not rest


def began_run(folder: Path) -> None:
    """A run with two checkpoints and an adapter."""
    folder.mkdir(parents=True)
    save(folder, 1)
    save(folder, 2)
    publish(folder, 2)


def goes_on(folder: Path) -> bool:
    """Whether a run can be taken up: what was left is removed, and the next checkpoint and adapter are saved."""
    clear_unfinished(folder)
    save(folder, 9)
    publish(folder, 9)
    return is_step(latest_checkpoint(folder), 9) and read_number(folder) == 9 and is_tidy(folder)
