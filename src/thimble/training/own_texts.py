"""Texts that the base itself writes: on them a run measures how far it has moved the model from its base.

The base is right about them by definition, so whatever a model gives otherwise it has unlearned, on any subject that
the base writes of. They are drawn from the base once, from the beginnings of general text, and kept in the cache.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, Session
from thimble.core.metrics import Divergence
from thimble.core.significance import LEAST_ROWS, bootstrap
from thimble.data.batches import micro_batches
from thimble.data.encode import IGNORED, Row
from thimble.errors import plural
from thimble.inference.batch import own_seed
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import Base
from thimble.models.execution import ExecutionPlan
from thimble.models.machine import cache_folder
from thimble.training import run_folder
from thimble.training.control import Control
from thimble.training.evaluation import ValidationSet, make_engine

TEXTS = 150  # in all, as many from each beginning
TEXT_TOKENS = 20  # of a text at most, behind its beginning
BEGINNING_TOKENS = 4  # of a plain text; that of a conversation is its prompt
LEAST_SHARE = 0.5  # of the texts that are to hold something, or nothing is concluded from them


def own_texts(
    session: Session, base: Base, fingerprint: str, general: Sequence[Row], validation: ValidationSet,
    execution: ExecutionPlan, control: Control,
) -> list[Row]:  # fmt: skip
    """About `TEXTS` texts of the base, known by its quick fingerprint, as rows that carry a label wherever it wrote a
    token, by beginnings that are the rows' sources; none if somebody wants to leave.
    """
    beginnings = [_beginning(row) for row in general]
    path = cache_folder() / "texts" / f"{_key(fingerprint, beginnings)}.json"
    written = _kept(path, len(beginnings) * _each(general), base.spec.vocab_size)
    if not written:
        control.log.stage("the base writes some texts, once, to see later what it forgets")
        written = _write(session, beginnings, _each(general), validation, execution, control)
        if written:
            with contextlib.suppress(OSError):  # no home, or no room there: written again next time
                run_folder.write_json(path, written)
    numbered = zip(written, range(len(written)), strict=True)
    return [_row(beginnings[n % len(general)], ids, general[n % len(general)].source) for ids, n in numbered]


def _each(general: Sequence[Row]) -> int:
    """Texts from each beginning."""
    return max(1, round(TEXTS / max(1, len(general))))


def _beginning(row: Row) -> NDArray[np.int32]:
    """What the base goes on from: the prompt of a conversation, or the first tokens of a text."""
    first = int(np.flatnonzero(row.labels != IGNORED)[0])
    return row.ids[: max(first + 1, BEGINNING_TOKENS)]


def _key(fingerprint: str, beginnings: Sequence[NDArray[np.int32]]) -> str:
    """What the texts depend on, hashed: the base, what they begin with, how many there are and how long they are."""
    total = hashlib.sha256(f"{fingerprint} {TEXTS} {TEXT_TOKENS}".encode())
    for ids in beginnings:
        total.update(ids.tobytes() + b".")
    return total.hexdigest()[:32]


def _kept(path: Any, count: int, vocab_size: int) -> list[list[int]]:
    """Texts that were kept, if they are whole; anything else counts as nothing."""
    texts = run_folder.read_json(path)
    is_whole = isinstance(texts, list) and len(texts) == count and all(isinstance(ids, list) for ids in texts)
    if not is_whole or not all(type(token) is int and 0 <= token < vocab_size for ids in texts for token in ids):
        return []
    return texts


def _write(
    session: Session, beginnings: Sequence[NDArray[np.int32]], each: int, validation: ValidationSet,
    execution: ExecutionPlan, control: Control,
) -> list[list[int]]:  # fmt: skip
    """Draw texts from the base as it is, at temperature 1, each from a random stream of its own."""
    session.release()
    engine, tokenizer, bare = make_engine(session, validation, execution), validation.tokenizer, session.load(None)
    count, places, done = len(beginnings) * each, {}, 0
    for number in range(count):
        options = SamplingOptions(TEXT_TOKENS, tokenizer.stop_ids, 1.0, seed=own_seed(0, number))
        places[engine.add(beginnings[number % len(beginnings)], options, bare)] = number
    written: list[list[int]] = [[] for _ in range(count)]
    while not engine.is_idle:
        if control.should_stop():
            return []
        for token in engine.step():
            end = [tokenizer.eos_id] if token.finish == "stop" and tokenizer.eos_id is not None else []
            written[places[token.request]] += end if token.id is None else [token.id]
            done += token.finish is not None
        control.log.progress("texts written,", done, count)
    return written


def _row(beginning: NDArray[np.int32], written: Sequence[int], source: str) -> Row:
    ids = np.concatenate([beginning, np.array(written, np.int32)])
    labels = np.append(ids[1:], np.int32(IGNORED))
    labels[: len(beginning) - 1] = IGNORED
    return Row(ids, labels, source)


def measure_divergence(
    session: Session, adapter: ActiveAdapter, texts: Sequence[Row], execution: ExecutionPlan, control: Control
) -> Mapping[str, Any]:
    """How far the model is from the base on its texts: `kl` and `same` with their 95 % intervals; empty if not known.

    Texts of one beginning are not independent: the bootstrap draws beginnings.
    """
    if control.should_stop() or not _is_enough(texts, control):
        return {}
    found: dict[str, Divergence] = {}
    batches = micro_batches(texts, execution.micro_tokens, shares_prefixes=session.shares_prefixes)
    read = 0
    for batch, rows in zip(batches, session.divergences(adapter, batches, execution), strict=True):
        for number, row in zip(batch.numbers.tolist(), rows, strict=True):
            found[texts[number].source] = found.get(texts[number].source, Divergence()) + row
        read += len(rows)
        control.log.progress("comparing with the base on its own texts,", read, len(texts))
        if control.should_stop():
            return {}
    nats, same, places = (
        np.array([getattr(each, name) for each in found.values()], float) for name in ("nats", "same", "places")
    )
    if not np.isfinite(nats).all():
        control.log.warning(
            "on texts that the base wrote the model gives NaN or Inf: how far it has moved is not known"
        )
        return {}
    (kl_low, kl_high), (same_low, same_high) = bootstrap(nats, places), bootstrap(same, places)
    return {
        "texts": len(texts), "places": int(places.sum()),
        "kl": nats.sum() / places.sum(), "kl_low": max(kl_low, 0.0), "kl_high": kl_high,
        "same": same.sum() / places.sum(), "same_low": same_low, "same_high": min(same_high, 1.0),
    }  # fmt: skip


def _is_enough(texts: Sequence[Row], control: Control) -> bool:
    """Whether the base wrote enough to measure anything on."""
    filled = [text for text in texts if text.target_tokens > 1]  # more than its end
    beginnings = len({text.source for text in filled})
    if len(filled) >= LEAST_SHARE * len(texts) and beginnings >= LEAST_ROWS:
        return True
    why = f"the base wrote texts from {plural(beginnings, 'beginning')} alone (at least {LEAST_ROWS} are needed)"
    if len(filled) < LEAST_SHARE * len(texts):
        empty = f"{len(texts) - len(filled)} of {plural(len(texts), 'beginning')}"
        why = f"the base writes nothing but its end token after {empty}"
    control.log.warning(f"{why}: what it forgets is measured on general text alone")
    return False
