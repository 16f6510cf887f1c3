"""Texts that the base itself writes: on some a run measures how far it has moved the model, on others it is held back.

The base is right about them by definition, so whatever a model gives otherwise it has unlearned, on any subject that
the base writes of. They are drawn from the base once and kept in the cache. Those that measure go on from the
beginnings of general text, those that hold back from others: what is measured was not trained on.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.known_answers import KnownAnswers
from thimble.backends.session import ActiveAdapter, Session
from thimble.core.metrics import Divergence
from thimble.core.significance import LEAST_ROWS, bootstrap
from thimble.data.batches import micro_batches, pack
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

TEXTS = 150  # to measure on, as many from each beginning
TEXT_TOKENS = 20  # of a text at most, behind its beginning
BEGINNING_TOKENS = 4  # of a plain text; that of a conversation is its prompt
LEAST_SHARE = 0.5  # of the texts that are to hold something, or nothing is concluded from them


@dataclass(frozen=True)
class Writer:
    """The base that writes, and how."""

    base: Base
    fingerprint: str  # what the texts are kept by: of the base, and of all else that they are to depend on
    validation: ValidationSet  # whose tokenizer and cache the engine has

    def texts(
        self, session: Session, beginnings: Sequence[Row], count: int, why: str, execution: ExecutionPlan,
        control: Control,
    ) -> list[Row]:  # fmt: skip
        """About so many texts, as rows that carry a label wherever the base wrote a token, with the sources of their
        beginnings; none if somebody wants to leave. `why` is told when they are written.
        """
        starts, each = [row.ids for row in beginnings], max(1, round(count / max(1, len(beginnings))))
        path = self._place(beginnings, count).with_suffix(".json")
        written = _kept(path, len(starts) * each, self.base.spec.vocab_size)
        if not written:
            control.log.stage(f"the base writes some texts, once, {why}")
            written = _write(session, starts, each, self.validation, execution, control)
            if written:
                with contextlib.suppress(OSError):  # no home, or no room there: written again next time
                    run_folder.write_json(path, written)
        return [_row(beginnings[number % len(starts)], ids) for number, ids in enumerate(written)]

    def measuring(
        self, session: Session, general: Sequence[Row], execution: ExecutionPlan, control: Control
    ) -> list[Row]:
        """The texts to measure on, which begin as general text does."""
        beginnings = [_beginning(row) for row in general]
        return self.texts(session, beginnings, TEXTS, "to see later what it forgets", execution, control)

    def answers_file(self, general: Sequence[Row], computed: str) -> Path:
        """Where the base's answers on the texts to measure on are kept, by how they are computed."""
        path = self._place([_beginning(row) for row in general], TEXTS)
        return path.with_name(f"{path.name}-{computed}.npz")

    def _place(self, beginnings: Sequence[Row], count: int) -> Path:
        return cache_folder() / "texts" / _key(self.fingerprint, count, [row.ids for row in beginnings])


def _beginning(row: Row) -> Row:
    """What the base goes on from: the prompt of a conversation, or the first tokens of a text."""
    first = int(np.flatnonzero(row.labels != IGNORED)[0])
    tokens = max(first + 1, BEGINNING_TOKENS)
    return Row(row.ids[:tokens], row.labels[:tokens], row.source)


def _key(fingerprint: str, count: int, starts: Sequence[NDArray[np.int32]]) -> str:
    """What the texts depend on, hashed: the base, what they begin with, how many there are and how long they are."""
    total = hashlib.sha256(f"{fingerprint} {count} {TEXT_TOKENS}".encode())
    for ids in starts:
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


def _row(beginning: Row, written: Sequence[int]) -> Row:
    """A text with labels where the base wrote; without its last token, of which nothing is asked."""
    ids = np.concatenate([beginning.ids, np.array(written, np.int32)])
    labels = ids[1:].copy()
    labels[: len(beginning.ids) - 1] = IGNORED
    return Row(ids[:-1], labels, beginning.source)


def measure_divergence(
    session: Session, adapter: ActiveAdapter, texts: Sequence[Row], execution: ExecutionPlan, control: Control,
    path: Path,
) -> Mapping[str, Any]:  # fmt: skip
    """How far the model is from the base on its texts: `kl` and `same` with their 95 % intervals; empty if not known.

    Texts of one beginning are not independent: the bootstrap draws beginnings. The base's answers are read from a file,
    or kept there for the next run.
    """
    if control.should_stop() or not _is_enough(texts, control):
        return {}
    known = _known_answers(path, session, texts, execution)
    found: dict[str, Divergence] = {}
    batches = micro_batches(texts, execution.micro_tokens, shares_prefixes=session.shares_prefixes)
    read = 0
    for batch, rows in zip(batches, session.divergences(adapter, batches, execution, known), strict=True):
        for number, row in zip(batch.numbers.tolist(), rows, strict=True):
            found[texts[number].source] = found.get(texts[number].source, Divergence()) + row
        read += len(rows)
        control.log.progress("comparing with the base on its own texts,", read, len(texts))
        if control.should_stop():
            return {}
    if known.is_changed:
        with contextlib.suppress(OSError):  # no home, or no room there: computed again next time
            known.write(path)
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


def _known_answers(path: Path, session: Session, texts: Sequence[Row], execution: ExecutionPlan) -> KnownAnswers:
    """The base's answers that were kept, if it still gives the first of them; else none."""
    known, first = KnownAnswers.read(path), KnownAnswers()
    if known.get(texts[0].ids, texts[0].labels) is None:
        return KnownAnswers()
    list(session.divergences(session.load(None), [pack(texts[:1])], execution, first))
    return known if known.agrees_with(first) else KnownAnswers()


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
