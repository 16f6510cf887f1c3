"""Beginnings that rows share, such as a system text or a list of tools: which rows, and how to batch them.

What a causal model makes of a token depends on the tokens before it alone, so rows that begin alike need that beginning
once. Shared are tokens before the first label only: those behind it would have to be counted once for each row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.data.encode import IGNORED

LEAST_SHARED = 16  # tokens: fewer are not worth a second range of keys
MOST_ROWS = 64  # with one prefix: more of them save next to nothing more

Ids = NDArray[np.int32]


class Segment(NamedTuple):
    """Consecutive tokens of a forward pass, which see their prefix and themselves.

    Attributes:
        start: Place of the first.
        end: Behind the last.
        prefix_start: Place of the first token of the prefix.
        prefix_end: Behind its last; no prefix where both are the same.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def position(self) -> int:
        """Of the first token, from 0: how long the prefix is."""
        return self.prefix_end - self.prefix_start

    @property
    def length(self) -> int:
        """Tokens with the prefix."""
        return self.position + self.end - self.start


def whole_rows(starts: Iterable[int]) -> list[Segment]:
    """Rows that share nothing: row s is tokens starts[s] to starts[s + 1]."""
    ends = [int(start) for start in starts]
    return [Segment(*pair) for pair in zip(ends, ends[1:], strict=False)]


@dataclass(frozen=True)
class Groups:
    """Rows, grouped by the prefix they share; one that shares none is a group of its own."""

    order: list[int]  # the rows, those of a group one after the other
    own: list[int]  # by row: its tokens without the prefix
    group: list[int]  # by row: its group
    prefixes: list[int]  # by group: tokens of the prefix

    @property
    def are_shared(self) -> bool:
        """Whether there is any shared prefix."""
        return any(self.prefixes)

    def tokens(self, rows: Iterable[int]) -> int:
        """How many tokens are computed for rows of one batch."""
        chosen = list(rows)
        prefixes = sum(self.prefixes[group] for group in {self.group[row] for row in chosen})
        return sum(self.own[row] for row in chosen) + prefixes

    def cut(self, rows: Sequence[int], most: int) -> list[list[int]]:
        """Cut rows, which stand in `order`, into as few pieces as have at most so many tokens, or a single row."""
        pieces: list[list[int]] = []
        filled = 0
        for row in rows:
            prefix = self.prefixes[self.group[row]]
            is_new = not pieces or self.group[pieces[-1][-1]] != self.group[row]
            more = self.own[row] + (prefix if is_new else 0)
            if not pieces or filled + more > most:
                pieces.append([])
                filled, more = 0, self.own[row] + prefix
            pieces[-1].append(row)
            filled += more
        return pieces

    def cut_evenly(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Cut rows, which stand in `order`, into at most `count` pieces, the largest as small as can be."""
        low, high = 0, self.tokens(rows)
        while low + 1 < high:
            middle = (low + high) // 2
            pieces = self.cut(rows, middle)
            fits = len(pieces) <= count and max(map(self.tokens, pieces)) <= middle
            low, high = (low, middle) if fits else (middle, high)
        return self.cut(rows, high)


def find_groups(ids: Sequence[Ids], labels: Sequence[Ids]) -> Groups:
    """Group rows so that the fewest tokens are left to compute: ids and labels int32 (tokens,) of each row."""
    unlabelled = [_unlabelled(*row) for row in zip(ids, labels, strict=True)]
    # Bytes sort rows with the longest common beginnings next to one another, whatever numbers they stand for.
    order = sorted(range(len(ids)), key=lambda row: unlabelled[row].tobytes())
    common = [_common(unlabelled[a], unlabelled[b]) for a, b in zip(order, order[1:], strict=False)]
    own, group, prefixes = [len(row) for row in ids], [0] * len(ids), []
    for start, end, prefix in _stretches(common):
        for row in order[start:end]:
            own[row] -= prefix
            group[row] = len(prefixes)
        prefixes.append(prefix)
    return Groups(order, own, group, prefixes)


def _unlabelled(ids: Ids, labels: Ids) -> Ids:
    """The tokens of a row before its first label, without the last of all."""
    places = np.flatnonzero(labels != IGNORED)
    return ids[: min(len(ids) - 1, places[0] if len(places) else len(ids))]


def _common(a: Ids, b: Ids) -> int:
    """How many tokens two rows have in common from their beginning."""
    most = min(len(a), len(b))
    differing = np.flatnonzero(a[:most] != b[:most])
    return int(differing[0]) if len(differing) else most


def _stretches(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut sorted rows into stretches (start, end, shared tokens) that save the most tokens together.

    `common` are the tokens that each row has in common with the next: of a stretch, the least of them.
    """
    saved, best = [0], [(0, 0)]  # by number of rows: most tokens saved, and start and prefix of the last stretch
    for end in range(1, len(common) + 2):
        saved.append(saved[end - 1])
        best.append((end - 1, 0))
        prefix = common[end - 2] if end > 1 else 0
        for start in range(end - 2, max(-1, end - 1 - MOST_ROWS), -1):
            prefix = min(prefix, common[start])
            if prefix < LEAST_SHARED:
                break
            if saved[start] + (end - 1 - start) * prefix > saved[end]:
                saved[end], best[end] = saved[start] + (end - 1 - start) * prefix, (start, prefix)
    stretches, end = [], len(common) + 1
    while end:
        start, prefix = best[end]
        stretches.append((start, end, prefix))
        end = start
    return stretches[::-1]
