"""Compiled elementwise loops: normalisation, gating, rotation, softmax and cross-entropy, each in one pass over memory.

Each loop handles rows begin to end, for `thimble.torch_backend.threads.split`. Arrays are float32, or bfloat16 as
uint16; arithmetic is float32. `exp` is a polynomial, so that loops over it vectorise too. NaN and infinity are kept, so
that a diverging run shows. The tests hold the same formulas in torch operators.
"""

import numpy as np
from numba import njit
from numba.extending import register_jitable

from thimble.torch_backend.vectors import from_bits, loaded, stored

FAST = {"reassoc", "contract", "arcp", "nsz"}  # no flag that lets the compiler assume away NaN
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


# ---- RMS normalisation ---------------------------------------------------------------------------------------------


@register_jitable
def _rate(row, eps):
    total = np.float32(0)
    for j in range(row.shape[0]):
        value = loaded(row[j])
        total += value * value
    return ONE / np.sqrt(total / np.float32(row.shape[0]) + eps)


@njit(nogil=True, cache=True, fastmath=FAST)
def norm_forward(begin, end, x, weight, eps, out):
    """x / rms(x) · weight: x, out (rows, n); weight float32 (n,)."""
    for i in range(begin, end):
        rate = _rate(x[i], eps)
        for j in range(x.shape[1]):
            out[i, j] = stored(loaded(x[i, j]) * rate * weight[j], out)


@njit(nogil=True, cache=True, fastmath=FAST)
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

    @njit(nogil=True, cache=True, fastmath=FAST)
    def forward(begin, end, x, out):
        n = out.shape[1]
        for i in range(begin, end):
            for j in range(n):
                out[i, j] = stored(activate(loaded(x[i, j]))[0] * loaded(x[i, n + j]), out)

    @njit(nogil=True, cache=True, fastmath=FAST)
    def backward(begin, end, x, grad, out):
        n = grad.shape[1]
        for i in range(begin, end):
            for j in range(n):
                value, slope = activate(loaded(x[i, j]))
                g = loaded(grad[i, j])
                out[i, j] = stored(g * loaded(x[i, n + j]) * slope, out)
                out[i, n + j] = stored(g * value, out)

    return forward, backward


# activation(gate) · up, x = gate beside up (rows, 2 n): forward(x, out (rows, n)); backward(x, grad, out (rows, 2 n)).
GATES = {"silu": _make_gate(_silu), "gelu_tanh": _make_gate(_gelu)}


# ---- heads ---------------------------------------------------------------------------------------------------------


@register_jitable
def _turn(source, cos, sin, sign, scale, out):
    """Rotate one head by its position's angles and scale it; what lies beyond the angles is only scaled."""
    half = cos.shape[0]
    for j in range(half):
        first, second = loaded(source[j]), loaded(source[half + j])
        out[j] = stored((first * cos[j] - sign * second * sin[j]) * scale, out)
        out[half + j] = stored((second * cos[j] + sign * first * sin[j]) * scale, out)
    for j in range(2 * half, source.shape[0]):
        out[j] = stored(loaded(source[j]) * scale, out)


@njit(nogil=True, cache=True, fastmath=FAST)
def split_heads(begin, end, qkv, cos, sin, scale, q, k, v):
    """Cut, rotate and scale: qkv (tokens, heads, dim) to q (kv, tokens, group, dim), k and v (kv, tokens, dim)."""
    kv, group = q.shape[0], q.shape[2]
    for t in range(begin, end):
        for h in range(kv):
            for g in range(group):
                _turn(qkv[t, h * group + g], cos[t], sin[t], ONE, scale, q[h, t, g])
            _turn(qkv[t, kv * group + h], cos[t], sin[t], ONE, ONE, k[h, t])
            for j in range(v.shape[2]):
                v[h, t, j] = qkv[t, kv * group + kv + h, j]


@njit(nogil=True, cache=True, fastmath=FAST)
def join_heads(begin, end, dq, dk, dv, cos, sin, scale, out):
    """Undo `split_heads` for gradients: the shapes are its own."""
    kv, group = dq.shape[0], dq.shape[2]
    for t in range(begin, end):
        for h in range(kv):
            for g in range(group):
                _turn(dq[h, t, g], cos[t], sin[t], -ONE, scale, out[t, h * group + g])
            _turn(dk[h, t], cos[t], sin[t], -ONE, ONE, out[t, kv * group + h])
            for j in range(dv.shape[2]):
                out[t, kv * group + kv + h, j] = stored(loaded(dv[h, t, j]), out)


# ---- softmax of one attention tile ---------------------------------------------------------------------------------
# scores (kv, queries · group, keys); row r is query first + r // group, column c is key low + c. A query sees the keys
# up to itself, at most `window` of them. Rows outside are given weight 0.


@register_jitable
def _seen(row, group, first, low, window, keys):
    query = first + row // group
    return max(0, query - window + 1 - low), min(keys, query + 1 - low)


@njit(nogil=True, cache=True, fastmath=FAST)
def softmax_forward(begin, end, scores, group, first, low, window, softcap, log_sums):
    """Turn scores into weights in place, and keep their log-sums, float32 (kv, queries · group)."""
    kv, rows, keys = scores.shape
    for i in range(begin, end):
        row = scores[i // rows, i % rows]
        start, end = _seen(i % rows, group, first, low, window, keys)
        top = np.float32(-np.inf)
        for j in range(start, end):
            top = max(top, loaded(row[j]))
        if softcap > 0:
            top = softcap * tanh(top / softcap)
        total = np.float32(0)
        for j in range(start, end):
            value = loaded(row[j])
            total += exp((softcap * tanh(value / softcap) if softcap > 0 else value) - top)
        log_sum = top + np.log(total)
        log_sums[i // rows, i % rows] = log_sum
        for j in range(start):
            row[j] = stored(np.float32(0), row)
        for j in range(start, end):
            value = loaded(row[j])
            row[j] = stored(exp((softcap * tanh(value / softcap) if softcap > 0 else value) - log_sum), row)
        for j in range(end, keys):
            row[j] = stored(np.float32(0), row)


@njit(nogil=True, cache=True, fastmath=FAST)
def softmax_backward(begin, end, scores, grads, group, first, low, window, softcap, log_sums, drift):
    """Turn scores into weights and the weights' gradients into the scores', both in place.

    With w = softmax(s) and d = Σ w · ∂L/∂w (drift, float32 (kv, queries · group)): ∂L/∂s = w (∂L/∂w − d), times the
    slope of the soft-cap.
    """
    kv, rows, keys = scores.shape
    for i in range(begin, end):
        row, grad = scores[i // rows, i % rows], grads[i // rows, i % rows]
        start, end = _seen(i % rows, group, first, low, window, keys)
        log_sum, shift = log_sums[i // rows, i % rows], drift[i // rows, i % rows]
        for j in range(start):
            row[j] = grad[j] = stored(np.float32(0), row)
        for j in range(start, end):
            value, slope = loaded(row[j]), ONE
            if softcap > 0:
                bent = tanh(value / softcap)
                value, slope = softcap * bent, ONE - bent * bent
            weight = exp(value - log_sum)
            row[j] = stored(weight, row)
            grad[j] = stored(weight * (loaded(grad[j]) - shift) * slope, grad)
        for j in range(end, keys):
            row[j] = grad[j] = stored(np.float32(0), row)


# ---- cross-entropy -------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True, fastmath=FAST)
def cross_entropy(begin, end, logits, targets, softcap, losses, needs_grad):
    """Loss of each row, float32 (rows,); if wanted, turn logits (rows, vocabulary) into their gradient in place."""
    for i in range(begin, end):
        row = logits[i]
        top = np.float32(-np.inf)
        for j in range(row.shape[0]):
            top = max(top, loaded(row[j]))
        if softcap > 0:
            top = softcap * tanh(top / softcap)
        total = np.float32(0)
        for j in range(row.shape[0]):
            value = loaded(row[j])
            total += exp((softcap * tanh(value / softcap) if softcap > 0 else value) - top)
        log_sum = top + np.log(total)
        target = loaded(row[targets[i]])
        bent = tanh(target / softcap) if softcap > 0 else np.float32(0)
        losses[i] = log_sum - (softcap * bent if softcap > 0 else target)
        if needs_grad:
            for j in range(row.shape[0]):
                value, slope = loaded(row[j]), ONE
                if softcap > 0:
                    curve = tanh(value / softcap)
                    value, slope = softcap * curve, ONE - curve * curve
                row[j] = stored(exp(value - log_sum) * slope, row)
            at_target = exp(-losses[i]) - ONE
            row[targets[i]] = stored(at_target * (ONE - bent * bent if softcap > 0 else ONE), row)
