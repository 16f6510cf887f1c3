"""Training the top of a network of convolutions: an epoch in which its beginning runs, and one from kept features.

    python examples/07_digits.py demo/image
    python benchmarks/kept_features.py demo/image --last 2

Reading pictures is not counted; running all rows through the beginning, to keep what comes of it, is told by itself.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from pictures import RANK, RATE, ROWS, network, read

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.backends.torch.module_targets import usual_targets
from thimble.core.method import Method
from thimble.models.execution import ExecutionPlan

PLAN = ExecutionPlan("dense", 1, 1 << 30, 1 << 30)


def top_of(folder, last):
    """The network with LoRA on its last blocks; its head is trained too, and alone if that is none of them."""
    model = network(folder)
    head = str(len(model) - 1)
    session = ModuleTorchSession(model, "labels", head)
    targets, told = usual_targets(model, [f"last-{last}"], [head])
    session.attach(targets, train_also=[head], rank=RANK, seed=0)
    print(told)
    return session


def epoch(session, state, batches, features=None):
    """Seconds, and seconds of processor time, of a step on each batch."""
    began, used = time.perf_counter(), time.process_time()
    for step, batch in enumerate(batches):
        given = features.batch(batch.numbers) if features else batch
        gradient = session.gradient(state, Work([[given]], ROWS, features), Objective(), PLAN, StepKey(0, step))
        state = session.apply(state, gradient, RATE)
    return time.perf_counter() - began, time.process_time() - used


def main(given):
    session = top_of(given.folder, given.last)
    batches = [
        ModuleBatch({"pixel_values": pixels}, {"labels": digits}, range(step * ROWS, (step + 1) * ROWS))
        for step, (pixels, digits) in enumerate(read(given.folder, given.size, given.steps))
    ]
    state = session.start(session.fresh_adapter(), Method())
    epoch(session, state, batches[:2])  # what the first steps alone take
    whole = epoch(session, state, batches)
    with tempfile.TemporaryFile() as file:
        began, used = time.perf_counter(), time.process_time()
        features = session.new_features(batches[0], lambda: file, len(batches) * ROWS)
        for _ in session.add_features(features, iter(batches)):
            pass
        keeping = time.perf_counter() - began, time.process_time() - used
        epoch(session, state, batches[:2], features)
        kept = epoch(session, state, batches, features)
    for what, (seconds, processor) in {
        "an epoch that runs all": whole, f"keeping {features.path}": keeping, "an epoch from what is kept": kept,
    }.items():  # fmt: skip
        print(f"{what}: {seconds:.2f} s, {processor:.2f} s of processor time")
    both = {"wall": 0, "processor": 1}
    print(json.dumps({
        "seconds": kept[0], **{f"whole_over_kept_{name}": whole[n] / kept[n] for name, n in both.items()},
        **{f"first_over_second_{name}": (keeping[n] + kept[n]) / kept[n] for name, n in both.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--last", type=int, default=1, help="blocks with LoRA")
    parser.add_argument("--size", type=int, default=96, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=20, help="steps of an epoch")
    main(parser.parse_args())
