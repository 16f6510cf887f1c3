"""Products of weights in blocks, as they lie in a file, with activations in whole numbers; eight rows at a time.

Activations are quantised in runs of 32 like Q8_0, so that a block of the file is multiplied without being decoded: a
weight is scale · q + low, so a run adds (scale · x_scale) · Σ q q_x + low · Σ x. Eight rows of weights stand side by
side, four values of each in a register: an activation is then one broadcast, and a run of eight rows costs a single
conversion to float. What is unpacked serves up to `TILE` rows of activations. The sums of q q_x are exact, and all else
is done in one order, so the three ways to make them (VNNI, AVX2, anything else) end in the same bits, whatever
rows stand beside.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from thimble.backends.torch.block_runs import FOUR, GROUP, ROWS, RUN, RUNS, WORDS, BlockOfRows, Rows, Run
from thimble.backends.torch.compiled import address_of, compiled
from thimble.backends.torch.dot_products import array_at, dots
from thimble.backends.torch.fused import int8_scale
from thimble.backends.torch.vectors import BYTE, FEATURES, FLOAT, INT, LONG, SHORT, Lanes, call, stored
from thimble.files.blocks import block_of

TILE = 64  # rows of activations for which weights are unpacked once
_FLOATS = ir.VectorType(FLOAT, ROWS)
_GROUPS = RUN // FOUR  # of a run


def form_of(dtype: str, is_int8: bool) -> str:
    """How products with weights of a type are made, if activations may be quantised for it."""
    return whole_number_form() if is_int8 and dtype in RUNS else "float"


def is_multiplied_in_blocks(dtype: str) -> bool:
    """Whether whole numbers are faster than float products for weights of a type, on this processor."""
    return form_of(dtype, is_int8=True) in ("vnni", "avx2")


def whole_number_form() -> str:
    """How sums of products of bytes are made on this processor: `vnni`, `avx2` or `plain`."""
    if "avxvnni" in FEATURES or {"avx512vnni", "avx512vl"} <= FEATURES:
        return "vnni"
    return "avx2" if "avx2" in FEATURES else "plain"


@register_jitable
def quantize_run(x, q):
    """Write a run of an activation, float32, as q = round(x · 127 / max |x|), int8; returns scale and scale · Σ q."""
    scale, inverse = int8_scale(x)
    total = np.int32(0)
    for j in range(RUN):
        whole = stored(x[j] * inverse, q)
        q[j] = whole
        total += np.int32(whole)
    return scale, np.float32(total) * scale


# ---- sums of products of bytes ---------------------------------------------------------------------------------------


def _sum(builder: ir.IRBuilder, run: Run, part: slice, x: Sequence[ir.Value], form: str) -> Lanes:
    """Products of part of a run's groups with those of an activation: exact, int32, one sum a row."""
    total, most = Lanes(builder, ir.Constant(WORDS, None)), 32767 // (2 * 127 * run.largest)
    pairs: Lanes | None = None
    for number, (w, own) in enumerate(zip(run.quants.groups()[part], x[part], strict=True), 1):
        if form == "plain":
            total = total + _plain_sum(builder, w, own, run.low is None)
            continue
        if run.low is None:  # |q| times x with the sign of q
            own = call(builder, "llvm.x86.avx2.psign.b", GROUP, own, w)
            w = call(builder, "llvm.abs.v32i8", GROUP, w, ir.Constant(ir.IntType(1), 0))
        if form == "vnni":
            words = [builder.bitcast(value, WORDS) for value in (w, own)]
            total = Lanes(builder, call(builder, "llvm.x86.avx512.vpdpbusd.256", WORDS, total.value, *words))
            continue
        halves = ir.VectorType(SHORT, ROWS * 2)
        two = Lanes(builder, call(builder, "llvm.x86.avx2.pmadd.ub.sw", halves, w, own))
        pairs = two if pairs is None else pairs + two
        if number % most == 0 or number == part.stop - part.start:  # more than 16 bits hold
            ones = ir.Constant(halves, [1] * (ROWS * 2))
            total = total + Lanes(builder, call(builder, "llvm.x86.avx2.pmadd.wd", WORDS, pairs.value, ones))
            pairs = None
    return total


def _plain_sum(builder: ir.IRBuilder, w: ir.Value, x: ir.Value, is_signed: bool) -> Lanes:
    wide = Lanes(builder, w).widen_signed() if is_signed else Lanes(builder, w).widen()
    products = Lanes(builder, builder.mul(wide.value, Lanes(builder, x).widen_signed().value))
    pairs = products.pick(range(0, ROWS * FOUR, 2)) + products.pick(range(1, ROWS * FOUR, 2))
    return pairs.pick(range(0, ROWS * 2, 2)) + pairs.pick(range(1, ROWS * 2, 2))


# ---- eight rows of weights with rows of activations ------------------------------------------------------------------


class _Kept:
    """The unpacked runs of a block of each of eight rows, in memory that LLVM turns into registers where they fit."""

    def __init__(self, builder: ir.IRBuilder, runs: Sequence[Run]) -> None:
        self._builder, self._like = builder, runs[0]
        parts = [self._parts(run) for run in runs]
        self._places = [cgutils.alloca_once(builder, part.value.type, size=LONG(len(runs))) for part in parts[0]]
        for number, run in enumerate(parts):
            for place, part in zip(self._places, run, strict=True):
                builder.store(part.value, builder.gep(place, [LONG(number)]))

    @staticmethod
    def _parts(run: Run) -> list[Rows]:
        return [run.quants, *run.scales, *([] if run.low is None else [run.low])]

    def run(self, number: ir.Value) -> Run:
        """One of them."""
        parts = [Rows(self._builder, self._builder.load(self._builder.gep(place, [number]))) for place in self._places]
        like = self._like
        return Run(parts[0], like.largest, parts[1 : 1 + len(like.scales)], None if like.low is None else parts[-1])


class _Activations(NamedTuple):
    """Where quantised activations begin; a run of all tokens lies together."""

    q: ir.Value  # int8 (runs, tokens, RUN)
    scales: ir.Value  # float32 (runs, tokens)
    sums: ir.Value  # float32 (runs, tokens), Σ x of each run


def _load(builder: ir.IRBuilder, address: ir.Value, number: ir.Value, kind: ir.Type) -> Lanes:
    """A number, or a vector, of an array at an address."""
    pointer = builder.inttoptr(address, kind.as_pointer())
    return Lanes(builder, builder.load(builder.gep(pointer, [number]), align=4))


def _add_run(builder: ir.IRBuilder, run: Run, form: str, x: _Activations, at: ir.Value, total: ir.Value) -> None:
    """Add what a run of weights makes of run `at` of a token to its eight totals."""
    words = builder.mul(at, LONG(_GROUPS))
    own = [_load(builder, x.q, builder.add(words, LONG(group)), INT).spread(ROWS) for group in range(_GROUPS)]
    own = [builder.bitcast(word.value, GROUP) for word in own]
    scale, size = _load(builder, x.scales, at, FLOAT).spread(ROWS), _GROUPS // len(run.scales)
    found = Lanes(builder, builder.load(total, align=4))
    for number, factor in enumerate(run.scales):
        part = slice(number * size, number * size + size)
        found = _sum(builder, run, part, own, form).to_float().fused(scale * factor, found)
    if run.low is not None:
        found = Lanes(builder, run.low.value).fused(_load(builder, x.sums, at, FLOAT).spread(ROWS), found)
    builder.store(found.value, total, align=4)


@intrinsic(prefer_literal=True)
def add_block(typing_context, dtype, form, starts, at, run, first, last, tokens, q, scales, sums, totals):
    """Add the products of a block of eight rows of weights with rows of activations to their totals.

    starts is the address of int64 (ROWS,), those of the rows; the block begins `at` bytes on, and its first run is
    number `run`. first and last tell the tokens, out of `tokens` at the addresses q, scales and sums (see
    `_Activations`); totals is the address of float32 (last - first, ROWS).
    """

    def write(context, builder, signature, arguments):
        starts, at, run, first, last, tokens, q, scales, sums, totals = arguments[2:]
        places = [builder.add(_load(builder, starts, LONG(row), LONG).value, at) for row in range(ROWS)]
        pointers = [builder.inttoptr(place, BYTE.as_pointer()) for place in places]
        runs = list(RUNS[dtype.literal_value](BlockOfRows(builder, pointers, dtype.literal_value)))
        kept, x = _Kept(builder, runs), _Activations(q, scales, sums)
        with cgutils.for_range(builder, LONG(len(runs))) as each:
            own, begin = kept.run(each.index), builder.mul(builder.add(run, each.index), tokens)
            with cgutils.for_range_slice(builder, first, last, LONG(1)) as (t, _):
                pointer = builder.inttoptr(totals, _FLOATS.as_pointer())
                total = builder.gep(pointer, [builder.sub(t, first)])
                _add_run(builder, own, form.literal_value, x, builder.add(begin, t), total)
        return context.get_dummy_value()

    return types.none(dtype, form, *[types.intp] * 10), write


@functools.cache
def product_kernel(dtype: str, form: str) -> int:
    """Compile the product of some rows of a matrix with all rows of activations; returns its address.

    It is a C function of whole numbers: address of row 0, bytes of a row, address of int64 with which row of the file
    each is or 0, columns, first row and the one behind the last, rows of activations, addresses of them, float32, and
    of what they are in whole numbers (see `_Activations`), then where the result of row 0 goes and the bytes from one
    row of results to the next. `form` is `float`, or how sums of whole numbers are made.
    """
    return address_of(_float_kernel(dtype) if form == "float" else _tiles(dtype, form), *[types.int64] * 13)


def _float_kernel(dtype: str) -> Callable[..., None]:
    @compiled(nogil=True, error_model="numpy")
    def multiply(weights, row_bytes, index, columns, first, last, tokens, x, q, scales, sums, out, width):
        order = array_at(index, last, np.int64(0))
        for i in range(first, last):
            row, to, t = weights + row_bytes * (i if index == 0 else order[i]), out + i * 4, 0
            while t + 4 <= tokens:
                dots(dtype, 4, row, columns, x + t * columns * 4, to + t * width, width)
                t += 4
            while t < tokens:
                dots(dtype, 1, row, columns, x + t * columns * 4, to + t * width, width)
                t += 1

    return multiply


def _tiles(dtype: str, form: str) -> Callable[..., None]:
    values, size = block_of(dtype)
    runs = values // RUN

    @compiled(nogil=True, error_model="numpy")
    def multiply(weights, row_bytes, index, columns, first, last, tokens, x, q, scales, sums, out, width):
        order, starts = array_at(index, last, np.int64(0)), np.empty(ROWS, np.int64)
        totals = np.empty((TILE, ROWS), np.float32)
        for begin in range(0, tokens, TILE):
            end = min(begin + TILE, tokens)
            for i in range(first, last, ROWS):
                for r in range(ROWS):  # where fewer are left, the last one is multiplied again
                    row = min(i + r, last - 1)
                    starts[r] = weights + row_bytes * (row if index == 0 else order[row])
                totals[: end - begin] = np.float32(0)
                for block in range(columns // values):
                    add_block(dtype, form, starts.ctypes.data, block * size, block * runs, begin, end, tokens, q,
                              scales, sums, totals.ctypes.data)  # fmt: skip
                for t in range(begin, end):
                    to = array_at(out + t * width + i * 4, ROWS, np.float32(0))
                    if i + ROWS <= last:
                        to[:] = totals[t - begin]
                    else:
                        to[: last - i] = totals[t - begin, : last - i]

    return multiply
