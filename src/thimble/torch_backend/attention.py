"""Causal attention over packed rows, in tiles of batched products that skip the masked half.

Query heads that share a key head are batched as further rows of one product (grouped-query attention), and the
probabilities are recomputed in the backward pass from their log-sum (Dao et al., arXiv:2205.14135). Handles sliding
windows, soft-capped scores and per-head normalisation of q and k.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thimble.torch_backend.elementwise import RmsNorm, rotate

TILE = 128


@dataclass(frozen=True)
class Angles:
    """cos and sin of every token's position for one rotary embedding; float32 (tokens, dim / 2)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention does.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        scale: Factor of q kᵀ.
        window: Latest positions seen, or None for all.
        softcap: Scores become cap · tanh(scores / cap), or None.
        q_norm: Normalisation of each query head, or None.
        k_norm: The same for keys.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    q_norm: RmsNorm | None = None
    k_norm: RmsNorm | None = None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.num_heads // self.num_kv_heads


def split_heads(qkv: Tensor, spec: AttentionSpec, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cut, normalise and rotate q, k and v.

    Args:
        qkv: (tokens, (heads + 2 kv_heads) · head_dim).
        spec: The layer's attention.
        angles: Rotations, or None for a layer without positions.

    Returns:
        q (kv_heads, tokens, group, head_dim) already scaled, k and v (kv_heads, tokens, head_dim); contiguous.
    """
    q, k, v = _raw_heads(qkv, spec)
    q = spec.q_norm.forward(q) if spec.q_norm else q
    k = spec.k_norm.forward(k) if spec.k_norm else k
    if angles:
        q, k = rotate(q, angles.cos, angles.sin), rotate(k, angles.cos, angles.sin)
    q = (q * spec.scale).unflatten(1, (spec.num_kv_heads, spec.group))
    return q.transpose(0, 1).contiguous(), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()


def _raw_heads(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Views (tokens, heads, head_dim) of q, k and v."""
    heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
    q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), 1)
    return q, k, v


def _join_gradients(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, grads: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Undo `split_heads` for gradients: shapes as it returns, result as qkv."""
    dq, dk, dv = grads[0].transpose(0, 1).flatten(1, 2) * spec.scale, grads[1].transpose(0, 1), grads[2].transpose(0, 1)
    if angles:
        dq, dk = rotate(dq, angles.cos, -angles.sin), rotate(dk, angles.cos, -angles.sin)
    q, k, _ = _raw_heads(qkv, spec)
    dq = spec.q_norm.backward(q, dq) if spec.q_norm else dq
    dk = spec.k_norm.backward(k, dk) if spec.k_norm else dk
    return torch.cat([dq, dk, dv], 1).flatten(1)


def attend(qkv: Tensor, spec: AttentionSpec, angles: Angles | None, starts: list[int]) -> Tensor:
    """Attention within each packed row.

    Args:
        qkv: (tokens, (heads + 2 kv_heads) · head_dim), compute type, before rotation.
        spec: The layer's attention.
        angles: Rotations, or None.
        starts: Row s is tokens starts[s] to starts[s + 1].

    Returns:
        (tokens, heads · head_dim), compute type.
    """
    return _Attend.apply(qkv, spec, angles, starts)  # type: ignore[no-any-return]


def _tiles(starts: list[int], window: int | None) -> Iterator[tuple[int, int, int]]:
    """Ranges (first query, last query + 1, first key) that cover the causal half of every row."""
    for start, end in zip(starts, starts[1:], strict=False):
        for first in range(start, end, TILE):
            low = start if window is None else max(start, first - window + 1)
            yield first, min(first + TILE, end), low


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec, first: int, last: int, low: int) -> Tensor:
    """Masked float32 scores (kv_heads, queries · group, keys) of one tile."""
    rows = q[:, first:last].flatten(1, 2)
    scores = torch.bmm(rows, k[:, low:last].transpose(1, 2)).float()
    if spec.softcap:
        scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    tile = scores.view(scores.shape[0], last - first, spec.group, last - low)
    tile.masked_fill_(_hidden(first, last, low, spec.window)[:, None], float("-inf"))
    return scores


def _hidden(first: int, last: int, low: int, window: int | None) -> Tensor:
    """True where a query (rows) must not see a key (columns): in its future, or outside its window."""
    age = torch.arange(first, last)[:, None] - torch.arange(low, last)
    return age < 0 if window is None else (age < 0) | (age >= window)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, spec: AttentionSpec, angles: Angles | None, starts: list[int]) -> Tensor:
        q, k, v = split_heads(qkv, spec, angles)
        out = torch.empty_like(q)
        log_sums = torch.empty(q.shape[:3], dtype=torch.float32)
        for first, last, low in _tiles(starts, spec.window):
            scores = _scores(q, k, spec, first, last, low)
            log_sum = torch.logsumexp(scores, -1, keepdim=True)
            weights = scores.sub_(log_sum).exp_().to(q.dtype)
            out[:, first:last] = torch.bmm(weights, v[:, low:last]).view(out[:, first:last].shape)
            log_sums[:, first:last] = log_sum.view(log_sums[:, first:last].shape)
        flat = out.transpose(0, 1).flatten(1)
        ctx.save_for_backward(qkv, flat, log_sums)
        ctx.spec, ctx.angles, ctx.starts = spec, angles, starts
        return flat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, flat, log_sums = ctx.saved_tensors
        spec, angles = ctx.spec, ctx.angles
        q, k, v = split_heads(qkv, spec, angles)
        grad = grads[0].view(-1, spec.num_kv_heads, spec.group, spec.head_dim).transpose(0, 1).contiguous()
        out = flat.view(-1, spec.num_kv_heads, spec.group, spec.head_dim).transpose(0, 1)
        drift = (grad.float() * out.float()).sum(-1)  # (kv_heads, tokens, group)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, last, low in _tiles(ctx.starts, spec.window):
            scores = _scores(q, k, spec, first, last, low)
            rows, g_rows = q[:, first:last].flatten(1, 2), grad[:, first:last].flatten(1, 2)
            weights = torch.exp(scores - log_sums[:, first:last].reshape(len(q), -1, 1))
            dv[:, low:last] += torch.bmm(weights.to(q.dtype).transpose(1, 2), g_rows)
            d_scores = torch.bmm(g_rows, v[:, low:last].transpose(1, 2)).float()
            d_scores.sub_(drift[:, first:last].reshape(len(q), -1, 1)).mul_(weights)
            if spec.softcap:  # masked scores are -inf; their weight is 0
                d_scores.mul_(1 - (scores.nan_to_num(neginf=0.0) / spec.softcap).square())
            d_scores = d_scores.to(q.dtype)
            dq[:, first:last] = torch.bmm(d_scores, k[:, low:last]).view(dq[:, first:last].shape)
            dk[:, low:last] += torch.bmm(d_scores.transpose(1, 2), rows)
        return _join_gradients(qkv, spec, angles, (dq, dk, dv)), None, None, None
