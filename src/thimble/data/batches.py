"""Rows into optimiser steps and packed batches: no padding, nothing dropped, the same order for the same seed."""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thimble.data.encode import IGNORED, Row
from thimble.data.prefixes import Groups, Segment, find_groups, whole_rows


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end."""

    ids: NDArray[np.int32]  # int32 (T,), token ids of all rows
    labels: NDArray[np.int32]  # int32 (T,), the target of each position, or `IGNORED`
    # int64 (rows + 1,), row s occupies ids[starts[s]:starts[s + 1]]; attention stays inside it
    starts: NDArray[np.int64]
    # int64 (rows,), place of each row in its optimiser step, from which its dropout is drawn
    numbers: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """T, how many tokens."""
        return len(self.ids)

    @property
    def target_tokens(self) -> int:
        """How many positions carry a label."""
        return int(np.count_nonzero(self.labels != IGNORED))

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32 (T,), the place of each token in its own row, from 0."""
        begins = np.repeat(self.starts[:-1], np.diff(self.starts))
        return (np.arange(self.tokens) - begins).astype(np.int32)


def epoch_steps(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Say which rows each step of an epoch takes: for each step the indices of its rows, every row in exactly one.

    Rows are shuffled, each epoch in its own order, then taken until the next would go over `batch_tokens`; a longer row
    makes a step of its own.

    >>> epoch_steps([5, 5, 5], batch_tokens=10, seed=0, epoch=0)
    [[0, 2], [1]]
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    # Sorting raw numbers instead of numpy's own shuffle: that may change between versions, Philox may not.
    order = np.argsort(np.random.Philox(key=key).random_raw(len(lengths)), kind="stable")
    steps: list[list[int]] = []
    filled = 0
    for index in map(int, order):
        if not steps or filled + lengths[index] > batch_tokens:
            steps.append([])
            filled = 0
        steps[-1].append(index)
        filled += lengths[index]
    return steps


def pack(rows: Sequence[Row], numbers: Sequence[int] | None = None) -> Batch:
    """Lay at least one row end to end, a segment a row; their places in the step are counted where none are given."""
    return Batch(
        ids=np.concatenate([row.ids for row in rows]),
        labels=np.concatenate([row.labels for row in rows]),
        starts=np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])]).astype(np.int64),
        numbers=np.array(range(len(rows)) if numbers is None else numbers, np.int64),
    )


@dataclass(frozen=True)
class Layout:
    """The tokens of a batch as a forward pass computes them."""

    places: NDArray[np.int64]  # int64 (T,), where in the batch each token stands
    copies: NDArray[np.int64]  # int64 (tokens of the batch,), which of the T is computed for each
    segments: list[Segment]  # one after the other, a prefix before those that see it


def lay_out(batch: Batch, shares_prefixes: bool) -> Layout:
    """Lay the tokens of a batch out, what rows have in common once if that is wanted."""
    spans = [slice(*span) for span in zip(batch.starts, batch.starts[1:], strict=False)]
    every = np.arange(batch.tokens)
    whole = Layout(every, every, whole_rows(batch.starts))
    if not shares_prefixes or len(spans) < 2:
        return whole
    groups = find_groups([batch.ids[span] for span in spans], [batch.labels[span] for span in spans])
    if not groups.are_shared:
        return whole
    places: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    copies = np.empty_like(every)
    end, last, shared = 0, -1, (0, 0)
    for row in groups.order:
        begin, prefix = int(spans[row].start), groups.prefixes[groups.group[row]]
        if groups.group[row] != last:
            last, shared = groups.group[row], (end, end + prefix) if prefix else (0, 0)
            if prefix:
                places.append(every[begin : begin + prefix])
                segments.append(Segment(*shared))
                end += prefix
        places.append(every[begin + prefix : int(spans[row].stop)])
        segments.append(Segment(end, end + groups.own[row], *shared))
        copies[spans[row]] = [*range(*shared), *range(end, end + groups.own[row])]
        end += groups.own[row]
    return Layout(np.concatenate(places), copies, segments)


def shares(rows: Sequence[Row], count: int, max_tokens: int, shares_prefixes: bool = False) -> list[list[Batch]]:
    """Split the rows of a step into at most `count` shares of about the same size, one a core, in micro-batches.

    What rows of a micro-batch have in common counts once if it is computed once.
    """
    parts = _balance([len(row.ids) for row in rows], range(len(rows)), min(count, len(rows)))
    groups = _groups(rows) if shares_prefixes else None
    if groups is None or not groups.are_shared:
        return [micro_batches(rows, max_tokens, sorted(part)) for part in parts]
    together = groups.cut_evenly(groups.order, count)
    parts = min(together, parts, key=lambda parts: max(map(groups.tokens, parts)))
    return [_grouped_batches(rows, groups, max_tokens, part) for part in parts]


def micro_batches(
    rows: Sequence[Row], max_tokens: int, chosen: Sequence[int] | None = None, shares_prefixes: bool = False
) -> list[Batch]:
    """Split rows, or the chosen ones of them, into as few batches of about the same size as hold them.

    A row of more than `max_tokens` makes a batch of its own, since rows are never split; such batches come first. What
    rows of a batch have in common counts once if it is computed once.
    """
    if shares_prefixes and (groups := _groups(rows)).are_shared:
        return _grouped_batches(rows, groups, max_tokens, range(len(rows)) if chosen is None else chosen)
    lengths = [len(row.ids) for row in rows]
    chosen = range(len(rows)) if chosen is None else chosen
    alone = [[index] for index in chosen if lengths[index] >= max_tokens]
    others = [index for index in chosen if lengths[index] < max_tokens]
    count = math.ceil(sum(lengths[index] for index in others) / max_tokens)
    even = _balance(lengths, others, count)
    while any(sum(lengths[index] for index in group) > max_tokens for group in even):
        count += 1
        even = _balance(lengths, others, count)
    return [pack([rows[index] for index in sorted(group)], sorted(group)) for group in [*alone, *even]]


def _groups(rows: Sequence[Row]) -> Groups:
    return find_groups([row.ids for row in rows], [row.labels for row in rows])


def _grouped_batches(rows: Sequence[Row], groups: Groups, max_tokens: int, chosen: Iterable[int]) -> list[Batch]:
    """Batches of the chosen rows, those with one prefix together."""
    wanted = set(chosen)
    order = [row for row in groups.order if row in wanted]
    pieces = groups.cut_evenly(order, len(groups.cut(order, max_tokens)))
    return [pack([rows[index] for index in sorted(piece)], sorted(piece)) for piece in pieces]


def _balance(lengths: Sequence[int], indices: Iterable[int], count: int) -> list[list[int]]:
    """Spread rows over groups of about the same size; two groups as even as they can be."""
    if count == 2:
        return _halve(lengths, list(indices))
    # The longest first, each to the group that is lightest by then.
    groups: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, group) for group in range(count)]
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        weight, group = heapq.heappop(heap)
        groups[group].append(index)
        heapq.heappush(heap, (weight + lengths[index], group))
    return groups


def _halve(lengths: Sequence[int], indices: Sequence[int]) -> list[list[int]]:
    """Two groups, the first with the largest sum that is not above half: found among all sums that can be reached."""
    reached = [1]  # bit n: some of the rows so far have n tokens together
    for index in indices:
        reached.append(reached[-1] | reached[-1] << lengths[index])
    half = sum(lengths[index] for index in indices) // 2
    left = (reached[-1] & (1 << half + 1) - 1).bit_length() - 1
    groups: list[list[int]] = [[], []]
    for index, before in zip(reversed(indices), reversed(reached[:-1]), strict=True):
        is_first = not before >> left & 1
        groups[0 if is_first else 1].append(index)
        left -= lengths[index] if is_first else 0
    return groups
