"""The oracle is `thimble.files.blocks`, itself held to ggml: equal means equal bits."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from thimble.backends.torch.kernels import decode_rows, dequantize_rows_into, quantize_rows_into, rescale_into
from thimble.errors import BaseModelError
from thimble.files.block_encoders import quantize
from thimble.files.blocks import (
    BLOCKS,
    LAYOUTS,
    dequantize,
    from_bfloat16,
    quantize_rows,
    row_bytes,
    to_bfloat16,
)

OUTPUTS = (np.float32, np.uint16)


def random_blocks(dtype, rows, columns, seed=0):
    """Random bytes, but for float16 scales of usual size."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, row_bytes(columns, dtype)), dtype=np.uint8)
    cells = raw.view(LAYOUTS[dtype])
    for name in {"scale", "low"} & set(cells.dtype.names):
        cells[name] = rng.normal(0, 0.01, cells.shape).astype(np.float16).view(np.uint16)
    if dtype in ("F32", "F16", "BF16"):
        raw[...] = quantize(rng.normal(size=(rows, columns)).astype(np.float32), dtype)
    return raw


def expected_rows(raw, dtype, shape, output):
    values = dequantize(raw, dtype, shape)
    return values if output is np.float32 else to_bfloat16(values)


def same_bits(found, expected):
    return np.array_equal(found.view(f"u{found.itemsize}"), expected.view(f"u{found.itemsize}"))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", BLOCKS)
def test_rows_decode_to_the_bits_of_the_reference(dtype, output):
    raw = random_blocks(dtype, 33, 512)
    out = np.zeros((33, 512), output)
    decode_rows(raw, dtype, out)
    assert same_bits(out, expected_rows(raw, dtype, out.shape, output))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", ["Q4_1", "Q6_K", "BF16"])
def test_rows_come_from_where_the_index_says_and_go_nowhere_else(dtype, output):
    raw = random_blocks(dtype, 20, 256)
    index = np.random.default_rng(1).permutation(20)[:12]
    buffer = np.full((40, 256), 7, output)
    decode_rows(raw, dtype, buffer[8:20], index)
    expected = np.full((40, 256), 7, output)
    expected[8:20] = expected_rows(raw, dtype, (20, 256), output)[index]
    assert same_bits(buffer, expected)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("columns", [1, 7, 33])
def test_plain_types_may_have_rows_of_any_length(dtype, output, columns):
    raw = random_blocks(dtype, 5, columns)
    out = np.zeros((5, columns), output)
    decode_rows(raw, dtype, out)
    assert same_bits(out, expected_rows(raw, dtype, out.shape, output))


@pytest.mark.parametrize("dtype", ["F32", "Q4_K"])
def test_blocks_may_lie_at_any_address(dtype):
    raw = random_blocks(dtype, 9, 256)
    odd = np.zeros(raw.size + 1, np.uint8)[1:].reshape(raw.shape)
    odd[...] = raw
    odd.flags.writeable = False
    out = np.zeros((9, 256), np.float32)
    decode_rows(odd, dtype, out)
    assert same_bits(out, dequantize(raw, dtype, out.shape))


@pytest.mark.parametrize("dtype", ["Q4_0", "F16"])
def test_matrices_shared_out_over_threads_decode_alike(dtype):
    raw = random_blocks(dtype, 700, 2048)
    out = np.zeros((700, 2048), np.uint16)
    index = np.arange(700)[::-1].copy()
    decode_rows(raw, dtype, out, index)
    assert np.array_equal(out, expected_rows(raw, dtype, out.shape, np.uint16)[index])


def test_several_threads_may_decode_at_the_same_time():
    raw = random_blocks("Q4_1", 600, 2048)
    expected = expected_rows(raw, "Q4_1", (600, 2048), np.uint16)

    def decode(_):
        out = np.zeros((600, 2048), np.uint16)
        decode_rows(raw, "Q4_1", out)
        return np.array_equal(out, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(decode, range(12)))


def test_every_float16_widens_and_narrows_like_the_reference():
    halves = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    out, short = np.zeros(halves.shape, np.float32), np.zeros(halves.shape, np.uint16)
    decode_rows(halves.view(np.uint8), "F16", out)
    decode_rows(halves.view(np.uint8), "F16", short)
    expected = halves.view(np.float16).astype(np.float32)
    is_number = ~np.isnan(expected)
    assert same_bits(out[is_number], expected[is_number])
    assert np.array_equal(short[is_number], to_bfloat16(expected)[is_number])
    assert np.isnan(out[~is_number]).all()
    assert np.isnan(from_bfloat16(short)[~is_number]).all()


def test_rounding_to_bfloat16_is_to_nearest_even_and_keeps_nan():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 64 * 1024, dtype=np.uint32)
    bits[::2] = (bits[::2] & 0xFFFF0000) | 0x8000
    bits[:3] = 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001
    values = bits.view(np.float32).reshape(64, 1024)
    out = np.zeros(values.shape, np.uint16)
    decode_rows(values.view(np.uint8), "F32", out)
    is_nan = np.isnan(values)
    assert np.array_equal(out[~is_nan], to_bfloat16(values)[~is_nan])
    assert np.isnan(from_bfloat16(out)[is_nan]).all()


def test_a_damaged_scale_decodes_to_nan_and_not_to_a_number():
    raw = random_blocks("Q4_1", 1, 64)
    raw.view(LAYOUTS["Q4_1"])["scale"] = 0x7FFF
    out = np.zeros((1, 64), np.uint16)
    decode_rows(raw, "Q4_1", out)
    assert np.isnan(from_bfloat16(out)).all()


def test_no_rows_are_no_work():
    decode_rows(np.zeros((3, 20), np.uint8), "Q4_1", np.zeros((0, 32), np.uint16))


def test_types_without_a_kernel_are_refused_by_name():
    with pytest.raises(BaseModelError, match="IQ3_S cannot be decoded"):
        decode_rows(np.zeros((1, 110), np.uint8), "IQ3_S", np.zeros((1, 256), np.float32))


@pytest.mark.parametrize(
    ("raw", "out", "index"),
    [
        ((4, 18), (4, 64), None),
        ((3, 18), (4, 32), None),
        ((4, 18), (4, 32), [0, 1, 2]),
        ((4, 18), (4, 32), [0, 1, 2, 4]),
        ((4, 18), (4, 32), [0, 1, 2, -1]),
    ],
)
def test_what_would_be_read_or_written_past_an_end_is_refused(raw, out, index):
    index = None if index is None else np.array(index)
    with pytest.raises(AssertionError):
        decode_rows(np.zeros(raw, np.uint8), "Q4_0", np.zeros(out, np.float32), index)


@pytest.mark.parametrize("columns", [1, 31, 576])
def test_int8_rows_are_those_of_the_reference(columns):
    x = np.random.default_rng(0).normal(size=(50, columns)).astype(np.float32)
    x[1], x[2] = 0, 1e-38
    for array, values in ((x, x), (to_bfloat16(x), from_bfloat16(to_bfloat16(x)))):
        q, scale = np.full(x.shape, 5, np.int8), np.full(50, 5, np.float32)
        quantize_rows_into(array, q, scale)
        expected_q, expected_scale = quantize_rows(values)
        assert np.array_equal(q, expected_q)
        assert np.array_equal(scale, expected_scale)


def test_columns_are_multiplied_by_their_factors_before_rows_become_int8():
    rng = np.random.default_rng(0)
    x, factor = rng.normal(size=(50, 333)).astype(np.float32), rng.random(333).astype(np.float32)
    q, scale = np.zeros(x.shape, np.int8), np.zeros(50, np.float32)
    quantize_rows_into(x, q, scale, factor)
    expected_q, expected_scale = quantize_rows(x * factor)
    assert np.array_equal(q, expected_q)
    assert np.array_equal(scale, expected_scale)


@pytest.mark.parametrize("output", OUTPUTS)
def test_sums_of_whole_numbers_are_scaled_by_row_and_column_into_their_place(output):
    rng = np.random.default_rng(0)
    sums = rng.integers(-(1 << 24), 1 << 24, (50, 33)).astype(np.int32)
    rows, columns = rng.random(50).astype(np.float32), rng.random(33).astype(np.float32)
    out = np.full((50, 60), 7, output)
    rescale_into(sums, rows, columns, out, first_column=20)
    expected = sums.astype(np.float32) * rows[:, None] * columns
    assert same_bits(out[:, 20:53], expected if output is np.float32 else to_bfloat16(expected))
    assert (out[:, :20] == 7).all()
    assert (out[:, 53:] == 7).all()


@pytest.mark.parametrize("output", OUTPUTS)
def test_int8_rows_come_back_as_number_times_scale(output):
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (50, 333)).astype(np.int8)
    scale = rng.random(50).astype(np.float32)
    out = np.zeros(q.shape, output)
    dequantize_rows_into(q, scale, out)
    expected = q.astype(np.float32) * scale[:, None]
    assert same_bits(out, expected if output is np.float32 else to_bfloat16(expected))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so_through_int8(bad):
    x = np.ones((3, 64), np.float32)
    x[1, 20] = bad
    q, scale, out = np.zeros(x.shape, np.int8), np.zeros(3, np.float32), np.zeros(x.shape, np.float32)
    quantize_rows_into(x, q, scale)
    assert np.isfinite(scale).tolist() == [True, False, True]
    dequantize_rows_into(q, scale, out)
    assert not np.isfinite(out[1, 20])


def test_a_second_process_finds_the_compiled_loops_on_disk_and_a_forked_one_gets_threads_of_its_own():
    program = """
import os, numpy as np
from thimble.backends.torch.kernels import _decode_kernel, decode_rows
raw, out = np.zeros((800, 2048 // 32 * 20), np.uint8), np.ones((800, 2048), np.uint16)
decode_rows(raw, "Q4_1", out)
assert _decode_kernel("Q4_1", 1).stats.cache_hits, "compiled again"
child = os.fork()
if child == 0:
    decode_rows(raw, "Q4_1", out)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    decode_rows(np.zeros((1, 20), np.uint8), "Q4_1", np.zeros((1, 32), np.uint16))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("dtype", ["IQ4_NL", "IQ4_XS"])
def test_tables_are_looked_up_on_processors_without_an_instruction_for_it(dtype, tmp_path):
    program = """
import sys, numpy as np
from thimble.backends.torch import vectors
from thimble.backends.torch.kernels import decode_rows
assert not vectors.FEATURES
raw, out = np.load(sys.argv[2]), np.zeros((9, 512), np.float32)
decode_rows(raw, sys.argv[1], out)
np.save(sys.argv[3], out)
"""
    raw = random_blocks(dtype, 9, 512)
    np.save(tmp_path / "raw.npy", raw)
    there = [str(tmp_path / "raw.npy"), str(tmp_path / "out.npy")]
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, dtype, *there], check=True, timeout=300, env=environment)
    assert same_bits(np.load(there[1]), dequantize(raw, dtype, (9, 512)))
