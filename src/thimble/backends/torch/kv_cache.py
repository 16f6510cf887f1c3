"""Keys and values of what requests have read, in blocks that requests share, and attention that reads them there."""

import mmap
from collections.abc import Iterable, Sequence
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
from thimble.backends.torch.paged import BLOCK_TOKENS, LIKE, head_bytes
from thimble.backends.torch.threads import parallel_for
from thimble.core.sizes import PADDED_KEYS, PADDED_QUERIES, TILE

LONGEST_SINGLE = 8  # tokens of a row that are looked up one by one: fewer than make a tile worth while
PIECE_BYTES = 1 << 24  # by which a cache grows, at least a block
# What memory has to be for its pages to be given back one by one; empty where the system cannot.
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MADV_DONTNEED") else {}


class KvCache:
    """Room for blocks of keys and values, by number; see thimble.backends.session.KeyValueCache.

    It grows by pieces and moves nothing, so that no answer waits while gigabytes are copied. Pages of blocks that hold
    nothing go back to the system, which gives others as they are written. `kind` is how numbers are kept: `F32`,
    `BF16`, or `I8`, rounded with a scale for each token and head.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(self, num_layers: int, spec: AttentionSpec, kind: str) -> None:
        self.kind, self._like = kind, LIKE[kind]
        self.head_bytes = head_bytes(spec.head_dim, kind)
        self._layer_bytes = spec.num_kv_heads * self.head_bytes
        self._block_bytes = num_layers * self._layer_bytes
        self._together = max(1, PIECE_BYTES // self._block_bytes)  # blocks of a piece
        self._rooms: list[mmap.mmap] = []
        self._pieces: list[Tensor] = []  # each the whole of a room: (blocks, bytes)
        self.addresses = np.zeros(0, np.int64)  # of each block

    @property
    def blocks(self) -> int:
        """How many there is room for."""
        return len(self.addresses)

    def reserve(self, blocks: int) -> None:
        while self.blocks < blocks:
            self._rooms.append(room := mmap.mmap(-1, self._together * self._block_bytes, **PRIVATE))
            piece = torch.frombuffer(room, dtype=torch.uint8).view(self._together, self._block_bytes)
            self._pieces.append(piece)
            added = piece.data_ptr() + self._block_bytes * np.arange(self._together)
            self.addresses = np.concatenate([self.addresses, added])

    def copy(self, source: int, target: int) -> None:
        self._block(target).copy_(self._block(source))

    def discard(self, blocks: Sequence[int]) -> None:
        for first, stop in _runs(blocks, self._together) if PRIVATE else ():
            piece, place = divmod(first, self._together)
            start = -(-place * self._block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE  # a page may be of two blocks
            end = (place + stop - first) * self._block_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                self._rooms[piece].madvise(mmap.MADV_DONTNEED, start, end - start)

    def _block(self, number: int) -> Tensor:
        piece, place = divmod(number, self._together)
        return self._pieces[piece][place]

    def layer(self, number: int) -> "Pool":
        """Where the heads of a layer are."""
        return Pool(number * self._layer_bytes, self.head_bytes, self._like)


def _runs(numbers: Iterable[int], together: int) -> list[tuple[int, int]]:
    """Numbers that follow one another within a piece of so many: the first of each run, and the one behind the last."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number and number % together:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


class Pool(NamedTuple):
    """One layer of a cache, for the loops of `thimble.backends.torch.paged`."""

    layer: int  # where its heads begin in a block, in bytes
    head_size: int  # what each takes
    like: np.generic  # a number as it is kept


@dataclass(frozen=True)
class Places:
    """Where the rows of a pass stand in a cache: what all layers look up."""

    cache: KvCache
    rows: Sequence[ForwardRow]
    starts: list[int]  # row s is tokens starts[s] to starts[s + 1]
    tables: NDArray[np.int64]  # (rows, blocks): addresses of the blocks of each row
    row_of: NDArray[np.int64]  # (tokens,): row of each token
    positions: NDArray[np.int64]  # (tokens,): its place in its request
    blocks: NDArray[np.int64]  # (tokens,): address of the block that it stands in


def place_rows(rows: Sequence[ForwardRow], cache: KvCache) -> Places:
    """Look up where the tokens of some rows go."""
    lengths = [row.tokens for row in rows]
    tables = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.blocks)] = cache.addresses[list(row.blocks)]
    row_of = np.repeat(np.arange(len(rows)), lengths)
    positions = np.concatenate([np.arange(row.position, row.position + row.tokens) for row in rows])
    blocks = tables[row_of, positions // BLOCK_TOKENS]
    return Places(cache, rows, [0, *np.cumsum(lengths).tolist()], tables, row_of, positions, blocks)


def attend_cached(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, places: Places, layer: int, memory: Memory
) -> Tensor:
    """Attention of rows to what their blocks hold, themselves included, which they add first; shapes as in `attend`."""
    heads, bias = heads_and_bias(qkv, spec)
    tokens, shape = len(places.positions), (len(qkv), spec.num_kv_heads, spec.group, spec.head_dim)
    q = memory.scratch("queries", len(qkv), spec.num_heads * spec.head_dim, torch.float32).view(shape)
    pool = places.cache.layer(layer)
    arrays = as_numpy(heads.contiguous()), bias.numpy(), *angle_arrays(angles, len(qkv)), np.float32(spec.scale)
    where = places.blocks, places.positions % BLOCK_TOKENS
    parallel_for(tokens, qkv.shape[1], paged.add_heads, *arrays, *where, *pool, as_numpy(q))
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
    seen, cap = (places.row_of[tokens], positions, places.tables), np.float32(spec.softcap or 0.0)
    parallel_for(
        count, work, paged.attend_blocks, as_numpy(q[tokens]), *seen, *pool, window, cap, as_numpy(out[tokens])
    )


def _attend_row(
    q: Tensor, out: Tensor, spec: AttentionSpec, row: ForwardRow, table: NDArray[np.int64], pool: Pool, memory: Memory
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
