"""Blocks of eight rows of weights side by side, as they lie in a file, as whole numbers in a program being written.

Each block is unpacked to runs of 32 whole numbers with what scales them, which `thimble.backends.torch.block_products`
multiplies; what the bits stand for is explained in `thimble.files.blocks`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from thimble.backends.torch.kernels import Block, iq4_scales, iq4_values, nibbles, q3_scales, sub_scales, three_bits
from thimble.backends.torch.vectors import BYTE, INT, Lanes
from thimble.files.blocks import LAYOUTS

RUN = 32  # values of an activation that share a scale
ROWS = 8  # of weights side by side
FOUR = 4  # values of a row that lie together: the sum of their products is a lane of 32 bits
GROUP = ir.VectorType(BYTE, ROWS * FOUR)
WORDS = ir.VectorType(INT, ROWS)


class Rows(Lanes):
    """Values of eight rows: each operation is done to every row, and lanes are numbered as in one row alone.

    Of one value a row, row r is lane r; of more, value v of row r is lane 32 · (v // 4) + 4 · r + v % 4.
    """

    @property
    def values(self) -> int:
        """How many values of each row."""
        return int(self.count) // ROWS

    def _match(self, other: Any) -> ir.Value:
        if isinstance(other, Sequence):
            other = [other[value] for value, _ in _places(len(other))]
        if isinstance(other, Rows) and other.values == 1 != self.values:
            other = other.pick([0] * self.values)
        return super()._match(other)

    def pick(self, lanes: Sequence[int]) -> "Rows":
        lane_of = {place: lane for lane, place in enumerate(_places(self.values))}
        mask = [lane_of[lanes[value], row] for value, row in _places(len(lanes))]
        return Rows(self.builder, super().pick(mask).value)

    def lane(self, number: int) -> "Rows":
        return self.pick([number])

    def quiet(self) -> "Rows":
        return self  # no bits of these numbers are rounded

    def groups(self) -> list[ir.Value]:
        """Registers of four values of each row."""
        size = ROWS * FOUR
        return [Lanes.pick(self, range(at, at + size)).value for at in range(0, self.count, size)]


def _places(values: int) -> list[tuple[int, int]]:
    """Value and row of each lane."""
    size = min(values, FOUR)
    return [(at + value, row) for at in range(0, values, size) for row in range(ROWS) for value in range(size)]


class BlockOfRows(Block):
    """A block of each of eight rows in a program being written."""

    def __init__(self, builder: ir.IRBuilder, starts: Sequence[ir.Value], dtype: str) -> None:
        super().__init__(builder, starts[0], LAYOUTS[dtype], 1)
        self._starts = starts

    def _load(self, name: str, skip: int, kind: ir.Type) -> Lanes:
        count = getattr(kind, "count", 1)
        if count > 16:
            parts = [self._load(name, skip + at, ir.VectorType(BYTE, 16)) for at in range(0, count, 16)]
            return parts[0].join(parts[1])
        word = ir.VectorType(INT, count // FOUR) if count == 16 else INT if count == FOUR else kind
        loaded = [Block(self.builder, start, self.layout, 1)._load(name, skip, word) for start in self._starts]
        if count == 16:
            return Rows(self.builder, self.builder.bitcast(_turned(loaded).value, ir.VectorType(BYTE, ROWS * count)))
        together = ir.Constant(ir.VectorType(word, ROWS), ir.Undefined)
        for row, one in enumerate(loaded):
            together = self.builder.insert_element(together, one.value, INT(row))
        if count == FOUR:
            together = self.builder.bitcast(together, GROUP)
        return Rows(self.builder, together)


def _turned(rows: Sequence[Lanes]) -> Lanes:
    """Eight rows of four words as the first word of each row, the second, ..."""
    pairs = [low.join(high) for low, high in zip(rows[:4], rows[4:], strict=True)]  # rows r and r + 4
    lower, upper = _crossed(pairs[0], pairs[1], 1), _crossed(pairs[2], pairs[3], 1)
    words = [word for a, b in zip(lower, upper, strict=True) for word in _crossed(a, b, 2)]
    return words[0].join(words[1]).join(words[2].join(words[3]))


def _crossed(a: Lanes, b: Lanes, size: int) -> Iterator[Lanes]:
    """The first words of each half of a and b in turn, so many at a time; then the last ones."""
    for first in (0, 2):
        order = [half + first + at + side for half in (0, 4) for at in range(0, 2, size) for side in (0, ROWS)]
        mask = ir.Constant(WORDS, [place + more for place in order for more in range(size)])
        yield Lanes(a.builder, a.builder.shuffle_vector(a.value, b.value, mask))


# ---- a block -> its runs ---------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A run of 32 weights of each row in a program being written."""

    quants: Rows  # bytes
    largest: int  # of the sizes of quants
    scales: Sequence[Rows]  # float32, of equal shares of the run
    low: Rows | None = None  # float32, added to every weight; with one, quants are not negative


def _four(block: Block) -> Lanes:
    low, high = nibbles(block.bytes("quants", 16))
    return low.join(high)


def _five(block: Block) -> Lanes:
    bit = block.bytes("high", FOUR).pick([lane // 8 for lane in range(RUN)]) & [1 << lane % 8 for lane in range(RUN)]
    zero, sixteen = (ir.Constant(bit.value.type, [number] * bit.count) for number in (0, 16))
    is_clear = block.builder.icmp_unsigned("==", bit.value, zero)
    return _four(block) | Rows(block.builder, block.builder.select(is_clear, zero, sixteen))


def _q8_0(block: Block) -> Iterator[Run]:
    yield Run(block.bytes("quants", RUN), 128, [block.half("scale")])


def _q4_0(block: Block) -> Iterator[Run]:
    scale = block.half("scale")
    yield Run(_four(block), 15, [scale], scale * -8.0)


def _q4_1(block: Block) -> Iterator[Run]:
    yield Run(_four(block), 15, [block.half("scale")], block.half("low"))


def _q5_0(block: Block) -> Iterator[Run]:
    scale = block.half("scale")
    yield Run(_five(block), 31, [scale], scale * -16.0)


def _q5_1(block: Block) -> Iterator[Run]:
    yield Run(_five(block), 31, [block.half("scale")], block.half("low"))


def _q4_k(block: Block) -> Iterator[Run]:
    scales, lows = sub_scales(block)
    for run in range(8):
        quants = nibbles(block.bytes("quants", RUN, run // 2 * RUN))[run % 2]
        yield Run(quants, 15, [scales.lane(run)], lows.lane(run) * -1.0)


def _q5_k(block: Block) -> Iterator[Run]:
    scales, lows = sub_scales(block)
    for run in range(8):
        quants = nibbles(block.bytes("quants", RUN, run // 2 * RUN))[run % 2]
        quants = quants | (((block.bytes("high", RUN) >> run) & 1) << 4)
        yield Run(quants, 31, [scales.lane(run)], lows.lane(run) * -1.0)


def _q6_k(block: Block) -> Iterator[Run]:
    scales = block.bytes("scales", 16).widen_signed().to_float() * block.half("scale")
    for run in range(8):
        half, quarter = divmod(run, 4)
        high = (block.bytes("high", RUN, RUN * half) >> (2 * quarter)) & 3
        quants = nibbles(block.bytes("quants", RUN, 64 * half + quarter % 2 * RUN))[quarter // 2]
        yield Run((quants | (high << 4)) - 32, 32, [scales.lane(2 * run), scales.lane(2 * run + 1)])


def _q3_k(block: Block) -> Iterator[Run]:
    scales = q3_scales(block)
    for run in range(8):
        yield Run(three_bits(block, run) - 4, 4, [scales.lane(2 * run), scales.lane(2 * run + 1)])


def _iq4_nl(block: Block) -> Iterator[Run]:
    low, high = iq4_values(block)
    yield Run(low.join(high), 127, [block.half("scale")])


def _iq4_xs(block: Block) -> Iterator[Run]:
    scales = iq4_scales(block)
    for run in range(8):
        low, high = iq4_values(block, run)
        yield Run(low.join(high), 127, [scales.lane(run)])


# Q2_K is none of them: its lows are those of 16 weights, and sums of activations those of 32.
RUNS: dict[str, Callable[[Block], Iterator[Run]]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k, "Q3_K": _q3_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip
