"""Compiled loops over the blocks of a key-value cache: adding to them, attention that reads them in place, gathering.

A block holds what BLOCK_TOKENS tokens left in all layers, and is known by its address. Of each layer and key head there
stand, one behind the other: keys (head_dim, BLOCK_TOKENS) and values (BLOCK_TOKENS, head_dim), so that both products of
attention run along the last axis; in int8 also float32 (2, BLOCK_TOKENS), what the key and the value of each token are
multiplied by. Numbers are float32, bfloat16 as uint16, or int8, as `like` is, a number of that type; all else is
float32, as in `thimble.backends.torch.attention`.
"""

import numpy as np
from numba.extending import register_jitable

from thimble.backends.torch.compiled import compiled
from thimble.backends.torch.dot_products import array_at
from thimble.backends.torch.fused import LOOP, ONE, _log_sum, _turn, exp, int8_scale, tanh
from thimble.backends.torch.vectors import is_rounded, loaded, stored

BLOCK_TOKENS = 32
LIKE = {"F32": np.float32(0), "BF16": np.uint16(0), "I8": np.int8(0)}  # by kind of a cache


def head_bytes(dim: int, kind: str) -> int:
    """What a block takes for each layer and key head."""
    numbers = 2 * dim * BLOCK_TOKENS * LIKE[kind].itemsize
    return numbers + (2 * BLOCK_TOKENS * ONE.itemsize if kind == "I8" else 0)


@register_jitable
def keys_at(head, dim, like):
    """The keys of a head in a block, which is at the address `head`: (dim · BLOCK_TOKENS,)."""
    return array_at(head, dim * BLOCK_TOKENS, like)


@register_jitable
def values_at(head, dim, like):
    """The values behind them, (BLOCK_TOKENS · dim,)."""
    count = dim * BLOCK_TOKENS
    return array_at(head + count * array_at(head, 1, like).itemsize, count, like)


@register_jitable
def scales_at(head, dim, which):
    """What keys (0) or values (1) in int8 are multiplied by, float32 (BLOCK_TOKENS,)."""
    return array_at(head + 2 * dim * BLOCK_TOKENS + which * BLOCK_TOKENS * 4, BLOCK_TOKENS, ONE)


@register_jitable
def put_heads(key, value, head, place, like):
    """Put the key and the value of a token, float32 (dim,), to its place in a head of its block."""
    dim, key_rate, value_rate = key.shape[0], ONE, ONE
    if is_rounded(like):
        scales_at(head, dim, 0)[place], key_rate = int8_scale(key)
        scales_at(head, dim, 1)[place], value_rate = int8_scale(value)
    keys, values = keys_at(head, dim, like), values_at(head, dim, like)[place * dim : place * dim + dim]
    for j in range(dim):
        keys[j * BLOCK_TOKENS + place] = stored(key[j] * key_rate, like)
        values[j] = stored(value[j] * value_rate, like)


@compiled(**LOOP)
def add_heads(begin, end, qkv, bias, cos, sin, scale, blocks, places, layer, head_size, like, q):
    """Cut, rotate and scale; queries go to q (tokens, kv, group, dim), keys and values to their places in the blocks.

    qkv (tokens, heads, dim); bias float32 (heads, dim); blocks, places int64 (tokens,): the block of each token, and
    its place there; `layer` is where the layer's heads begin in a block, and `head_size` what each takes, in bytes.
    """
    kv, group, dim = q.shape[1], q.shape[2], q.shape[3]
    turned, value = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for t in range(begin, end):
        for h in range(kv):
            for g in range(group):
                head = h * group + g
                _turn(qkv[t, head], bias[head], cos[t], sin[t], ONE, scale, q[t, h, g])
            head = kv * group + h
            _turn(qkv[t, head], bias[head], cos[t], sin[t], ONE, ONE, turned)
            source, added = qkv[t, head + kv], bias[head + kv]
            for j in range(dim):
                value[j] = loaded(source[j]) + added[j]
            put_heads(turned, value, blocks[t] + layer + h * head_size, places[t], like)


@register_jitable
def _score(query, key, scores):
    """Products of a query (dim,) with the keys of a block (dim · BLOCK_TOKENS,), to scores (BLOCK_TOKENS,)."""
    size = BLOCK_TOKENS
    for j in range(size):
        scores[j] = np.float32(0)
    for d in range(0, query.shape[0], 4):  # head dims are even; every second one is a multiple of four
        rest = min(4, query.shape[0] - d)
        rows = key[d * size : (d + rest) * size]
        if rest == 4:
            a, b, c, e = loaded(query[d]), loaded(query[d + 1]), loaded(query[d + 2]), loaded(query[d + 3])
            first, second, third, fourth = rows[:size], rows[size:], rows[2 * size :], rows[3 * size :]
            for j in range(size):
                scores[j] += a * loaded(first[j]) + b * loaded(second[j]) + c * loaded(third[j]) + e * loaded(fourth[j])
        else:
            for more in range(rest):
                a, first = loaded(query[d + more]), rows[more * size :]
                for j in range(size):
                    scores[j] += a * loaded(first[j])


@register_jitable
def _mix(weights, value, count, total):
    """Add weights (tokens,) times values (tokens · dim,) of a block to total (dim,), float32."""
    dim = total.shape[0]
    for j in range(0, count - count % 4, 4):
        a, b, c, e = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        rows = value[j * dim :]
        first, second, third, fourth = rows[:dim], rows[dim:], rows[2 * dim :], rows[3 * dim :]
        for d in range(dim):
            total[d] += a * loaded(first[d]) + b * loaded(second[d]) + c * loaded(third[d]) + e * loaded(fourth[d])
    for j in range(count - count % 4, count):
        a, first = weights[j], value[j * dim :]
        for d in range(dim):
            total[d] += a * loaded(first[d])


@register_jitable
def _weigh(scores, hidden, seen, cap):
    """Turn the scores of a query (places,) into weights, in place: those from hidden to seen; the first ones are 0."""
    row = scores[hidden:seen]
    if cap > 0:
        for j in range(row.shape[0]):
            row[j] = cap * tanh(row[j] / cap)
    log_sum = _log_sum(row)
    for j in range(row.shape[0]):
        row[j] = exp(row[j] - log_sum)
    for j in range(hidden):
        scores[j] = np.float32(0)


@register_jitable
def rescale(numbers, scales):
    """Multiply numbers by scales, in place."""
    for j in range(numbers.shape[0]):
        numbers[j] *= scales[j]


@compiled(**LOOP)
def attend_blocks(begin, end, q, rows, positions, tables, layer, head_size, like, window, cap, out):
    """Attention of single queries, of which number i is token i // kv of key head i % kv.

    q, out (tokens, kv, group, dim); rows int64 (tokens,): row of each token in tables, int64 (rows, blocks), which hold
    addresses; positions int64 (tokens,): the last place that each token sees, of at most `window`; `cap` bends scores,
    0 does not; layer and head_size as in `add_heads`.
    """
    kv, group, dim, size = q.shape[1], q.shape[2], q.shape[3], BLOCK_TOKENS
    total = np.empty(dim, np.float32)
    for i in range(begin, end):
        t, h = i // kv, i % kv
        last = positions[t]
        first = max(0, last - window + 1)
        low, high = first // size, last // size + 1
        table, at = tables[rows[t]], layer + h * head_size
        scores = np.empty((group, (high - low) * size), np.float32)
        for b in range(low, high):
            key, start = keys_at(table[b] + at, dim, like), (b - low) * size
            for g in range(group):
                part = scores[g][start : start + size]
                _score(q[t, h, g], key, part)
                if is_rounded(like):
                    rescale(part, scales_at(table[b] + at, dim, 0))
        seen = last + 1 - low * size
        for g in range(group):
            _weigh(scores[g], first - low * size, seen, cap)
            for d in range(dim):
                total[d] = np.float32(0)
            for b in range(low, high):
                start = (b - low) * size
                count = min(size, seen - start)
                weights = scores[g][start : start + count]
                if is_rounded(like):
                    rescale(weights, scales_at(table[b] + at, dim, 1))
                _mix(weights, values_at(table[b] + at, dim, like), count, total)
            for d in range(dim):
                out[t, h, g, d] = stored(total[d], out)


@compiled(**LOOP)
def gather(begin, end, table, layer, head_size, like, count, to_keys, to_values):
    """Lay the first `count` tokens of some blocks side by side, for key heads begin to end, zero behind them.

    table int64 (blocks,), their addresses; to float32 to_keys (kv, dim, tokens) and to_values (kv, tokens, dim); layer
    and head_size as in `add_heads`.
    """
    tokens = to_keys.shape[2]
    for h in range(begin, end):
        for b in range((tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
            start = b * BLOCK_TOKENS
            size = max(0, min(BLOCK_TOKENS, count - start))
            stop = min(start + BLOCK_TOKENS, tokens)
            if size:
                _gather_block(table[b] + layer + h * head_size, size, like, to_keys[h], to_values[h], start)
            to_keys[h, :, start + size : stop] = 0
            to_values[h, start + size : stop] = 0


@register_jitable
def _gather_block(head, size, like, to_keys, to_values, start):
    """The first `size` tokens of a head of a block, to places from `start` on."""
    dim = to_keys.shape[0]
    keys, values = keys_at(head, dim, like), values_at(head, dim, like)
    for d in range(dim):
        source, to = keys[d * BLOCK_TOKENS : d * BLOCK_TOKENS + size], to_keys[d, start : start + size]
        for j in range(size):
            to[j] = loaded(source[j])
        if is_rounded(like):
            rescale(to, scales_at(head, dim, 0))
    for j in range(size):
        source, to = values[j * dim : j * dim + dim], to_values[start + j]
        rate = scales_at(head, dim, 1)[j] if is_rounded(like) else ONE
        for d in range(dim):
            to[d] = loaded(source[d]) * rate
