"""Proof that an exported adapter does in another runtime what it does here: probabilities of the same tokens compared.

Two runs are made on each side, with and without the adapter. What the bare base differs by between here and there is
the noise of the runtime (blocks multiplied in whole numbers, another order of sums); the adapter may differ by about as
much again, and its effect must be the same.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    chosen = choose_tokens(rows[:MOST_ROWS])
    each = max(1, MOST_POSITIONS // max(1, len(chosen)))
    there = []
    for number, lora in enumerate((None, exported)):  # one after the other: two at a time would hold the base twice
        model = LlamaCpp(base.path, lora, threads, MOST_TOKENS)
        found: list[float] = []
        for done, (ids, begin) in enumerate(chosen, 1):
            found += model.log_probabilities(ids[: begin + each], begin)
            on_row(number * len(chosen) + done, 2 * len(chosen))
        there.append(np.array(found))
    here = [probabilities_here(session, session.load(which), chosen, each) for which in (None, adapter)]
    return _compare(len(chosen), here, there)


def choose_tokens(rows: Sequence[Row]) -> list[tuple[list[int], int]]:
    """The tokens of each row, and the first place whose probability is asked for: a target, unless those are few."""
    is_whole = sum(row.target_tokens for row in rows) < FEW_TARGETS
    return [(row.ids[:MOST_TOKENS].tolist(), 1 if is_whole else _first_target(row)) for row in rows]


def _first_target(row: Row) -> int:
    targets = np.flatnonzero(row.labels[: MOST_TOKENS - 1] != IGNORED)  # the label of a place is the token behind it
    return int(targets[0]) + 1 if len(targets) else 1


def probabilities_here(
    session: Session, adapter: ActiveAdapter, rows: Iterable[tuple[list[int], int]], each: int
) -> Floats:
    """Natural log-probability of `each` tokens of each row from its first place on, in Thimble: float64 (tokens,)."""
    found: list[float] = []
    for ids, begin in rows:
        cut = ids[: begin + each]
        cache = session.new_cache()
        blocks = range(-(-len(cut) // cache.block_tokens))
        cache.reserve(len(blocks))
        places = list(range(begin - 1, len(cut) - 1))
        whole = Pass(np.array(cut, np.int32), [ForwardRow(len(cut), blocks, 0, len(cut), adapter)], places)
        ((logits, _),) = session.forward([whole], cache, 1)
        wide = logits.astype(np.float64)
        wide -= wide.max(1, keepdims=True)
        sums = np.log(np.exp(wide).sum(1))
        found += (wide[range(len(places)), cut[begin:]] - sums).tolist()
    return np.array(found)


def _compare(rows: int, here: Sequence[Floats], there: Sequence[Floats]) -> Proof:
    told = np.isfinite(there[0]) & np.isfinite(there[1])  # of tokens that are no whole character nothing is told
    if not told.any():
        raise RuntimeError("it tells the probability of none of the tokens; name other examples with --data")
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
