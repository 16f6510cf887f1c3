"""A batch, adapters of any base, and PEFT's loss, for the tests of training and of files."""

import numpy as np
import torch

from thimble.backends.session import Objective, StepKey, Work
from thimble.core.adapter import Adapter
from thimble.core.inits import LayerData, kaiming
from thimble.core.lowrank import Factors
from thimble.core.method import Method
from thimble.data.batches import Batch
from thimble.data.encode import Row
from thimble.models.execution import ExecutionPlan

DENSE, PLAIN = ExecutionPlan("dense"), Objective()
RANDOM = np.random.default_rng(3)
IDS = RANDOM.integers(3, 290, 48).astype(np.int32)


def make_batch(starts=(0, 20, 48), label_share=0.6):
    labels = np.roll(IDS, -1)
    labels[RANDOM.random(len(IDS)) > label_share] = -100
    labels[np.array(starts[1:]) - 1] = -100
    return Batch(IDS, labels, np.array(starts), np.arange(len(starts) - 1))


def count(batch):
    """Target tokens of a batch."""
    return int((batch.labels >= 0).sum())


class Trainer:
    """A session with a state that steps move, for tests that take many."""

    def __init__(self, session, adapter, method=None, execution=DENSE):
        self.session, self.execution, self.steps = session, execution, 0
        self.state = session.start(adapter, method or Method())

    def gradient(self, shares, target_tokens, objective=PLAIN):
        key = StepKey(3, self.steps)
        return self.session.gradient(self.state, Work(shares, target_tokens), objective, self.execution, key)

    def step(self, batch, rate, target_tokens=20):
        gradient = self.gradient([[batch]], target_tokens)
        self.state, self.steps = self.session.apply(self.state, gradient, rate), self.steps + 1
        return gradient

    @property
    def adapter(self):
        return self.session.adapter(self.state)

    def logits(self, ids):
        return self.session.logits(ids, self.state.active)

    def layers_of(self, gradient):
        """A gradient by layer path, with sides A, B and magnitude."""
        return self.state.active.views(torch.from_numpy(gradient.flat))


def drawn_by_peft(module, config, folder):
    """Save an adapter of PEFT for a module, all of its trained numbers moved at random; returns the PEFT model."""
    import peft

    model = peft.get_peft_model(module, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def make_rows(count=6):
    """Rows of random tokens, all of them targets."""
    rows = []
    for number in range(count):
        ids = RANDOM.integers(3, 290, 24).astype(np.int32)
        rows.append(Row(ids, np.append(ids[1:], -100).astype(np.int32), f"row {number}", 1))
    return rows


def make_adapter(base, rank=4, b_size=0.05, only=None):
    layers = {
        path: Factors(
            kaiming(LayerData(path, (fan_out, fan_in), rank, 2.0)).A,
            (RANDOM.standard_normal((fan_out, rank)) * b_size).astype(np.float32),
            2.0,
        )
        for path, (fan_out, fan_in) in base.spec.linear_shapes().items()
        if only is None or only in path
    }
    return Adapter(layers)


def peft_loss(model, batch):
    total = 0.0
    for start, end in zip(batch.starts, batch.starts[1:], strict=False):
        logits = model(torch.from_numpy(batch.ids[start:end].astype(np.int64))[None]).logits[0]
        targets = torch.from_numpy(batch.labels[start:end].astype(np.int64))
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / (batch.labels >= 0).sum()


def loss_curves(trainer, model, steps, rate):
    """The losses of a trainer and of PEFT's model, trained on the same batches with AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    curves = []
    for _ in range(steps):
        batch = make_batch()
        loss = peft_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        gradient = trainer.step(batch, rate, count(batch))
        curves.append((gradient.loss.mean, float(loss.detach())))
    return np.array(curves).T
