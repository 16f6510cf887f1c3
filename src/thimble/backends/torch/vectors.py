"""Numbers side by side in a compiled loop, and single ones as float32, bfloat16 or int8.

numba leaves vectors to LLVM's own vectoriser, which gives up on half of the block types; `Lanes` writes vector
instructions that LLVM fits to the processor. bfloat16 is kept as uint16, the upper half of a float32.
"""

from collections.abc import Sequence
from typing import Any, Self

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

BYTE, SHORT, INT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT = ir.FloatType()
ROUNDER = 12582912.0  # 1.5 · 2^23: adding it to a float32 leaves the number rounded to nearest even in its lower bits
# What the processor has beyond its kind; nothing is known of one that numba was told to compile for instead.
_COMPILES_FOR_HOST = config.CPU_NAME is None and config.CPU_FEATURES is None
FEATURES = {name for name, is_here in binding.get_host_cpu_features().items() if is_here and _COMPILES_FOR_HOST}


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Call a function by its name, such as an LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


class Lanes:
    """Numbers side by side, or a single one, in a program being written: each operator adds one instruction."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value
        self.count = getattr(value.type, "count", None)
        self.element = getattr(value.type, "element", value.type)

    def _new(self, value: ir.Value) -> Self:
        return type(self)(self.builder, value)

    def _typed(self, element: ir.Type) -> ir.Type:
        return element if self.count is None else ir.VectorType(element, self.count)

    def _match(self, other: "Lanes | Sequence[int] | int | float") -> ir.Value:
        """Give `other` as many lanes as there are here: a constant or a single number is repeated."""
        if not isinstance(other, Lanes):
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
        add = self.builder.fadd if self.element == FLOAT else self.builder.add
        return self._new(add(self.value, self._match(other)))

    def __sub__(self, other: Any) -> Self:
        subtract = self.builder.fsub if self.element == FLOAT else self.builder.sub
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
            source = self._new(self.builder.insert_element(ir.Constant(one, ir.Undefined), self.value, INT(0)))
        mask = ir.Constant(ir.VectorType(INT, len(lanes)), list(lanes))
        return self._new(self.builder.shuffle_vector(source.value, source.value, mask))

    def lane(self, number: int) -> Self:
        """One of the lanes, a single number."""
        return self._new(self.builder.extract_element(self.value, INT(number)))

    def spread(self, count: int) -> Self:
        """A single number in each of so many lanes."""
        return self.pick([0] * count)

    def fused(self, other: Self, addend: Self) -> Self:
        """self · other + addend of float32, rounded once."""
        kind = self.value.type
        name = f"llvm.fma.{'f32' if self.count is None else f'v{self.count}f32'}"
        return self._new(call(self.builder, name, kind, self.value, self._match(other), addend.value))

    def total(self) -> Self:
        """The sum of all lanes, in halves: always in the same order."""
        lanes = self
        while lanes.count > 1:
            half = lanes.count // 2
            lanes = lanes.pick(range(half)) + lanes.pick(range(half, lanes.count))
        return lanes.lane(0)

    def join(self, other: Self) -> Self:
        """Set the lanes of `other` behind these."""
        mask = ir.Constant(ir.VectorType(INT, 2 * self.count), list(range(2 * self.count)))
        return self._new(self.builder.shuffle_vector(self.value, other.value, mask))

    def look_up(self, table: Sequence[int]) -> Self:
        """Bytes from 0 to 15 -> the signed bytes of a table of 16; sixteen lanes, or a multiple of them."""
        size = 32 if "avx2" in FEATURES and self.count % 32 == 0 else 16
        kind = ir.VectorType(BYTE, size)
        parts = [Lanes.pick(self, range(at, at + size)) for at in range(0, self.count, size)]
        if "ssse3" in FEATURES:
            name = "llvm.x86.avx2.pshuf.b" if size == 32 else "llvm.x86.ssse3.pshuf.b.128"
            bytes_of = ir.Constant(kind, list(table) * (size // 16))
            parts = [Lanes(self.builder, call(self.builder, name, kind, bytes_of, part.value)) for part in parts]
        else:
            parts = [part._chosen(table) for part in parts]
        while len(parts) > 1:
            parts = [low.join(high) for low, high in zip(parts[::2], parts[1::2], strict=True)]
        return self._new(parts[0].value)

    def _chosen(self, table: Sequence[int]) -> Self:
        """The same by choices between halves of the table, one for each bit."""
        halves = [self._new(self._match(number)) for number in table]
        for bit in range(4):
            is_clear = self._new(self.builder.icmp_signed("==", ((self >> bit) & 1).value, self._match(0)))
            halves = [is_clear.choose(zero, one) for zero, one in zip(halves[::2], halves[1::2], strict=True)]
        return halves[0]

    def widen(self) -> Self:
        """Unsigned whole numbers -> int32."""
        return self._new(self.builder.zext(self.value, self._typed(INT)))

    def widen_signed(self) -> Self:
        """Signed whole numbers -> int32."""
        return self._new(self.builder.sext(self.value, self._typed(INT)))

    def to_float(self) -> Self:
        """int32 -> float32."""
        return self._new(self.builder.sitofp(self.value, self._typed(FLOAT)))

    def bits(self) -> Self:
        """float32 -> its bits as int32."""
        return self._new(self.builder.bitcast(self.value, self._typed(INT)))

    def from_bits(self) -> Self:
        """int32 -> the float32 with these bits."""
        return self._new(self.builder.bitcast(self.value, self._typed(FLOAT)))

    def from_half(self) -> Self:
        """Bits of float16 -> float32, by the processor's own instruction or by moving bits."""
        if "f16c" in FEATURES:
            half = self.builder.bitcast(self.value, self._typed(ir.HalfType()))
            return self._new(self.builder.fpext(half, self._typed(FLOAT))).quiet()
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
        return self._new(self.builder.trunc(rounded.value, self._typed(SHORT)))


@intrinsic
def loaded(typing_context, value):
    """Read a number of an array, float32, bfloat16 as uint16 or int8, as float32."""

    def write(context, builder, signature, arguments):
        number = Lanes(builder, arguments[0])
        if value == types.int8:
            return number.widen_signed().to_float().value
        return number.value if value == types.float32 else (number.widen() << 16).from_bits().value

    return types.float32(value), write


@intrinsic
def stored(typing_context, value, out):
    """Convert float32 to what `out` is, a number or an array of them: itself, bfloat16 as uint16, or rounded int8."""
    kind = getattr(out, "dtype", out)

    def write(context, builder, signature, arguments):
        number = Lanes(builder, arguments[0])
        if kind == types.int8:
            return builder.trunc((number + ROUNDER).bits().value, BYTE)
        return number.value if kind == types.float32 else number.quiet().bfloat16().value

    return kind(types.float32, out), write


@intrinsic
def is_rounded(typing_context, like):
    """Whether numbers of the type of `like` are int8: known when a loop is compiled, so that it has one way alone."""
    return types.boolean(like), lambda context, builder, s, a: context.get_constant(types.boolean, like == types.int8)


@intrinsic
def bits_of(typing_context, value):
    """Return the bits of a float32 as int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: Lanes(builder, args[0]).bits().value


@intrinsic
def from_bits(typing_context, value):
    """Return the float32 with these bits, int32."""
    return types.float32(types.int32), lambda c, builder, s, args: Lanes(builder, args[0]).from_bits().value


@intrinsic
def multiply_add(typing_context, a, b, c):
    """Return a · b + c of float32, rounded once: what a compiler may fuse or not ends in other digits."""
    return types.float32(types.float32, types.float32, types.float32), lambda x, builder, s, args: builder.fma(*args)
