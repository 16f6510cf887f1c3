"""Compiled loops over the blocks of a key-value cache: adding to them, attention that reads them in place, gathering.

A layer's keys lie as (blocks, kv_heads, head_dim, BLOCK_TOKENS) and its values as (blocks, kv_heads, BLOCK_TOKENS,
head_dim): both products of attention then run along their last axis. These are float32, or bfloat16 as uint16; all
else is float32, as in `thimble.backends.torch.attention`.
"""

import numpy as np
from numba.extending import register_jitable

from thimble.backends.torch.compiled import compiled
from thimble.backends.torch.fused import LOOP, ONE, _log_sum, _turn, exp, tanh
from thimble.backends.torch.vectors import loaded, stored

BLOCK_TOKENS = 32


@compiled(**LOOP)
def add_heads(begin, end, qkv, bias, cos, sin, scale, places, q, keys, values):
    """Cut, rotate and scale; queries go to q (tokens, kv, group, dim), keys and values to their places in the blocks.

    qkv (tokens, heads, dim); bias float32 (heads, dim); places int64 (tokens,): block · BLOCK_TOKENS + place in it.
    """
    kv, group, dim = q.shape[1], q.shape[2], q.shape[3]
    turned = np.empty(dim, np.float32)
    for t in range(begin, end):
        block, place = places[t] // BLOCK_TOKENS, places[t] % BLOCK_TOKENS
        for h in range(kv):
            for g in range(group):
                head = h * group + g
                _turn(qkv[t, head], bias[head], cos[t], sin[t], ONE, scale, q[t, h, g])
            head = kv * group + h
            _turn(qkv[t, head], bias[head], cos[t], sin[t], ONE, ONE, turned)
            head += kv
            key, value, source, added = keys[block, h], values[block, h, place], qkv[t, head], bias[head]
            for j in range(dim):
                key[j, place] = stored(turned[j], keys)
                value[j] = stored(loaded(source[j]) + added[j], values)


@register_jitable
def _score(query, key, scores):
    """Products of a query (dim,) with the keys of a block (dim, BLOCK_TOKENS), to scores (BLOCK_TOKENS,)."""
    for j in range(BLOCK_TOKENS):
        scores[j] = np.float32(0)
    for d in range(0, query.shape[0], 4):  # head dims are even; every second one is a multiple of four
        rest = min(4, query.shape[0] - d)
        if rest == 4:
            a, b, c, e = loaded(query[d]), loaded(query[d + 1]), loaded(query[d + 2]), loaded(query[d + 3])
            first, second, third, fourth = key[d], key[d + 1], key[d + 2], key[d + 3]
            for j in range(BLOCK_TOKENS):
                scores[j] += a * loaded(first[j]) + b * loaded(second[j]) + c * loaded(third[j]) + e * loaded(fourth[j])
        else:
            for more in range(d, d + rest):
                a, first = loaded(query[more]), key[more]
                for j in range(BLOCK_TOKENS):
                    scores[j] += a * loaded(first[j])


@register_jitable
def _mix(weights, value, count, total):
    """Add weights (tokens,) times values (tokens, dim) of a block to total (dim,), float32."""
    for j in range(0, count - count % 4, 4):
        a, b, c, e = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        first, second, third, fourth = value[j], value[j + 1], value[j + 2], value[j + 3]
        for d in range(total.shape[0]):
            total[d] += a * loaded(first[d]) + b * loaded(second[d]) + c * loaded(third[d]) + e * loaded(fourth[d])
    for j in range(count - count % 4, count):
        a, first = weights[j], value[j]
        for d in range(total.shape[0]):
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


@compiled(**LOOP)
def attend_blocks(begin, end, q, keys, values, rows, positions, tables, window, cap, out):
    """Attention of single queries, of which number i is token i // kv of key head i % kv.

    q, out (tokens, kv, group, dim); rows int64 (tokens,): row of each token in tables, int32 (rows, blocks);
    positions int64 (tokens,): the last place that each token sees, of at most `window`; `cap` bends scores, 0 does not.
    """
    kv, group, dim = q.shape[1], q.shape[2], q.shape[3]
    total = np.empty(dim, np.float32)
    for i in range(begin, end):
        t, h = i // kv, i % kv
        last = positions[t]
        first = max(0, last - window + 1)
        low, high = first // BLOCK_TOKENS, last // BLOCK_TOKENS + 1
        table = tables[rows[t]]
        scores = np.empty((group, (high - low) * BLOCK_TOKENS), np.float32)
        for b in range(low, high):
            key, start = keys[table[b], h], (b - low) * BLOCK_TOKENS
            for g in range(group):
                _score(q[t, h, g], key, scores[g, start : start + BLOCK_TOKENS])
        seen = last + 1 - low * BLOCK_TOKENS
        for g in range(group):
            _weigh(scores[g], first - low * BLOCK_TOKENS, seen, cap)
            for d in range(dim):
                total[d] = np.float32(0)
            for b in range(low, high):
                start = (b - low) * BLOCK_TOKENS
                count = min(BLOCK_TOKENS, seen - start)
                _mix(scores[g, start : start + count], values[table[b], h], count, total)
            for d in range(dim):
                out[t, h, g, d] = stored(total[d], out)


@compiled(**LOOP)
def gather(begin, end, table, keys, values, count, to_keys, to_values):
    """Lay the first `count` tokens of some blocks side by side, for key heads begin to end, zero behind them.

    table int32 (blocks,); to float32 to_keys (kv, dim, tokens) and to_values (kv, tokens, dim).
    """
    dim, tokens = to_keys.shape[1], to_keys.shape[2]
    for h in range(begin, end):
        for b in range((tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
            start = b * BLOCK_TOKENS
            size = max(0, min(BLOCK_TOKENS, count - start))
            stop = min(start + BLOCK_TOKENS, tokens)
            if size:
                key, value = keys[table[b], h], values[table[b], h]
                for d in range(dim):
                    source, to = key[d, :size], to_keys[h, d, start : start + size]
                    for j in range(size):
                        to[j] = loaded(source[j])
                for j in range(size):
                    source, to = value[j], to_values[h, start + j]
                    for d in range(dim):
                        to[d] = loaded(source[d])
            to_keys[h, :, start + size : stop] = 0
            to_values[h, start + size : stop] = 0
