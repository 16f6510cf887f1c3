"""Compiled elementwise loops: normalisation, gating, rotation, softmax and cross-entropy, each in one pass over memory.

Each loop handles rows begin to end, for `thimble.backends.torch.threads.split`. Arrays are float32, or bfloat16 as
uint16; arithmetic is float32. `exp` is a polynomial, so that loops over it vectorise too. NaN and infinity are kept, so
that a diverging run shows. The tests hold the same formulas in torch operators.
"""

import numpy as np
from numba.extending import register_jitable

from thimble.backends.torch.compiled import compiled
from thimble.backends.torch.vectors import bits_of, from_bits, loaded, multiply_add, stored
from thimble.files.blocks import TINY

# Fast arithmetic but for flags that let the compiler assume away NaN; and no checks for division by zero, whose
# branches keep a loop from being vectorised.
LOOP = {"nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_LOW, EXP_HIGH = np.float32(-87.0), np.float32(88.0)
C2, C3, C4, C5, C6 = (np.float32(1 / n) for n in (2, 6, 24, 120, 720))
GELU_ROOT, GELU_CUBE = np.float32(0.7978845608), np.float32(0.044715)


@register_jitable
def exp(x):
    """e^x to about 1e-7, x clamped to the range of normal float32 (Cody and Waite reduction, degree 6)."""
    x = min(max(x, EXP_LOW), EXP_HIGH)
    n = np.floor(x * LOG2_E + HALF)
    f = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ONE + f * (ONE + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    return p * from_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@register_jitable
def tanh(x):
    """Hyperbolic tangent by `exp`."""
    return ONE - TWO / (exp(TWO * x) + ONE)


@register_jitable
def int8_scale(row):
    """What float32 numbers are divided by to become int8, max |x| / 127, and the inverse; both 0 if all are about 0."""
    largest = np.int32(0)
    for j in range(row.shape[0]):
        largest = max(largest, bits_of(row[j]) & np.int32(0x7FFFFFFF))  # a NaN is above all numbers
    size = from_bits(largest)
    if size < TINY:
        return np.float32(0), np.float32(0)
    return size / np.float32(127), np.float32(127) / size


# ---- RMS normalisation ---------------------------------------------------------------------------------------------


@register_jitable
def _rate(row, eps):
    total = np.float32(0)
    for j in range(row.shape[0]):
        value = loaded(row[j])
        total += value * value
    return ONE / np.sqrt(total / np.float32(row.shape[0]) + eps)


@compiled(**LOOP)
def norm_forward(begin, end, x, weight, eps, out):
    """x / rms(x) · weight: x, out (rows, n); weight float32 (n,)."""
    for i in range(begin, end):
        rate = _rate(x[i], eps)
        for j in range(x.shape[1]):
            out[i, j] = stored(loaded(x[i, j]) * rate * weight[j], out)


@compiled(**LOOP)
def norm_backward(begin, end, x, weight, eps, grad, out):
    """Gradient at x of `norm_forward`: all (rows, n)."""
    for i in range(begin, end):
        rate = _rate(x[i], eps)
        dot = np.float32(0)
        for j in range(x.shape[1]):
            dot += loaded(grad[i, j]) * weight[j] * loaded(x[i, j])
        drift = dot * rate * rate * rate / np.float32(x.shape[1])
        for j in range(x.shape[1]):
            out[i, j] = stored(loaded(grad[i, j]) * weight[j] * rate - loaded(x[i, j]) * drift, out)


# ---- gating --------------------------------------------------------------------------------------------------------


@register_jitable
def _silu(gate):
    """silu(gate) and its slope."""
    share = ONE / (ONE + exp(-gate))
    return gate * share, share * (ONE + gate * (ONE - share))


@register_jitable
def _gelu(gate):
    """gelu(gate) by its tanh form, and its slope."""
    inner = tanh(GELU_ROOT * (gate + GELU_CUBE * gate * gate * gate))
    slope = GELU_ROOT * (ONE + np.float32(3) * GELU_CUBE * gate * gate)
    return HALF * gate * (ONE + inner), HALF * (ONE + inner) + HALF * gate * (ONE - inner * inner) * slope


def _make_gate(activate):
    """Compile the pair of loops for one activation."""

    @compiled(**LOOP)
    def forward(begin, end, x, out):
        n = out.shape[1]
        for i in range(begin, end):
            gate, up, to = x[i, :n], x[i, n:], out[i]
            for j in range(n):
                to[j] = stored(activate(loaded(gate[j]))[0] * loaded(up[j]), out)

    @compiled(**LOOP)
    def backward(begin, end, x, grad, out):
        n = grad.shape[1]
        for i in range(begin, end):
            gate, up, g = x[i, :n], x[i, n:], grad[i]
            to_gate, to_up = out[i, :n], out[i, n:]
            for j in range(n):
                value, slope = activate(loaded(gate[j]))
                to_gate[j] = stored(loaded(g[j]) * loaded(up[j]) * slope, out)
                to_up[j] = stored(loaded(g[j]) * value, out)

    return forward, backward


# activation(gate) · up, x = gate beside up (rows, 2 n): forward(x, out (rows, n)); backward(x, grad, out (rows, 2 n)).
GATES = {"silu": _make_gate(_silu), "gelu_tanh": _make_gate(_gelu)}


# ---- dropout -------------------------------------------------------------------------------------------------------

LOW_WORD, WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@register_jitable
def _philox(column, token, row, layer, seed, step):
    """Four words of Philox4x32-10 for one counter and key; see thimble.core.dropout.philox. Words lie in uint64."""
    for _ in range(10):
        left, right = column * MULTIPLIERS[0], row * MULTIPLIERS[1]
        column, token = (right >> WORD) ^ token ^ seed, right & LOW_WORD
        row, layer = (left >> WORD) ^ layer ^ step, left & LOW_WORD
        seed, step = (seed + KEY_STEPS[0]) & LOW_WORD, (step + KEY_STEPS[1]) & LOW_WORD
    return column, token, row, layer


@compiled(**LOOP)
def drop(begin, end, x, tokens, rows, layer, seed, step, threshold, factor, out, is_added):
    """x · factor, or 0 where the word of an element is below threshold; written to out, or added to it.

    x, out (tokens, n); tokens and rows int64 (tokens,): the counters of thimble.core.dropout.keep_mask.
    """
    words = np.empty(x.shape[1] + 4, np.uint64)
    for i in range(begin, end):
        token, row = np.uint64(tokens[i]), np.uint64(rows[i])
        for four in range((x.shape[1] + 3) // 4):
            a, b, c, d = _philox(np.uint64(four), token, row, layer, seed, step)
            words[4 * four], words[4 * four + 1], words[4 * four + 2], words[4 * four + 3] = a, b, c, d
        source, to = x[i], out[i]
        for j in range(x.shape[1]):
            value = loaded(source[j]) * factor if words[j] >= threshold else np.float32(0)
            to[j] = stored(loaded(to[j]) + value if is_added else value, out)


# ---- heads ---------------------------------------------------------------------------------------------------------


@register_jitable
def _turn(source, bias, cos, sin, sign, scale, out):
    """Add a bias to one head, rotate it by its position's angles and scale it; beyond the angles it is only scaled."""
    half = cos.shape[0]
    for j in range(half):
        first, second = loaded(source[j]) + bias[j], loaded(source[half + j]) + bias[half + j]
        # Fused here and not by the compiler, which does it in other places in the process that compiles than in those
        # that load what it cached.
        out[j] = stored(multiply_add(first, cos[j], -(sign * second * sin[j])) * scale, out)
        out[half + j] = stored(multiply_add(second, cos[j], sign * first * sin[j]) * scale, out)
    for j in range(2 * half, source.shape[0]):
        out[j] = stored((loaded(source[j]) + bias[j]) * scale, out)


@compiled(**LOOP)
def split_heads(begin, end, qkv, bias, cos, sin, scale, q, k, v):
    """Cut, rotate and scale: qkv (tokens, heads, dim) to float32 q (kv, tokens, group, dim), k and v (kv, tokens, dim).

    The bias is float32 (heads, dim).
    """
    kv, group = q.shape[0], q.shape[2]
    for t in range(begin, end):
        for h in range(kv):
            for g in range(group):
                place = h * group + g
                _turn(qkv[t, place], bias[place], cos[t], sin[t], ONE, scale, q[h, t, g])
            place = kv * group + h
            _turn(qkv[t, place], bias[place], cos[t], sin[t], ONE, ONE, k[h, t])
            place += kv
            for j in range(v.shape[2]):
                v[h, t, j] = loaded(qkv[t, place, j]) + bias[place, j]


@compiled(**LOOP)
def join_heads(begin, end, dq, dk, dv, cos, sin, scale, out):
    """Undo `split_heads` for gradients: the shapes are its own."""
    kv, group = dq.shape[0], dq.shape[2]
    none = np.zeros(dq.shape[3], np.float32)
    for t in range(begin, end):
        for h in range(kv):
            for g in range(group):
                _turn(dq[h, t, g], none, cos[t], sin[t], -ONE, scale, out[t, h * group + g])
            _turn(dk[h, t], none, cos[t], sin[t], -ONE, ONE, out[t, kv * group + h])
            for j in range(dv.shape[2]):
                out[t, kv * group + kv + h, j] = stored(loaded(dv[h, t, j]), out)


@compiled(**LOOP)
def by_head(begin, end, grad, mixed, out, dots):
    """Sort a gradient by key head, and take its dot products with what it is the gradient of.

    grad, mixed (tokens, kv, group, dim) to float32 out (kv, tokens, group, dim) and dots (kv, tokens, group).
    """
    for t in range(begin, end):
        for h in range(grad.shape[1]):
            for g in range(grad.shape[2]):
                source, other, to = grad[t, h, g], mixed[t, h, g], out[h, t, g]
                total = np.float32(0)
                for j in range(source.shape[0]):
                    to[j] = loaded(source[j])
                    total += loaded(source[j]) * loaded(other[j])
                dots[h, t, g] = total


# ---- soft-cap -------------------------------------------------------------------------------------------------------


@compiled(**LOOP)
def bend(begin, end, x, cap):
    """Replace x (rows, n) by cap · tanh(x / cap), in place; its slope is 1 - (result / cap)²."""
    for i in range(begin, end):
        row = x[i]
        for j in range(row.shape[0]):
            row[j] = stored(cap * tanh(loaded(row[j]) / cap), x)


# ---- softmax of one attention tile ---------------------------------------------------------------------------------
# scores, float32 (kv · queries · group, keys), already bent; row r of a key head is the query at positions[r // group],
# column c is the key at position low + c. A query sees the keys up to itself, at most `window` of them; the others are
# given weight 0. A query at -1 is padding and sees none. Slices rather than offsets: an index that might be negative
# keeps a loop from being vectorised.


@register_jitable
def _seen(query, low, window, keys):
    if query < 0:
        return 0, 0
    return max(0, query - window + 1 - low), min(keys, query + 1 - low)


@register_jitable
def _ordered(bits):
    """Whole numbers in the order of the floats with these bits, and back: their maximum vectorises, a float's not."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@register_jitable
def _log_sum(row):
    """log Σ exp of a row of float32 or bfloat16."""
    order = _ordered(bits_of(loaded(row[0])))
    for j in range(row.shape[0]):
        order = max(order, _ordered(bits_of(loaded(row[j]))))
    top = from_bits(_ordered(order))
    total = np.float32(0)
    for j in range(row.shape[0]):
        total += exp(loaded(row[j]) - top)
    return top + np.log(total)


@register_jitable
def _clear(row, array):
    for j in range(row.shape[0]):
        row[j] = stored(np.float32(0), array)


@compiled(**LOOP)
def softmax_forward(begin, end, scores, rows, group, positions, low, window, log_sums):
    """Turn scores into weights in place, and keep their log-sums, float32 (kv · queries · group,).

    `rows` are those of one key head; positions int64 (queries,).
    """
    for i in range(begin, end):
        start, stop = _seen(positions[i % rows // group], low, window, scores.shape[1])
        seen = scores[i, start:stop]
        log_sum = log_sums[i] = _log_sum(seen) if stop > start else np.float32(0)
        for j in range(seen.shape[0]):
            seen[j] = stored(exp(loaded(seen[j]) - log_sum), scores)
        _clear(scores[i, :start], scores)
        _clear(scores[i, stop:], scores)


@compiled(**LOOP)
def softmax_backward(begin, end, scores, grads, rows, group, positions, low, window, per_cap, log_sums, drift):
    """Turn scores into weights and the weights' gradients into the scores', both in place.

    With w = softmax(s) and d = Σ w · ∂L/∂w (drift, float32 (kv · queries · group,)): ∂L/∂s = w (∂L/∂w − d), times the
    slope of the soft-cap (`per_cap` is its inverse, 0 for none).
    """
    for i in range(begin, end):
        start, stop = _seen(positions[i % rows // group], low, window, scores.shape[1])
        seen, grad, log_sum, shift = scores[i, start:stop], grads[i, start:stop], log_sums[i], drift[i]
        for j in range(seen.shape[0]):
            value = loaded(seen[j])
            weight, bent = exp(value - log_sum), value * per_cap
            seen[j] = stored(weight, scores)
            grad[j] = stored(weight * (loaded(grad[j]) - shift) * (ONE - bent * bent), grads)
        for array in (scores, grads):
            _clear(array[i, :start], array)
            _clear(array[i, stop:], array)


# ---- cross-entropy -------------------------------------------------------------------------------------------------


@compiled(**LOOP)
def cross_entropy(begin, end, logits, targets, per_cap, losses, needs_grad):
    """Loss of each row of logits (rows, vocabulary), already bent, to float32 (rows,).

    If wanted, the logits become the gradient of the loss before bending, in place; `per_cap` is the inverse of the
    soft-cap, 0 for none.
    """
    for i in range(begin, end):
        row = logits[i]
        log_sum = _log_sum(row)
        target = loaded(row[targets[i]])
        losses[i] = log_sum - target
        if needs_grad:
            for j in range(row.shape[0]):
                value = loaded(row[j])
                bent = value * per_cap
                row[j] = stored(exp(value - log_sum) * (ONE - bent * bent), logits)
            bent = target * per_cap
            row[targets[i]] = stored((exp(target - log_sum) - ONE) * (ONE - bent * bent), logits)
