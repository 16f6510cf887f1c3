"""Proof that an exported adapter does in another runtime what it does here: probabilities of the same tokens compared.

Two runs are made on each side, with and without the adapter. What the bare base differs by between here and there is
the noise of the runtime (blocks multiplied in whole numbers, another order of sums); the adapter may differ by about as
much again, and its effect must be the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, ForwardRow, Pass, Session
from thimble.core.adapter import Adapter
from thimble.data.encode import IGNORED, Row
from thimble.exports.llamacpp import LlamaCpp
from thimble.models.base import Base

MOST_ROWS, MOST_POSITIONS = 20, 500
MOST_TOKENS = 512  # of a row
FEW_TARGETS = 100  # if there are fewer, the tokens of the prompts are compared too
TIMES_BASE = 2.0  # the bare base's own difference: the most that the adapter's may be
LEAST_NOISE = 1e-4  # nats: below this, differences are those of float32
EFFECT_ERROR = 0.1  # share of its own size that the effect may differ by, beside noise

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Proof:
    """What was compared, in nats a token, averaged over the positions.

    Attributes:
        runtime: Name of the runtime.
        rows: Rows of text.
        positions: Tokens whose probability was compared.
        base_difference: Of the bare base, here and there.
        adapter_difference: With the adapter, here and there.
        effect: How much the adapter moves a log-probability here.
        effect_there: The same there, as a multiple: 1 is the same effect, 0 none, from a least-squares fit.
        holds: Whether it does there what it does here, as far as the noise lets it be seen.
    """

    runtime: str
    rows: int
    positions: int
    base_difference: float
    adapter_difference: float
    effect: float
    effect_there: float
    holds: bool

    @property
    def is_visible(self) -> bool:
        """Whether the effect stands out of the noise; if not, nothing is shown either way."""
        return self.effect > self.base_difference

    @property
    def difference(self) -> str:
        """What was found, for whom the proof fails."""
        return (
            f"log-probabilities differ by {self.adapter_difference:.4f} nats, those of the bare base by "
            f"{self.base_difference:.4f}, and the effect of the adapter there is {self.effect_there:.2f} times what it "
            "is here"
        )


def prove(
    adapter: Adapter,
    base: Base,
    session: Session,
    exported: Path,
    rows: Sequence[Row],
    threads: int,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Compare an exported adapter in llama.cpp with the one it was made from.

    Args:
        adapter: The original.
        base: A GGUF file, which both sides read.
        session: With that base, in float32.
        exported: The GGUF adapter.
        rows: Text to compare on; the first MOST_ROWS are taken, and of them the first target tokens.
        threads: For llama.cpp.
        on_row: Told how many rows are done.

    Returns:
        What was found.

    Raises:
        MissingPackageError: Without the runtime.
        RuntimeError: If the runtime refuses a file.
    """
    texts = choose_texts(rows)
    there = []
    for number, lora in enumerate((None, exported)):  # one after the other: two at a time would hold the base twice
        model = LlamaCpp(base.path, lora, threads, MOST_TOKENS)
        found: list[float] = []
        for done, text in enumerate(texts, 1):
            found += model.log_probabilities(text.ids, text.begin)
            on_row(number * len(texts) + done, 2 * len(texts))
        there.append(np.array(found))
    here = [probabilities_here(session, session.load(which), texts) for which in (None, adapter)]
    return _compare(len(texts), here, there)


class Text(NamedTuple):
    """What is compared of a row: the tokens from `begin` on, given those before."""

    ids: list[int]
    begin: int  # at least 1


def choose_texts(rows: Sequence[Row]) -> list[Text]:
    """At most MOST_POSITIONS tokens of the first rows: targets, unless those are few."""
    chosen = rows[:MOST_ROWS]
    is_whole = sum(row.target_tokens for row in chosen) < FEW_TARGETS
    each = max(1, MOST_POSITIONS // max(1, len(chosen)))
    begins = [1 if is_whole else _first_target(row) for row in chosen]
    return [
        Text(row.ids[: min(begin + each, MOST_TOKENS)].tolist(), begin)
        for row, begin in zip(chosen, begins, strict=True)
    ]


def _first_target(row: Row) -> int:
    targets = np.flatnonzero(row.labels[: MOST_TOKENS - 1] != IGNORED)  # the label of a place is the token behind it
    return int(targets[0]) + 1 if len(targets) else 1


def probabilities_here(session: Session, adapter: ActiveAdapter, texts: Iterable[Text]) -> Floats:
    """Natural log-probability of each token that is compared, in Thimble: float64 (tokens,)."""
    return np.concatenate([of_tokens(text, logs) for text, logs in distributions(session, adapter, texts)])


def of_tokens(text: Text, logs: Floats) -> Floats:
    """Of the log-probabilities of all tokens those of the ones that stand there."""
    return np.asarray(logs[range(len(logs)), text.ids[text.begin :]])


def distributions(session: Session, adapter: ActiveAdapter, texts: Iterable[Text]) -> Iterator[tuple[Text, Floats]]:
    """For each text the log-probabilities of all tokens at each compared place, in Thimble: float64 (tokens, words)."""
    for text in texts:
        cache = session.new_cache()
        blocks = range(-(-len(text.ids) // cache.block_tokens))
        cache.reserve(len(blocks))
        places, size = list(range(text.begin - 1, len(text.ids) - 1)), len(text.ids)
        whole = Pass(np.array(text.ids, np.int32), [ForwardRow(size, blocks, 0, size, adapter)], places)
        ((logits, _),) = session.forward([whole], cache, 1)
        wide = logits.astype(np.float64)
        wide -= wide.max(1, keepdims=True)
        yield text, wide - np.log(np.exp(wide).sum(1, keepdims=True))


def what_is_told(found: Floats) -> NDArray[np.bool_]:
    """Where a runtime told a log-probability: of tokens that are no whole character it tells none."""
    told = np.isfinite(found)
    if not told.any():
        raise RuntimeError("it tells the probability of none of the tokens; name other examples with --data")
    return told


def _compare(rows: int, here: Sequence[Floats], there: Sequence[Floats]) -> Proof:
    told = what_is_told(there[0] + there[1])
    (base, tuned), (base_there, tuned_there) = ([side[told] for side in both] for both in (here, there))
    noise, difference = float(np.abs(base - base_there).mean()), float(np.abs(tuned - tuned_there).mean())
    effect = tuned - base
    size = float(effect @ effect)
    share = float((tuned_there - base_there) @ effect / size) if size else 0.0
    allowed = TIMES_BASE * max(noise, LEAST_NOISE)
    # Of an effect that noise drowns, the fit is noise too.
    uncertain = noise * np.sqrt(2 * len(effect) / size) if size else 1.0
    holds = difference <= allowed and abs(share - 1) <= EFFECT_ERROR + 2 * uncertain and size > 0
    return Proof("llama.cpp", rows, len(effect), noise, difference, float(np.abs(effect).mean()), share, bool(holds))
