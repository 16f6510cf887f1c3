"""One contestant: a short run on the demo's data with one compute type; the validation loss it ends with.

Everything else is the same: rows, order, start of A, rate. The loss is that of the adapter on the original base in
float32, whatever it was trained in: two errors in one number say nothing of either.
"""

import argparse
import json
import tempfile
from pathlib import Path

import thimble
from thimble.backends.torch.compute import use_fast_fp32
from thimble.backends.torch.session import TorchSession
from thimble.config.train import TrainConfig
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches
from thimble.events import EventLog, ignore
from thimble.files.peft import load_adapter
from thimble.models.execution import ExecutionPlan
from thimble.training.plan import plan_run


def true_loss(run: Path, options: dict) -> float:
    """Validation loss of the adapter of a run on the base as it is in its file, in float32."""
    use_fast_fp32()
    run_plan = plan_run(TrainConfig.build(options), EventLog(ignore), needs_folder=False)
    session, execution = TorchSession(run_plan.model.base, "fp32", "file"), ExecutionPlan("file")
    batches = micro_batches(run_plan.examples.valid, execution.micro_tokens, None, session.shares_prefixes)
    return sum(session.losses(session.load(load_adapter(run)), batches, execution), LossSum()).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("compute", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    options = {"seed": given.seed, "max_steps": given.steps, "batch_tokens": 1024, "eval_rows": 0}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        report = thimble.train(given.data, out=str(run), compute=given.compute, **options)
        after = true_loss(run, {"data": given.data, "compute": "fp32", **options})
    print(json.dumps({"own_loss_after": report.loss_after, "loss_after": after, "seconds": report.seconds}))


main()
