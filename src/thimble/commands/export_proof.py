"""The part of `thimble export` that has llama.cpp prove what was written, and tells what rounding cost."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from thimble.backends.open import open_session
from thimble.backends.session import Session
from thimble.commands.export_model import WholeModel
from thimble.core.adapter import Adapter
from thimble.data.encode import Row
from thimble.data.model import Model, model_of
from thimble.errors import RunError, as_word
from thimble.events import EventLog
from thimble.exports.proof import Proof, prove
from thimble.exports.proof_model import Here, ModelProof, prove_model
from thimble.exports.proof_weights import SURVIVES, WeightsCheck
from thimble.models.base import open_base

AnyProof = TypeVar("AnyProof", Proof, ModelProof)
OnRow = Callable[[int, int], None]
TOO_SMALL = "the adapter moves probabilities by less than the runtime's own noise: the proof says little"


def prove_adapter(
    adapter: Adapter, name: str, model: Model, file: Path, out: Path, rows: Sequence[Row], log: EventLog
) -> Proof:
    """Compare an adapter; a RunError if it does not do in the runtime what it does here."""
    session = _open(model)
    proof = _proved(lambda on_row: prove(adapter, model.base, session, file, rows, _threads(), on_row), name, out, log)
    if not proof.is_visible:
        log.warning(TOO_SMALL)
    return proof


def prove_whole(
    whole: WholeModel, weights: WeightsCheck, file: Path, out: Path, rows: Sequence[Row], log: EventLog
) -> ModelProof:
    """Compare a whole model; a RunError if the runtime does not compute what is in the file."""
    here = Here(whole.model, whole.adapter, model_of(open_base(file)), _open)
    proof = _proved(
        lambda on_row: prove_model(here, file, whole.file_type, weights, rows, _threads(), on_row), "it", out, log
    )
    if 0 < proof.effect < proof.runtime_difference:
        log.warning(TOO_SMALL)
    for text in proof.different_texts:
        log.warning(f"llama.cpp makes other tokens of {text!r} than the base was trained with")
    for name in proof.different_conversations:
        log.warning(f"llama.cpp writes {name} by the chat template in another way, or not at all: try it there")
    if not proof.ends:
        log.note("the answer to the first row did not end by itself in llama.cpp within 256 tokens")
    return proof


def tell_loss(whole: WholeModel, name: str, weights: WeightsCheck, proof: ModelProof | None, log: EventLog) -> None:
    """Warn if rounding changed much of what an adapter does, with how much that is and what loses nothing."""
    is_drowned = proof and proof.effect and proof.rounding_difference > proof.effect
    gain = proof.kept_gain if proof else 1.0
    if abs(weights.kept_update - 1) <= 1 - SURVIVES and gain >= SURVIVES and not is_drowned:
        return
    seen = (
        f" Loss {proof.loss_base:.3f} of the bare base, {proof.loss_before_rounding:.3f} with the adapter, "
        f"{proof.loss_there:.3f} of this file; KL divergence {proof.divergence:.3f} nats a token."
        if proof
        else ""
    )
    beside = f"thimble export {as_word(name)} --base {as_word(str(whole.model.base.path))} --out adapter.gguf"
    better = "" if whole.file_type == "Q8_0" else ", and --type Q8_0 next to nothing"
    log.warning(
        f"rounding to {whole.file_type} changes what the adapter does: {weights.kept_update:.2f} of its update is in "
        f"the weights, where 1 is all of it.{seen} The file is what llama.cpp's own quantiser would make; the adapter "
        f"beside the base loses nothing ({beside}){better}"
    )


def _proved(make: Callable[[OnRow], AnyProof], subject: str, out: Path, log: EventLog) -> AnyProof:
    """Make a proof; a RunError if the runtime refuses the file, or the proof does not hold."""
    log.stage("proving it in llama.cpp")
    try:
        proof = make(partial(log.progress, "rows compared"))
    except RuntimeError as error:
        raise RunError(f"llama.cpp cannot use {out}: {error}") from None
    if not proof.holds:
        raise RunError(f"{out} does not do in llama.cpp what {subject} does here: {proof.difference}")
    return proof


def _threads() -> int:
    from thimble.backends.torch.threads import num_cores

    return num_cores()


def _open(model: Model) -> Session:
    return open_session(model, "fp32", "file")
