"""How weights are stored in few bits: the block types of GGUF, bfloat16, and int8 with one scale per row.

This is the plain numpy reference: bit for bit what ggml's own Python package computes. Its fast twins are in
`thimble.backends.torch.kernels`. It knows arrays, not files: those are read by `thimble.files.tensors`.

A quantised matrix is cut along its rows into blocks of 32 or 256 values; each block holds small integers and the
float16 numbers that scale them. The layouts and formulas are those of ggml (https://github.com/ggml-org/ggml,
src/ggml-common.h and src/ggml-quants.c).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError, listing

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Halves = NDArray[np.uint16]

# One block of each type as it lies in a file, little endian. `scale` and `low` are float16 bits kept as integers, so
# that compiled kernels, which know no float16, read the same layout.
LAYOUTS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype([("bits", "<u4")]),
    "F16": np.dtype([("bits", "<u2")]),
    "BF16": np.dtype([("bits", "<u2")]),
    "Q8_0": np.dtype([("scale", "<u2"), ("quants", "i1", 32)]),
    "Q4_0": np.dtype([("scale", "<u2"), ("quants", "u1", 16)]),
    "Q4_1": np.dtype([("scale", "<u2"), ("low", "<u2"), ("quants", "u1", 16)]),
    "Q5_0": np.dtype([("scale", "<u2"), ("high", "<u4"), ("quants", "u1", 16)]),
    "Q5_1": np.dtype([("scale", "<u2"), ("low", "<u2"), ("high", "<u4"), ("quants", "u1", 16)]),
    "Q4_K": np.dtype([("scale", "<u2"), ("low", "<u2"), ("scales", "u1", 12), ("quants", "u1", 128)]),
    "Q5_K": np.dtype(
        [("scale", "<u2"), ("low", "<u2"), ("scales", "u1", 12), ("high", "u1", 32), ("quants", "u1", 128)]
    ),
    "Q6_K": np.dtype([("quants", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("scale", "<u2")]),
    "Q2_K": np.dtype([("scales", "u1", 16), ("quants", "u1", 64), ("scale", "<u2"), ("low", "<u2")]),
    "Q3_K": np.dtype([("high", "u1", 32), ("quants", "u1", 64), ("scales", "u1", 12), ("scale", "<u2")]),
    "IQ4_NL": np.dtype([("scale", "<u2"), ("quants", "u1", 16)]),
    "IQ4_XS": np.dtype([("scale", "<u2"), ("scales", "u1", 6), ("quants", "u1", 128)]),
}
_VALUES = {name: 1 if name in ("F32", "F16", "BF16") else 256 if name.endswith(("_K", "_XS")) else 32
           for name in LAYOUTS}  # fmt: skip

# What the sixteen numbers of the types IQ4 stand for: closer together around zero, where most weights are.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

ONE_SCALE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # types whose blocks have one step size

# dtype -> (values in one block, bytes of one block)
BLOCKS: dict[str, tuple[int, int]] = {name: (_VALUES[name], one.itemsize) for name, one in LAYOUTS.items()}

# A row or block whose largest number is below this is stored as zeros: the reciprocal of its scale would overflow.
TINY = np.float32(1e-36)

# Values decoded or encoded at a time: bounds the temporary arrays to a few megabytes, whatever the size of the tensor.
CHUNK_VALUES = 1 << 18


def block_of(dtype: str) -> tuple[int, int]:
    """Return (values, bytes) of one block of `dtype`; a BaseModelError if Thimble cannot decode that type."""
    if dtype not in BLOCKS:
        raise BaseModelError(
            f"weights of type {dtype} cannot be decoded: expected one of {listing(BLOCKS, most=20)}; "
            "take a file of the same model in one of these types (Q4_K_M, Q8_0 and F16 files are common)"
        )
    return BLOCKS[dtype]


def row_bytes(columns: int, dtype: str) -> int:
    """Return the bytes of one row of `columns` values; a BaseModelError if that is not a whole number of blocks."""
    values, size = block_of(dtype)
    if columns % values:
        raise BaseModelError(f"a row of {columns} values cannot be {dtype}: expected a multiple of {values}")
    return columns // values * size


def to_bfloat16(values: Floats) -> Halves:
    """Round float32 to bfloat16, ties to even: uint16, the upper half of each rounded float32; NaN stays NaN.

    >>> to_bfloat16(np.array([1.0, 1.00390625, -2.5], np.float32)).tolist()
    [16256, 16256, 49184]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if is_nan.any():  # adding to a NaN could carry into its sign; it is made quiet and cut instead
        rounded[is_nan] = (bits[is_nan] & 0xFFFF0000) | 0x00400000
    rounded >>= 16
    return rounded.astype(np.uint16).reshape(values.shape)


def from_bfloat16(bits: Halves) -> Floats:
    """Widen bfloat16, given as uint16, to float32; exact.

    >>> from_bfloat16(np.array([16256, 49184], np.uint16)).tolist()
    [1.0, -2.5]
    """
    return np.left_shift(np.asarray(bits, np.uint16), 16, dtype=np.uint32).view(np.float32)


def quantize_rows(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Store each row as int8 with one scale: q = round(w / s), s = max|w| / 127 (symmetric, ties to even).

    From finite float32 (out, in) to int8 (out, in) between -127 and 127 and float32 (out,). A row of zeros (or of
    numbers below 1e-36, whose reciprocal would overflow) has scale 0.

    >>> q, scale = quantize_rows(np.array([[1.0, -0.5], [0.0, 0.0]], np.float32))
    >>> q.tolist(), (scale * 127).tolist()
    ([[127, -64], [0, 0]], [1.0, 0.0])
    """
    largest: Floats = np.abs(weight).max(axis=1, initial=0.0).astype(np.float32)
    largest[largest < TINY] = 0
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest != 0)
    return np.rint(weight * inverse[:, None]).astype(np.int8), largest / np.float32(127)


def dequantize(raw: Bytes, dtype: str, shape: Sequence[int]) -> Floats:
    """Decode the bytes of a tensor, uint8, to a new float32 array; its numbers are those of `gguf.quants.dequantize`,
    bit for bit. A BaseModelError if the type is none of BLOCKS or the bytes do not match the shape.

    >>> dequantize(np.array([0x80, 0x3F], np.uint8), "BF16", (1,)).tolist()
    [1.0]
    """
    shape = tuple(shape)
    needed = math.prod(shape[:-1]) * row_bytes(shape[-1] if shape else 1, dtype)
    if raw.size != needed:
        raise BaseModelError(f"{raw.size} bytes of {dtype} do not make shape {shape}: expected {needed} bytes")
    values, size = BLOCKS[dtype]
    blocks = np.ascontiguousarray(raw).reshape(-1).view(LAYOUTS[dtype])
    out = np.empty((raw.size // size, values), np.float32)
    step = CHUNK_VALUES // values
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = _DECODERS[dtype](blocks[start : start + step]).reshape(-1, values)
    return out.reshape(shape)


# Decoders: structured blocks (n,) -> float32 (n, values). Each product and sum is rounded to float32 on its own, in
# ggml's order, because that is what makes the result bit-identical.

Blocks = NDArray[Any]


def _half(bits: Halves) -> Floats:
    """Widen float16, given as uint16 (n,), to a float32 column (n, 1)."""
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)[:, None]


def _nibbles(packed: Bytes) -> Bytes:
    """Unpack (..., m) bytes to (..., 2 m): all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _five_bits(blocks: Blocks) -> Floats:
    """q in 0..31: four bits as in Q4, the fifth of value j is bit j of `high`."""
    fifth = (blocks["high"][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return (_nibbles(blocks["quants"]) | (fifth << 4)).astype(np.float32)


def _sub_scales(blocks: Blocks) -> tuple[Floats, Floats]:
    """Unpack the eight 6-bit scales and lows of a K block, each times the block's own: two float32 (n, 8, 1).

    Bytes 0-3 hold the first four scales, 4-7 the first four lows; their upper two bits and bytes 8-11 hold the rest.
    """
    first, second, rest = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=1)
    lows = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=1)
    scales, lows = scales.astype(np.float32), lows.astype(np.float32)
    return (_half(blocks["scale"]) * scales)[..., None], (_half(blocks["low"]) * lows)[..., None]


def _decode_q4_k(blocks: Blocks) -> Floats:
    """w = scaleᵢ · q - lowᵢ for each run i of 32 values; 32 bytes hold two runs."""
    scales, lows = _sub_scales(blocks)
    quants = _nibbles(blocks["quants"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return scales * quants.astype(np.float32) - lows


def _decode_q5_k(blocks: Blocks) -> Floats:
    """As Q4_K; the fifth bit of value j in run i is bit i of high[j]."""
    scales, lows = _sub_scales(blocks)
    quants = _nibbles(blocks["quants"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = (blocks["high"][:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return scales * (quants | (fifth << 4)).astype(np.float32) - lows


def _decode_q6_k(blocks: Blocks) -> Floats:
    """w = scale · scalesᵢ · (q - 32) for each run i of 16 values; 128 values take 64 bytes of low, 32 of high bits."""
    low = _nibbles(blocks["quants"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (blocks["high"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    quants = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    return (_half(blocks["scale"]) * blocks["scales"].astype(np.float32))[..., None] * quants


def _two_bits(blocks: Blocks) -> Bytes:
    """q in 0..3, (n, 16, 16): 32 bytes hold 128 values, the lowest two bits of all first."""
    pairs = blocks["quants"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (pairs & 3).reshape(-1, 16, 16)


def _decode_q2_k(blocks: Blocks) -> Floats:
    """w = scale · scalesᵢ · q - low · lowsᵢ for each run i of 16 values."""
    scales, lows = (part.astype(np.float32) for part in (blocks["scales"] & 15, blocks["scales"] >> 4))
    scales, lows = _half(blocks["scale"]) * scales, _half(blocks["low"]) * lows
    return scales[..., None] * _two_bits(blocks).astype(np.float32) - lows[..., None]


def _decode_q3_k(blocks: Blocks) -> Floats:
    """w = scale · (scalesᵢ - 32) · (q - 4) for each run i of 16 values; the third bit of value j in each run of 32 is
    one of high[j]. Bytes 0-7 hold four bits of two scales each, bytes 8-11 the upper two of all.
    """
    upper = (blocks["scales"][:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales = (_nibbles(blocks["scales"][:, :8]) | (upper.reshape(-1, 16) << 4)).astype(np.float32) - 32
    third = (blocks["high"][:, None] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    quants = (_two_bits(blocks) | (third.reshape(-1, 16, 16) << 2)).astype(np.float32) - 4
    return (_half(blocks["scale"]) * scales)[..., None] * quants


def _iq4_values(packed: Bytes) -> Floats:
    """What the nibbles of (..., 16) bytes stand for: float32 (..., 32)."""
    return np.array(IQ4_VALUES, np.float32)[_nibbles(packed)]


def _decode_iq4_xs(blocks: Blocks) -> Floats:
    """w = scale · (scalesᵢ - 32) · value for each run i of 32 values. Bytes 0-1 hold the upper two bits of the scales,
    bytes 2-5 the lower four.
    """
    upper = (blocks["scales"][:, :2, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    lower = (blocks["scales"][:, 2:, None] >> np.array([0, 4], np.uint8)) & 15
    scales = (lower.reshape(-1, 8) | (upper.reshape(-1, 8) << 4)).astype(np.float32) - 32
    return (_half(blocks["scale"]) * scales)[..., None] * _iq4_values(blocks["quants"].reshape(-1, 8, 16))


_DECODERS: dict[str, Callable[[Blocks], Floats]] = {
    "F32": lambda blocks: blocks["bits"].view(np.float32),
    "F16": lambda blocks: _half(blocks["bits"]),
    "BF16": lambda blocks: from_bfloat16(blocks["bits"]),
    "Q8_0": lambda blocks: _half(blocks["scale"]) * blocks["quants"].astype(np.float32),
    "Q4_0": lambda blocks: _half(blocks["scale"]) * (_nibbles(blocks["quants"]).astype(np.float32) - 8),
    "Q4_1": lambda blocks: (
        _half(blocks["scale"]) * _nibbles(blocks["quants"]).astype(np.float32) + _half(blocks["low"])
    ),
    "Q5_0": lambda blocks: _half(blocks["scale"]) * (_five_bits(blocks) - 16),
    "Q5_1": lambda blocks: _half(blocks["scale"]) * _five_bits(blocks) + _half(blocks["low"]),
    "Q4_K": _decode_q4_k, "Q5_K": _decode_q5_k, "Q6_K": _decode_q6_k, "Q2_K": _decode_q2_k, "Q3_K": _decode_q3_k,
    "IQ4_NL": lambda blocks: _half(blocks["scale"]) * _iq4_values(blocks["quants"]), "IQ4_XS": _decode_iq4_xs,
}  # fmt: skip


def step_sizes(raw: Bytes, dtype: str) -> Floats | None:
    """Distances between neighbouring values of a quantised tensor, which bound its rounding errors: float32 (blocks,).
    None for numbers that are not in blocks or whose blocks have scales of two levels.
    """
    if dtype not in ONE_SCALE:
        return None
    blocks = np.ascontiguousarray(raw).reshape(-1).view(LAYOUTS[dtype])
    return np.abs(np.ascontiguousarray(blocks["scale"]).view(np.float16).astype(np.float32))
