"""Dot products of one row of weights, as it lies in a file or in memory, with a few rows of float32 activations.

Blocks are decoded in registers. All is done in one order, whatever rows stand beside. Products of blocks with
activations in whole numbers are those of `thimble.backends.torch.block_products`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from thimble.backends.torch.kernels import DECODERS, Block
from thimble.backends.torch.vectors import BYTE, FLOAT, LONG, Lanes
from thimble.files.blocks import LAYOUTS, block_of

_LANES = 16  # of a sum


class _Activations(NamedTuple):
    """Rows of activations, one behind the other: where they begin, in a program being written."""

    count: int  # rows
    columns: ir.Value  # of a row
    x: ir.Value  # float32

    def load(self, builder: ir.IRBuilder, row: int, at: ir.Value, kind: ir.Type) -> Lanes:
        """Some numbers of one row, from column `at` on."""
        place = builder.add(builder.mul(self.columns, LONG(row)), at)
        return _load(builder, builder.add(self.x, builder.mul(place, LONG(4))), kind)


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


def _dots(builder: ir.IRBuilder, dtype: str, row: ir.Value, x: _Activations) -> list[Lanes]:
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
                    _accumulate(sums[t], part, x.load(builder, t, at, part.value.type))
                at = builder.add(at, LONG(_LANES))
    return [Lanes(builder, builder.load(place)).total() for place in sums]


def _plain_dots(builder: ir.IRBuilder, dtype: str, row: ir.Value, x: _Activations) -> list[Lanes]:
    totals = []
    for lanes, begin, end in _pieces(builder, x.columns):
        sums = _accumulators(builder, ir.VectorType(FLOAT, lanes), x.count)
        with cgutils.for_range_slice(builder, begin, end, LONG(lanes)) as (at, _):
            numbers = _plain(builder, dtype, row, at, lanes)
            for t in range(x.count):
                _accumulate(sums[t], numbers, x.load(builder, t, at, numbers.value.type))
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
    if dtype == "I8":  # which is not a type of files
        return _load(builder, builder.add(row, at), ir.VectorType(BYTE, lanes)).widen_signed().to_float()
    address = builder.add(row, builder.mul(at, LONG(block_of(dtype)[1])))
    if dtype == "F32":  # whose decoder makes every NaN the same one, which costs more than the product
        return _load(builder, address, ir.VectorType(FLOAT, lanes))
    block = Block(builder, builder.inttoptr(address, BYTE.as_pointer()), LAYOUTS[dtype], lanes)
    (numbers,) = DECODERS[dtype](block)
    return numbers


@intrinsic(prefer_literal=True)
def dots(typing_context, dtype, count, row, columns, x, out, step):
    """Write the dot products of a row of weights with `count` rows of activations to out, out + step, ...

    row, x and out are addresses, `step` bytes.
    """

    def write(context, builder, signature, arguments):
        row, columns, x, out, step = arguments[2:]
        results = _dots(builder, dtype.literal_value, row, _Activations(count.literal_value, columns, x))
        for t, result in enumerate(results):
            place = builder.add(out, builder.mul(step, LONG(t)))
            builder.store(result.value, builder.inttoptr(place, FLOAT.as_pointer()))
        return context.get_dummy_value()

    return types.none(dtype, count, *[types.intp] * 5), write


@intrinsic(prefer_literal=True)
def dot(typing_context, dtype, row, columns, x):
    """Return the dot product of the float32 numbers at address x with a row of weights of a type, decoded."""

    def write(context, builder, signature, arguments):
        _, row, columns, x = arguments
        (result,) = _dots(builder, dtype.literal_value, row, _Activations(1, columns, x))
        return result.value

    return types.float32(dtype, types.intp, types.intp, types.intp), write


@intrinsic(prefer_literal=True)
def add_mixed(typing_context, dtype, weights, count, rows, jump, width, out):
    """Add Σ weights[n] · row n to the float32 numbers at address out, `width` of them.

    weights is the address of `count` float32 numbers, rows that of rows of a type without blocks, or of int8 (`I8`),
    `jump` bytes apart.
    """

    def write(context, builder, signature, arguments):
        _, weights, count, rows, jump, width, out = arguments
        even = builder.and_(count, LONG(-2))
        for lanes, begin, end in _pieces(builder, width, (2 * _LANES, _LANES // 2, 1)):
            with cgutils.for_range_slice(builder, begin, end, LONG(lanes)) as (at, _):
                kind, to = ir.VectorType(FLOAT, lanes), builder.add(out, builder.mul(at, LONG(4)))
                places = _accumulators(builder, kind, 2)  # in turn: neither waits for the sum before
                for first, last, step in ((LONG(0), even, 2), (even, count, 1)):
                    with cgutils.for_range_slice(builder, first, last, LONG(step)) as (number, _):
                        for place, n in zip(places[:step], (number, builder.add(number, LONG(1))), strict=False):
                            row = builder.add(rows, builder.mul(n, jump))
                            weight = _load(builder, builder.add(weights, builder.mul(n, LONG(4))), FLOAT)
                            _accumulate(place, _plain(builder, dtype.literal_value, row, at, lanes), weight)
                both = [Lanes(builder, builder.load(place)) for place in places]
                total = both[0] + both[1] + _load(builder, to, kind)
                builder.store(total.value, builder.inttoptr(to, kind.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(dtype, *[types.intp] * 6), write


@intrinsic
def sum_of(typing_context, x, count):
    """Return the sum of so many float32 numbers at address x."""

    def write(context, builder, signature, arguments):
        return _reduced(builder, *arguments, 0.0, lambda a, b: a + b).value

    return types.float32(types.intp, types.intp), write


@intrinsic
def largest_of(typing_context, x, count):
    """Return the largest of so many float32 numbers at address x, at least one; a NaN may be passed over."""

    def write(context, builder, signature, arguments):
        def larger(a, b):
            return Lanes(builder, builder.select(builder.fcmp_ordered(">", a.value, b.value), a.value, b.value))

        return _reduced(builder, *arguments, float("-inf"), larger).value

    return types.float32(types.intp, types.intp), write


def _reduced(
    builder: ir.IRBuilder, x: ir.Value, count: ir.Value, first: float, both: Callable[[Lanes, Lanes], Lanes]
) -> Lanes:
    """Numbers at an address made one, in lanes first: always in the same order."""
    found: Lanes | None = None
    for lanes, begin, end in _pieces(builder, count):
        kind = ir.VectorType(FLOAT, lanes)
        place = cgutils.alloca_once(builder, kind)
        builder.store(ir.Constant(kind, [first] * lanes), place)
        with cgutils.for_range_slice(builder, begin, end, LONG(lanes)) as (at, _):
            own = _load(builder, builder.add(x, builder.mul(at, LONG(4))), kind)
            builder.store(both(Lanes(builder, builder.load(place)), own).value, place)
        total = Lanes(builder, builder.load(place))
        while total.count > 1:
            half = total.count // 2
            total = both(total.pick(range(half)), total.pick(range(half, total.count)))
        found = total if found is None else both(found, total)
    return found.lane(0)


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
