"""Training an encoder on pairs of uneven length: Thimble against PEFT, the same base, A and B, rows and steps.

    python examples/08_sentences.py demo/sentences
    python benchmarks/encoder.py demo/sentences

Each side runs in a process of its own. PEFT has its rows as Sentence Transformers gives them: anchors and what belongs
to them apart, each padded to the longest of the batch.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.module_losses import TEMPERATURE
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.method import Method
from thimble.data.sentence_tokens import SentenceTokenizer, TokenCounts
from thimble.files.peft import save_adapter
from thimble.models.execution import ExecutionPlan

ROWS, RANK, RATE, WARM = 32, 16, 1e-3, 2  # of a step; steps that are not timed


def read(folder, steps):
    """For each step the tokens of its anchors, and of what belongs to them."""
    lines = (folder / "answers" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tuple(json.loads(line).values()) for line in lines]
    base = folder / "minilm"
    tokenizer = SentenceTokenizer(base, json.loads((base / "config.json").read_text()))
    order = np.random.default_rng(0).permutation(np.arange(steps * ROWS) % len(rows))
    found = [tokenizer.encode(((rows[row][side],) for row in order), TokenCounts()) for side in (0, 1)]
    return tokenizer, [[side[start : start + ROWS] for side in found] for start in range(0, steps * ROWS, ROWS)]


def thimble_steps(folder, steps, adapter):
    from transformers import AutoModel

    tokenizer, batches = read(folder, steps)
    session = ModuleTorchSession(AutoModel.from_pretrained(folder / "minilm", add_pooling_layer=False), "pairs")
    session.attach(rank=RANK, seed=0)
    save_adapter(session.fresh_adapter(), adapter)
    state = session.start(session.fresh_adapter(), Method(0.0, 1.0, 0.0, False, 1.0, 0, 0.999))
    targets = {"pair": np.arange(2 * ROWS).reshape(2, -1).T, "content": np.arange(2 * ROWS)}
    for step, (first, second) in enumerate(batches):
        work = Work([[ModuleBatch(tokenizer.padded([*first, *second]), targets, range(ROWS))]], ROWS)
        gradient = session.gradient(
            state, work, Objective(), ExecutionPlan("dense", 1, 1 << 20, 1 << 20), StepKey(0, step)
        )
        state = session.apply(state, gradient, RATE)
        yield gradient.loss.mean


def peft_steps(folder, steps, adapter, dtype):
    import peft
    from torch.nn import functional
    from transformers import AutoModel

    tokenizer, batches = read(folder, steps)
    model = AutoModel.from_pretrained(folder / "minilm", add_pooling_layer=False, dtype=getattr(torch, dtype))
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, own = torch.optim.AdamW(trained, RATE, weight_decay=0.0), torch.arange(ROWS)
    for halves in batches:
        made = []
        for half in halves:
            inputs = {name: torch.from_numpy(values) for name, values in tokenizer.padded(half).items()}
            mask = inputs["attention_mask"][..., None]
            hidden = model(**inputs).last_hidden_state.float() * mask
            made.append(functional.normalize(hidden.sum(1) / mask.sum(1), dim=-1))
        near = made[0] @ made[1].T / TEMPERATURE
        loss = (functional.cross_entropy(near, own) + functional.cross_entropy(near.T, own)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        yield float(loss.detach())


def measure(given):
    """Run one side, and print what it took."""
    sides = {"thimble": (given.folder, given.steps, given.adapter)}
    sides["peft"] = (*sides["thimble"], given.dtype)
    losses, seconds, processor = [], [], []
    began, used = time.perf_counter(), time.process_time()
    for loss in {"thimble": thimble_steps, "peft": peft_steps}[given.side](*sides[given.side]):
        losses.append(loss)
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
        began, used = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    timed = statistics.mean(seconds[WARM:]), statistics.mean(processor[WARM:])
    print(json.dumps({"seconds": timed[0], "processor": timed[1], "peak": peak, "losses": losses}))


parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--dtype", default="float32", help="of PEFT's base")
parser.add_argument("--side")
parser.add_argument("--adapter")
given = parser.parse_args()
if given.side:
    sys.exit(measure(given))
found = {}
with tempfile.TemporaryDirectory() as place:
    for side in ("thimble", "peft"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--adapter", f"{place}/adapter"]
        found[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        took = "{seconds:.2f} s a step, {processor:.2f} s of processor time".format(**found[side])
        print(f"{side:<8} {took}, {found[side]['peak'] / 1e6:,.0f} MB at most")
ours, theirs = found["thimble"], found["peft"]
apart = np.abs(np.subtract(ours["losses"], theirs["losses"])).max()
print(f"{theirs['seconds'] / ours['seconds']:.2f} times as fast, {ours['peak'] / theirs['peak']:.2f} of the memory")
print(f"losses of {given.steps} steps are at most {apart:.1e} apart")
