"""What llama.cpp calls the weights of a base, and in which order it keeps their rows.

The names and the order are those of llama.cpp's own converter; a base that is a GGUF file already says both itself.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.models.gguf_base import GGUF_TOP, block_names, row_order
from thimble.models.spec import DecoderSpec
from thimble.models.weights import Base

ARCHITECTURES = {"mistral": "llama"}  # families that llama.cpp calls otherwise


class GgufName(NamedTuple):
    """A weight as a GGUF file has it."""

    name: str  # `blk.0.attn_q.weight`
    order: NDArray[np.int64] | None  # row i of the file is row order[i] of the weight; None if they agree


def architecture(base: Base) -> str:
    """What a GGUF file of this base has as general.architecture."""
    if base.metadata is not None:
        return str(base.metadata["general.architecture"])
    return ARCHITECTURES.get(base.decoder.family, base.decoder.family)


def gguf_name(base: Base, weight: str) -> GgufName:
    """The name and row order of a weight, by its transformers name; a KeyError if the format has no place for it."""
    if base.metadata is not None:
        found = base.weights[weight]
        return GgufName(found.info.name, found.order)
    order = row_order(weight, base.weights[weight].shape, architecture(base), base.decoder)
    return GgufName(_converted(base.decoder, weight), order)


def _converted(spec: DecoderSpec, weight: str) -> str:
    stem, _, kind = weight.rpartition(".")
    top = {ours: theirs for theirs, ours in GGUF_TOP.items()}
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, number, part = stem.split(".", 3)
    # Of two names for one part, the later is the family's own.
    block = {ours: theirs for theirs, ours in block_names(spec).items()}
    return f"blk.{number}.{block[part]}.{kind}"
