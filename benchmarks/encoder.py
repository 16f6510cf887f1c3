"""Training an encoder on pairs of uneven length: Thimble against PEFT, the same base, A and B, rows and steps.

    python examples/08_sentences.py demo/sentences
    python benchmarks/encoder.py demo/sentences

Each side runs in a process of its own. PEFT has its rows as Sentence Transformers gives them: anchors and what belongs
to them apart, each padded to the longest of the batch.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sides import run

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.module_losses import TEMPERATURE
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.method import Method
from thimble.data.sentence_tokens import SentenceTokenizer, TokenCounts
from thimble.files.peft import save_adapter
from thimble.models.execution import ExecutionPlan

ROWS, RANK, RATE = 32, 16, 1e-3


def read(folder, steps):
    """For each step the tokens of its anchors, and of what belongs to them."""
    lines = (folder / "answers" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tuple(json.loads(line).values()) for line in lines]
    base = folder / "minilm"
    tokenizer = SentenceTokenizer(base, json.loads((base / "config.json").read_text()))
    order = np.random.default_rng(0).permutation(np.arange(steps * ROWS) % len(rows))
    found = [tokenizer.encode(((rows[row][side],) for row in order), TokenCounts()) for side in (0, 1)]
    return tokenizer, [[side[start : start + ROWS] for side in found] for start in range(0, steps * ROWS, ROWS)]


def thimble_steps(given):
    from transformers import AutoModel

    tokenizer, batches = read(given.folder, given.steps)
    session = ModuleTorchSession(AutoModel.from_pretrained(given.folder / "minilm", add_pooling_layer=False), "pairs")
    session.attach(rank=RANK, seed=0)
    save_adapter(session.fresh_adapter(), given.adapter)
    state = session.start(session.fresh_adapter(), Method(0.0, 1.0, 0.0, False, 1.0, 0, 0.999))
    targets = {"pair": np.arange(2 * ROWS).reshape(2, -1).T, "content": np.arange(2 * ROWS)}
    for step, (first, second) in enumerate(batches):
        work = Work([[ModuleBatch(tokenizer.padded([*first, *second]), targets, range(ROWS))]], ROWS)
        gradient = session.gradient(
            state, work, Objective(), ExecutionPlan("dense", 1, 1 << 20, 1 << 20), StepKey(0, step)
        )
        state = session.apply(state, gradient, RATE)
        yield gradient.loss.mean


def peft_steps(given):
    import peft
    from torch.nn import functional
    from transformers import AutoModel

    tokenizer, batches = read(given.folder, given.steps)
    model = AutoModel.from_pretrained(
        given.folder / "minilm", add_pooling_layer=False, dtype=getattr(torch, given.dtype)
    )
    model = peft.PeftModel.from_pretrained(model, given.adapter, is_trainable=True).eval()
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", help="of PEFT's base")
    run(parser, {"thimble": thimble_steps, "peft": peft_steps})
