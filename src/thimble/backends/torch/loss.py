"""Cross-entropy on labelled tokens only, in chunks, with the gradient made in the same pass.

The frozen head needs no gradient of its own, so the forward pass can turn each chunk's logits into the gradient of
the hidden states at once: the full logits never exist (as in Liger's fused linear cross-entropy, arXiv:2410.10989;
rows without a label are dropped first).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.known_answers import Answers
from thimble.backends.torch import fused
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.frozen import as_numpy
from thimble.backends.torch.threads import parallel_for
from thimble.core.sizes import TABLES_COMPARED, logit_chunk, windows
from thimble.data.encode import IGNORED


def label_loss(decoder: Decoder, hidden: Tensor, labels: NDArray[np.int32]) -> Tensor:
    """Summed cross-entropy over the labelled positions, a float32 scalar; its gradient flows to `hidden` only.

    hidden: (tokens, hidden), compute type; labels: int32 (tokens,), the next token, or -100 where nothing is learned.
    """
    return _LabelLoss.apply(hidden, *_targets(labels), decoder)  # type: ignore[no-any-return]


def target_losses(decoder: Decoder, hidden: Tensor, labels: NDArray[np.int32]) -> NDArray[np.float32]:
    """Cross-entropy of each labelled position, float32 (targets,), in their order; no gradient."""
    places, targets = _targets(labels)
    normal, chunks = _normalised(decoder, hidden[places])
    return np.concatenate([_chunk_losses(normal[chunk], decoder, targets[chunk], False) for chunk in chunks])


def _targets(labels: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    """The places that carry a label, and the labels, int64 (targets,) each."""
    places = np.flatnonzero(labels != IGNORED)
    return torch.from_numpy(places), torch.from_numpy(labels[places].astype(np.int64))


def _normalised(decoder: Decoder, rows: Tensor) -> tuple[Tensor, list[slice]]:
    """What the head reads of some hidden states, with padding, and the chunks of it whose logits are made at once."""
    size = logit_chunk(len(rows), rows.element_size() * decoder.head.rows)
    chunks = [slice(start, start + size) for start in range(0, max(1, len(rows)), size)]
    normal = torch.zeros(chunks[-1].stop, rows.shape[1], dtype=rows.dtype)
    decoder.norm.forward(rows, normal[: len(rows)])
    return normal, chunks


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: Tensor, targets: Tensor, decoder: Decoder) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        rows = hidden[places]
        normal, chunks = _normalised(decoder, rows)
        parts = (_chunk_losses(normal[chunk], decoder, targets[chunk], needs_grad) for chunk in chunks)
        total = sum(float(part.sum(dtype=np.float64)) for part in parts)
        if needs_grad:
            ctx.save_for_backward(decoder.norm.backward(rows, normal[: len(rows)]), places)
            ctx.shape = hidden.shape
        return torch.tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, places = ctx.saved_tensors
        out = torch.zeros(ctx.shape, dtype=rows.dtype)
        out[places] = rows * grads[0]
        return out, None, None, None


def _chunk_losses(x: Tensor, decoder: Decoder, targets: Tensor, needs_grad: bool) -> NDArray[np.float32]:
    """Losses of the rows that have a target; if wanted, x becomes the gradient of their sum."""
    logits = decoder.memory.scratch("logits", len(x), decoder.head.rows)
    decoder.head.forward(x, logits)
    losses, softcap = np.empty(len(targets), np.float32), decoder.spec.final_softcap
    if softcap:
        parallel_for(*logits.shape, fused.bend, as_numpy(logits), np.float32(softcap))
    per_cap = np.float32(1 / softcap if softcap else 0.0)
    arrays = (as_numpy(logits), targets.numpy(), per_cap, losses, needs_grad)
    parallel_for(len(targets), logits.shape[1], fused.cross_entropy, *arrays)
    if needs_grad:
        decoder.head.input_grad(logits, x)
    return losses


def divergence_at(
    decoder: Decoder, base_hidden: Tensor, hidden: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """KL(base ‖ model) in nats at each place, and whether both find the same token likeliest; no gradient.

    Hidden states: (places, hidden) each. Logits are made in float32: those of bfloat16 have steps of 0.06 from 8 on, in
    which a small divergence is lost.
    """
    count = len(hidden)
    nats, same = np.empty(count, np.float32), np.empty(count, np.bool_)
    size = logit_chunk(count, 4 * TABLES_COMPARED * decoder.head.rows)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        wanted, found = (decoder.logits(each[rows], torch.float32).log_softmax(1) for each in (base_hidden, hidden))
        same[rows] = (wanted.argmax(1) == found.argmax(1)).numpy()
        nats[rows] = found.sub_(wanted).mul_(wanted.exp_()).sum(1).neg_().numpy()
    return nats, same


def base_answers(decoder: Decoder, hidden: Tensor) -> Answers:
    """What the base says at some places, condensed; hidden states: (places, hidden)."""
    parts = []
    for x, logits in _head_tables(decoder, hidden):
        total, likeliest = logits.logsumexp(1), logits.argmax(1)
        shares, mean = logits.sub_(total[:, None]).exp_(), torch.zeros_like(x)
        for rows in windows(decoder.head.rows, decoder.head.cols):
            mean.addmm_(shares[:, rows], decoder.head.decoded(rows).float())
        parts.append((mean.numpy(), _offset(total, mean, x), likeliest.int().numpy()))
    return Answers(*map(np.concatenate, zip(*parts, strict=True)))


def divergence_from(decoder: Decoder, base: Answers, hidden: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The same as `divergence_at`, from condensed answers of the base; see `thimble.backends.known_answers`."""
    nats, same, end = np.empty(len(hidden)), np.empty(len(hidden), np.bool_), 0
    for x, logits in _head_tables(decoder, hidden):
        rows = slice(end, end := end + len(x))
        moved = _offset(logits.logsumexp(1), torch.from_numpy(base.mean[rows]), x)
        nats[rows] = np.maximum(moved - base.offset[rows], 0.0)  # below zero by rounding alone
        same[rows] = logits.argmax(1).numpy() == base.likeliest[rows]
    return nats, same


def _head_tables(decoder: Decoder, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What the head reads and what it says, float32 (n, hidden) and (n, vocabulary), a chunk of places at a time."""
    size = logit_chunk(len(hidden), 4 * TABLES_COMPARED * decoder.head.rows)
    for rows in hidden.split(size) if len(hidden) else (hidden,):
        x = decoder.norm.forward(rows, torch.empty(rows.shape, dtype=torch.float32))
        yield x, decoder.head.forward(x, torch.empty(len(x), decoder.head.rows))


def _offset(total: Tensor, mean: Tensor, x: Tensor) -> NDArray[np.float64]:
    """log Σ exp(l) − mean · x, float64 (places,): two large numbers that are nearly the same."""
    return (total.double() - (mean.double() * x.double()).sum(1)).numpy()


def divergence(decoder: Decoder, hidden: Tensor, base_hidden: Tensor, weight: float) -> Tensor:
    """weight · Σ KL(base ‖ model) over some places of a text, a float32 scalar; its gradient flows to `hidden` only.

    Its gradient at the logits is softmax(model) − softmax(base): the model is pulled to all the base would have said,
    not only to the word that followed. Hidden states: (places, hidden) each.
    """
    return _Divergence.apply(hidden, base_hidden, decoder, weight)  # type: ignore[no-any-return]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, base_hidden: Tensor, decoder: Decoder, weight: float) -> Tensor:
        grad, total, softcap = torch.zeros_like(hidden), 0.0, decoder.spec.final_softcap
        size = logit_chunk(len(base_hidden), 4 * TABLES_COMPARED * decoder.head.rows)
        for start in range(0, len(base_hidden), size):
            rows = slice(start, min(start + size, len(base_hidden)))
            x = decoder.norm.forward(hidden[rows])
            # In float32: what the two differ by is smaller than the steps of bfloat16 at the size of logits.
            wanted = decoder.logits(base_hidden[rows], torch.float32).log_softmax(1)
            found = decoder.logits(hidden[rows], torch.float32)
            bent = (found / softcap).square_().neg_().add_(1) if softcap else 1.0
            found = found.log_softmax(1)
            share = wanted.exp()
            total += float(torch.dot(share.view(-1), wanted.sub_(found).view(-1)))
            slope = found.exp_().sub_(share).mul_(weight).mul_(bent)
            decoder.head.input_grad(slope.to(hidden.dtype), x)
            grad[rows] = decoder.norm.backward(hidden[rows], x)
        ctx.save_for_backward(grad)
        return torch.tensor(total * weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None
