"""One contestant: a short run on the demo's data with one compute type; the validation loss it ends with.

Everything else is the same: rows, order, start of A, rate. The loss is measured in the compute type that was trained.
"""

import argparse
import json
import tempfile
from pathlib import Path

import thimble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("compute", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = thimble.train(
            options.data, out=str(Path(folder) / "run"), compute=options.compute, seed=options.seed,
            max_steps=options.steps, batch_tokens=1024, eval_rows=0,
        )  # fmt: skip
    print(json.dumps({"loss_before": report.loss_base, "loss_after": report.loss_after, "seconds": report.seconds}))


main()
