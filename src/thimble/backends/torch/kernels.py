"""Compiled loops over weights: blocks of a file to numbers, numbers to int8 rows and back.

The loops are numba's: compiled when first called (a few tenths of a second each), then cached on disk if that can be.
`thimble.files.blocks` holds the same formulas in numpy, and the tests hold the two equal bit for bit. This module
knows nothing of torch, files or layers.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from thimble.backends.torch.compiled import compiled
from thimble.backends.torch.threads import parallel_for
from thimble.backends.torch.vectors import BYTE, FLOAT, INT, LONG, SHORT, Lanes, bits_of, from_bits, loaded, stored
from thimble.files.blocks import IQ4_VALUES, LAYOUTS, TINY, block_of, row_bytes

Array = NDArray[Any]

# Lanes of a type that has no blocks: any number would do, this one fills the registers.
_PLAIN_LANES = 32


class Block:
    """One block of a file in a program being written."""

    def __init__(self, builder: ir.IRBuilder, start: ir.Value, layout: np.dtype[Any], lanes: int) -> None:
        self.builder, self.start, self.layout, self.lanes = builder, start, layout, lanes

    def _load(self, name: str, skip: int, kind: ir.Type) -> Lanes:
        at = self.builder.gep(self.start, [LONG(self.layout.fields[name][1] + skip)])
        # A block may lie anywhere in the file, so nothing is known of its alignment.
        return Lanes(self.builder, self.builder.load(self.builder.bitcast(at, kind.as_pointer()), align=1))

    def bytes(self, name: str, count: int, skip: int = 0) -> Lanes:
        """`count` bytes of a field, after `skip` others."""
        return self._load(name, skip, ir.VectorType(BYTE, count))

    def word(self, name: str) -> Lanes:
        """A field of four bytes, a single int32."""
        return self._load(name, 0, INT)

    def half(self, name: str) -> Lanes:
        """A float16 field as a single float32."""
        return self._load(name, 0, SHORT).from_half()

    def plain(self, element: ir.Type) -> Lanes:
        """As many numbers as there are lanes, for types without blocks."""
        return self._load("bits", 0, ir.VectorType(element, self.lanes))


# One block -> its numbers, in order, a few float32 lanes at a time. Each product and sum is rounded on its own, as in
# the numpy reference, where the formulas are explained.

Program = Iterator[Lanes]


def _f32(block: Block) -> Program:
    yield block.plain(INT).from_bits().quiet()


def _f16(block: Block) -> Program:
    yield block.plain(SHORT).from_half()


def _bf16(block: Block) -> Program:
    yield (block.plain(SHORT).widen() << 16).from_bits()


def _q8_0(block: Block) -> Program:
    yield block.bytes("quants", 32).widen_signed().to_float() * block.half("scale")


def nibbles(packed: Lanes) -> tuple[Lanes, Lanes]:
    """The lower and the upper four bits of bytes."""
    return packed & 15, packed >> 4


def _q4_0(block: Block) -> Program:
    scale = block.half("scale")
    for quants in nibbles(block.bytes("quants", 16)):
        yield (quants.widen() - 8).to_float() * scale


def _q4_1(block: Block) -> Program:
    scale, low = block.half("scale"), block.half("low")
    for quants in nibbles(block.bytes("quants", 16)):
        yield quants.widen().to_float() * scale + low


def _five_bits(block: Block) -> Program:
    high = block.word("high").pick([0] * 32)
    fifth = ((high >> range(32)) & 1) << 4
    for half, quants in enumerate(nibbles(block.bytes("quants", 16))):
        yield quants.widen() | fifth.pick(range(16 * half, 16 * half + 16))


def _q5_0(block: Block) -> Program:
    scale = block.half("scale")
    for quants in _five_bits(block):
        yield (quants - 16).to_float() * scale


def _q5_1(block: Block) -> Program:
    scale, low = block.half("scale"), block.half("low")
    for quants in _five_bits(block):
        yield quants.to_float() * scale + low


def sub_scales(block: Block) -> tuple[Lanes, Lanes]:
    """Scales and lows of the eight runs of a K block, float32."""
    first, second, rest = (block.bytes("scales", 4, skip) for skip in (0, 4, 8))
    scales = (first & 63).join((rest & 15) | ((first >> 6) << 4))
    lows = (second & 63).join((rest >> 4) | ((second >> 6) << 4))
    return scales.widen().to_float() * block.half("scale"), lows.widen().to_float() * block.half("low")


def _q4_k(block: Block) -> Program:
    scales, lows = sub_scales(block)
    for run in range(8):
        quants = nibbles(block.bytes("quants", 32, run // 2 * 32))[run % 2]
        yield quants.widen().to_float() * scales.pick([run] * 32) - lows.pick([run] * 32)


def _q5_k(block: Block) -> Program:
    scales, lows = sub_scales(block)
    for run in range(8):
        quants = nibbles(block.bytes("quants", 32, run // 2 * 32))[run % 2]
        quants = quants | (((block.bytes("high", 32) >> run) & 1) << 4)
        yield quants.widen().to_float() * scales.pick([run] * 32) - lows.pick([run] * 32)


def _q6_k(block: Block) -> Program:
    scales = block.bytes("scales", 16).widen_signed().to_float() * block.half("scale")
    for half in range(2):
        high = block.bytes("high", 32, 32 * half)
        for quarter in range(4):
            quants = nibbles(block.bytes("quants", 32, 64 * half + quarter % 2 * 32))[quarter // 2]
            quants = quants | (((high >> (2 * quarter)) & 3) << 4)
            run = 8 * half + 2 * quarter
            yield (quants.widen() - 32).to_float() * scales.pick([run] * 16 + [run + 1] * 16)


def two_bits(block: Block, run: int) -> Lanes:
    """q of a run of 32 values of Q2_K and of the lower bits of Q3_K."""
    return (block.bytes("quants", 32, run // 4 * 32) >> (run % 4 * 2)) & 3


def _q2_k(block: Block) -> Program:
    packed = block.bytes("scales", 16)
    scales = (packed & 15).widen().to_float() * block.half("scale")
    lows = (packed >> 4).widen().to_float() * block.half("low")
    for run in range(8):
        both = [2 * run] * 16 + [2 * run + 1] * 16
        yield two_bits(block, run).widen().to_float() * scales.pick(both) - lows.pick(both)


def q3_scales(block: Block) -> Lanes:
    """Scales of the sixteen runs of a block of Q3_K, float32."""
    first, second, upper = (block.bytes("scales", 4, skip) for skip in (0, 4, 8))
    lower = first.join(second)
    upper = (upper.pick([0, 1, 2, 3] * 4) >> [place // 4 * 2 for place in range(16)]) & 3
    scales = (lower & 15).join(lower >> 4) | (upper << 4)
    return (scales.widen() - 32).to_float() * block.half("scale")


def three_bits(block: Block, run: int) -> Lanes:
    """q in 0..7 of a run of 32 values of Q3_K."""
    return two_bits(block, run) | (((block.bytes("high", 32) >> run) & 1) << 2)


def _q3_k(block: Block) -> Program:
    scales = q3_scales(block)
    for run in range(8):
        both = [2 * run] * 16 + [2 * run + 1] * 16
        yield (three_bits(block, run).widen() - 4).to_float() * scales.pick(both)


def iq4_values(block: Block, run: int = 0) -> tuple[Lanes, Lanes]:
    """What the numbers of a run of 32 values of IQ4_NL or IQ4_XS stand for, signed bytes in two halves."""
    low, high = nibbles(block.bytes("quants", 16, run * 16))
    return low.look_up(IQ4_VALUES), high.look_up(IQ4_VALUES)


def _iq4_nl(block: Block) -> Program:
    scale = block.half("scale")
    for values in iq4_values(block):
        yield values.widen_signed().to_float() * scale


def iq4_scales(block: Block) -> Lanes:
    """Scales of the eight runs of a block of IQ4_XS, float32."""
    upper = (block.bytes("scales", 4).pick([0] * 4 + [1] * 4) >> [0, 2, 4, 6] * 2) & 3
    lower = (block.bytes("scales", 4, 2).pick([0, 0, 1, 1, 2, 2, 3, 3]) >> [0, 4] * 4) & 15
    return ((lower | (upper << 4)).widen() - 32).to_float() * block.half("scale")


def _iq4_xs(block: Block) -> Program:
    scales = iq4_scales(block)
    for run in range(8):
        for values in iq4_values(block, run):
            yield values.widen_signed().to_float() * scales.pick([run] * 16)


DECODERS: dict[str, Callable[[Block], Program]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0,
    "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "Q2_K": _q2_k, "Q3_K": _q3_k, "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}  # fmt: skip


@intrinsic(prefer_literal=True)
def _decode_block(typing_context, dtype, lanes, row, at, out, to):
    """Decode the block of type `dtype` at byte `at` of row, to `out[to:]`; both rows are one-dimensional arrays."""

    def write(context, builder, signature, arguments):
        _, _, row_value, at_value, out_value, to_value = arguments
        source = context.make_array(signature.args[2])(context, builder, row_value).data
        target = context.make_array(signature.args[4])(context, builder, out_value).data
        target = builder.gep(target, [to_value])
        start = builder.gep(builder.bitcast(source, BYTE.as_pointer()), [at_value])
        block = Block(builder, start, LAYOUTS[dtype.literal_value], lanes.literal_value)
        for values in DECODERS[dtype.literal_value](block):
            _store(values if out.dtype == types.float32 else values.bfloat16(), target)
            target = builder.gep(target, [LONG(values.count)])
        return context.get_dummy_value()

    return types.none(dtype, lanes, row, types.intp, out, types.intp), write


def _store(values: Lanes, target: ir.Value) -> None:
    size = 4 if values.element == FLOAT else 2
    values.builder.store(values.value, values.builder.bitcast(target, values.value.type.as_pointer()), align=size)


@functools.cache
def _decode_kernel(dtype: str, lanes: int) -> Callable[..., None]:
    """Make the loop over the blocks of one type. It closes over plain values only: numba can cache nothing else."""
    values, size = block_of(dtype)
    values, size = values * lanes, size * lanes

    @compiled(nogil=True)
    def decode(begin, end, raw, index, out):
        for i in range(begin, end):
            row, to = raw[index[i]], out[i]
            for block in range(row.size // size):
                _decode_block(dtype, lanes, row, block * size, to, block * values)

    return decode


def decode_rows(raw: NDArray[np.uint8], dtype: str, out: Array, index: NDArray[np.int64] | None = None) -> None:
    """Decode rows of a matrix: row i of `out`, float32 or bfloat16 as uint16, is row index[i] of the file.

    raw: uint8 (rows, bytes per row), contiguous; may be a view of a memory map. Without an index, the first rows.
    """
    rows, columns = out.shape
    index = np.arange(rows) if index is None else index
    if not (raw.shape[1] == row_bytes(columns, dtype)):
        raise AssertionError(f"{raw.shape} bytes of {dtype} do not make {out.shape}")
    if not (out.flags.c_contiguous):
        raise AssertionError(f"out of shape {out.shape} is not contiguous")
    if not (index.shape == (rows,)):
        raise AssertionError(f"an index of {index.shape} does not fit {out.shape}")
    if not (rows == 0 or 0 <= index.min() <= index.max() < len(raw)):
        raise AssertionError(f"the index leaves the {len(raw)} rows of the file")
    lanes = _PLAIN_LANES if block_of(dtype)[0] == 1 and columns % _PLAIN_LANES == 0 else 1
    parallel_for(rows, columns, _decode_kernel(dtype, lanes), _read_only(raw), index, out)


def _read_only(array: Array) -> Array:
    """View an array as read-only, like a memory map, so that one compiled version serves every caller."""
    view = array.view()
    view.flags.writeable = False
    return view


# int8 rows


# Adding 1.5 · 2^23 to a float32 leaves, in its lower bits, the number rounded to nearest even as an integer.
_ROUNDER = np.float32(12582912.0)


@compiled(nogil=True)
def _quantize(begin, end, x, factor, q, scale):
    for i in range(begin, end):
        largest = np.int32(0)
        for j in range(x.shape[1]):
            # Positive floats are ordered like their bits, and a NaN is above them all: none goes unnoticed.
            largest = max(largest, bits_of(loaded(x[i, j]) * factor[j]) & np.int32(0x7FFFFFFF))
        size = from_bits(largest)
        is_zero = size < TINY
        scale[i] = np.float32(0) if is_zero else size / np.float32(127)
        inverse = np.float32(0) if is_zero else np.float32(127) / size
        for j in range(x.shape[1]):
            q[i, j] = np.int8(bits_of(loaded(x[i, j]) * factor[j] * inverse + _ROUNDER) - bits_of(_ROUNDER))


@compiled(nogil=True)
def _dequantize(begin, end, q, scale, out):
    for i in range(begin, end):
        for j in range(q.shape[1]):
            out[i, j] = stored(np.float32(np.int32(q[i, j])) * scale[i], out)


def quantize_rows_into(
    x: Array, q: NDArray[np.int8], scale: NDArray[np.float32], factor: NDArray[np.float32] | None = None
) -> None:
    """Write rows as int8 with one scale each; see `thimble.files.blocks.quantize_rows`.

    x (rows, n) is float32 or uint16 (bfloat16); each column is multiplied by its own factor first. A NaN or infinity
    makes the scale of its row one too.
    """
    if not ((*scale.shape, x.shape[1]) == x.shape == q.shape):
        raise AssertionError(f"{x.shape}, {q.shape} and {scale.shape} do not agree")
    factor = np.ones(x.shape[1], np.float32) if factor is None else factor
    parallel_for(*x.shape, _quantize, _read_only(x), _read_only(factor), q, scale)


@compiled(nogil=True)
def _rescale(begin, end, sums, row_scale, column_scale, out, first):
    for i in range(begin, end):
        to = out[i, first : first + sums.shape[1]]
        for j in range(to.shape[0]):
            to[j] = stored(np.float32(sums[i, j]) * row_scale[i] * column_scale[j], out)


def rescale_into(
    sums: NDArray[np.int32], row_scale: NDArray[np.float32], column_scale: NDArray[np.float32], out: Array,
    first_column: int = 0,
) -> None:  # fmt: skip
    """Write a product of int8 matrices, int32 (rows, n), as numbers to columns of `out`, float32 or uint16 (bfloat16).

    They are sums[i, j] · row_scale[i] · column_scale[j].
    """
    if not ((*row_scale.shape, *column_scale.shape) == sums.shape):
        raise AssertionError(f"the scales do not fit {sums.shape}")
    if not (len(out) == len(sums)):
        raise AssertionError(f"{out.shape} has not the rows of {sums.shape}")
    if not (0 <= first_column <= out.shape[1] - sums.shape[1]):
        raise AssertionError(f"{sums.shape} leaves {out.shape} at {first_column}")
    parallel_for(*sums.shape, _rescale, sums, row_scale, _read_only(column_scale), out, first_column)


def dequantize_rows_into(q: NDArray[np.int8], scale: NDArray[np.float32], out: Array) -> None:
    """Write q · scale, the inverse of `quantize_rows_into`, as float32 or uint16 (bfloat16)."""
    if not ((*scale.shape, q.shape[1]) == q.shape == out.shape):
        raise AssertionError(f"{q.shape}, {scale.shape} and {out.shape} do not agree")
    parallel_for(*q.shape, _dequantize, _read_only(q), _read_only(scale), out)
