"""The search for the scales of blocks: which rounding ends in the least weighted error.

The search is llama.cpp's (ggml/src/ggml-quants.c: make_qx_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants),
in its order of float32 operations, so the results are the same bits. Many groups of values are searched at once, side
by side in vector registers, which the original does one after the other.
"""

from typing import NamedTuple

import numpy as np

from thimble.backends.torch.compiled import compiled
from thimble.files.blocks import TINY, Bytes, Floats

_F = np.float32
_LANES = 64  # groups side by side; what they need fits the first cache
NOTHING = np.float32(1e-15)  # numbers below are zeros (GROUP_MAX_EPS)
_ROUNDER = np.float32(12582912.0)  # adding and subtracting 1.5 · 2^23 rounds to nearest even
# Places in the workspace of a search, each of _LANES numbers.
_LOW, _HIGH, _WEIGHT, _SUM, _SCALE, _BEST, _RATE, _START, _TRIED, _ERROR, _ONES, _SQUARES, _CROSS, _NEW_LOW = (
    place * _LANES for place in range(14)
)


class Tries(NamedTuple):
    """Which steps a search for scale and low tries: (most + first + delta · t) / range, t = 0 ... count."""

    first: np.float32
    delta: np.float32
    count: int


# ---- symmetric types: one scale -------------------------------------------------------------------------------------


def search_symmetric(groups: Floats, weights: Floats, half: int) -> tuple[Floats, Floats]:
    """Scales with the least weighted error, and what was multiplied by before rounding: both float32 (groups,)."""
    scales, rates = np.empty((2, len(groups)), np.float32)
    _fit_symmetric(groups, weights, _F(half), scales, rates)
    return scales, rates


@compiled(nogil=True, error_model="numpy")
def _fit_symmetric(groups, weights, half, scales, rates):
    size = groups.shape[1]
    data, state = np.empty(2 * size * _LANES, np.float32), np.empty(14 * _LANES, np.float32)
    for begin in range(0, groups.shape[0], _LANES):
        count = min(_LANES, groups.shape[0] - begin)
        _load(groups, weights, begin, count, data)
        _find_extreme(data, size, state)
        for number in range(19):  # 0, then -9 ... 9 without 0
            step = 0 if number == 0 else number - 10 if number < 10 else number - 9
            _try_rate(data, size, half, -(half + _F(0.1) * _F(step)), number == 0, state)
        for lane in range(count):
            is_zero = state[_LOW + lane] < NOTHING
            scales[begin + lane] = _F(0) if is_zero else state[_SCALE + lane]
            rates[begin + lane] = _F(0) if is_zero else state[_RATE + lane]


@compiled(nogil=True, error_model="numpy")
def _find_extreme(data, size, state):
    """The first value of largest size of each group, to _HIGH, and its size, to _LOW."""
    for lane in range(_LANES):
        state[_LOW + lane] = _F(0)
        state[_HIGH + lane] = _F(0)
    for i in range(size):
        for lane in range(_LANES):
            value = data[2 * i * _LANES + lane]
            is_larger = abs(value) > state[_LOW + lane]
            state[_LOW + lane] = abs(value) if is_larger else state[_LOW + lane]
            state[_HIGH + lane] = value if is_larger else state[_HIGH + lane]


@compiled(nogil=True, error_model="numpy")
def _try_rate(data, size, half, target, is_first, state):
    """Round with one rate, fit the scale by least squares, and keep both if no better is known."""
    for lane in range(_LANES):
        state[_TRIED + lane] = target / state[_HIGH + lane]
        state[_CROSS + lane] = _F(0)
        state[_SQUARES + lane] = _F(0)
    for i in range(size):
        for lane in range(_LANES):
            value, weight = data[2 * i * _LANES + lane], data[(2 * i + 1) * _LANES + lane]
            quant = (state[_TRIED + lane] * value + _ROUNDER) - _ROUNDER
            quant = min(max(quant, -half), half - _F(1))
            state[_CROSS + lane] += weight * value * quant
            state[_SQUARES + lane] += weight * quant * quant
    for lane in range(_LANES):
        cross, squares = state[_CROSS + lane], state[_SQUARES + lane]
        scale = cross / squares if squares > 0 else _F(0)
        is_better = is_first or (squares > 0) & (cross * cross > state[_BEST + lane] * squares)
        state[_SCALE + lane] = scale if is_better else state[_SCALE + lane]
        state[_BEST + lane] = scale * cross if is_better else state[_BEST + lane]
        state[_RATE + lane] = state[_TRIED + lane] if is_better else state[_RATE + lane]


# ---- types with a low: scale and low --------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a search found for each group: float32 (groups,) each, in the order of the rows that `_fit_low` writes.

    w is about scale · q - depth.
    """

    scales: Floats
    depths: Floats
    rates: Floats
    starts: Floats  # q = rate · (w - start), rounded
    sums: Floats  # of the weights


def search_low(groups: Floats, weights: Floats, most: int, tries: Tries) -> Found:
    """Scales and lows of least weighted error, with q = 0 ... most: groups and weights are float32 (groups, 32)."""
    found = np.empty((5, len(groups)), np.float32)
    _fit_low(groups, weights, _F(most), tries.first, tries.delta, tries.count, found)
    return Found(*found)


@compiled(nogil=True, error_model="numpy")
def _fit_low(groups, weights, most, first, delta, count, found):
    size = groups.shape[1]
    data, state = np.empty(2 * size * _LANES, np.float32), np.empty(14 * _LANES, np.float32)
    for begin in range(0, groups.shape[0], _LANES):
        num_lanes = min(_LANES, groups.shape[0] - begin)
        _load(groups, weights, begin, num_lanes, data)
        _find_range(data, size, most, state)
        for lane in range(_LANES):
            state[_TRIED + lane] = state[_RATE + lane]
        _add_errors(data, size, most, _SCALE, _LOW, state)
        for lane in range(_LANES):
            state[_BEST + lane] = state[_ERROR + lane]
        for number in range(count + 1):
            _fit_line(data, size, most, first + delta * _F(number) + most, state)
            _add_errors(data, size, most, _ONES, _NEW_LOW, state)
            _keep_better(state)
        for lane in range(num_lanes):
            found[0, begin + lane] = state[_SCALE + lane]
            found[1, begin + lane] = -state[_LOW + lane]
            found[2, begin + lane] = state[_RATE + lane]
            found[3, begin + lane] = state[_START + lane]
            found[4, begin + lane] = state[_WEIGHT + lane]


@compiled(nogil=True)
def _load(groups, weights, begin, count, data):
    """Set the values and weights of some groups side by side; the last group fills lanes that have none."""
    for lane in range(_LANES):
        row = begin + min(lane, count - 1)
        for i in range(groups.shape[1]):
            data[2 * i * _LANES + lane] = groups[row, i]
            data[(2 * i + 1) * _LANES + lane] = weights[row, i]


@compiled(nogil=True, error_model="numpy")
def _find_range(data, size, most, state):
    """Lowest value (at most 0), highest value and weighted sums of each group, and the scale that spans them."""
    for lane in range(_LANES):
        state[_LOW + lane] = state[_HIGH + lane] = data[lane]
        state[_WEIGHT + lane] = data[_LANES + lane]
        state[_SUM + lane] = data[_LANES + lane] * data[lane]
    for i in range(1, size):
        for lane in range(_LANES):
            value, weight = data[2 * i * _LANES + lane], data[(2 * i + 1) * _LANES + lane]
            state[_LOW + lane] = value if value < state[_LOW + lane] else state[_LOW + lane]
            state[_HIGH + lane] = value if value > state[_HIGH + lane] else state[_HIGH + lane]
            state[_WEIGHT + lane] += weight
            state[_SUM + lane] += weight * value
    for lane in range(_LANES):
        low = state[_LOW + lane] if state[_LOW + lane] < 0 else _F(0)
        span = state[_HIGH + lane] - low
        state[_LOW + lane] = state[_START + lane] = low
        state[_RATE + lane] = most / span if span > TINY else _F(0)
        state[_SCALE + lane] = _F(1) / state[_RATE + lane] if span > TINY else _F(0)


@compiled(nogil=True, error_model="numpy")
def _fit_line(data, size, most, target, state):
    """Round with one rate, and fit scale (to _ONES) and low (to _NEW_LOW) by weighted least squares."""
    for lane in range(_LANES):
        span = state[_HIGH + lane] - state[_LOW + lane]
        state[_TRIED + lane] = target / span if span > TINY else _F(0)
        state[_ONES + lane] = state[_SQUARES + lane] = state[_CROSS + lane] = _F(0)
    for i in range(size):
        for lane in range(_LANES):
            value, weight = data[2 * i * _LANES + lane], data[(2 * i + 1) * _LANES + lane]
            quant = (state[_TRIED + lane] * (value - state[_LOW + lane]) + _ROUNDER) - _ROUNDER
            weighted = weight * min(max(quant, _F(0)), most)
            state[_ONES + lane] += weighted
            state[_SQUARES + lane] += weighted * min(max(quant, _F(0)), most)
            state[_CROSS + lane] += weighted * value
    for lane in range(_LANES):
        ones, squares, cross = state[_ONES + lane], state[_SQUARES + lane], state[_CROSS + lane]
        weight, total = state[_WEIGHT + lane], state[_SUM + lane]
        spread = weight * squares - ones * ones
        low = (squares * total - ones * cross) / spread
        scale = (weight * cross - total * ones) / spread
        state[_ONES + lane] = cross / squares if low > 0 else scale
        state[_NEW_LOW + lane] = _F(0) if low > 0 else low
        state[_SQUARES + lane] = spread


@compiled(nogil=True, error_model="numpy")
def _add_errors(data, size, most, scale, low, state):
    """Weighted squares of the errors that the rate in _TRIED ends in, with the scale and low at some places."""
    for lane in range(_LANES):
        state[_ERROR + lane] = _F(0)
    for i in range(size):
        for lane in range(_LANES):
            value, weight = data[2 * i * _LANES + lane], data[(2 * i + 1) * _LANES + lane]
            quant = (state[_TRIED + lane] * (value - state[_LOW + lane]) + _ROUNDER) - _ROUNDER
            error = state[scale + lane] * min(max(quant, _F(0)), most) + state[low + lane] - value
            state[_ERROR + lane] += weight * (error * error)


@compiled(nogil=True)
def _keep_better(state):
    for lane in range(_LANES):
        is_better = (state[_SQUARES + lane] > 0) & (state[_ERROR + lane] < state[_BEST + lane])
        state[_BEST + lane] = state[_ERROR + lane] if is_better else state[_BEST + lane]
        state[_SCALE + lane] = state[_ONES + lane] if is_better else state[_SCALE + lane]
        state[_RATE + lane] = state[_TRIED + lane] if is_better else state[_RATE + lane]
        state[_START + lane] = state[_LOW + lane] if is_better else state[_START + lane]
        state[_LOW + lane] = state[_NEW_LOW + lane] if is_better else state[_LOW + lane]


# ---- the scales of a block as whole numbers -------------------------------------------------------------------------


def share_of_largest(sizes: Floats) -> tuple[Floats, Bytes]:
    """Sizes, float32 (blocks, 8), as 63rds of the largest: the unit (blocks,) and whole numbers (blocks, 8)."""
    largest = sizes.max(1) + _F(0)  # -0 becomes 0
    rate = np.divide(_F(63), largest, out=np.zeros_like(largest), where=largest > TINY)
    whole = np.rint(rate[:, None] * sizes).clip(0, 63).astype(np.uint8)
    return largest / _F(63), whole


def search_shares(sizes: Floats, weights: Floats) -> tuple[Floats, Bytes]:
    """The same, with the unit of least weighted error."""
    units, whole = np.empty(len(sizes), np.float32), np.zeros(sizes.shape, np.float32)
    _fit_shares(sizes, weights, units, whole)
    return units, whole.astype(np.uint8)


@compiled(nogil=True, error_model="numpy")
def _fit_shares(sizes, weights, units, whole):
    for block in range(sizes.shape[0]):
        size, weight, quants = sizes[block], weights[block], whole[block]
        largest = size.max()
        if largest < NOTHING:
            units[block] = _F(0)
            continue
        rate = _best_rate(size, weight, largest)
        cross = squares = _F(0)
        for i in range(8):
            quants[i] = min((rate * size[i] + _ROUNDER) - _ROUNDER, _F(63))
            cross += weight[i] * size[i] * quants[i]
            squares += weight[i] * quants[i] * quants[i]
        units[block] = _improved(size, weight, quants, cross, squares)


@compiled(nogil=True, error_model="numpy")
def _best_rate(size, weight, largest):
    best, best_error = _F(63) / largest, _F(0)
    for number in range(9):  # 0, then -4 ... 4 without 0
        step = 0 if number == 0 else number - 5 if number < 5 else number - 4
        rate = (_F(0.1) * _F(step) + _F(63)) / largest
        unit, error = _F(1) / rate, _F(0)
        for i in range(8):
            quant = (rate * size[i] + _ROUNDER) - _ROUNDER
            difference = size[i] - unit * (quant if number == 0 else min(quant, _F(63)))
            error += weight[i] * difference * difference
        if number == 0 or error < best_error:
            best, best_error = rate, error
    return best


@compiled(nogil=True, error_model="numpy")
def _improved(size, weight, quants, cross, squares):
    """Move single numbers while the fit gets better, at most five rounds; returns the unit."""
    for _ in range(5):
        has_changed = False
        for i in range(8):
            without = cross - weight[i] * size[i] * quants[i]
            without_squares = squares - weight[i] * quants[i] * quants[i]
            if without > 0 and without_squares > 0:
                quant = min((size[i] * without_squares / without + _ROUNDER) - _ROUNDER, _F(63))
                if quant != quants[i]:
                    without += weight[i] * size[i] * quant
                    without_squares += weight[i] * quant * quant
                    if without * without * squares > cross * cross * without_squares:
                        quants[i], cross, squares = quant, without, without_squares
                        has_changed = True
        if not has_changed:
            break
    return cross / squares if squares > 0 else _F(0)
