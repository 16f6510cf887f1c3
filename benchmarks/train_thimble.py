"""One contestant: Thimble's training step on a base in a given shape, with what the plan expected of it."""

import argparse
import json
import time

import numpy as np
from make_rows import ALPHA, RANK, RATE, make_tokens, peak_bytes

from thimble.backends.open import choose_store
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.compute import choose_compute, machine
from thimble.backends.torch.session import TorchSession
from thimble.backends.torch.threads import num_cores
from thimble.core.adapter import fresh_adapter
from thimble.core.method import Method
from thimble.core.sizes import MICRO_BATCH_TOKENS
from thimble.core.targets import size_layers
from thimble.data.batches import shares
from thimble.data.encode import Row
from thimble.models.base import open_base
from thimble.models.cost import MemoryInputs, StepWork, estimate_memory, estimate_seconds
from thimble.models.execution import ExecutionPlan


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", help="a GGUF; default: SmolLM2-135M")
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--labels", type=float, default=1.0)
    parser.add_argument("--store", default="file")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--shares", type=int)
    parser.add_argument("--recomputed", type=int, default=0)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    options.compute, _ = choose_compute(options.compute)
    rates, base = machine(), open_base(options.base)
    choose_store(options.store, base, options.compute)  # refuses int8 that cannot run here
    tokens = options.rows * options.length
    num_shares = min(options.shares or num_cores(), options.rows)
    micro = max(MICRO_BATCH_TOKENS[0], options.length)
    execution = ExecutionPlan(
        options.store, num_shares, micro, min(num_shares * micro, tokens), options.recomputed, options.streamed
    )
    shapes = base.spec.linear_shapes()
    adapter = fresh_adapter(shapes, "kaiming", size_layers(list(shapes), options.rank, ALPHA), 0)
    ids, is_learned = make_tokens(options.labels, options.rows, options.length)
    targets = np.where(is_learned, ids, -100)
    labels = np.concatenate([targets[:, 1:], np.full((options.rows, 1), -100)], 1).astype(np.int32)
    step_work = StepWork(tokens, float((labels >= 0).sum()), options.length, adapter.num_parameters)
    inputs = MemoryInputs(options.compute, step_work.trained, options.length)
    planned = {
        "planned_bytes": estimate_memory(base, inputs, execution).total,
        "planned_seconds": estimate_seconds(base, options.compute, step_work, execution, rates),
    }
    session = TorchSession(base, options.compute, options.store, options.streamed, ids[0, :512])
    state = session.start(adapter, Method())
    kept = session.snapshot(state)  # as a run keeps its last valid state
    del adapter
    rows = [Row(i, t, "", 0) for i, t in zip(ids, labels, strict=True)]
    work = Work(shares(rows, num_shares, execution.micro_tokens), int((labels >= 0).sum()))
    times, losses = [], []
    for number in range(options.steps + 1):
        began = time.perf_counter()
        gradient = session.gradient(state, work, Objective(), execution, StepKey(0, number))
        kept = session.snapshot(state, kept)
        state = session.apply(state, gradient, RATE)
        times.append(time.perf_counter() - began)
        losses.append(gradient.loss.mean)
    seconds = sorted(times[1:])[(len(times) - 1) // 2]
    found = {"tokens_per_second": tokens / seconds, "peak_bytes": peak_bytes(), "seconds": seconds}
    print(json.dumps({**found, "first_loss": losses[0], "last_loss": losses[-1], **planned}))


main()
