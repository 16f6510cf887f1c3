"""Rows of numbers to blocks of any type: the K types of GGUF too, and with columns of different importance.

The bytes are llama.cpp's own (ggml/src/ggml-quants.c: quantize_q4_K and its like). This module knows arrays, not files.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.torch.block_search import (
    NOTHING,
    Tries,
    search_low,
    search_shares,
    search_symmetric,
    share_of_largest,
)
from thimble.backends.torch.compiled import compiled
from thimble.files.block_encoders import PLAIN, pack, quantize, to_half
from thimble.files.blocks import Bytes, Floats, row_bytes

Array = NDArray[Any]
_F = np.float32
_ROUNDER = np.float32(12582912.0)  # adding and subtracting 1.5 · 2^23 rounds to nearest even
_MOST = {"Q4_1": 15, "Q5_1": 31, "Q4_K": 15, "Q5_K": 31}  # largest whole number of types with a low
_HALF = {"Q4_0": 8, "Q5_0": 16, "Q6_K": 32}  # half the whole numbers of symmetric types
_ALIKE = {"Q4_K": Tries(_F(-1), _F(0.1), 20), "Q5_K": Tries(_F(-0.5), _F(0.1), 15)}  # columns of equal importance
_DIFFERENT = Tries(_F(-0.9), _F(0.05), 36)


def encode(values: Floats, dtype: str, importance: Floats | None = None) -> Bytes:
    """Encode rows of a matrix; the bytes are those of llama.cpp's `ggml_quantize_chunk`.

    Args:
        values: Finite float32 (rows, columns).
        dtype: One of ENCODABLE; a row must be whole blocks of it.
        importance: Mean square of what comes in at each column, float32 (columns,): errors there weigh as much. None
            if all are alike; types that have no use for it leave it aside.

    Returns:
        uint8 (rows, bytes per row).

    Raises:
        BaseModelError: If a number does not fit the type, or a row is not whole blocks.
    """
    row_bytes(values.shape[1], dtype)
    if dtype in PLAIN and (importance is None or dtype not in (*_MOST, *_HALF)):
        return quantize(values, dtype)
    values = np.ascontiguousarray(values, np.float32)
    find = {"Q4_K": _k_blocks, "Q5_K": _k_blocks, "Q6_K": _q6_k_blocks, "Q4_0": _symmetric_blocks,
            "Q5_0": _symmetric_blocks, "Q4_1": _low_blocks, "Q5_1": _low_blocks}[dtype]  # fmt: skip
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused as a scale
        return find(values, dtype, importance).view(np.uint8).reshape(len(values), -1)


ENCODABLE = (*PLAIN, "Q4_K", "Q5_K", "Q6_K")


# ---- the types ------------------------------------------------------------------------------------------------------


def _symmetric_blocks(values: Floats, dtype: str, importance: Floats | None) -> Array:
    """Q4_0 and Q5_0: w = scale · (q - half)."""
    groups = values.reshape(-1, 32)
    scales, rates = search_symmetric(groups, _weights(values, importance, values.shape[1], 1), _HALF[dtype])
    return pack(dtype, _quants(groups, rates, low=-_HALF[dtype]), scale=to_half(scales))


def _low_blocks(values: Floats, dtype: str, importance: Floats | None) -> Array:
    """Q4_1 and Q5_1: w = scale · q + low."""
    groups = values.reshape(-1, 32)
    found = search_low(groups, _weights(values, importance, values.shape[1], 1), _MOST[dtype], _DIFFERENT)
    quants = _quants(groups, found.rates, found.starts, most=_MOST[dtype])
    return pack(dtype, quants, scale=to_half(found.scales), low=to_half(-found.depths))


def _k_blocks(values: Floats, dtype: str, importance: Floats | None) -> Array:
    """Q4_K and Q5_K: w = scale · scalesᵢ · q - low · lowsᵢ, for eight runs of 32 values."""
    groups, most = values.reshape(-1, 32), _MOST[dtype]
    tries = _ALIKE[dtype] if importance is None else _DIFFERENT
    found = search_low(groups, _weights(values, importance, 256, 2), most, tries)
    sides = []
    for sizes in (found.scales.reshape(-1, 8), found.depths.reshape(-1, 8)):
        if importance is None:
            top, whole = share_of_largest(sizes)
        else:
            top, whole = search_shares(sizes, found.sums.reshape(-1, 8))
        sides.append((to_half(top), whole))
    (scale, scales), (low, lows) = sides
    steps, shifts = (top.astype(np.float32)[:, None] * whole.astype(np.float32) for top, whole in sides)
    quants = _quants(groups, found.rates, found.starts, steps.reshape(-1), shifts.reshape(-1), most=most)
    return pack(dtype, quants.reshape(-1, 256), scale=scale, low=low, scales=scales, lows=lows)


def _q6_k_blocks(values: Floats, dtype: str, importance: Floats | None) -> Array:
    """Q6_K: w = scale · scalesᵢ · (q - 32), for sixteen runs of 16 values."""
    groups = values.reshape(-1, 16)
    weights = groups * groups if importance is None else _repeated(importance, values, 16)
    found, rates = search_symmetric(groups, weights, 32)
    sizes = found.reshape(-1, 16)
    top = np.take_along_axis(sizes, np.abs(sizes).argmax(1)[:, None], 1)[:, 0]
    is_zero = np.abs(top) < NOTHING
    rate = np.divide(_F(-128), top, out=np.zeros_like(top), where=~is_zero)
    scale = to_half(np.divide(_F(1), rate, out=np.zeros_like(top), where=~is_zero))
    scales = np.rint(rate[:, None] * sizes).clip(-128, 127).astype(np.int8)
    steps = scale.astype(np.float32)[:, None] * scales.astype(np.float32)
    quants = _quants(groups, rates, steps=steps.reshape(-1), low=-32, most=31).reshape(-1, 256)
    quants[is_zero] = 0
    return pack(dtype, quants, scale=scale, scales=scales)


# ---- weights of errors ----------------------------------------------------------------------------------------------


def _weights(values: Floats, importance: Floats | None, run: int, factor: int) -> Floats:
    """How much the square of each error counts, float32 (groups, 32), as llama.cpp weighs it.

    importance · √(σ² + w²), where σ² is `factor` times the mean square of a run of values; without importance
    √(mean square of the group) + |w|.
    """
    groups = values.reshape(-1, 32)
    if importance is None:
        return np.asarray(np.sqrt(_mean_squares(groups))[:, None] + np.abs(groups))
    sigma = np.repeat(_F(factor) * _mean_squares(values.reshape(-1, run)), run // 32)[:, None]
    return np.asarray(_repeated(importance, values, 32) * np.sqrt(sigma + groups * groups))


def _repeated(importance: Floats, values: Floats, size: int) -> Floats:
    return np.broadcast_to(importance.astype(np.float32), values.shape).reshape(-1, size)


def _mean_squares(rows: Floats) -> Floats:
    means = np.empty(len(rows), np.float32)
    _add_squares(rows, means)
    return means


@compiled(nogil=True)
def _add_squares(rows, means):
    for row in range(rows.shape[0]):
        total = _F(0)
        for column in range(rows.shape[1]):
            total += rows[row, column] * rows[row, column]
        means[row] = total / _F(rows.shape[1])


# ---- whole numbers for known scales ---------------------------------------------------------------------------------


def _quants(
    groups: Floats, rates: Floats, starts: Floats | None = None, steps: Floats | None = None,
    shifts: Floats | None = None, low: int = 0, most: int | None = None,
) -> Bytes:  # fmt: skip
    """Round to whole numbers between `low` and `most`, counted from `low`: uint8 like `groups`.

    By the rounded scales, q = (w + shift) / step, or as the search left them where a step is zero or there are none:
    q = rate · (w - start).
    """
    none = np.zeros(len(groups), np.float32)
    starts, steps, shifts = (none if given is None else given for given in (starts, steps, shifts))
    quants = np.empty(groups.shape, np.uint8)
    _round(groups, rates, starts, steps, shifts, _F(low), _F(-low - 1 if most is None else most), quants)
    return quants


@compiled(nogil=True, error_model="numpy")
def _round(groups, rates, starts, steps, shifts, low, most, quants):
    for row in range(groups.shape[0]):
        rate, start, step, shift = rates[row], starts[row], steps[row], shifts[row]
        for column in range(groups.shape[1]):
            value = groups[row, column]
            exact = (value + shift) / step if step != 0 else rate * (value - start)
            quant = min(max((exact + _ROUNDER) - _ROUNDER, low), most) - low
            quants[row, column] = np.uint8(np.int32(quant)) if step != 0 or rate != 0 else np.uint8(0)
