"""Keys and values of what requests have read, in blocks that requests share, and attention that reads them there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.session import ForwardRow
from thimble.backends.torch import fused, paged
from thimble.backends.torch.attention import (
    NO_WINDOW,
    SOFTMAX_COST,
    Angles,
    AttentionSpec,
    angle_arrays,
    heads_and_bias,
)
from thimble.backends.torch.frozen import as_numpy
from thimble.backends.torch.memory import Memory
from thimble.backends.torch.paged import BLOCK_TOKENS
from thimble.backends.torch.threads import parallel_for
from thimble.core.sizes import PADDED_KEYS, PADDED_QUERIES, TILE

LONGEST_SINGLE = 8  # tokens of a row that are looked up one by one: fewer than make a tile worth while
GROWTH = 1.5  # of the room, when it grows


class KvCache:
    """Room for blocks of keys and values, by number; see thimble.backends.session.KeyValueCache."""

    block_tokens = BLOCK_TOKENS

    def __init__(self, num_layers: int, spec: AttentionSpec, compute: torch.dtype) -> None:
        self._layers, self._heads, self._dim, self._compute = num_layers, spec.num_kv_heads, spec.head_dim, compute
        self.keys, self.values = self._rooms(0)

    def _rooms(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Room for so many blocks: keys (layers, blocks, kv_heads, dim, tokens), values (..., tokens, dim)."""
        shape, (a, b) = (self._layers, blocks, self._heads), (self._dim, BLOCK_TOKENS)
        return torch.empty(*shape, a, b, dtype=self._compute), torch.empty(*shape, b, a, dtype=self._compute)

    @property
    def blocks(self) -> int:
        """How many there is room for."""
        return self.keys.shape[1]

    def reserve(self, blocks: int) -> None:
        if blocks <= self.blocks:
            return
        old = self.keys, self.values
        self.keys, self.values = self._rooms(max(blocks, int(GROWTH * self.blocks)))
        for room, before in zip((self.keys, self.values), old, strict=True):
            room[:, : before.shape[1]] = before

    def copy(self, source: int, target: int) -> None:
        for room in (self.keys, self.values):
            room[:, target] = room[:, source]

    def layer(self, number: int) -> "Pool":
        """Keys and values of a layer."""
        return Pool(as_numpy(self.keys[number]), as_numpy(self.values[number]))


class Pool(NamedTuple):
    """One layer of a cache, for the loops of `thimble.backends.torch.paged`."""

    keys: np.ndarray  # (blocks, kv_heads, dim, tokens)
    values: np.ndarray  # (blocks, kv_heads, tokens, dim)


@dataclass(frozen=True)
class Places:
    """Where the rows of a pass stand in a cache: what all layers look up."""

    cache: KvCache
    rows: Sequence[ForwardRow]
    starts: list[int]  # row s is tokens starts[s] to starts[s + 1]
    tables: NDArray[np.int32]  # (rows, blocks): blocks of each row
    row_of: NDArray[np.int64]  # (tokens,): row of each token
    positions: NDArray[np.int64]  # (tokens,): its place in its request
    places: NDArray[np.int64]  # (tokens,): its place in the cache, counted in tokens


def place_rows(rows: Sequence[ForwardRow], cache: KvCache) -> Places:
    """Look up where the tokens of some rows go."""
    lengths = [row.tokens for row in rows]
    tables = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int32)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.blocks)] = row.blocks
    row_of = np.repeat(np.arange(len(rows)), lengths)
    positions = np.concatenate([np.arange(row.position, row.position + row.tokens) for row in rows])
    places = tables[row_of, positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
    return Places(cache, rows, [0, *np.cumsum(lengths).tolist()], tables, row_of, positions, places)


def attend_cached(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, places: Places, layer: int, memory: Memory
) -> Tensor:
    """Attention of rows to what their blocks hold, themselves included, which they add first; shapes as in `attend`."""
    heads, bias = heads_and_bias(qkv, spec)
    tokens, shape = len(places.positions), (len(qkv), spec.num_kv_heads, spec.group, spec.head_dim)
    q = memory.scratch("queries", len(qkv), spec.num_heads * spec.head_dim, torch.float32).view(shape)
    pool = places.cache.layer(layer)
    arrays = (
        as_numpy(heads.contiguous()),
        bias.numpy(),
        *angle_arrays(angles, len(qkv)),
        np.float32(spec.scale),
        places.places,
    )
    parallel_for(tokens, qkv.shape[1], paged.add_heads, *arrays, as_numpy(q), *pool)
    mixed = memory.scratch("mixed", len(qkv), spec.num_heads * spec.head_dim)
    mixed[tokens:] = 0
    out, single = mixed.view(shape), 0
    for number, row in enumerate(places.rows):
        start = places.starts[number]
        if row.tokens > LONGEST_SINGLE:
            _attend_one_by_one(q, out, slice(single, start), spec, places, pool)
            single = start + row.tokens
            _attend_row(q[start:single], out[start:single], spec, row, places.tables[number], pool, memory)
    _attend_one_by_one(q, out, slice(single, tokens), spec, places, pool)
    return mixed


def _attend_one_by_one(q: Tensor, out: Tensor, tokens: slice, spec: AttentionSpec, places: Places, pool: Pool) -> None:
    """Attention of tokens whose rows are short, to the blocks where they lie."""
    count = (tokens.stop - tokens.start) * spec.num_kv_heads
    if not count:
        return
    positions, window = places.positions[tokens], spec.window or NO_WINDOW
    work = 2 * spec.group * spec.head_dim * min(int(positions.max()) + 1, window) // 8
    seen = (places.row_of[tokens], positions, places.tables, window, np.float32(spec.softcap or 0.0))
    parallel_for(count, work, paged.attend_blocks, as_numpy(q[tokens]), *pool, *seen, as_numpy(out[tokens]))


def _attend_row(
    q: Tensor, out: Tensor, spec: AttentionSpec, row: ForwardRow, table: NDArray[np.int32], pool: Pool, memory: Memory
) -> None:
    """Attention of a long row, in tiles as in training; q, out (tokens, kv, group, dim)."""
    end, kv, dim = row.position + row.tokens, spec.num_kv_heads, spec.head_dim
    base = 0 if spec.window is None else max(0, row.position - spec.window + 1) // BLOCK_TOKENS * BLOCK_TOKENS
    room = -(-(end - base) // PADDED_KEYS) * PADDED_KEYS
    k = memory.scratch("gathered keys", kv * room, dim, torch.float32).view(kv, dim, room)
    v = memory.scratch("gathered values", kv * room, dim, torch.float32).view(kv, room, dim)
    arrays = (table[base // BLOCK_TOKENS :], *pool, end - base, as_numpy(k), as_numpy(v))
    parallel_for(kv, 2 * room * dim, paged.gather, *arrays)
    for first in range(row.position, end, TILE):
        last = min(first + TILE, end)
        low = base if spec.window is None else max(base, first - spec.window + 1)
        stop = min(low + -(-(last - low) // PADDED_KEYS) * PADDED_KEYS, base + room)
        part = slice(first - row.position, last - row.position)
        count = -(-(last - first) // PADDED_QUERIES) * PADDED_QUERIES
        queries = memory.scratch("tile of queries", kv * count * spec.group, dim, torch.float32).view(
            kv, count, spec.group, dim
        )
        queries[:, : last - first] = q[part].transpose(0, 1)
        queries[:, last - first :] = 0
        weights, flat = _scores(queries.flatten(1, 2), k[:, :, low - base : stop - base], spec, memory)
        positions = np.full(count, -1)  # of padding
        positions[: last - first] = np.arange(first, last)
        seen = (weights.shape[1], spec.group, positions, low, spec.window or NO_WINDOW)
        log_sums = np.empty(len(flat), np.float32)
        parallel_for(len(flat), SOFTMAX_COST * flat.shape[1], fused.softmax_forward, flat, *seen, log_sums)
        mixed = torch.bmm(weights, v[:, low - base : stop - base]).view(kv, count, spec.group, dim)
        out[part] = mixed[:, : last - first].transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, spec: AttentionSpec, memory: Memory) -> tuple[Tensor, np.ndarray]:
    """Products (kv, queries, dim) by (kv, dim, keys), bent where there is a soft-cap; as tensor and as flat rows."""
    flat = memory.scratch("scores", queries.shape[0] * queries.shape[1], keys.shape[2], torch.float32)
    scores = torch.bmm(queries, keys, out=flat.view(*queries.shape[:2], keys.shape[2]))
    if spec.softcap:
        parallel_for(*flat.shape, fused.bend, as_numpy(flat), np.float32(spec.softcap))
    return scores, as_numpy(flat)
