"""One contestant: Thimble's training step on the SmolLM2 shape, weights of the default base held in memory."""

import argparse
import json
import resource
import time

import numpy as np
from make_rows import ALPHA, LENGTH, RANK, RATE, ROWS, make_tokens

from thimble.core.adapter import Adapter
from thimble.core.base import open_base
from thimble.core.lowrank import Factors, start_a
from thimble.data.batches import shares
from thimble.data.encode import Row
from thimble.torch_backend.compute import use_fast_fp32
from thimble.torch_backend.session import TorchSession
from thimble.torch_backend.threads import num_cores

MICRO_BATCH_TOKENS = 1024  # what `thimble train` chooses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--labels", type=float, default=1.0)
    parser.add_argument("--store", default="dense")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    use_fast_fp32()
    base = open_base(None)
    shapes = base.spec.linear_shapes()
    layers = {
        path: Factors(start_a("kaiming", RANK, fan_in, 0, path), np.zeros((fan_out, RANK), np.float32), ALPHA / RANK)
        for path, (fan_out, fan_in) in shapes.items()
    }
    session = TorchSession(base, options.dtype, options.store)
    session.train(Adapter(layers), num_shares=num_cores())
    ids, is_learned = make_tokens(options.labels)
    targets = np.where(is_learned, ids, -100)
    labels = np.concatenate([targets[:, 1:], np.full((ROWS, 1), -100)], 1)
    rows = [Row(i.astype(np.int32), t.astype(np.int32), "", 0) for i, t in zip(ids, labels, strict=True)]
    step = shares(rows, num_cores(), MICRO_BATCH_TOKENS)
    times = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        gradients = session.gradients(step, int((labels >= 0).sum()))
        session.apply(gradients, RATE, 1.0)
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_second": ROWS * LENGTH / sorted(times[1:])[len(times) // 2 - 1], "peak_bytes": peak}))


main()
