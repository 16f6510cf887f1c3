"""Causal attention over packed rows, in tiles of batched products that skip the masked half.

A row may begin with a prefix that other rows begin with too: it lies in the pack once, and a tile then sees two ranges
of keys, which are copied next to each other.

Query heads that share a key head are batched as further rows of one product (grouped-query attention), and the
probabilities are recomputed in the backward pass from their log-sum (Dao et al., arXiv:2205.14135). Handles sliding
windows, soft-capped scores and per-head normalisation of q and k.

All of it is float32, whatever the compute type: a score of 100 rounded to bfloat16 is off by up to a quarter, which
changes its weight by as much, and Qwen2's biases make keys that large. So biases are added here too and not to the
product before it, which is rounded.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch import fused
from thimble.backends.torch.elementwise import RmsNorm
from thimble.backends.torch.frozen import as_numpy
from thimble.backends.torch.memory import Memory
from thimble.backends.torch.threads import parallel_for
from thimble.core.sizes import PADDED_KEYS, PADDED_QUERIES, TILE
from thimble.data.prefixes import Segment

NO_WINDOW = 1 << 40  # a window longer than any row
SOFTMAX_COST = 2  # of a score, against a plain load and store


@dataclass(frozen=True)
class Angles:
    """cos and sin of every token's position for one rotary embedding; float32 (tokens, dim / 2)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention does."""

    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads
    head_dim: int  # width of a head
    scale: float  # factor of q kᵀ
    window: int | None = None  # latest positions seen, or None for all
    softcap: float | None = None  # scores become cap · tanh(scores / cap), or None
    q_norm: RmsNorm | None = None  # normalisation of each query head, or None
    k_norm: RmsNorm | None = None  # the same for keys
    bias: Tensor | None = None  # float32 (heads + 2 kv_heads, head_dim), added to q, k and v, or None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.num_heads // self.num_kv_heads


def split_heads(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, memory: Memory
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut, add the bias, normalise, rotate and scale (tokens, (heads + 2 kv_heads) · head_dim) into q, k and v.

    q (kv_heads, tokens + TILE, group, head_dim) is already scaled; k and v are (kv_heads, tokens + TILE, head_dim). All
    are float32, contiguous, in scratch, and zero behind the tokens. A layer without positions has no angles.
    """
    heads, bias = heads_and_bias(qkv, spec)
    tokens = len(heads)
    q, k, v = _room_for_heads(memory, "", spec, tokens)
    cos, sin = angle_arrays(angles, tokens)
    arrays = (as_numpy(heads), bias.numpy(), cos, sin, np.float32(spec.scale), as_numpy(q), as_numpy(k), as_numpy(v))
    parallel_for(tokens, qkv.shape[1], fused.split_heads, *arrays)
    return q, k, v


def heads_and_bias(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Heads (tokens, all heads, head_dim), q and k normalised, and what is still to be added to each: its bias or 0."""
    heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
    if spec.q_norm and spec.k_norm:
        return _normalised(heads, spec), torch.zeros(heads.shape[1:])
    return heads, torch.zeros(heads.shape[1:]) if spec.bias is None else spec.bias


def _room_for_heads(memory: Memory, what: str, spec: AttentionSpec, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scratch for q, k and v, shaped as `split_heads` returns them, zero behind the tokens."""
    return (
        _room(memory, "q" + what, tokens, spec.num_kv_heads, spec.group, spec.head_dim),
        _room(memory, "k" + what, tokens, spec.num_kv_heads, spec.head_dim),
        _room(memory, "v" + what, tokens, spec.num_kv_heads, spec.head_dim),
    )


def _room(memory: Memory, purpose: str, tokens: int, heads: int, *size: int) -> Tensor:
    """Scratch, float32 (heads, tokens + TILE, *size), zero behind the tokens."""
    rows = memory.scratch(purpose, tokens + TILE, heads * math.prod(size), torch.float32)
    room = rows.view(heads, tokens + TILE, *size)
    room[:, tokens:] = 0
    return room


def angle_arrays(angles: Angles | None, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin as arrays; of no width for a layer without positions, which turns nothing."""
    if angles is None:
        nothing = np.empty((tokens, 0), np.float32)
        return nothing, nothing
    return angles.cos.numpy(), angles.sin.numpy()


def _biased(heads: Tensor, spec: AttentionSpec) -> tuple[Tensor, ...]:
    """q, k and v of heads (tokens, all heads, head_dim) with their bias, where there is one."""
    heads = heads if spec.bias is None else heads + spec.bias
    return heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), 1)


def _normalised(heads: Tensor, spec: AttentionSpec) -> Tensor:
    """Heads (tokens, all heads, head_dim) with their bias and with q and k normalised, float32."""
    q, k, v = _biased(heads, spec)
    wide = (norm.forward(x, torch.empty(x.shape)) for norm, x in ((spec.q_norm, q), (spec.k_norm, k)) if norm)
    return torch.cat([*wide, v.float()], 1)


def _join_gradients(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, grads: tuple[Tensor, Tensor, Tensor], memory: Memory
) -> Tensor:
    """Undo `split_heads` for gradients: shapes as it returns, result as qkv, in scratch."""
    out = memory.scratch("qkv_grad", *qkv.shape).view(qkv.shape[0], -1, spec.head_dim)
    cos, sin = angle_arrays(angles, len(out))
    arrays = (*(as_numpy(grad) for grad in grads), cos, sin, np.float32(spec.scale), as_numpy(out))
    parallel_for(len(out), qkv.shape[1], fused.join_heads, *arrays)
    if spec.q_norm and spec.k_norm:
        q, k, _ = _biased(qkv.view(out.shape), spec)
        dq, dk, dv = out.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), 1)
        out = torch.cat([spec.q_norm.backward(q, dq), spec.k_norm.backward(k, dk), dv], 1)
    return out.view(qkv.shape).to(qkv.dtype)


class Asked(NamedTuple):
    """The tokens whose attention is asked for."""

    places: NDArray[np.int64]  # in the pack, ascending
    size: int  # how many with padding


def attend(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, segments: Sequence[Segment], memory: Memory,
    asked: Asked | None = None,
) -> Tensor:  # fmt: skip
    """Attention of segments of a pack to their prefixes and themselves.

    qkv (tokens, (heads + 2 kv_heads) · head_dim), compute type, before rotation, becomes (tokens, heads · head_dim), in
    scratch unless a backward pass follows; of tokens that are asked for, (their size, heads · head_dim).
    """
    is_kept = torch.is_grad_enabled() and qkv.requires_grad
    return _Attend.apply(qkv, spec, angles, segments, memory, asked, is_kept)  # type: ignore[no-any-return]


class _Tile(NamedTuple):
    """Queries of one segment and the keys that they may see."""

    first: int
    last: int  # behind the last query
    positions: NDArray[np.int64]  # of each query in its row; -1 for padding
    low: int  # position of the first key
    prefix: slice  # keys that lie in the prefix
    own: slice  # the others
    padded_keys: int  # how many there are, with padding

    @property
    def queries(self) -> slice:
        """All queries with padding."""
        return slice(self.first, self.first + len(self.positions))


def _tiles(segments: Sequence[Segment], places: NDArray[np.int64], window: int | None) -> Iterator[_Tile]:
    """Tiles that cover the causal half of every segment, for queries at some places."""
    for segment in segments:
        begin, end = np.searchsorted(places, (segment.start, segment.end)).tolist()
        for first in range(begin, end, TILE):
            last = min(first + TILE, end)
            positions = places[first:last] - segment.start + segment.position
            low = 0 if window is None else max(0, int(positions[0]) - window + 1)
            in_prefix = max(0, segment.position - low)
            own = slice(segment.start + max(0, low - segment.position), int(places[last - 1]) + 1)
            keys = -(-(in_prefix + own.stop - own.start) // PADDED_KEYS) * PADDED_KEYS
            padding = -(last - first) % PADDED_QUERIES
            positions = np.pad(positions, (0, padding), constant_values=-1)
            prefix = slice(segment.prefix_end - in_prefix, segment.prefix_end)
            yield _Tile(first, last, positions, low, prefix, own, keys)


def _seen(room: Tensor, tile: _Tile, memory: Memory, purpose: str) -> Tensor:
    """The keys or values of a tile, float32 (kv_heads, keys with padding, head_dim); finite behind the last."""
    if tile.prefix.start == tile.prefix.stop:
        return room[:, tile.own.start : tile.own.start + tile.padded_keys]
    heads, _, dim = room.shape
    out = memory.scratch(purpose, heads * tile.padded_keys, dim, torch.float32).view(heads, -1, dim)
    count = tile.prefix.stop - tile.prefix.start
    out[:, :count] = room[:, tile.prefix]
    out[:, count:] = room[:, tile.own.start : tile.own.start + tile.padded_keys - count]
    return out


def _add_seen(room: Tensor, tile: _Tile, values: Tensor) -> None:
    """Add to the keys or values that `_seen` gives; nothing is added behind the last."""
    count = tile.prefix.stop - tile.prefix.start
    room[:, tile.prefix] += values[:, :count]
    room[:, tile.own.start : tile.own.start + tile.padded_keys - count] += values[:, count:]


def _queries(q: Tensor, asked: Asked | None, memory: Memory) -> Tensor:
    """The queries that are asked for, (kv_heads, size + TILE, group, head_dim), zero behind them."""
    if asked is None:
        return q
    out = _room(memory, "q asked", asked.size, len(q), *q.shape[2:])
    out[:, len(asked.places) :] = 0
    out[:, : len(asked.places)] = q[:, torch.from_numpy(asked.places)]
    return out


def _dot(a: Tensor, b: Tensor, memory: Memory, purpose: str) -> tuple[Tensor, np.ndarray]:
    """a bᵀ of a tile, float32 (kv_heads, queries · group, keys), in scratch; as tensor and as flat rows."""
    heads, rows, keys = a.shape[0], a.shape[1], b.shape[1]
    flat = memory.scratch(purpose, heads * rows, keys, torch.float32)
    return torch.bmm(a, b.transpose(1, 2), out=flat.view(heads, rows, keys)), as_numpy(flat)


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec, memory: Memory) -> tuple[Tensor, np.ndarray]:
    """Scores of a tile, bent where there is a soft-cap; as `_dot`."""
    scores, flat = _dot(q, k, memory, "scores")
    if spec.softcap:
        parallel_for(*flat.shape, fused.bend, flat, np.float32(spec.softcap))
    return scores, flat


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, spec: AttentionSpec, angles: Angles | None, segments: Sequence[Segment], memory: Memory,
        asked: Asked | None, is_kept: bool,
    ) -> Tensor:  # fmt: skip
        q, k, v = split_heads(qkv, spec, angles, memory)
        q = _queries(q, asked, memory)
        places, tokens = asked or Asked(np.arange(segments[-1].end), len(qkv))
        size = (tokens, spec.num_heads * spec.head_dim)
        mixed = memory.keep(*size) if is_kept else memory.scratch("mixed", *size)
        mixed[len(places) :] = 0
        out = mixed.view(tokens, spec.num_kv_heads, spec.group, spec.head_dim).transpose(0, 1)
        log_sums, tiles = [], list(_tiles(segments, places, spec.window))
        for tile in tiles:
            rows, keys = q[:, tile.queries].flatten(1, 2), _seen(k, tile, memory, "keys")
            weights, flat = _scores(rows, keys, spec, memory)
            log_sums.append(np.empty(len(flat), np.float32))
            seen = (rows.shape[1], spec.group, tile.positions, tile.low, spec.window or NO_WINDOW)
            parallel_for(len(flat), SOFTMAX_COST * flat.shape[1], fused.softmax_forward, flat, *seen, log_sums[-1])
            _put(out, tile, torch.bmm(weights, _seen(v, tile, memory, "values")))
        ctx.save_for_backward(qkv, mixed)
        ctx.call, ctx.tiles = (spec, angles, memory, asked), list(zip(tiles, log_sums, strict=True))
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, mixed = ctx.saved_tensors
        spec, angles, memory, asked = ctx.call
        q, k, v = split_heads(qkv, spec, angles, memory)
        q = _queries(q, asked, memory)
        grad, drift = _by_head(grads[0], mixed, spec, memory)
        dq, dk, dv = (room.zero_() for room in _room_for_heads(memory, "_grad", spec, len(qkv)))
        per_cap = np.float32(1 / spec.softcap if spec.softcap else 0.0)
        for tile, log_sum in ctx.tiles:
            rows, g_rows = q[:, tile.queries].flatten(1, 2), grad[:, tile.queries].flatten(1, 2)
            keys = _seen(k, tile, memory, "keys")
            weights, flat = _scores(rows, keys, spec, memory)
            slopes, flat_slopes = _dot(g_rows, _seen(v, tile, memory, "values"), memory, "slopes")
            seen = (rows.shape[1], spec.group, tile.positions, tile.low, spec.window or NO_WINDOW)
            arrays = (flat, flat_slopes, *seen, per_cap, log_sum, drift[:, tile.queries].flatten().numpy())
            parallel_for(len(flat), SOFTMAX_COST * flat.shape[1], fused.softmax_backward, *arrays)
            _add_seen(dv, tile, torch.bmm(weights.transpose(1, 2), g_rows))
            _add_seen(dk, tile, torch.bmm(slopes.transpose(1, 2), rows))
            _put(dq, tile, torch.bmm(slopes, keys), asked)
        return _join_gradients(qkv, spec, angles, (dq, dk, dv), memory), *[None] * 6


def _put(heads: Tensor, tile: _Tile, values: Tensor, asked: Asked | None = None) -> None:
    """Write what was computed for the queries of a tile to their place, (kv_heads, tokens, group, head_dim).

    That is the place among all tokens of the pack if `asked` is given.
    """
    values = values.view(len(heads), -1, *heads.shape[2:])[:, : tile.last - tile.first]
    if asked is None:
        heads[:, tile.first : tile.last] = values
    else:
        heads[:, torch.from_numpy(asked.places[tile.first : tile.last])] = values


def _by_head(grad: Tensor, mixed: Tensor, spec: AttentionSpec, memory: Memory) -> tuple[Tensor, Tensor]:
    """The gradient, shaped as q, and its dot products with the result, float32 (kv_heads, tokens + TILE, group)."""
    shape = (len(mixed), spec.num_kv_heads, spec.group, spec.head_dim)
    out = _room(memory, "mixed_grad", len(mixed), spec.num_kv_heads, spec.group, spec.head_dim)
    dots = torch.zeros(out.shape[:3])
    arrays = (as_numpy(array.view(shape)) for array in (grad.contiguous(), mixed))
    parallel_for(len(mixed), mixed.shape[1], fused.by_head, *arrays, as_numpy(out), dots.numpy())
    return out, dots
