"""One contestant: how long a start takes on SmolLM2-135M once the model is loaded, and how much memory beside it."""

import argparse
import json
import time
from pathlib import Path

import torch
from make_rows import ALPHA, RANK

from thimble.backends.open import open_session
from thimble.config.train import TrainConfig
from thimble.core.method import parse_init
from thimble.data.batches import micro_batches
from thimble.events import EventLog, ignore
from thimble.models.base import default_base
from thimble.training.initialise import initialise
from thimble.training.plan import RunPlan, plan_run

STEPS = 2  # of 2048 tokens, that starts made from data look at


def make_job(data: str, init: str) -> RunPlan:
    """A run on some rows; both contestants see the same tokens."""
    config = TrainConfig.build({"data": data, "init": init, "rank": RANK, "alpha": ALPHA, "eval_rows": 0})
    return plan_run(config, EventLog(ignore), needs_folder=False)


def ours(data: str, init: str) -> dict[str, float]:
    """Thimble's start."""
    run_plan = make_job(data, init)
    session = open_session(run_plan.model, run_plan.config.compute, run_plan.execution.store)
    list(session.losses(micro_batches(run_plan.examples.train[:2], 1024)))  # the file is in memory, as in training
    with Measured() as measured:
        config, data = run_plan.config, run_plan.calibration_data()
        initialise(parse_init(init), config, run_plan.sizes, data, session, EventLog(ignore))
    return measured.found


def peft(data: str, init: str) -> dict[str, float]:
    """PEFT's start; EVA gets the same rows one by one."""
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
    from transformers import AutoModelForCausalLM

    run_plan, path = make_job(data, "kaiming"), default_base()
    rows = [run_plan.examples.train[number] for step in range(STEPS) for number in run_plan.step_schedule.rows(step)]
    batches = [{"input_ids": torch.from_numpy(row.ids).long()[None]} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    kind = {"eva": EvaConfig(rho=1.0)} if init == "eva" else {}
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=init,
        eva_config=kind.get("eva"),
    )  # fmt: skip
    with torch.no_grad():
        model(**batches[0])
    with Measured() as measured:
        model = get_peft_model(model, config)
        if init == "eva":
            initialize_lora_eva_weights(model, batches)
    return measured.found


class Measured:
    """Seconds, and the peak of memory above where it began, by the kernel's account."""

    def __enter__(self) -> "Measured":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.began, self.before = time.perf_counter(), _memory("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.began
        self.found = {"seconds": seconds, "extra_bytes": _memory("VmHWM") - self.before}


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("who", choices=("ours", "peft"))
    parser.add_argument("init")
    parser.add_argument("data")
    options = parser.parse_args()
    print(json.dumps({"ours": ours, "peft": peft}[options.who](options.data, options.init)))


main()
