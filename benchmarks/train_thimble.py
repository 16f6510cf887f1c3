"""One contestant: Thimble's training step on a base in a given shape."""

import argparse
import json
import time

import numpy as np
from make_rows import ALPHA, RANK, RATE, make_tokens, peak_bytes

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
    parser.add_argument("--base", help="a GGUF; default: SmolLM2-135M")
    parser.add_argument("--compute", default="bf16")
    parser.add_argument("--labels", type=float, default=1.0)
    parser.add_argument("--store", default="dense")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shares", type=int, default=num_cores())
    parser.add_argument("--recomputed", type=int, default=0)
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    use_fast_fp32()
    base = open_base(options.base)
    layers = {
        path: Factors(start_a("kaiming", RANK, fan_in, 0, path), np.zeros((fan_out, RANK), np.float32), ALPHA / RANK)
        for path, (fan_out, fan_in) in base.spec.linear_shapes().items()
    }
    ids, is_learned = make_tokens(options.labels, options.rows, options.length)
    recomputed = base.spec.num_layers if options.streamed else options.recomputed
    session = TorchSession(base, options.compute, options.store, recomputed, options.streamed, sample=ids[0, :512])
    session.train(Adapter(layers), num_shares=options.shares)
    targets = np.where(is_learned, ids, -100)
    labels = np.concatenate([targets[:, 1:], np.full((options.rows, 1), -100)], 1)
    rows = [Row(i, t.astype(np.int32), "", 0) for i, t in zip(ids, labels, strict=True)]
    step = shares(rows, options.shares, MICRO_BATCH_TOKENS)
    times, losses = [], []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        gradients = session.gradients(step, int((labels >= 0).sum()))
        session.apply(gradients, RATE, 1.0)
        times.append(time.perf_counter() - began)
        losses.append(gradients.loss.mean)
    seconds = sorted(times[1:])[(len(times) - 1) // 2]
    rate = options.rows * options.length / seconds
    print(json.dumps({"tokens_per_second": rate, "peak_bytes": peak_bytes(), "seconds": seconds, "losses": losses}))


main()
