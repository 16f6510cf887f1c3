"""Keys and values of what requests have read: rows of different lengths in parallel, each in a slot of its own."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from thimble.backends.session import ForwardRow
from thimble.backends.torch.attention import Angles, AttentionSpec, attend, split_heads
from thimble.backends.torch.memory import Memory
from thimble.data.prefixes import whole_rows

SLOT_STEP = 8  # more rows than this are padded to a multiple: each number of rows is a new set of compiled products
CAPACITY_STEP = 64  # tokens


class KvCache:
    """Room for the keys and values of requests; it grows, and a slot can be read while it is written.

    The place for a pool of blocks, which slots would share, is here: callers know slots and positions only.
    """

    def __init__(self, num_layers: int, spec: AttentionSpec, compute: torch.dtype) -> None:
        shape = (num_layers, 0, spec.num_kv_heads, 0, spec.head_dim)
        self.keys, self.values = torch.empty(shape, dtype=compute), torch.empty(shape, dtype=compute)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Most tokens of a slot."""
        return self.keys.shape[3]

    @staticmethod
    def padded_rows(rows: int) -> int:
        """Rows that are computed together for so many that are wanted."""
        return rows if rows <= SLOT_STEP else -(-rows // SLOT_STEP) * SLOT_STEP

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for so many slots of so many tokens; what is there stays."""
        slots = max(self.slots, self.padded_rows(slots))
        capacity = max(self.capacity, -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        if (slots, capacity) != (self.slots, self.capacity):
            self.keys, self.values = (self._grown(room, slots, capacity) for room in (self.keys, self.values))

    @staticmethod
    def _grown(room: Tensor, slots: int, capacity: int) -> Tensor:
        layers, had_slots, heads, had_capacity, dim = room.shape
        grown = torch.zeros(layers, slots, heads, capacity, dim, dtype=room.dtype)
        grown[:, :had_slots, :, :had_capacity] = room
        return grown

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        for room in (self.keys, self.values):
            room[:, target] = room[:, source]


def attend_cached(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, rows: Sequence[ForwardRow], cache: KvCache, layer: int,
    memory: Memory,
) -> Tensor:  # fmt: skip
    """Attention of rows that stand in a cache, which they add to; shapes as in `attend`, with padding.

    Rows are prompts that begin, one prompt that goes on, or a next token for each of slots 0, 1, 2 ...
    """
    # (kv_heads, tokens + TILE, group, dim), k and v without group
    q, k, v = (heads.to(cache.keys.dtype) for heads in split_heads(qkv, spec, angles, memory))
    if all(row.tokens == 1 for row in rows) and [row.slot for row in rows] == list(range(len(rows))):
        q, k, v = (heads[:, : len(qkv)] for heads in (q, k, v))
        return _attend_next(q, k, v, spec, rows, cache, layer)
    starts = list(itertools.accumulate((row.tokens for row in rows), initial=0))
    for row, start in zip(rows, starts, strict=False):
        places = slice(row.position, row.position + row.tokens)
        cache.keys[layer, row.slot, :, places] = k[:, start : start + row.tokens]
        cache.values[layer, row.slot, :, places] = v[:, start : start + row.tokens]
    if all(row.position == 0 for row in rows):  # they see nothing but themselves
        return attend(qkv, spec, angles, whole_rows(starts), memory)
    (row,) = rows
    mixed = torch.zeros(len(qkv), spec.num_heads * spec.head_dim, dtype=qkv.dtype)
    mixed[: row.tokens] = _attend_on(q[:, : row.tokens], spec, row, cache, layer)
    return mixed


def _attend_next(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, rows: Sequence[ForwardRow], cache: KvCache, layer: int
) -> Tensor:
    """One new token a row against all keys of its slot; shapes as from `split_heads`, rows padded.

    All of the cache's room takes part, masked, since cutting it to the longest row would copy it.
    """
    count, padded = len(rows), q.shape[1]
    positions = torch.tensor([row.position for row in rows] + [0] * (padded - count))
    places = torch.arange(count)
    cache.keys[layer, places, :, positions[:count]] = k[:, :count].transpose(0, 1)
    cache.values[layer, places, :, positions[:count]] = v[:, :count].transpose(0, 1)
    keys, values = (room[layer, :padded].flatten(0, 1) for room in (cache.keys, cache.values))
    scores = torch.bmm(q.transpose(0, 1).flatten(0, 1), keys.transpose(1, 2))  # (rows · kv_heads, group, n)
    scores = _bent(scores, spec)
    hidden = _hidden(positions[:, None], cache.capacity, spec)  # (rows, n)
    scores.view(padded, -1, cache.capacity).masked_fill_(hidden[:, None], float("-inf"))
    return torch.bmm(scores.softmax(-1).to(q.dtype), values).view(padded, -1)


def _attend_on(q: Tensor, spec: AttentionSpec, row: ForwardRow, cache: KvCache, layer: int) -> Tensor:
    """A part of a prompt against what its slot holds, itself included: q (kv_heads, tokens, group, dim)."""
    end = row.position + row.tokens
    keys, values = cache.keys[layer, row.slot, :, :end], cache.values[layer, row.slot, :, :end]  # (kv_heads, end, dim)
    scores = _bent(torch.bmm(q.flatten(1, 2), keys.transpose(1, 2)), spec)  # (kv_heads, tokens · group, end)
    positions = torch.arange(row.position, end).repeat_interleave(spec.group)
    scores.masked_fill_(_hidden(positions[:, None], end, spec), float("-inf"))
    mixed = torch.bmm(scores.softmax(-1).to(q.dtype), values).view(len(q), row.tokens, spec.group, -1)
    return mixed.transpose(0, 1).reshape(row.tokens, -1)


def _bent(scores: Tensor, spec: AttentionSpec) -> Tensor:
    """Scores in float32, bent where there is a soft-cap."""
    return torch.tanh(scores.float() / spec.softcap) * spec.softcap if spec.softcap else scores.float()


def _hidden(now: Tensor, end: int, spec: AttentionSpec) -> Tensor:
    """Which keys at places 0 to end are not seen from some positions: (n, 1) to (n, end)."""
    place = torch.arange(end)
    hidden = place > now
    return hidden if spec.window is None else hidden | (place <= now - spec.window)
