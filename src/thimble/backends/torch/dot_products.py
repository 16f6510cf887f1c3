"""Dot products of one row of weights, as it lies in a file or in memory, with a few rows of activations.

In form `int8` the activations are whole numbers too, quantised in blocks of 32 like Q8_0, so that a block of the file
is multiplied without being decoded: a weight is scale · q + low, so a block adds
(scale · x_scale) · Σ q q_x + low · Σ x. The sums of q q_x are exact, and everything else is done in one order, so the
three ways to make them (VNNI, AVX2, anything else) end in the same bits, whatever rows stand beside. In form `float`,
and for weights that are not in blocks, activations are float32 and blocks are decoded in registers.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from thimble.backends.torch.compiled import address_of, compiled
from thimble.backends.torch.kernels import DECODERS, Block, nibbles, sub_scales
from thimble.backends.torch.vectors import BYTE, FEATURES, FLOAT, INT, LONG, SHORT, Lanes, call
from thimble.files.blocks import LAYOUTS, block_of

RUN = 32  # values of an activation that share a scale
_SUMS = 8  # lanes of a run's sum: each is of four products
_LANES = 16  # of sums of float products
_BYTES = ir.VectorType(BYTE, RUN)


def form_of(dtype: str, is_int8: bool) -> str:
    """How products with weights of a type are made, if activations may be quantised for it."""
    return whole_number_form() if is_int8 and dtype in _RUNS else "float"


def whole_number_form() -> str:
    """How sums of products of bytes are made on this processor: `vnni`, `avx2` or `plain`."""
    if "avxvnni" in FEATURES or {"avx512vnni", "avx512vl"} <= FEATURES:
        return "vnni"
    return "avx2" if "avx2" in FEATURES else "plain"


class _Run(NamedTuple):
    """A run of 32 weights in a program being written."""

    quants: Lanes  # bytes
    is_signed: bool  # whether they are -128 to 127, not 0 to 127
    scale: Lanes  # float32, one or one for each lane of the sum
    low: Lanes | None = None  # float32, added to every weight


# ---- one block -> its runs -------------------------------------------------------------------------------------------


def _fifth_bits(block: Block) -> Lanes:
    """16 where the fifth bit of a value is set, as bytes."""
    builder = block.builder
    high = Lanes(builder, builder.bitcast(block.word("high").value, ir.VectorType(BYTE, 4)))
    spread = high.pick([lane // 8 for lane in range(RUN)]) & [1 << lane % 8 for lane in range(RUN)]
    is_clear = builder.icmp_unsigned("==", spread.value, ir.Constant(_BYTES, [0] * RUN))
    return Lanes(builder, builder.select(is_clear, ir.Constant(_BYTES, [0] * RUN), ir.Constant(_BYTES, [16] * RUN)))


def _four(block: Block) -> Lanes:
    low, high = nibbles(block.bytes("quants", 16))
    return low.join(high)


def _q8_0(block: Block) -> Iterator[_Run]:
    yield _Run(block.bytes("quants", RUN), True, block.half("scale"))


def _q4_0(block: Block) -> Iterator[_Run]:
    yield _Run(_four(block) - 8, True, block.half("scale"))


def _q4_1(block: Block) -> Iterator[_Run]:
    yield _Run(_four(block), False, block.half("scale"), block.half("low"))


def _q5_0(block: Block) -> Iterator[_Run]:
    yield _Run((_four(block) | _fifth_bits(block)) - 16, True, block.half("scale"))


def _q5_1(block: Block) -> Iterator[_Run]:
    yield _Run(_four(block) | _fifth_bits(block), False, block.half("scale"), block.half("low"))


def _q4_k(block: Block) -> Iterator[_Run]:
    scales, lows = sub_scales(block)
    for run in range(8):
        quants = nibbles(block.bytes("quants", RUN, run // 2 * RUN))[run % 2]
        yield _Run(quants, False, scales.lane(run), lows.lane(run) * -1.0)


def _q5_k(block: Block) -> Iterator[_Run]:
    scales, lows = sub_scales(block)
    for run in range(8):
        quants = nibbles(block.bytes("quants", RUN, run // 2 * RUN))[run % 2]
        quants = quants | (((block.bytes("high", RUN) >> run) & 1) << 4)
        yield _Run(quants, False, scales.lane(run), lows.lane(run) * -1.0)


def _q6_k(block: Block) -> Iterator[_Run]:
    scales = block.bytes("scales", 16).widen_signed().to_float() * block.half("scale")
    for run in range(8):
        half, quarter = divmod(run, 4)
        high = (block.bytes("high", RUN, RUN * half) >> (2 * quarter)) & 3
        quants = nibbles(block.bytes("quants", RUN, 64 * half + quarter % 2 * RUN))[quarter // 2]
        yield _Run((quants | (high << 4)) - 32, True, scales.pick([2 * run] * 4 + [2 * run + 1] * 4))


_RUNS: dict[str, Callable[[Block], Iterator[_Run]]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}  # fmt: skip


# ---- sums of products of bytes ---------------------------------------------------------------------------------------


def _sums(run: _Run, x: Lanes, form: str) -> Lanes:
    """Products of 32 bytes, added by fours: exact, int32 (8 lanes). x is -127 to 127."""
    builder, quants = x.builder, run.quants.value
    if form == "plain":
        wide = run.quants.widen_signed() if run.is_signed else run.quants.widen()
        products = Lanes(builder, builder.mul(wide.value, x.widen_signed().value))
        pairs = products.pick(range(0, RUN, 2)) + products.pick(range(1, RUN, 2))
        return pairs.pick(range(0, RUN // 2, 2)) + pairs.pick(range(1, RUN // 2, 2))
    other = x.value
    if run.is_signed:  # |q| times x with the sign of q
        other = call(builder, "llvm.x86.avx2.psign.b", _BYTES, other, quants)
        quants = call(builder, "llvm.abs.v32i8", _BYTES, quants, ir.Constant(ir.IntType(1), 0))
    words, halves = ir.VectorType(INT, _SUMS), ir.VectorType(SHORT, RUN // 2)
    if form == "vnni":
        zero = ir.Constant(words, [0] * _SUMS)
        bytes_of = [builder.bitcast(value, words) for value in (quants, other)]
        return Lanes(builder, call(builder, "llvm.x86.avx512.vpdpbusd.256", words, zero, *bytes_of))
    # Two products are at most 2 · 128 · 127, which 16 bits hold.
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", halves, quants, other)
    ones = ir.Constant(halves, [1] * (RUN // 2))
    return Lanes(builder, call(builder, "llvm.x86.avx2.pmadd.wd", words, pairs, ones))


# ---- one row of weights with a few rows of activations ---------------------------------------------------------------


class _Activations(NamedTuple):
    """Rows of activations, one behind the other: where they begin, in a program being written."""

    count: int  # rows
    columns: ir.Value  # of a row
    x: ir.Value  # float32
    q: ir.Value  # int8
    scales: ir.Value  # float32, one a run
    sums: ir.Value  # float32, Σ x of each run

    def load(self, builder: ir.IRBuilder, what: str, row: int, at: ir.Value, kind: ir.Type) -> Lanes:
        """Some numbers of one row, from column or run `at` on."""
        size, per = {"x": (4, 1), "q": (1, 1), "scales": (4, RUN), "sums": (4, RUN)}[what]
        columns = builder.udiv(self.columns, LONG(per)) if per > 1 else self.columns
        place = builder.mul(builder.add(builder.mul(columns, LONG(row)), at), LONG(size))
        return _load(builder, builder.add(getattr(self, what), place), kind)


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> Lanes:
    return Lanes(builder, builder.load(builder.inttoptr(address, kind.as_pointer()), align=1))


def _accumulators(builder: ir.IRBuilder, kind: ir.Type, count: int) -> list[ir.Value]:
    """Places of running sums, zero; LLVM keeps them in registers."""
    zero = ir.Constant(kind, [0.0] * kind.count if isinstance(kind, ir.VectorType) else 0.0)
    places = [cgutils.alloca_once(builder, kind) for _ in range(count)]
    for place in places:
        builder.store(zero, place)
    return places


def _accumulate(place: ir.Value, a: Lanes, b: Lanes) -> None:
    total = a.fused(b, Lanes(a.builder, a.builder.load(place)))
    a.builder.store(total.value, place)


def _int8_dots(builder: ir.IRBuilder, dtype: str, form: str, row: ir.Value, x: _Activations) -> list[Lanes]:
    values, size = block_of(dtype)
    sums = _accumulators(builder, ir.VectorType(FLOAT, _SUMS), x.count)
    lows = _accumulators(builder, FLOAT, x.count)
    with cgutils.for_range(builder, builder.udiv(x.columns, LONG(values))) as loop:
        start = builder.inttoptr(builder.add(row, builder.mul(loop.index, LONG(size))), BYTE.as_pointer())
        for number, run in enumerate(_RUNS[dtype](Block(builder, start, LAYOUTS[dtype], 1))):
            place = builder.add(builder.mul(loop.index, LONG(values // RUN)), LONG(number))
            at = builder.mul(place, LONG(RUN))
            for t in range(x.count):
                products = _sums(run, x.load(builder, "q", t, at, _BYTES), form).to_float()
                scale = x.load(builder, "scales", t, place, FLOAT)
                scale = (scale if run.scale.count is None else scale.spread(_SUMS)) * run.scale
                _accumulate(sums[t], products, scale if scale.count else scale.spread(_SUMS))
                if run.low is not None:
                    _accumulate(lows[t], run.low, x.load(builder, "sums", t, place, FLOAT))
    totals = [Lanes(builder, builder.load(place)).total() for place in sums]
    return [total + Lanes(builder, builder.load(low)) for total, low in zip(totals, lows, strict=True)]


def _float_dots(builder: ir.IRBuilder, dtype: str, row: ir.Value, x: _Activations) -> list[Lanes]:
    values, size = block_of(dtype)
    if values == 1:
        return _plain_dots(builder, dtype, row, x)
    sums = _accumulators(builder, ir.VectorType(FLOAT, _LANES), x.count)
    with cgutils.for_range(builder, builder.udiv(x.columns, LONG(values))) as loop:
        start = builder.inttoptr(builder.add(row, builder.mul(loop.index, LONG(size))), BYTE.as_pointer())
        at = builder.mul(loop.index, LONG(values))
        for numbers in DECODERS[dtype](Block(builder, start, LAYOUTS[dtype], 1)):
            for first in range(0, numbers.count, _LANES):
                part = numbers.pick(range(first, first + _LANES))
                for t in range(x.count):
                    _accumulate(sums[t], part, x.load(builder, "x", t, at, part.value.type))
                at = builder.add(at, LONG(_LANES))
    return [Lanes(builder, builder.load(place)).total() for place in sums]


def _plain_dots(builder: ir.IRBuilder, dtype: str, row: ir.Value, x: _Activations) -> list[Lanes]:
    totals = []
    for lanes, begin, end in _pieces(builder, x.columns):
        sums = _accumulators(builder, ir.VectorType(FLOAT, lanes), x.count)
        with cgutils.for_range_slice(builder, begin, end, LONG(lanes)) as (at, _):
            numbers = _plain(builder, dtype, row, at, lanes)
            for t in range(x.count):
                _accumulate(sums[t], numbers, x.load(builder, "x", t, at, numbers.value.type))
        totals.append([Lanes(builder, builder.load(place)).total() for place in sums])
    return [most + rest for most, rest in zip(*totals, strict=True)]


def _pieces(
    builder: ir.IRBuilder, columns: ir.Value, sizes: Sequence[int] = (_LANES, 1)
) -> Iterator[tuple[int, ir.Value, ir.Value]]:
    """How a row of numbers is gone through: so many at a time, from where to where; 1 comes last."""
    begin = LONG(0)
    for lanes in sizes:
        end = builder.mul(builder.udiv(columns, LONG(lanes)), LONG(lanes))
        yield lanes, begin, end
        begin = end


def _plain(builder: ir.IRBuilder, dtype: str, row: ir.Value, at: ir.Value, lanes: int) -> Lanes:
    """Some numbers of a row of a type without blocks, as float32 lanes."""
    address = builder.add(row, builder.mul(at, LONG(block_of(dtype)[1])))
    block = Block(builder, builder.inttoptr(address, BYTE.as_pointer()), LAYOUTS[dtype], lanes)
    (numbers,) = DECODERS[dtype](block)
    return numbers


@intrinsic(prefer_literal=True)
def dots(typing_context, dtype, form, count, row, columns, x, q, scales, sums, out, step):
    """Write the dot products of a row of weights with `count` rows of activations to out, out + step, ...

    `form` is `float`, or how sums of bytes are made. The others are addresses, but for `columns`, and `step` in bytes.
    """

    def write(context, builder, signature, arguments):
        row, columns, x, q, scales, sums, out, step = arguments[3:]
        activations = _Activations(count.literal_value, columns, x, q, scales, sums)
        if form.literal_value == "float":
            results = _float_dots(builder, dtype.literal_value, row, activations)
        else:
            results = _int8_dots(builder, dtype.literal_value, form.literal_value, row, activations)
        for t, result in enumerate(results):
            place = builder.add(out, builder.mul(step, LONG(t)))
            builder.store(result.value, builder.inttoptr(place, FLOAT.as_pointer()))
        return context.get_dummy_value()

    return types.none(dtype, form, count, *[types.intp] * 8), write


@intrinsic(prefer_literal=True)
def dot(typing_context, dtype, row, columns, x):
    """Return the dot product of the float32 numbers at address x with a row of weights of a type, decoded."""

    def write(context, builder, signature, arguments):
        _, row, columns, x = arguments
        (result,) = _float_dots(builder, dtype.literal_value, row, _Activations(1, columns, x, x, x, x))
        return result.value

    return types.float32(dtype, types.intp, types.intp, types.intp), write


@intrinsic(prefer_literal=True)
def add_mixed(typing_context, dtype, weights, count, rows, jump, width, out):
    """Add Σ weights[n] · row n to the float32 numbers at address out, `width` of them.

    weights is the address of `count` float32 numbers, rows that of rows of a type without blocks, `jump` bytes apart.
    """

    def write(context, builder, signature, arguments):
        _, weights, count, rows, jump, width, out = arguments
        for lanes, begin, end in _pieces(builder, width, (2 * _LANES, _SUMS, 1)):
            with cgutils.for_range_slice(builder, begin, end, LONG(lanes)) as (at, _):
                kind, to = ir.VectorType(FLOAT, lanes), builder.add(out, builder.mul(at, LONG(4)))
                (place,) = _accumulators(builder, kind, 1)
                builder.store(_load(builder, to, kind).value, place)
                with cgutils.for_range(builder, count) as loop:
                    row = builder.add(rows, builder.mul(loop.index, jump))
                    weight = _load(builder, builder.add(weights, builder.mul(loop.index, LONG(4))), FLOAT)
                    _accumulate(place, _plain(builder, dtype.literal_value, row, at, lanes), weight)
                builder.store(builder.load(place), builder.inttoptr(to, kind.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(dtype, *[types.intp] * 6), write


@functools.cache
def product_kernel(dtype: str, form: str) -> int:
    """Compile the product of some rows of a matrix with all rows of activations; returns its address.

    It is a C function of whole numbers: address of row 0, bytes of a row, address of int64 with which row of the file
    each is or 0, columns, first row and the one behind the last, rows of activations and their addresses (see
    `_Activations`), then where the result of row 0 goes and the bytes from one row of results to the next.
    """

    @compiled(nogil=True, error_model="numpy")
    def multiply(weights, row_bytes, index, columns, first, last, tokens, x, q, scales, sums, out, width):
        runs, order = columns // RUN * 4, array_at(index, last, np.int64(0))
        for i in range(first, last):
            row, to, t = weights + row_bytes * (i if index == 0 else order[i]), out + i * 4, 0
            while t + 4 <= tokens:
                dots(dtype, form, 4, row, columns, x + t * columns * 4, q + t * columns, scales + t * runs,
                     sums + t * runs, to + t * width, width)  # fmt: skip
                t += 4
            while t < tokens:
                dots(dtype, form, 1, row, columns, x + t * columns * 4, q + t * columns, scales + t * runs,
                     sums + t * runs, to + t * width, width)  # fmt: skip
                t += 1

    return address_of(multiply, *[types.int64] * 13)


@intrinsic
def array_at(typing_context, address, count, like):
    """The numbers at an address as an array (count,) of the type of `like`, a number; whoever asks keeps them alive."""
    kind = types.Array(like, 1, "C")

    def write(context, builder, signature, arguments):
        array, number = context.make_array(kind)(context, builder), context.get_data_type(like)
        size = context.get_abi_sizeof(number)
        data = builder.inttoptr(arguments[0], number.as_pointer())
        populate_array(
            array, data=data, shape=[arguments[1]], strides=[LONG(size)], itemsize=LONG(size), meminfo=None
        )  # fmt: skip
        return array._getvalue()

    return kind(types.intp, types.intp, like), write


@intrinsic
def call_product(typing_context, address, arguments):
    """Call the `product_kernel` at an address with a tuple of its arguments."""

    def write(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [LONG] * len(arguments))
        unpacked = cgutils.unpack_tuple(builder, values[1], len(arguments))
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), unpacked)
        return context.get_dummy_value()

    return types.none(address, arguments), write
