"""One pass of decoding, compiled: all blocks of a decoder over the next tokens of some requests.

The program is a list of phases, run by a gang of threads (`gang`): every thread does its share of each. Activations are
float32; where weights lie in blocks and the form says so, they are quantised before a product (`dot_products`). Nothing
a token comes to depends on what tokens stand beside it or on how many threads there are: each number is made by one
thread, in one order. Sizes and addresses stand in tables of int64, filled by `decode_step`; the columns are named here.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba.extending import register_jitable

from thimble.backends.torch.block_products import RUN, quantize_run
from thimble.backends.torch.compiled import compiled, specialised
from thimble.backends.torch.dot_products import add_mixed, array_at, call_product, dot, largest_of, sum_of
from thimble.backends.torch.fused import ONE, _gelu, _silu, _turn, exp, tanh
from thimble.backends.torch.gang import CLOSED, advance, join
from thimble.backends.torch.paged import BLOCK_TOKENS, LIKE, keys_at, put_heads, rescale, scales_at, values_at
from thimble.backends.torch.vectors import from_bits, is_rounded

NUMBER = 4  # bytes of a float32

# Phases: what they do.
NORMALISE = 0  # h = the residual stream x, normalised
LOWER = 1  # low = h Aᵀ of the adapters of some jobs
MULTIPLY = 2  # y or logits = h Wᵀ of some jobs, with adapters and bias
UPDATE = 3  # x += h Wᵀ
ADD_NORMALISED = 4  # x += y, normalised (Gemma)
PLACE = 5  # queries and keys of y rotated, keys and values put into the cache
ATTEND = 6  # h = attention of the queries
QUANTIZE = 7  # h in whole numbers
GATE = 8  # h = activation(gate) · up of y

# Columns of the table of phases: what it does; the first job, and the one behind the last; address of the norm; where
# a product goes, Y or LOGITS; number of the block; addresses of the norms of queries and keys, or 0; of cos and sin of
# the rotary embedding, float32 (T, angles), and how many angles; most keys that are seen; whether it is of the head,
# which has a room of its own.
PHASE = KIND, JOBS, END, NORM, TO, BLOCK, Q_NORM, K_NORM, COS, SIN, ANGLES, WINDOW, IS_HEAD = range(13)

# Columns of the table of jobs, which are weight matrices: address of the `product_kernel`; address and size of a row;
# rows; columns; address of int64 (rows,), which row of the file each is, or 0 if they lie in order; address of the
# bias, float32 (rows,), or 0; the column of the result that row 0 makes, and the width of the result.
JOB = KERNEL, WEIGHTS, ROW_BYTES, ROWS, COLUMNS, INDEX, BIAS, FIRST, WIDTH = range(9)

# Columns of the table of an adapter, one row a job: addresses of A (ranks, columns), or 0 if it leaves the job alone,
# and of Bᵀ (ranks, rows); ranks; the column of low that A's first row makes; address of what the rows are multiplied by
# (DoRA), float32 (rows,), or 0; bits of the scale.
LOW = A, B, RANKS, LOW_FIRST, RATES, SCALE = range(6)

# The room of a pass: tokens and width of the residual stream; heads, key heads and their dimension; whether inputs are
# quantised for products, and whether the gate is SiLU, not GELU; then addresses of float32 arrays whose rows, one a
# token, lie closely: the residual stream; the input of a product; the same in int8, with the scale and the scaled sum
# of each run, as in `block_products`; the result of a product; scale · h Aᵀ, and its width; scores of each thread,
# (queries of a key head, most keys), and how many keys; bytes of a key head in a block of the cache; logits. The head,
# where not all tokens are wanted, has such a row of its own: its tokens are those whose numbers stand at an address,
# int64 (T,), which is 0 for the blocks.
ROOM = (
    T, HIDDEN, HEADS, KV_HEADS, DIM, IS_INT8, IS_SILU, X, H, Q, SCALES, SUMS, Y, LOWS, LOWS_WIDTH, SCORES, MOST_KEYS,
    HEAD_BYTES, LOGITS, WANTED,
) = range(20)  # fmt: skip
EPS, SCORE_SCALE, SOFTCAP, FINAL_SOFTCAP = range(4)  # numbers, float32; no soft-cap is 0


@register_jitable
def _floats(address, count):
    """The float32 numbers at an address."""
    return array_at(address, count, np.float32(0))


@register_jitable
def _row(address, number, width):
    """Row `number` of float32 rows of some width."""
    return _floats(address + number * width * NUMBER, width)


@register_jitable
def _share(items, number, threads):
    """Of so many items, those of one thread."""
    return items * number // threads, items * (number + 1) // threads


# ---- inputs of products ----------------------------------------------------------------------------------------------


@register_jitable
def _quantize(room, t, width, begin, end):
    """Write runs begin to end of row t of h, `width` wide, as q = round(h · 127 / max |h|), and scale and Σ of each."""
    h, tokens = _row(room[H], t, width), room[T]
    for run in range(begin, end):
        part, to = h[run * RUN : run * RUN + RUN], array_at(room[Q] + (run * tokens + t) * RUN, RUN, np.int8(0))
        _row(room[SCALES], run, tokens)[t], _row(room[SUMS], run, tokens)[t] = quantize_run(part, to)


@register_jitable
def _normalise(x, weight, eps, out):
    """Write x / rms(x) · weight."""
    square = dot("F32", x.ctypes.data, x.shape[0], x.ctypes.data)
    rate = ONE / np.sqrt(square / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = x[j] * rate * weight[j]


@register_jitable
def _read_stream(phase, room, numbers, number, threads):
    width, wanted = room[HIDDEN], array_at(room[WANTED], room[T], np.int64(0))
    first, last = _share(room[T], number, threads)
    for t in range(first, last):
        x = _row(room[X], t if room[WANTED] == 0 else wanted[t], width)
        _normalise(x, _floats(phase[NORM], width), numbers[EPS], _row(room[H], t, width))
        if room[IS_INT8]:
            _quantize(room, t, width, 0, width // RUN)


@register_jitable
def _add_normalised(phase, room, numbers, number, threads):
    width = room[HIDDEN]
    first, last = _share(room[T], number, threads)
    for t in range(first, last):
        x, y = _row(room[X], t, width), _row(room[Y], t, width)
        _normalise(y, _floats(phase[NORM], width), numbers[EPS], y)
        for j in range(width):
            x[j] += y[j]


@register_jitable
def _make_input(is_gated, room, width, number, threads):
    """Make a share of the columns of h from gate and up, which lie beside one another in y, if gated; quantise them."""
    first, last = _share((width + RUN - 1) // RUN, number, threads)
    begin, end = first * RUN, min(last * RUN, width)
    for t in range(room[T]):
        if is_gated:
            both, h = _row(room[Y], t, 2 * width), _row(room[H], t, width)[begin:end]
            gate, up, is_silu = both[begin:end], both[width + begin : width + end], room[IS_SILU]
            for j in range(h.shape[0]):
                value = _silu(gate[j])[0] if is_silu else _gelu(gate[j])[0]
                h[j] = value * up[j]
        if room[IS_INT8]:
            _quantize(room, t, width, first, end // RUN)


# ---- products --------------------------------------------------------------------------------------------------------


@specialised
def _multiply(kind, size, phase, jobs, room, numbers, adapters, chosen, number, threads):
    """Multiply a share of the rows of each matrix with all rows of h, and finish what they made."""
    for j in range(phase[JOBS], phase[END]):
        job, to = jobs[j], room[phase[TO]]
        first, last = _share(job[ROWS], number, threads)
        call_product(job[KERNEL], (
            job[WEIGHTS], job[ROW_BYTES], job[INDEX], job[COLUMNS], first, last, room[T], room[H], room[Q],
            room[SCALES], room[SUMS], to + job[FIRST] * NUMBER, job[WIDTH] * NUMBER,
        ))  # fmt: skip
        _finish(kind, size, phase, job, j, room, adapters, chosen, numbers[FINAL_SOFTCAP], number, threads)


@specialised
def _lower(kind, size, phase, jobs, room, adapters, chosen, number, threads):
    """Make a share of scale · h Aᵀ of each token that has an adapter."""
    columns = jobs[phase[JOBS], COLUMNS]
    for t in range(room[T]):
        if chosen[t] >= 0:
            low, h = _row(room[LOWS], t, room[LOWS_WIDTH]), room[H] + t * columns * NUMBER
            for j in range(phase[JOBS], phase[END]):
                layer = adapters[chosen[t], j]
                first, last = _share(layer[RANKS], number, threads)  # none where the adapter leaves the job alone
                scale = from_bits(np.int32(layer[SCALE]))
                for r in range(first, last):
                    low[layer[LOW_FIRST] + r] = scale * dot(kind, layer[A] + r * columns * size, columns, h)


@specialised
def _adapt(kind, size, layer, room, t, rows, first, own):
    """Add low Bᵀ of one token to rows `first` on of a job's result, out of `rows`, and multiply them by their rates."""
    low = room[LOWS] + (t * room[LOWS_WIDTH] + layer[LOW_FIRST]) * NUMBER
    add_mixed(kind, low, layer[RANKS], layer[B] + first * size, rows * size, own.shape[0], own.ctypes.data)
    if layer[RATES] != 0:
        rates = _floats(layer[RATES] + first * NUMBER, own.shape[0])
        for i in range(own.shape[0]):
            own[i] *= rates[i]


@specialised
def _finish(kind, size, phase, job, j, room, adapters, chosen, cap, number, threads):
    """Add what a share of a matrix's rows is still without: adapter, bias, soft-cap, or the stream they update."""
    first, last = _share(job[ROWS], number, threads)
    for t in range(room[T]):
        own = _row(room[phase[TO]], t, job[WIDTH])[job[FIRST] + first : job[FIRST] + last]
        if chosen[t] >= 0 and adapters[chosen[t], j, A] != 0:
            _adapt(kind, size, adapters[chosen[t], j], room, t, job[ROWS], first, own)
        if job[BIAS] != 0:
            bias = _floats(job[BIAS] + first * NUMBER, last - first)
            for i in range(own.shape[0]):
                own[i] += bias[i]
        if phase[KIND] == UPDATE:
            x = _row(room[X], t, room[HIDDEN])[first:last]
            for i in range(own.shape[0]):
                x[i] += own[i]
        elif phase[TO] == LOGITS and cap != 0:
            for i in range(own.shape[0]):
                own[i] = cap * tanh(own[i] / cap)


# ---- attention -------------------------------------------------------------------------------------------------------


@register_jitable
def _head_at(phase, room, head):
    """Where a key head of the layer begins in a block of the cache, in bytes."""
    return (phase[BLOCK] * room[KV_HEADS] + head) * room[HEAD_BYTES]


@register_jitable
def _place_heads(phase, room, numbers, positions, rows, tables, like, number, threads):
    """A share of tokens and key heads: heads are normalised and turned, and keys and values put into their block."""
    heads, kv_heads, dim, angles = room[HEADS], room[KV_HEADS], room[DIM], phase[ANGLES]
    group, width, none = heads // kv_heads, (heads + 2 * kv_heads) * dim, np.zeros(dim, np.float32)
    first, last = _share(room[T] * kv_heads, number, threads)
    for item in range(first, last):
        t, head = item // kv_heads, item % kv_heads
        cos, sin, own = _row(phase[COS], t, angles), _row(phase[SIN], t, angles), room[Y] + t * width * NUMBER
        for g in range(group):
            query = _row(own, head * group + g, dim)
            if phase[Q_NORM] != 0:
                _normalise(query, _floats(phase[Q_NORM], dim), numbers[EPS], query)
            _turn(query, none, cos, sin, ONE, numbers[SCORE_SCALE], query)
        key, value = _row(own, heads + head, dim), _row(own, heads + kv_heads + head, dim)
        if phase[K_NORM] != 0:
            _normalise(key, _floats(phase[K_NORM], dim), numbers[EPS], key)
        _turn(key, none, cos, sin, ONE, ONE, key)
        block, place = tables[rows[t], positions[t] // BLOCK_TOKENS], positions[t] % BLOCK_TOKENS
        put_heads(key, value, block + _head_at(phase, room, head), place, like)


@specialised
def _attend(kind, like, phase, room, numbers, positions, rows, tables, number, threads):
    """A share of tokens and key heads; the result is h, (T, heads · dim).

    Those of a head follow one another, so that what a request has read of it stays in the cache of the core; later
    tokens see more, so threads take turns.
    """
    heads, kv_heads, dim, width = room[HEADS], room[KV_HEADS], room[DIM], room[MOST_KEYS] * NUMBER
    group = heads // kv_heads
    scores = room[SCORES] + number * group * width
    for item in range(number, room[T] * kv_heads, threads):
        head, t = item // room[T], item % room[T]
        end, table, at = positions[t] + 1, tables[rows[t]], _head_at(phase, room, head)
        begin = max(0, end - phase[WINDOW])
        queries = room[Y] + (t * (heads + 2 * kv_heads) + head * group) * dim * NUMBER
        _score(kind, like, table, at, begin, end, group, dim, queries, scores, width)
        for g in range(group):
            own = scores + g * width + begin % BLOCK_TOKENS * NUMBER
            _softmax(_floats(own, end - begin), numbers[SOFTCAP])
        out = room[H] + (t * heads + head * group) * dim * NUMBER
        _mix(kind, like, table, at, begin, end, group, dim, scores, width, out)


@specialised
def _score(kind, like, table, at, begin, end, group, dim, queries, scores, width):
    """Products of the queries of a head with the keys of tokens begin to end, whole blocks of them.

    Its part of a block is `at` bytes behind the block; scores of a query are `width` bytes behind those of the last.
    """
    low, high = begin // BLOCK_TOKENS, (end - 1) // BLOCK_TOKENS + 1
    for block in range(low, high):
        head = table[block] + at
        keys = keys_at(head, dim, like)
        for g in range(group):
            own = _row(scores + g * width, block - low, BLOCK_TOKENS)
            own[:] = np.float32(0)
            add_mixed(kind, queries + g * dim * NUMBER, dim, head, BLOCK_TOKENS * keys.itemsize, BLOCK_TOKENS,
                      own.ctypes.data)  # fmt: skip
            if is_rounded(like):
                rescale(own, scales_at(head, dim, 0))


@specialised
def _mix(kind, like, table, at, begin, end, group, dim, scores, width, out):
    """Write the values of tokens begin to end, times the weights that `_score`'s places hold, to rows (group, dim)."""
    low, high = begin // BLOCK_TOKENS, (end - 1) // BLOCK_TOKENS + 1
    _floats(out, group * dim)[:] = np.float32(0)
    for block in range(low, high):
        head, start, stop = table[block] + at, max(begin, block * BLOCK_TOKENS), min(end, (block + 1) * BLOCK_TOKENS)
        values = values_at(head, dim, like)[start % BLOCK_TOKENS * dim :]
        for g in range(group):
            weights = _floats(scores + g * width + (start - low * BLOCK_TOKENS) * NUMBER, stop - start)
            if is_rounded(like):
                rescale(weights, scales_at(head, dim, 1)[start % BLOCK_TOKENS :])
            add_mixed(kind, weights.ctypes.data, stop - start, values.ctypes.data, dim * values.itemsize, dim,
                      out + g * dim * NUMBER)  # fmt: skip


@register_jitable
def _softmax(scores, cap):
    """Turn scores into weights, in place, bent first where there is a soft-cap."""
    if cap != 0:
        for n in range(scores.shape[0]):
            scores[n] = cap * tanh(scores[n] / cap)
    top = largest_of(scores.ctypes.data, scores.shape[0])
    for n in range(scores.shape[0]):
        scores[n] = exp(scores[n] - top)
    total = sum_of(scores.ctypes.data, scores.shape[0])
    for n in range(scores.shape[0]):
        scores[n] = scores[n] / total


# ---- the program -----------------------------------------------------------------------------------------------------


@functools.cache
def decode_program(kind: str, cache: str) -> Callable[..., None]:
    """Compile the program for bases in a compute type.

    Args:
        kind: Type of adapters, `F32` or `BF16`.
        cache: Kind of the key-value cache, one of `paged.LIKE`.

    Returns:
        program(shared, phases, jobs, rooms, numbers, positions, rows, tables, adapters, chosen) for
        `gang.run_together`. phases, jobs, rooms and numbers are tables, as described above; for each token there is its
        position, its row in tables and which adapter it has, or -1, all int64 (T,). tables, int64 (rows, blocks), holds
        the addresses of the blocks that hold what a row has read; adapters is int64 (adapters, jobs, LOW).
    """
    size, like = 4 if kind == "F32" else 2, LIKE[cache]

    @compiled(nogil=True, error_model="numpy")
    def program(shared, phases, jobs, rooms, numbers, positions, rows, tables, adapters, chosen):
        number, begun, threads = join(shared)
        if begun == CLOSED:
            return
        for at in range(begun, phases.shape[0]):
            if at > begun:
                threads = advance(shared, number, threads, at)
            if at < 0:
                continue
            phase, what, room = phases[at], phases[at, KIND], rooms[phases[at, IS_HEAD]]
            if what == NORMALISE:
                _read_stream(phase, room, numbers, number, threads)
            elif what == LOWER:
                _lower(kind, size, phase, jobs, room, adapters, chosen, number, threads)
            elif what == MULTIPLY or what == UPDATE:
                _multiply(kind, size, phase, jobs, room, numbers, adapters, chosen, number, threads)
            elif what == ADD_NORMALISED:
                _add_normalised(phase, room, numbers, number, threads)
            elif what == PLACE:
                _place_heads(phase, room, numbers, positions, rows, tables, like, number, threads)
            elif what == ATTEND:
                _attend(cache, like, phase, room, numbers, positions, rows, tables, number, threads)
            else:
                _make_input(what == GATE, room, jobs[phase[JOBS], COLUMNS], number, threads)
        advance(shared, number, threads, CLOSED)

    return program
