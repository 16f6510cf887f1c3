"""What a batch is measured by, row by row: hidden states at labels, losses, and divergences from the base."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from thimble.backends.known_answers import Answers, KnownAnswers
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.features import Features
from thimble.backends.torch.lora import BARE, Lora
from thimble.backends.torch.loss import base_answers, divergence_at, divergence_from, target_losses
from thimble.backends.torch.memory import out_of_memory
from thimble.core.metrics import Divergence, LossSum
from thimble.data.batches import Batch, lay_out, pack
from thimble.data.encode import IGNORED, Row


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
    return _by_row(bare.rows, nats, same, len(batch.numbers))


@out_of_memory
@torch.no_grad()
def divergences_from_known(
    decoder: Decoder, batch: Batch, lora: Lora, shares_prefixes: bool, known: KnownAnswers
) -> list[Divergence]:
    """The same, with what is known of the base; the answers to other rows are added to that."""
    base = _answers(decoder, batch, shares_prefixes, known)
    hidden, rows = _row_by_row(labelled(decoder, batch, lora, shares_prefixes))
    return _by_row(rows, *divergence_from(decoder, base, hidden), len(batch.numbers))


def _answers(decoder: Decoder, batch: Batch, shares_prefixes: bool, known: KnownAnswers) -> Answers:
    """What the base says at the labels of a batch, row by row."""
    spans = [slice(*span) for span in zip(batch.starts, batch.starts[1:], strict=False)]
    texts = [Row(batch.ids[span], batch.labels[span], "") for span in spans]
    if new := [text for text in texts if known.get(text.ids, text.labels) is None]:
        hidden, rows = _row_by_row(labelled(decoder, pack(new), BARE, shares_prefixes))
        ends = np.cumsum(np.bincount(rows, minlength=len(new)))[:-1]
        parts = zip(*(np.split(each, ends) for each in base_answers(decoder, hidden)), strict=True)
        for text, part in zip(new, parts, strict=True):
            known.put(text.ids, text.labels, part)
    found = [answers for text in texts if (answers := known.get(text.ids, text.labels))]
    return Answers(*map(np.concatenate, zip(*found, strict=True)))


def _row_by_row(found: Labelled) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Hidden states at labels, a copy with the rows one after the other, and the row of each."""
    places, order = np.flatnonzero(found.labels != IGNORED), np.argsort(found.rows, kind="stable")
    return found.hidden[torch.from_numpy(places[order])], found.rows[order]


def _by_row(
    rows: NDArray[np.int64], nats: NDArray[np.float32], same: NDArray[np.bool_], count: int
) -> list[Divergence]:
    """Sums over the places of each row."""
    sums = (np.bincount(rows, values, count) for values in (nats, same, np.ones(len(rows))))
    return [Divergence(nats, int(same), int(places)) for nats, same, places in zip(*sums, strict=True)]
