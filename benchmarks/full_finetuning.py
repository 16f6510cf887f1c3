"""LoRA against full fine-tuning: the same base, rows and steps, and the same head at first.

    thimble train demo/sentences/topics --base demo/sentences/minilm --task classify-text --out demo/topics
    python benchmarks/full_finetuning.py demo/topics

Each folder is one that `thimble train` has left, of a task with classes. Every weight of its base is trained on the
rows of each of its steps with AdamW, in a plain loop; the peak learning rate, and whether dropout and norms are as in
training, are those that do best on every fifth training row of a label, which that choice learns nothing from. The
validation rows are then asked of both, and compared row by row where the run itself has not looked at them.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from thimble.backends.torch.module_losses import LOSSES, as_tensors
from thimble.backends.torch.open_module import open_module
from thimble.config.train import TrainConfig
from thimble.core.logistic import fit_probe
from thimble.core.significance import share_interval, sign_test
from thimble.events import EventLog, ignore
from thimble.training.module_adapter import read_trained
from thimble.training.module_plan import plan_module_run
from thimble.training.module_use import open_trained
from thimble.training.tasks.reading import TRAIN, VALID

HELD, TOGETHER = 5, 64  # one row of so many chooses; rows asked together
DECAY, CLIP = 0.01, 1.0
LOSS = LOSSES["labels"]
SILENT = EventLog(ignore)


class Run:
    """A finished run of `thimble train`, and what it trained on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        self.steps = json.loads((folder / "report.json").read_text(encoding="utf-8"))["steps"]
        self.config = TrainConfig.build({**values, "max_minutes": None, "max_steps": self.steps, "resume": False})
        self.plan = plan_module_run(self.config, self.config.task, SILENT, needs_folder=False)
        self.reading, self.schedule = self.plan.reading, self.plan.step_schedule
        self.labels = {part: self._labels(part, rows) for part, rows in self.parts().items()}

    def parts(self) -> dict[str, range]:
        return {TRAIN: range(len(self.reading.costs)), VALID: range(len(self.reading.valid_costs))}

    def _labels(self, part: str, rows: range) -> np.ndarray:
        return np.concatenate([batch.targets["labels"] for batch in self.batches(part, rows)])

    def batches(self, part: str, rows):
        """Rows of a part, some together."""
        for start in range(0, len(rows), TOGETHER):
            yield self.reading.batch(part, list(rows[start : start + TOGETHER]), None)

    def module(self):
        """The base as it is before training, and the path of its head."""
        found = open_module(self.plan.opened.base, self.config.task, self.plan.rows.labels, self.config.seed)
        return found.module, found.head

    def with_head(self, rows):
        """The base with the head that thimble fits: to what comes to it of these training rows."""
        module, path = self.module()
        head, seen = module.get_submodule(path), []
        hook = head.register_forward_hook(lambda _, args, output: seen.append(args[0].detach().numpy()))
        said(module, self.batches(TRAIN, rows))
        hook.remove()
        probe = fit_probe(np.concatenate(seen), self.labels[TRAIN][rows], len(self.plan.rows.labels))
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(probe.weight))
            head.bias.copy_(torch.from_numpy(probe.bias))
        return module

    def adapted(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Logits of the validation rows before and after LoRA, and how many parameters that trained."""
        trained = read_trained(str(self.folder), self.config.task, self.config.base, SILENT)
        session, _, _ = open_trained(trained, SILENT)
        rows, execution = self.parts()[VALID], self.plan.execution
        before, after = (
            np.concatenate(list(session.outputs(session.load(adapter), self.batches(VALID, rows), execution)))
            for adapter in (None, trained.adapter)
        )
        return before, after, session.trained_parameters


def said(module, batches) -> np.ndarray:
    """Logits of rows, float32 (rows, classes)."""
    module.eval()
    with torch.no_grad():
        return np.concatenate([LOSS.output(module, *as_tensors(batch)).numpy() for batch in batches])


def train(run: Run, module, rate: float, is_training: bool, steps: int, left_out: frozenset[int] = frozenset()):
    """Every weight, at rates that rise and fall as those of the run do."""
    module.requires_grad_(True).train(is_training)
    weights = list(module.parameters())
    optimiser = torch.optim.AdamW(weights, rate, weight_decay=DECAY)
    torch.manual_seed(run.config.seed)
    for step in range(steps):
        rows = [row for row in run.schedule.rows(step) if row not in left_out]
        inputs, targets = as_tensors(run.reading.batch(TRAIN, rows, None))
        loss = LOSS.rows(LOSS.forward(module, inputs, targets), targets).nats.mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        at = run.schedule.rate_at(step * run.steps // steps, 0.0)
        optimiser.param_groups[0]["lr"] = rate * at / run.schedule.rate
        optimiser.step()
    return module


def choose(run: Run, rates, modes, steps: int) -> tuple[float, bool]:
    """The rate and the mode that are right most often on training rows held out, and of equals the least loss."""
    labels = run.labels[TRAIN]
    place = np.zeros(len(labels), np.int64)  # of each row among those of its label
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        place[own] = np.arange(len(own))
    held = np.flatnonzero(place % HELD == HELD - 1)
    kept, found = np.setdiff1d(np.arange(len(labels)), held), {}
    first = run.with_head(kept).state_dict()
    for mode in modes:
        for rate in rates:
            module, _ = run.module()
            module.load_state_dict(first)
            train(run, module, rate, mode == "train", steps, frozenset(held.tolist()))
            logits = torch.from_numpy(said(module, run.batches(TRAIN, held)))
            right = float((logits.argmax(1).numpy() == labels[held]).mean())
            loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[held])))
            found[rate, mode == "train"] = (right, -loss)
            share = f"{100 * right:.2f} % of {len(held)} training rows held out"
            print(f"  rate {rate:g} in {mode}: {share}, loss {loss:.3f}", flush=True)
    return max(found, key=lambda key: found[key])


def compare(run: Run, rates, modes, sweep_steps: int) -> dict:
    """One run against full fine-tuning."""
    before, after, trained = run.adapted()
    rate, is_training = choose(run, rates, modes, min(sweep_steps or run.steps, run.steps))
    began = time.process_time()
    module = train(run, run.with_head(np.arange(len(run.labels[TRAIN]))), rate, is_training, run.steps)
    took = time.process_time() - began
    full = said(module, run.batches(VALID, run.parts()[VALID]))
    right = {name: logits.argmax(1) == run.labels[VALID] for name, logits in
             (("head", before), ("lora", after), ("full", full))}  # fmt: skip
    unseen = np.array(run.plan.watch.judging)
    better = int((right["lora"] & ~right["full"])[unseen].sum())
    worse = int((right["full"] & ~right["lora"])[unseen].sum())
    weights = sum(weight.numel() for weight in module.parameters())
    return {
        "run": str(run.folder), "steps": run.steps, "rows": len(run.labels[VALID]), "compared": len(unseen),
        **{name: float(values.mean()) for name, values in right.items()}, "rate": rate, "train_mode": is_training,
        "lora_right_alone": better, "full_right_alone": worse,
        "chance": min(1.0, 2 * sign_test(max(better, worse), min(better, worse))),
        "interval": share_interval(better, worse, len(unseen)), "trained": trained, "all": weights, "processor": took,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    parser.add_argument("--modes", nargs="+", choices=["eval", "train"], default=["eval", "train"])
    parser.add_argument("--sweep-steps", type=int, default=0, help="of each choice; 0 for those of the run")
    given = parser.parse_args()
    for folder in given.runs:
        print(folder, flush=True)
        print(json.dumps(compare(Run(folder), given.rates, given.modes, given.sweep_steps)), flush=True)


if __name__ == "__main__":
    main()
