"""Compiled loops over weights: blocks of a file to numbers, numbers to int8 rows and back.

The loops are numba's: compiled when first called (a few tenths of a second each), then cached on disk. What happens to
one block is written as vector instructions that LLVM fits to the processor, because its own vectoriser gives up on
half of the block types. bfloat16 is kept as uint16, the upper half of a float32. `thimble.core.quantize` holds the same
formulas in numpy, and the tests hold the two equal bit for bit. This module knows nothing of torch, files or layers.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from thimble.core.quantize import LAYOUTS, TINY, block_of, row_bytes

Array = NDArray[Any]

_BYTE, _SHORT, _INT, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()

# Lanes of a type that has no blocks: any number would do, this one fills the registers.
_PLAIN_LANES = 32

# Numbers that one thread handles at a time: enough to outweigh the hand-over, few enough to share out evenly.
_PIECE = 1 << 19


class _Lanes:
    """Numbers side by side, or a single one, in a program being written: each operator adds one instruction."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value
        self.count = getattr(value.type, "count", None)
        self.element = getattr(value.type, "element", value.type)

    def _new(self, value: ir.Value) -> Self:
        return type(self)(self.builder, value)

    def _typed(self, element: ir.Type) -> ir.Type:
        return element if self.count is None else ir.VectorType(element, self.count)

    def _match(self, other: "_Lanes | Sequence[int] | int | float") -> ir.Value:
        """Give `other` as many lanes as there are here: a constant or a single number is repeated."""
        if not isinstance(other, _Lanes):
            lanes = list(other) if isinstance(other, Sequence) else [other] * (self.count or 1)
            return ir.Constant(self.value.type, lanes if self.count else lanes[0])
        return other.value if other.count == self.count else other.pick([0] * self.count).value

    def __and__(self, other: Any) -> Self:
        return self._new(self.builder.and_(self.value, self._match(other)))

    def __or__(self, other: Any) -> Self:
        return self._new(self.builder.or_(self.value, self._match(other)))

    def __rshift__(self, other: Any) -> Self:
        return self._new(self.builder.lshr(self.value, self._match(other)))

    def __lshift__(self, other: Any) -> Self:
        return self._new(self.builder.shl(self.value, self._match(other)))

    def __add__(self, other: Any) -> Self:
        add = self.builder.fadd if self.element == _FLOAT else self.builder.add
        return self._new(add(self.value, self._match(other)))

    def __sub__(self, other: Any) -> Self:
        subtract = self.builder.fsub if self.element == _FLOAT else self.builder.sub
        return self._new(subtract(self.value, self._match(other)))

    def __mul__(self, other: Any) -> Self:
        return self._new(self.builder.fmul(self.value, self._match(other)))

    def __lt__(self, other: Any) -> Self:
        return self._new(self.builder.icmp_signed("<", self.value, self._match(other)))

    def choose(self, yes: Self, no: Self) -> Self:
        """Take lanes of `yes` where this comparison holds, else of `no`."""
        return self._new(self.builder.select(self.value, yes.value, no.value))

    def pick(self, lanes: Sequence[int]) -> Self:
        """Choose lanes by number, in any order, also repeatedly."""
        source = self
        if self.count is None:
            one = ir.VectorType(self.element, 1)
            source = self._new(self.builder.insert_element(ir.Constant(one, ir.Undefined), self.value, _INT(0)))
        mask = ir.Constant(ir.VectorType(_INT, len(lanes)), list(lanes))
        return self._new(self.builder.shuffle_vector(source.value, source.value, mask))

    def join(self, other: Self) -> Self:
        """Set the lanes of `other` behind these."""
        mask = ir.Constant(ir.VectorType(_INT, 2 * self.count), list(range(2 * self.count)))
        return self._new(self.builder.shuffle_vector(self.value, other.value, mask))

    def widen(self) -> Self:
        """Unsigned whole numbers -> int32."""
        return self._new(self.builder.zext(self.value, self._typed(_INT)))

    def widen_signed(self) -> Self:
        """Signed whole numbers -> int32."""
        return self._new(self.builder.sext(self.value, self._typed(_INT)))

    def to_float(self) -> Self:
        """int32 -> float32."""
        return self._new(self.builder.sitofp(self.value, self._typed(_FLOAT)))

    def bits(self) -> Self:
        """float32 -> its bits as int32."""
        return self._new(self.builder.bitcast(self.value, self._typed(_INT)))

    def from_bits(self) -> Self:
        """int32 -> the float32 with these bits."""
        return self._new(self.builder.bitcast(self.value, self._typed(_FLOAT)))

    def from_half(self) -> Self:
        """Bits of float16 -> float32, by moving bits: not every processor has an instruction for it."""
        bits = self.widen()
        size = bits & 0x7FFF
        tiny = (size.to_float() * 2.0**-24).bits()
        normal = (size << 13) + ((127 - 15) << 23)
        infinite = (size << 13) | (255 << 23)
        wide = (size < 0x0400).choose(tiny, (size < 0x7C00).choose(normal, infinite))
        return (wide | ((bits & 0x8000) << 16)).from_bits().quiet()

    def quiet(self) -> Self:
        """Replace every NaN by the usual one, whose bits can be rounded like those of a number."""
        is_nan = self.builder.fcmp_unordered("uno", self.value, self.value)
        return self._new(self.builder.select(is_nan, self._match(float("nan")), self.value))

    def bfloat16(self) -> Self:
        """float32 -> bits of bfloat16, rounded to nearest even; a NaN must be quiet."""
        bits = self.bits()
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        return self._new(self.builder.trunc(rounded.value, self._typed(_SHORT)))


class _Block:
    """One block of a file in a program being written."""

    def __init__(self, builder: ir.IRBuilder, start: ir.Value, layout: np.dtype[Any], lanes: int) -> None:
        self.builder, self.start, self.layout, self.lanes = builder, start, layout, lanes

    def _load(self, name: str, skip: int, kind: ir.Type) -> _Lanes:
        at = self.builder.gep(self.start, [_LONG(self.layout.fields[name][1] + skip)])
        # A block may lie anywhere in the file, so nothing is known of its alignment.
        return _Lanes(self.builder, self.builder.load(self.builder.bitcast(at, kind.as_pointer()), align=1))

    def bytes(self, name: str, count: int, skip: int = 0) -> _Lanes:
        """`count` bytes of a field, after `skip` others."""
        return self._load(name, skip, ir.VectorType(_BYTE, count))

    def word(self, name: str) -> _Lanes:
        """A field of four bytes, a single int32."""
        return self._load(name, 0, _INT)

    def half(self, name: str) -> _Lanes:
        """A float16 field as a single float32."""
        return self._load(name, 0, _SHORT).from_half()

    def plain(self, element: ir.Type) -> _Lanes:
        """As many numbers as there are lanes, for types without blocks."""
        return self._load("bits", 0, ir.VectorType(element, self.lanes))


# One block -> its numbers, in order, a few float32 lanes at a time. Each product and sum is rounded on its own, as in
# the numpy reference, where the formulas are explained.

Program = Iterator[_Lanes]


def _f32(block: _Block) -> Program:
    yield block.plain(_INT).from_bits().quiet()


def _f16(block: _Block) -> Program:
    yield block.plain(_SHORT).from_half()


def _bf16(block: _Block) -> Program:
    yield (block.plain(_SHORT).widen() << 16).from_bits()


def _q8_0(block: _Block) -> Program:
    yield block.bytes("quants", 32).widen_signed().to_float() * block.half("scale")


def _nibbles(packed: _Lanes) -> tuple[_Lanes, _Lanes]:
    return packed & 15, packed >> 4


def _q4_0(block: _Block) -> Program:
    scale = block.half("scale")
    for quants in _nibbles(block.bytes("quants", 16)):
        yield (quants.widen() - 8).to_float() * scale


def _q4_1(block: _Block) -> Program:
    scale, low = block.half("scale"), block.half("low")
    for quants in _nibbles(block.bytes("quants", 16)):
        yield quants.widen().to_float() * scale + low


def _five_bits(block: _Block) -> Program:
    high = block.word("high").pick([0] * 32)
    fifth = ((high >> range(32)) & 1) << 4
    for half, quants in enumerate(_nibbles(block.bytes("quants", 16))):
        yield quants.widen() | fifth.pick(range(16 * half, 16 * half + 16))


def _q5_0(block: _Block) -> Program:
    scale = block.half("scale")
    for quants in _five_bits(block):
        yield (quants - 16).to_float() * scale


def _q5_1(block: _Block) -> Program:
    scale, low = block.half("scale"), block.half("low")
    for quants in _five_bits(block):
        yield quants.to_float() * scale + low


def _sub_scales(block: _Block) -> tuple[_Lanes, _Lanes]:
    first, second, rest = (block.bytes("scales", 4, skip) for skip in (0, 4, 8))
    scales = (first & 63).join((rest & 15) | ((first >> 6) << 4))
    lows = (second & 63).join((rest >> 4) | ((second >> 6) << 4))
    return scales.widen().to_float() * block.half("scale"), lows.widen().to_float() * block.half("low")


def _q4_k(block: _Block) -> Program:
    scales, lows = _sub_scales(block)
    for run in range(8):
        quants = _nibbles(block.bytes("quants", 32, run // 2 * 32))[run % 2]
        yield quants.widen().to_float() * scales.pick([run] * 32) - lows.pick([run] * 32)


def _q5_k(block: _Block) -> Program:
    scales, lows = _sub_scales(block)
    for run in range(8):
        quants = _nibbles(block.bytes("quants", 32, run // 2 * 32))[run % 2]
        quants = quants | (((block.bytes("high", 32) >> run) & 1) << 4)
        yield quants.widen().to_float() * scales.pick([run] * 32) - lows.pick([run] * 32)


def _q6_k(block: _Block) -> Program:
    scales = block.bytes("scales", 16).widen_signed().to_float() * block.half("scale")
    for half in range(2):
        high = block.bytes("high", 32, 32 * half)
        for quarter in range(4):
            quants = _nibbles(block.bytes("quants", 32, 64 * half + quarter % 2 * 32))[quarter // 2]
            quants = quants | (((high >> (2 * quarter)) & 3) << 4)
            run = 8 * half + 2 * quarter
            yield (quants.widen() - 32).to_float() * scales.pick([run] * 16 + [run + 1] * 16)


_DECODERS: dict[str, Callable[[_Block], Program]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0,
    "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


@intrinsic(prefer_literal=True)
def _decode_block(typing_context, dtype, lanes, row, at, out, to):
    """Decode the block of type `dtype` at byte `at` of row, to `out[to:]`; both rows are one-dimensional arrays."""

    def write(context, builder, signature, arguments):
        _, _, row_value, at_value, out_value, to_value = arguments
        source = context.make_array(signature.args[2])(context, builder, row_value).data
        target = context.make_array(signature.args[4])(context, builder, out_value).data
        target = builder.gep(target, [to_value])
        start = builder.gep(builder.bitcast(source, _BYTE.as_pointer()), [at_value])
        block = _Block(builder, start, LAYOUTS[dtype.literal_value], lanes.literal_value)
        for values in _DECODERS[dtype.literal_value](block):
            _store(values if out.dtype == types.float32 else values.bfloat16(), target)
            target = builder.gep(target, [_LONG(values.count)])
        return context.get_dummy_value()

    return types.none(dtype, lanes, row, types.intp, out, types.intp), write


def _store(values: _Lanes, target: ir.Value) -> None:
    size = 4 if values.element == _FLOAT else 2
    values.builder.store(values.value, values.builder.bitcast(target, values.value.type.as_pointer()), align=size)


@functools.cache
def _decode_kernel(dtype: str, lanes: int) -> Callable[..., None]:
    """Make the loop over the blocks of one type. It closes over plain values only: numba can cache nothing else."""
    values, size = block_of(dtype)
    values, size = values * lanes, size * lanes

    @njit(nogil=True, cache=True)
    def decode(begin, end, raw, order, out):
        for i in range(begin, end):
            row, to = raw[i], out[order[i]]
            for block in range(row.size // size):
                _decode_block(dtype, lanes, row, block * size, to, block * values)

    return decode


def decode_rows(raw: NDArray[np.uint8], dtype: str, out: Array, order: NDArray[np.int64] | None = None) -> None:
    """Decode a matrix: row i of the file becomes row order[i] of `out`.

    Args:
        raw: uint8 (rows, bytes per row), contiguous; may be a view of a memory map.
        dtype: One of `thimble.core.quantize.BLOCKS`.
        out: float32 or uint16 (bfloat16), (n, in), contiguous; written in place.
        order: int64 (rows,); None leaves the order as it is.
    """
    rows, columns = len(raw), out.shape[1]
    order = np.arange(rows) if order is None else order
    assert raw.shape[1] == row_bytes(columns, dtype), f"{raw.shape} bytes of {dtype} do not make {out.shape}"
    assert out.flags.c_contiguous, f"out of shape {out.shape} is not contiguous"
    assert order.shape == (rows,), f"an order of {order.shape} does not fit {raw.shape}"
    assert rows == 0 or 0 <= order.min() <= order.max() < len(out), f"the order leaves the {len(out)} rows of out"
    lanes = _PLAIN_LANES if block_of(dtype)[0] == 1 and columns % _PLAIN_LANES == 0 else 1
    _split(rows, columns, _decode_kernel(dtype, lanes), _read_only(raw), order, out)


def _read_only(array: Array) -> Array:
    """View an array as read-only, like a memory map, so that one compiled version serves every caller."""
    view = array.view()
    view.flags.writeable = False
    return view


# Threads. Pieces of rows are taken one by one, so that a core that is busy with other work delays nobody, and no thread
# ever spins, which would steal the cores of torch's own threads. Small matrices are done before a second thread wakes.


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """Make the threads that help the calling one."""
    return ThreadPoolExecutor(max(1, _num_cores() - 1), thread_name_prefix="thimble")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A forked process inherits the pool, but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def _split(rows: int, columns: int, kernel: Callable[..., None], *arrays: Array) -> None:
    """Call kernel(begin, end, *arrays) for pieces of all rows, on every core if there is enough to do."""
    step = max(1, _PIECE // max(1, columns))
    pieces = iter(range(0, rows, step))

    def work() -> None:
        for begin in pieces:
            kernel(begin, min(begin + step, rows), *arrays)

    num_helpers = min(_num_cores(), -(-rows // step)) - 1
    tasks = [_helpers().submit(work) for _ in range(num_helpers)]
    work()
    for task in tasks:
        if not task.cancel():  # nothing is left to do for one that has not begun
            task.result()


# int8 rows


@intrinsic
def _loaded(typing_context, value):
    """Read a number of an array, float32 or bfloat16 as uint16, as float32."""

    def write(context, builder, signature, arguments):
        number = _Lanes(builder, arguments[0])
        return number.value if value == types.float32 else (number.widen() << 16).from_bits().value

    return types.float32(value), write


@intrinsic
def _stored(typing_context, value, out):
    """Convert float32 to what the array `out` holds: itself, or bfloat16 as uint16."""

    def write(context, builder, signature, arguments):
        number = _Lanes(builder, arguments[0])
        return number.value if out.dtype == types.float32 else number.quiet().bfloat16().value

    return out.dtype(types.float32, out), write


@intrinsic
def _bits(typing_context, value):
    """Return the bits of a float32 as int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: _Lanes(builder, args[0]).bits().value


@intrinsic
def _from_bits(typing_context, value):
    """Return the float32 with these bits, int32."""
    return types.float32(types.int32), lambda c, builder, s, args: _Lanes(builder, args[0]).from_bits().value


# Adding 1.5 · 2^23 to a float32 leaves, in its lower bits, the number rounded to nearest even as an integer.
_ROUNDER = np.float32(12582912.0)


@njit(nogil=True, cache=True)
def _quantize(begin, end, x, q, scale):
    for i in range(begin, end):
        largest = np.int32(0)
        for j in range(x.shape[1]):
            # Positive floats are ordered like their bits, and a NaN is above them all: none goes unnoticed.
            largest = max(largest, _bits(_loaded(x[i, j])) & np.int32(0x7FFFFFFF))
        size = _from_bits(largest)
        is_zero = size < TINY
        scale[i] = np.float32(0) if is_zero else size / np.float32(127)
        inverse = np.float32(0) if is_zero else np.float32(127) / size
        for j in range(x.shape[1]):
            q[i, j] = np.int8(_bits(_loaded(x[i, j]) * inverse + _ROUNDER) - _bits(_ROUNDER))


@njit(nogil=True, cache=True)
def _dequantize(begin, end, q, scale, out):
    for i in range(begin, end):
        for j in range(q.shape[1]):
            out[i, j] = _stored(np.float32(np.int32(q[i, j])) * scale[i], out)


def quantize_rows_into(x: Array, q: NDArray[np.int8], scale: NDArray[np.float32]) -> None:
    """Write rows as int8 with one scale each; see `thimble.core.quantize.quantize_rows`.

    Args:
        x: float32 or uint16 (bfloat16), (rows, n), contiguous. A NaN or infinity makes the scale of its row one too.
        q: int8 (rows, n), written in place.
        scale: float32 (rows,), written in place.
    """
    assert (*scale.shape, x.shape[1]) == x.shape == q.shape, f"{x.shape}, {q.shape} and {scale.shape} do not agree"
    _split(*x.shape, _quantize, _read_only(x), q, scale)


def dequantize_rows_into(q: NDArray[np.int8], scale: NDArray[np.float32], out: Array) -> None:
    """Write q · scale, the inverse of `quantize_rows_into`.

    Args:
        q: int8 (rows, n), contiguous.
        scale: float32 (rows,).
        out: float32 or uint16 (bfloat16), (rows, n), written in place.
    """
    assert (*scale.shape, q.shape[1]) == q.shape == out.shape, f"{q.shape}, {scale.shape} and {out.shape} do not agree"
    _split(*q.shape, _dequantize, _read_only(q), _read_only(scale), out)
