"""The part of `thimble export` that writes whole models: planned, written, read again, proved, and only then named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from thimble.backends.open import open_session
from thimble.backends.session import Session
from thimble.core.adapter import Adapter
from thimble.data.encode import Row
from thimble.data.model import Model, model_of
from thimble.data.vocab_to_gguf import vocab_header
from thimble.errors import RunError, plural
from thimble.events import EventLog
from thimble.exports.gguf_model import importance_of, plan_tensors, write_gguf_model
from thimble.exports.proof_model import Here, ModelProof, WeightsCheck, check_weights, prove_model
from thimble.files.gguf_write import NewTensor
from thimble.models.base import open_base
from thimble.models.gguf_header import carried_header, made_header


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

    def tensors(self, importance: Mapping[str, Any] | None = None) -> list[NewTensor]:
        """The tensors of the file."""
        return plan_tensors(self.model.base, self.updates, self.file_type, importance)

    @property
    def size_bytes(self) -> int:
        """Size of the file, but for its header."""
        return sum(tensor.nbytes for tensor in self.tensors())


def write_model(whole: WholeModel, path: Path, calibration: Sequence[Row], log: EventLog) -> None:
    """Write a model as GGUF; with rows for calibration, rounding errors are weighed by the inputs they meet."""
    importance = None
    if calibration:
        log.stage(f"measuring the inputs of every layer on {plural(len(calibration), 'row')}")
        importance = importance_of(_open(whole.model), calibration)
    log.stage(f"writing the model as {whole.file_type}")
    on_tensor = partial(log.progress, "tensors")
    write_gguf_model(path, whole.tensors(importance), whole.file_type, whole.header, on_tensor)


def check_model(whole: WholeModel, path: Path, out: Path, log: EventLog) -> WeightsCheck:
    """Read a written file again and compare its numbers; a RunError if they are not those of base and adapter."""
    log.stage("reading it again")
    weights = check_weights(whole.model.base, whole.updates, open_base(path))
    if weights.problems:
        raise RunError(
            f"{out} does not hold what it should: {'; '.join(weights.problems[:3])}. Rounding to few bits can swallow "
            "a small update whole, most of all where the base has as few: take --type Q8_0, or keep the adapter beside "
            "the base"
        )
    return weights


def prove_written(
    whole: WholeModel, path: Path, out: Path, weights: WeightsCheck, rows: Sequence[Row], log: EventLog
) -> ModelProof:
    """Compare a written file in llama.cpp; a RunError if it does not do there what base and adapter do here."""
    from thimble.backends.torch.threads import num_cores

    log.stage("proving it in llama.cpp")
    here = Here(whole.model, whole.adapter, model_of(open_base(path)), _open)
    on_row = partial(log.progress, "rows compared")
    try:
        proof = prove_model(here, path, whole.file_type, weights, rows, num_cores(), on_row)
    except RuntimeError as error:
        raise RunError(f"llama.cpp cannot use {out}: {error}") from None
    if not proof.holds:
        raise RunError(
            f"{out} does not do in llama.cpp what it does here: log-probabilities differ by "
            f"{proof.runtime_difference:.4f} nats, and the effect of the adapter there is {proof.effect_there:.2f} "
            "times what it is here"
        )
    for text in proof.different_texts:
        log.warning(f"llama.cpp makes other tokens of {text!r} than the base was trained with")
    for name in proof.different_conversations:
        log.warning(f"llama.cpp writes {name} by the chat template in another way, or not at all: try it there")
    if not proof.ends:
        log.note("the answer to the first row did not end by itself in llama.cpp within 256 tokens")
    if proof.effect and proof.rounding_difference > proof.effect:
        log.warning(
            f"rounding to {whole.file_type} moves probabilities by {proof.rounding_difference:.3f} nats, more than the "
            f"adapter does ({proof.effect:.3f}): take a type of more bits, or keep the adapter beside the base"
        )
    return proof


def _open(model: Model) -> Session:
    return open_session(model, "fp32", "file")
