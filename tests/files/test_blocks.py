"""The oracle is ggml's own Python package: equal means equal bits."""

import gguf
import numpy as np
import pytest

from thimble.errors import BaseModelError
from thimble.files.block_encoders import PLAIN, quantize
from thimble.files.blocks import (
    BLOCKS,
    LAYOUTS,
    dequantize,
    from_bfloat16,
    quantize_rows,
    row_bytes,
    step_sizes,
    to_bfloat16,
)


def kind(dtype):
    return gguf.GGMLQuantizationType[dtype]


def random_blocks(dtype, rows, blocks, seed=0):
    """Random bytes, but for float16 scales of usual size and sign: what a file may hold, and no encoder can make."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks * BLOCKS[dtype][1]), dtype=np.uint8)
    cells = raw.view(LAYOUTS[dtype])
    for name in {"scale", "low"} & set(cells.dtype.names):
        cells[name] = rng.normal(0, 0.01, cells.shape).astype(np.float16).view(np.uint16)
    if dtype == "F32":
        cells["bits"] = rng.normal(size=cells.shape).astype(np.float32).view(np.uint32)
    if dtype == "F16":
        cells["bits"] = rng.normal(size=cells.shape).astype(np.float16).view(np.uint16)
    return raw


def weights(rows=70, columns=256, seed=1):
    """Normal weights with the rows that break naive code: zeros, one constant, one sign, very small, an outlier."""
    w = np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)
    w[0], w[1], w[2], w[3], w[4, 7] = 0, 0.25, np.abs(w[2]), w[3] * 1e-6, 30
    return w


@pytest.mark.parametrize("dtype", BLOCKS)
def test_decoding_gives_the_bits_of_ggml(dtype):
    raw = random_blocks(dtype, 40, 6)
    expected = gguf.quants.dequantize(raw, kind(dtype))
    found = dequantize(raw, dtype, expected.shape)
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", PLAIN)
def test_encoding_gives_the_bytes_of_ggml(dtype):
    expected = gguf.quants.quantize(weights(), kind(dtype)).view(np.uint8)
    assert np.array_equal(quantize(weights(), dtype), expected)


@pytest.mark.parametrize("dtype", BLOCKS)
def test_block_sizes_are_those_of_ggml(dtype):
    assert BLOCKS[dtype] == gguf.GGML_QUANT_SIZES[kind(dtype)]


@pytest.mark.parametrize("dtype", PLAIN)
def test_tensors_larger_than_one_chunk_decode_and_encode_alike(dtype):
    w = weights(1100, 320)
    raw = quantize(w, dtype)
    assert np.array_equal(raw[-5:], quantize(w[-5:], dtype))
    assert np.array_equal(dequantize(raw, dtype, w.shape)[-5:], dequantize(raw[-5:], dtype, (5, 320)))


def test_every_float16_scale_is_widened_exactly():
    halves = np.arange(65536, dtype=np.uint16)
    found = dequantize(halves.view(np.uint8), "F16", (65536,))
    assert np.array_equal(found, halves.view(np.float16).astype(np.float32), equal_nan=True)


def test_bfloat16_rounds_as_ggml_does_and_keeps_nan():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    values = np.concatenate([bits, ties, nans]).view(np.float32)
    expected = gguf.quants.quantize(values[None], kind("BF16")).view(np.uint16)[0]
    found = to_bfloat16(values)
    assert np.array_equal(found, expected)
    assert np.array_equal(np.isnan(from_bfloat16(found)), np.isnan(values))


def test_bfloat16_survives_the_round_trip_in_any_shape():
    halves = np.random.default_rng(0).integers(0, 0x7F80, (3, 4, 5)).astype(np.uint16)
    assert np.array_equal(to_bfloat16(from_bfloat16(halves)), halves)
    assert to_bfloat16(np.float32(1.0)).shape == ()
    assert np.array_equal(to_bfloat16(np.eye(3, dtype=np.float32)[:, ::2]), [[16256, 0], [0, 0], [0, 16256]])


def test_int8_rows_are_within_half_a_step_of_the_weights():
    w = weights()
    q, scale = quantize_rows(w)
    assert q.dtype == np.int8
    assert q.min() >= -127
    assert np.all(np.abs(q * scale[:, None] - w) <= scale[:, None] * 0.5001)
    assert np.all(np.abs(q).max(1)[1:] == 127)


def test_int8_rows_of_zeros_or_of_nearly_nothing_stay_zero():
    w = np.zeros((3, 8), np.float32)
    w[1], w[2] = 1e-40, 1e-37
    q, scale = quantize_rows(w)
    assert not q.any()
    assert not scale.any()


def test_blocks_of_nearly_nothing_are_written_as_zeros():
    w = np.full((1, 32), 1e-39, np.float32)
    for dtype in ("Q8_0", "Q4_0", "Q4_1"):
        assert not dequantize(quantize(w, dtype), dtype, w.shape).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("dtype", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_weight_that_float16_cannot_hold_is_refused_when_encoding(dtype, bad):
    w = weights()
    w[5, 5] = bad
    with pytest.raises(BaseModelError, match="does not fit float16"):
        quantize(w, dtype)


def test_types_that_cannot_be_decoded_are_refused_by_name():
    with pytest.raises(BaseModelError, match="IQ3_S cannot be decoded: expected one of F32"):
        dequantize(np.zeros(110, np.uint8), "IQ3_S", (1, 256))
    with pytest.raises(BaseModelError, match="cannot be written as Q6_K"):
        quantize(weights(), "Q6_K")


def test_rows_that_are_no_whole_number_of_blocks_are_refused():
    with pytest.raises(BaseModelError, match="a row of 100 values cannot be Q4_0: expected a multiple of 32"):
        quantize(np.zeros((2, 100), np.float32), "Q4_0")
    with pytest.raises(BaseModelError, match="multiple of 256"):
        row_bytes(576, "Q6_K")


def test_bytes_that_do_not_make_the_shape_are_refused():
    with pytest.raises(BaseModelError, match="expected 36 bytes"):
        dequantize(np.zeros(35, np.uint8), "Q4_0", (2, 32))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,)])
def test_empty_tensors_decode_to_empty_arrays(shape):
    assert dequantize(np.zeros(0, np.uint8), "Q4_0", shape).shape == shape


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q4_1"])
def test_no_value_is_rounded_by_more_than_half_a_step(dtype):
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    raw = quantize(values, dtype)
    steps = step_sizes(raw, dtype)
    assert steps.shape == (4 * 64 // 32,)
    error = np.abs(dequantize(raw, dtype, values.shape) - values).reshape(-1, 32).max(axis=1)
    bound = steps if dtype == "Q4_0" else 0.51 * steps  # Q4_0 reaches one end of its range only; 0.51: scale is float16
    assert (error <= bound).all()
    assert (error > 0.3 * steps).all()


def test_types_without_one_step_a_block_have_no_step_size():
    assert step_sizes(np.zeros(144, np.uint8), "Q4_K") is None
    assert step_sizes(np.zeros(4, np.uint8), "F32") is None
