"""A batch, an adapter of any base, and PEFT's loss, for the tests of training."""

from types import SimpleNamespace

import numpy as np
import torch

from thimble.core.adapter import Adapter
from thimble.core.inits import LayerData, kaiming
from thimble.core.lowrank import Factors
from thimble.data.encode import Row

RANDOM = np.random.default_rng(3)
IDS = RANDOM.integers(3, 290, 48).astype(np.int32)


def make_batch(starts=(0, 20, 48), label_share=0.6):
    labels = np.roll(IDS, -1)
    labels[RANDOM.random(len(IDS)) > label_share] = -100
    labels[np.array(starts[1:]) - 1] = -100
    return SimpleNamespace(ids=IDS, labels=labels, starts=np.array(starts))


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


def loss_curves(session, model, steps, rate):
    """The losses of a session and of PEFT's model, trained side by side on the same batches with AdamW."""
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
        gradients = session.gradients([[batch]], int((batch.labels >= 0).sum()))
        session.apply(gradients, rate, 1.0)
        curves.append((gradients.loss.mean, float(loss.detach())))
    return np.array(curves).T
