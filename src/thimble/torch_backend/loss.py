"""Cross-entropy on labelled tokens only, in chunks, with the gradient made in the same pass.

The frozen head needs no gradient of its own, so the forward pass can turn each chunk's logits into the gradient of
the hidden states at once: the full logits never exist (as in Liger's fused linear cross-entropy, arXiv:2410.10989;
rows without a label are dropped first).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.torch_backend.decoder import Decoder

CHUNK_BYTES = 64_000_000  # float32 logits alive at once
IGNORED = -100


def label_loss(decoder: Decoder, hidden: Tensor, labels: NDArray[np.int32]) -> Tensor:
    """Summed cross-entropy over the labelled positions.

    Args:
        decoder: For its final norm, head and soft-cap.
        hidden: (tokens, hidden), compute type.
        labels: int32 (tokens,): the next token, or -100 where nothing is learned.

    Returns:
        A float32 scalar; its gradient flows to `hidden` only.
    """
    places = torch.from_numpy(np.flatnonzero(labels != IGNORED))
    targets = torch.from_numpy(labels[labels != IGNORED].astype(np.int64))
    return _LabelLoss.apply(hidden, places, targets, decoder)  # type: ignore[no-any-return]


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: Tensor, targets: Tensor, decoder: Decoder) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        rows = hidden[places]
        normal = decoder.norm.forward(rows)
        weight = decoder.head.weight()
        total = torch.zeros((), dtype=torch.float64)
        size = max(64, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            nats, grad = _chunk_loss(normal[chunk], weight, targets[chunk], decoder.spec.final_softcap, needs_grad)
            total += nats
            if needs_grad:
                normal[chunk] = grad  # the chunk's input is no longer needed
        if needs_grad:
            ctx.save_for_backward(decoder.norm.backward(rows, normal), places)
            ctx.shape = hidden.shape
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, places = ctx.saved_tensors
        out = torch.zeros(ctx.shape, dtype=rows.dtype)
        out[places] = rows * grads[0]
        return out, None, None, None


def _chunk_loss(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of some rows, and its gradient at x."""
    logits = torch.mm(x, weight.t()).float()
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    at_target = logits.gather(1, targets[:, None])
    nats = (log_sum - at_target).double().sum()
    if not needs_grad:
        return nats, None
    slope = 1 - (logits / softcap).square() if softcap else None
    logits.sub_(log_sum).exp_()
    logits[torch.arange(len(targets)), targets] -= 1
    if slope is not None:
        logits.mul_(slope)
    return nats, torch.mm(logits.to(x.dtype), weight)
