"""The forward pass of every Llama-like decoder in one page: what the fast backends are measured against.

Written in operators, `reshape`, `swapaxes` and a small table of operations, so that any array library runs it: numpy in
`thimble.backends.reference`, and others by filling in `Ops`. Plain functions of values: rows are packed, a batch being
one list of T tokens; nothing is kept between calls. Read `hidden` first.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.models.base import EMBEDDING, FINAL_NORM, HEAD
from thimble.models.rope import Rope
from thimble.models.spec import DecoderSpec

# Dropout: maps the input of a group of projections, (T, in), and the number of the group (4 · block + 0 for q, k and v,
# 1 for the output of attention, 2 for gate and up, 3 for down) to what A reads of it.
Drop = Callable[[Any, int], Any]
Angles = tuple[Any, Any]  # cos and sin, float64 (T, 1, dim / 2)


@dataclass(frozen=True)
class Ops:
    """What an array library is asked for beside operators."""

    exp: Callable[[Any], Any]  # of each element
    tanh: Callable[[Any], Any]  # of each element
    sqrt: Callable[[Any], Any]  # of each element
    mean: Callable[[Any], Any]  # over the last axis, which stays with length 1
    sum: Callable[[Any], Any]  # of all elements
    log_softmax: Callable[[Any], Any]  # over the last axis
    where: Callable[[Any, Any, Any], Any]  # of a condition and two arrays or numbers
    concatenate: Callable[[Any], Any]  # of a sequence, along the last axis
    stop_gradient: Callable[[Any], Any]  # the same values, as constants


class Update(NamedTuple):
    """The update of one layer in a library's own arrays: scale · (B A − B₀ A₀)."""

    A: Any  # (rank, in)
    B: Any  # (out, rank)
    scale: float  # factor of the product
    magnitude: Any = None  # (out,), lengths that the rows of the updated weight are given (DoRA), or None
    origin: tuple[Any, Any] | None = None  # A₀ and B₀, or None for plain LoRA


class Layout(NamedTuple):
    """What the layers need to know of the rows of a batch."""

    angles: tuple[Angles | None, ...]  # per layer: cos and sin, or None for a layer without positions
    seen: tuple[Any, ...]  # per layer: which keys each query sees, bool (T, T)


@dataclass(frozen=True)
class _Model:
    """What every part of a pass reads: the arguments of `hidden`."""

    ops: Ops
    spec: DecoderSpec
    weights: Mapping[str, Any]
    adapter: Mapping[str, Update]
    drop: Drop | None


def layout(spec: DecoderSpec, starts: NDArray[np.int64], ends: NDArray[np.int64] | None = None) -> Layout:
    """Angles and masks of rows laid end to end; layers that agree share them.

    Row s is tokens starts[s] to starts[s + 1] of int64 (rows + 1,). `ends`, int64 (rows,), are the tokens that each row
    may come to, on which LongRoPE depends; None: those that it has.
    """
    lengths, tokens = np.diff(starts), np.arange(starts[-1])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    back = tokens[:, None] - tokens  # (T, T), how far behind its query a key is
    causal = (rows[:, None] == rows) & (back >= 0)
    seen = {window: causal if window is None else causal & (back < window) for window in set(spec.windows)}
    ends = lengths if ends is None else ends
    angles = {id(rope): _angles(rope, tokens - starts[rows], ends[rows]) for rope in spec.ropes}
    return Layout(tuple(angles[id(rope)] for rope in spec.ropes), tuple(seen[window] for window in spec.windows))


def _angles(rope: Rope | None, positions: NDArray[np.int64], ends: NDArray[np.int64]) -> Angles | None:
    """cos and sin of each token; the angles are rounded to float32, as every implementation of these families does."""
    if rope is None:
        return None
    inv_freq = rope.inv_freq[None]
    if rope.long_inv_freq is not None:
        inv_freq = np.where(ends[:, None] > rope.long_from, rope.long_inv_freq, inv_freq)
    turned = (positions[:, None].astype(np.float32) * inv_freq.astype(np.float32)).astype(np.float64)[:, None]
    return np.cos(turned) * rope.scale, np.sin(turned) * rope.scale  # (T, 1, dim / 2)


def hidden(
    ops: Ops, spec: DecoderSpec, weights: Mapping[str, Any], ids: Any, rows: Layout,
    adapter: Mapping[str, Update] | None = None, drop: Drop | None = None,
) -> Any:  # fmt: skip
    """Run all blocks on token ids (T,), laid out by `layout`: (T, hidden), before the final norm.

    Weights go by their transformers name, matrices (out, in); updates by layer path, and without any it is the bare
    base, bit for bit.
    """
    model = _Model(ops, spec, weights, adapter or {}, drop)
    x = weights[EMBEDDING][ids] * spec.embedding_scale  # (T, hidden)
    for number in range(spec.num_layers):
        x = _block(model, number, x, rows.angles[number], rows.seen[number])
    return x


def logits(ops: Ops, spec: DecoderSpec, weights: Mapping[str, Any], x: Any) -> Any:
    """Final norm, head and soft-cap: (n, hidden) to (n, vocabulary)."""
    head = weights[EMBEDDING if spec.is_tied else HEAD]
    return _softcapped(ops, _normed(ops, x, weights[FINAL_NORM], spec.norm_eps) @ head.T, spec.final_softcap)


def cross_entropy(ops: Ops, scores: Any, targets: Any) -> Any:
    """Summed over tokens: logits (n, vocabulary) against the tokens that follow, (n,)."""
    return -ops.sum(ops.log_softmax(scores)[np.arange(len(targets)), targets])


def divergence(ops: Ops, scores: Any, base_scores: Any) -> Any:
    """Σ KL(base ‖ model) over tokens: logits of both (n, vocabulary)."""
    wanted = ops.log_softmax(base_scores)
    return ops.sum(ops.exp(wanted) * (wanted - ops.log_softmax(scores)))


def _block(model: _Model, number: int, x: Any, angles: Angles | None, seen: Any) -> Any:
    """Attention and a gated MLP, each added to the stream; Gemma normalises what is added, too."""
    path, is_gemma = f"model.layers.{number}", model.spec.has_post_norms

    def norm(x: Any, name: str) -> Any:
        return _normed(model.ops, x, model.weights[f"{path}.{name}.weight"], model.spec.norm_eps)

    mixed = _attention(model, number, norm(x, "input_layernorm"), angles, seen)
    x = x + (norm(mixed, "post_attention_layernorm") if is_gemma else mixed)
    made = _mlp(model, number, norm(x, "pre_feedforward_layernorm" if is_gemma else "post_attention_layernorm"))
    return x + (norm(made, "post_feedforward_layernorm") if is_gemma else made)


def _attention(model: _Model, number: int, x: Any, angles: Angles | None, seen: Any) -> Any:
    """Causal attention within each row, with query heads that share key heads (arXiv:2305.13245)."""
    ops, spec, path = model.ops, model.spec, f"model.layers.{number}.self_attn"
    tokens, heads, kv_heads = x.shape[0], spec.num_heads, spec.num_kv_heads
    names = ("qkv_proj",) if spec.is_fused else ("q_proj", "k_proj", "v_proj")
    qkv = _projected(model, 4 * number, x, path, names).reshape(tokens, heads + 2 * kv_heads, spec.head_dim)
    q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]  # (T, heads, head_dim)
    if spec.has_qk_norm:
        q = _normed(ops, q, model.weights[f"{path}.q_norm.weight"], spec.norm_eps)
        k = _normed(ops, k, model.weights[f"{path}.k_norm.weight"], spec.norm_eps)
    if angles is not None:
        q, k = _rotated(ops, q, *angles), _rotated(ops, k, *angles)
    q, k, v = (part.swapaxes(0, 1) for part in (q * spec.attention_scale, k, v))  # (heads, T, head_dim)
    q = q.reshape(kv_heads, -1, spec.head_dim)  # (kv_heads, group · T, head_dim): one product for all that share keys
    scores = (q @ k.swapaxes(1, 2)).reshape(heads, tokens, tokens)
    scores = ops.where(seen, _softcapped(ops, scores, spec.attention_softcap), -math.inf)
    shares = ops.exp(ops.log_softmax(scores)).reshape(kv_heads, -1, tokens)
    mixed = (shares @ v).reshape(heads, tokens, spec.head_dim).swapaxes(0, 1).reshape(tokens, spec.q_size)
    return _projected(model, 4 * number + 1, mixed, path, ("o_proj",))


def _mlp(model: _Model, number: int, x: Any) -> Any:
    """activation(gate) · up, brought back to the width of the stream (arXiv:2002.05202)."""
    spec, path = model.spec, f"model.layers.{number}.mlp"
    names = ("gate_up_proj",) if spec.is_fused else ("gate_proj", "up_proj")
    both = _projected(model, 4 * number + 2, x, path, names)  # (T, 2 · intermediate)
    gate, up = both[:, : spec.intermediate_size], both[:, spec.intermediate_size :]
    # With tanh, neither activation nor its slope overflows: silu(x) = x · sigmoid(x) = x / 2 · (1 + tanh(x / 2)).
    inner = gate * 0.5
    if spec.activation == "gelu_tanh":
        inner = (gate + gate * gate * gate * 0.044715) * math.sqrt(2 / math.pi)
    gated = gate * 0.5 * (model.ops.tanh(inner) + 1) * up
    return _projected(model, 4 * number + 3, gated, path, ("down_proj",))


def _projected(model: _Model, group: int, x: Any, path: str, names: tuple[str, ...]) -> Any:
    """Linear layers that read the same input, side by side: (T, in) to (T, sum of outs)."""
    paths = [f"{path}.{name}" for name in names]
    read_by_a = model.drop(x, group) if model.drop and any(path in model.adapter for path in paths) else x
    parts = [_linear(model, path, x, read_by_a) for path in paths]
    return parts[0] if len(parts) == 1 else model.ops.concatenate(parts)


def _linear(model: _Model, path: str, x: Any, read_by_a: Any) -> Any:
    """y = x Wᵀ + scale · (x Aᵀ) Bᵀ, its rows at other lengths with DoRA, plus the bias."""
    weight, update, bias = model.weights[f"{path}.weight"], model.adapter.get(path), model.weights.get(f"{path}.bias")
    y = x @ weight.T  # (T, out)
    if update is not None:
        low = (read_by_a @ update.A.T) @ update.B.T
        if update.origin is not None:
            low = low - (read_by_a @ update.origin[0].T) @ update.origin[1].T
        y = y + low * update.scale
        if update.magnitude is not None:
            y = y * _row_rates(model.ops, weight, update)
    return y if bias is None else y + bias


def _row_rates(ops: Ops, weight: Any, update: Update) -> Any:
    """magnitude / ‖W + scale · B A‖ by row, (out,); the length is a constant of the step (arXiv:2402.09353, 4.3)."""
    total = weight + ops.stop_gradient(update.B) @ ops.stop_gradient(update.A) * update.scale
    if update.origin is not None:
        total = total - update.origin[1] @ update.origin[0] * update.scale
    lengths = ops.sqrt(ops.mean(total * total)[:, 0] * total.shape[1])
    return ops.where(lengths > 0, update.magnitude / ops.where(lengths > 0, lengths, 1.0), 1.0)


def _normed(ops: Ops, x: Any, weight: Any, eps: float) -> Any:
    """x / rms(x) · weight over the last axis (arXiv:1910.07467)."""
    return x / ops.sqrt(ops.mean(x * x) + eps) * weight


def _rotated(ops: Ops, x: Any, cos: Any, sin: Any) -> Any:
    """Turn the pairs (i, i + dim / 2) of each head by its token's angles; what lies beyond dim stays (T, heads, n)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin, rest])


def _softcapped(ops: Ops, scores: Any, cap: float | None) -> Any:
    """cap · tanh(scores / cap), or the scores as they are."""
    return scores if cap is None else ops.tanh(scores / cap) * cap
