"""What a batch is measured by, row by row: hidden states at labels, losses, and divergences from the base."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.features import Features
from thimble.backends.torch.lora import BARE, Lora
from thimble.backends.torch.loss import divergence_at, target_losses
from thimble.backends.torch.memory import out_of_memory
from thimble.core.metrics import Divergence, LossSum
from thimble.data.batches import Batch, lay_out
from thimble.data.encode import IGNORED


class Labelled(NamedTuple):
    """Hidden states with labels.

    Attributes:
        hidden: (tokens, hidden) of a batch, or of its labelled tokens alone.
        labels: int32 (tokens,) of them.
        rows: int64 (labelled tokens,), the row of the batch that each belongs to.
    """

    hidden: torch.Tensor
    labels: NDArray[np.int32]
    rows: NDArray[np.int64]


def labelled(
    decoder: Decoder, batch: Batch, lora: Lora, shares_prefixes: bool, checkpointed_blocks: int = 0,
    features: Features | None = None,
) -> Labelled:  # fmt: skip
    """Run a batch; what its rows have in common is computed once, but for dropout, drawn by row."""
    layout = lay_out(batch, shares_prefixes and lora.dropout is None)
    labels = batch.labels[layout.places]
    wanted = np.flatnonzero(labels != IGNORED)
    forward = decoder.pack(layout.segments, lora, checkpointed_blocks, wanted)
    known = features.get(batch) if features else None
    if features and known is not None:
        x = torch.zeros(forward.size, known.shape[1], dtype=known.dtype)
        x[: len(layout.places)] = known[torch.from_numpy(layout.places)]
        hidden = decoder.through(decoder.blocks[features.lowest :], x, forward)
    else:
        hidden = decoder.hidden(batch.ids[layout.places], forward)
    rows = np.searchsorted(batch.starts, layout.places[wanted], "right") - 1
    return Labelled(hidden, labels[wanted] if forward.asked else labels, rows)


@out_of_memory
@torch.no_grad()
def row_losses(decoder: Decoder, batch: Batch, lora: Lora, shares_prefixes: bool) -> list[LossSum]:
    """The loss of each row."""
    found, count = labelled(decoder, batch, lora, shares_prefixes), len(batch.numbers)
    nats = np.bincount(found.rows, target_losses(decoder, found.hidden, found.labels), count)
    return list(map(LossSum, nats.tolist(), np.bincount(found.rows, minlength=count).tolist()))


@out_of_memory
@torch.no_grad()
def divergences(decoder: Decoder, batch: Batch, lora: Lora, shares_prefixes: bool) -> list[Divergence]:
    """How far each row is from the bare base, at its labels."""
    bare = labelled(decoder, batch, BARE, shares_prefixes)
    places = torch.from_numpy(np.flatnonzero(bare.labels != IGNORED))
    base = bare.hidden[places]  # a copy: the next pass uses the same buffers
    nats, same = divergence_at(decoder, base, labelled(decoder, batch, lora, shares_prefixes).hidden[places])
    sums = (np.bincount(bare.rows, values, len(batch.numbers)) for values in (nats, same, np.ones(len(bare.rows))))
    return [Divergence(nats, int(same), int(places)) for nats, same, places in zip(*sums, strict=True)]
