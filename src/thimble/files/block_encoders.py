"""Numbers to the blocks of GGUF: where each bit goes, and the encoders that need no search.

The plain encoders give byte for byte what ggml's own Python package gives. Types whose scales are searched for, and all
types with weights of importance, are in `thimble.backends.torch.encode`, which packs its blocks here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError, listing
from thimble.files.blocks import BLOCKS, CHUNK_VALUES, LAYOUTS, TINY, Blocks, Bytes, Floats, row_bytes, to_bfloat16


def quantize(array: Floats, dtype: str) -> Bytes:
    """Encode a finite float32 (out, in) as F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1, to uint8 (out, bytes per
    row); the bytes are those of `gguf.quants.quantize`. A BaseModelError if the type cannot be written without a
    search, or a number does not fit it.

    >>> quantize(np.ones((2, 32), np.float32), "Q8_0").shape
    (2, 34)
    """
    if dtype not in _ENCODERS:
        raise BaseModelError(f"weights cannot be written as {dtype}: expected one of {listing(_ENCODERS, 10)}")
    out = np.empty((len(array), row_bytes(array.shape[1], dtype)), np.uint8)
    values, size = BLOCKS[dtype]
    blocks, raw = np.ascontiguousarray(array, np.float32).reshape(-1, values), out.reshape(-1, size)
    step = CHUNK_VALUES // values
    for start in range(0, len(blocks), step):
        encoded = _ENCODERS[dtype](blocks[start : start + step])
        raw[start : start + step] = encoded.view(np.uint8).reshape(-1, size)
    return out


def to_half(values: Floats) -> NDArray[np.float16]:
    """Round to float16; a BaseModelError if a number is NaN or Inf there, which would ruin its whole block."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        worst = values[~np.isfinite(half)].flat[0]
        raise BaseModelError(
            f"a weight or block scale of {worst:g} does not fit float16: expected finite numbers up to 65504; "
            "write the tensor as BF16 or F32"
        )
    return half


def pack(dtype: str, quants: Bytes, **scales: Any) -> Blocks:
    """Make blocks of whole numbers and their scales.

    Args:
        dtype: A quantised type.
        quants: uint8 (blocks, values), each as the decoder takes it: 0 to 15, 31 or 63; int8 for Q8_0.
        **scales: `scale` and, for types with one, `low`: float16 (blocks,). For K types `scales` and `lows`: uint8
            (blocks, 8) up to 63, or for Q6_K `scales`: int8 (blocks, 16).

    Returns:
        Structured blocks (blocks,) in the layout of the type.
    """
    blocks = np.empty(len(quants), LAYOUTS[dtype])
    if "lows" in scales:
        scales["scales"] = _pack_sub_scales(scales["scales"], scales.pop("lows"))
    for name, values in {**scales, **_PACKERS[dtype](quants)}.items():
        blocks[name] = values.view(np.uint16) if values.dtype == np.float16 else values
    return blocks


# Packers: whole numbers (n, values) -> the fields of a layout that hold them.

_Fields = dict[str, NDArray[Any]]


def _plain(quants: NDArray[Any]) -> _Fields:
    return {"quants": quants}


def _four_bits(quants: Bytes) -> _Fields:
    """Values j and j + 16 share a byte."""
    return {"quants": (quants[:, :16] & 15) | (quants[:, 16:] << 4)}


def _five_bits(quants: Bytes) -> _Fields:
    """Four bits as above; the fifth of value j is bit j of `high`."""
    return {**_four_bits(quants), "high": np.packbits(quants >> 4, axis=1, bitorder="little").view("<u4")[:, 0]}


def _four_bits_k(quants: Bytes) -> _Fields:
    """32 bytes hold two runs of 32 values."""
    runs = quants.reshape(-1, 4, 2, 32)
    return {"quants": ((runs[:, :, 0] & 15) | (runs[:, :, 1] << 4)).reshape(-1, 128)}


def _five_bits_k(quants: Bytes) -> _Fields:
    """Four bits as above; the fifth of value j in run i is bit i of high[j]."""
    high = np.packbits(quants.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little")
    return {**_four_bits_k(quants), "high": high[:, 0]}


def _six_bits(quants: Bytes) -> _Fields:
    """128 values take 64 bytes of low and 32 of high bits."""
    runs = quants.reshape(-1, 2, 4, 32)
    low = (runs[:, :, :2] & 15) | (runs[:, :, 2:] << 4)
    high = (runs >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return {"quants": low.reshape(-1, 128), "high": np.bitwise_or.reduce(high, axis=2).reshape(-1, 64)}


def _pack_sub_scales(scales: Bytes, lows: Bytes) -> Bytes:
    """Pack eight scales and eight lows of six bits to 12 bytes; `blocks._sub_scales` says where each lies."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = lows[:, :4] | (lows[:, 4:] >> 4 << 6)
    return np.concatenate([first, second, (scales[:, 4:] & 15) | (lows[:, 4:] << 4)], axis=1)


_PACKERS: dict[str, Callable[[Bytes], _Fields]] = {
    "Q8_0": _plain, "Q4_0": _four_bits, "Q4_1": _four_bits, "Q5_0": _five_bits, "Q5_1": _five_bits,
    "Q4_K": _four_bits_k, "Q5_K": _five_bits_k, "Q6_K": _six_bits,
}  # fmt: skip


# Encoders: float32 (n, values) -> any array whose bytes are the n blocks.


def _reciprocal(scale: Floats) -> Floats:
    """1 / scale, and 0 where that would not be finite."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > TINY)


def _encode_q8_0(blocks: Floats) -> Blocks:
    """scale = max|w| / 127, q = w / scale rounded half away from zero."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    half = to_half(scale)
    scaled = blocks * _reciprocal(scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    rounded = np.copysign(whole + np.floor(2 * (size - whole)), scaled)
    return pack("Q8_0", rounded.astype(np.int8), scale=half[:, 0])


def _encode_symmetric(dtype: str, half_range: int) -> Callable[[Floats], Blocks]:
    """scale = (the w of largest size) / -half_range, q = floor(w / scale + half_range + 0.5), cut off at the top."""

    def encode(blocks: Floats) -> Blocks:
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
        scale = extreme / np.float32(-half_range)
        half = to_half(scale)
        quants = blocks * _reciprocal(scale) + np.float32(half_range + 0.5)
        return pack(dtype, quants.astype(np.uint8).clip(0, 2 * half_range - 1), scale=half[:, 0])

    return encode


def _encode_from_low(dtype: str, most: int) -> Callable[[Floats], Blocks]:
    """low = min w, scale = (max w - min w) / most, q = floor((w - low) / scale + 0.5), cut off at the top."""

    def encode(blocks: Floats) -> Blocks:
        low = blocks.min(axis=1, keepdims=True)
        scale = (blocks.max(axis=1, keepdims=True) - low) / np.float32(most)
        half, low_half = to_half(scale), to_half(low)
        quants = (blocks - low) * _reciprocal(scale) + np.float32(0.5)
        return pack(dtype, quants.astype(np.uint8).clip(0, most), scale=half[:, 0], low=low_half[:, 0])

    return encode


_ENCODERS: dict[str, Callable[[Floats], Any]] = {
    "F32": lambda blocks: blocks, "F16": to_half, "BF16": to_bfloat16, "Q8_0": _encode_q8_0,
    "Q4_0": _encode_symmetric("Q4_0", 8), "Q5_0": _encode_symmetric("Q5_0", 16),
    "Q4_1": _encode_from_low("Q4_1", 15), "Q5_1": _encode_from_low("Q5_1", 31),
}  # fmt: skip
PLAIN = tuple(_ENCODERS)  # types that `quantize` writes
