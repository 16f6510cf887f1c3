"""The part of `thimble export` that writes whole models: planned, written, read again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.open import open_session
from thimble.core.adapter import Adapter
from thimble.data.encode import Row
from thimble.data.model import Model
from thimble.data.vocab_to_gguf import vocab_header
from thimble.errors import RunError, plural
from thimble.events import EventLog
from thimble.exports.gguf_model import importance_of, plan_tensors, write_gguf_model
from thimble.exports.proof_weights import WeightsCheck, check_weights
from thimble.files.gguf_write import NewTensor
from thimble.models.base import open_base
from thimble.models.gguf_header import carried_header, made_header

IMATRIX_ENTRIES = "quantize.imatrix.entries_count"  # llama.cpp's key: for how many layers inputs were measured
Importance = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class WholeModel:
    """A model to be written, checked as far as it can be before anything is."""

    model: Model
    adapter: Adapter | None
    file_type: str
    header: Mapping[str, Any]

    @classmethod
    def of(cls, model: Model, adapter: Adapter | None, file_type: str) -> "WholeModel":
        """Plan one; a BaseModelError if GGUF has no place for something of the base."""
        base = model.base
        if base.metadata is None:
            header = made_header(base)
            header |= vocab_header(base.path, model.tokenizer, base.spec.vocab_size)
        else:
            header = carried_header(base)
        return cls(model, adapter, file_type, header)

    @property
    def updates(self) -> Mapping[str, Any]:
        """Updates by path of the layer."""
        return self.adapter.plain().layers if self.adapter else {}

    def tensors(self, importance: Importance | None = None) -> list[NewTensor]:
        """The tensors of the file."""
        return plan_tensors(self.model.base, self.updates, self.file_type, importance)

    @property
    def size_bytes(self) -> int:
        """Size of the file, but for its header."""
        return sum(tensor.nbytes for tensor in self.tensors())


def measure_importance(whole: WholeModel, rows: Sequence[Row], log: EventLog) -> Importance:
    """How large the inputs of every column are in the model that is written, by path of the layer."""
    log.stage(f"measuring the inputs of every layer on {plural(len(rows), 'row')}")
    return importance_of(open_session(whole.model, "fp32", "file"), whole.adapter, rows)


def write_model(whole: WholeModel, path: Path, importance: Importance | None, log: EventLog) -> None:
    """Write a model as GGUF; with importance, rounding errors are weighed by the inputs they meet."""
    log.stage(f"writing the model as {whole.file_type}")
    header = {**whole.header, **({IMATRIX_ENTRIES: np.uint32(len(importance))} if importance else {})}
    write_gguf_model(path, whole.tensors(importance), whole.file_type, header, partial(log.progress, "tensors"))


def check_model(whole: WholeModel, path: Path, out: Path, importance: Importance | None, log: EventLog) -> WeightsCheck:
    """Read a written file again and compare its numbers; a RunError if they are not those of base and adapter."""
    log.stage("reading it again")
    weights = check_weights(whole.model.base, whole.updates, open_base(path), importance)
    if weights.problems:
        raise RunError(f"{out} does not hold what it should: {'; '.join(weights.problems[:3])}")
    return weights


def has_importance(path: Path) -> bool:
    """Whether a file says that its rounding errors were weighed."""
    metadata = open_base(path).metadata
    return metadata is not None and IMATRIX_ENTRIES in metadata
