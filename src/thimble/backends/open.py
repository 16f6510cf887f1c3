"""The way into a backend: the store of the frozen weights, and a session of the engine, which is loaded only now."""

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import Session
from thimble.data.model import Model
from thimble.data.records import general_records
from thimble.models.base import Base

SAMPLE_TOKENS = 512  # of text that shows compute int8 which columns of the activations are large


def choose_store(wanted: str, base: Base, compute: str) -> tuple[tuple[str, ...], str]:
    """The stores that come into question for an already chosen compute type, the fastest first, and why that one."""
    if compute == "int8":
        return ("int8",), "store int8: compute int8 multiplies int8 weights, and keeps them so"
    if wanted != "auto":
        return (wanted,), f"store {wanted} was asked for"
    if base.metadata is not None:
        return ("file",), "store file: the blocks of the GGUF are used as they are, memory-mapped"
    return ("dense", "file"), "store dense: the weights of a folder are held in the compute type"


def open_session(model: Model, compute: str, store: str, is_streamed: bool = False, decode: str = "float") -> Session:
    """Load a base into the torch engine; `is_streamed` reads weights from the file for each product and keeps none.

    `decode` is `float`, or `int8` to quantise activations where answers are written with weights in blocks.
    """
    from thimble.backends.torch.session import TorchSession

    sample = _sample(model) if compute == "int8" else None
    return TorchSession(model.base, compute, store, is_streamed, sample, decode)


def _sample(model: Model) -> NDArray[np.int32]:
    """Tokens of general text, int32 (at most SAMPLE_TOKENS,)."""
    texts = [record.text for record in general_records() if record.text is not None]
    return np.array(model.tokenizer.encode("\n\n".join(texts)), np.int32)[:SAMPLE_TOKENS]
