"""The memory and time that a run on a module takes: measured on micro-batches of two sizes, and laid on a line."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from thimble.backends.module_session import ModuleSession
from thimble.config.train import TrainConfig
from thimble.core.method import parse_init
from thimble.core.sizes import MOMENT_BYTES
from thimble.errors import DoesNotFitError
from thimble.models.cost import ADAPTER_NUMBER_BYTES, DECOMPOSED_BYTES, SKETCH_NUMBERS, MemoryPlan
from thimble.models.execution import ExecutionPlan
from thimble.models.machine import available_bytes
from thimble.training.step_schedule import StepSchedule
from thimble.training.tasks.module_task import are_alike
from thimble.training.tasks.reading import TRAIN, Reading

MEASURED_ROWS = (2, 4)
COPIES = 4  # of the largest activation, that come and go beside what is kept


@dataclass(frozen=True)
class ModuleCost:
    """What the steps of a run take."""

    execution: ExecutionPlan
    memory: MemoryPlan
    allowed_bytes: int  # by the user, or by what the machine has free
    seconds_per_step: float


def plan_memory(config: TrainConfig, session: ModuleSession, reading: Reading, schedule: StepSchedule) -> ModuleCost:
    """Take the largest micro-batch, up to a whole step, that fits the memory allowed; else raise DoesNotFitError.

    Measured are the costliest rows, which all others of a micro-batch are padded to.
    """
    costs, here = reading.costs, resident_bytes()
    order = sorted(range(len(costs)), key=lambda row: -costs[row])
    order = [order[0]] * max(MEASURED_ROWS) if are_alike(reading) else order
    counts = [min(rows, len(order)) for rows in MEASURED_ROWS]
    few, more = (session.measure(reading.batch(TRAIN, order[:rows], None)) for rows in counts)
    span = max(1, counts[1] - counts[0])
    per_row = (
        max(1, (more.kept_bytes - few.kept_bytes) // span) if counts[1] > counts[0] else few.kept_bytes // counts[0]
    )
    fixed = max(0, few.kept_bytes - per_row * counts[0])
    weights = session.weight_bytes
    largest = -(-more.largest_bytes // counts[1])
    step_rows = math.ceil(len(costs) / schedule.steps_per_epoch)
    trained = session.trained_parameters * ADAPTER_NUMBER_BYTES
    allowed = config.memory_budget or available_bytes() + here
    whose = "--memory-budget allows" if config.memory_budget else "this machine has free"
    for rows in _sizes(step_rows):
        kept = fixed + per_row * rows
        adapter = max(trained, _init_bytes(config, session) - kept)  # before the first step nothing is kept
        memory = MemoryPlan(max(0, here - weights), weights, adapter, kept, COPIES * largest * rows)
        if memory.total <= allowed:
            size = rows * costs[order[0]]
            seconds = more.seconds / counts[1] * sum(costs) / schedule.steps_per_epoch / costs[order[0]]
            store = "int8" if config.store == "int8" else "dense"
            return ModuleCost(ExecutionPlan(store, 1, size, size), memory, allowed, seconds)
    raise DoesNotFitError(
        f"the run needs at least {memory.total / 1e9:.2f} GB and {whose} {allowed / 1e9:.2f} GB: make rows smaller "
        f"(--image-size, --max-seconds, --seq-len), lower --rank, or allow at least "
        f"{math.ceil(memory.total / 1e7) / 100}GB"
    )


def _init_bytes(config: TrainConfig, session: ModuleSession) -> int:
    """What an init takes while it is made: second moments of inputs and the decomposition of one, or of a weight."""
    needs, shapes = parse_init(config.init).needs, [layer.shape for layer in session.layers]
    if needs == "inputs":
        squares = [4 * width**2 for _, width in shapes]
        return min(MOMENT_BYTES, sum(squares)) + 3 * max(squares)
    if needs in ("weights", "quantised"):
        return DECOMPOSED_BYTES * max(rows * columns for rows, columns in shapes)
    return SKETCH_NUMBERS * 4 * session.trained_parameters if needs == "gradients" else 0


def _sizes(step_rows: int) -> list[int]:
    """Rows of a micro-batch to try, the largest first."""
    sizes = [step_rows]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def resident_bytes() -> int:
    """Memory that this process holds now: Python, libraries and the module."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
