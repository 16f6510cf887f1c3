"""Products with weights as they lie, in every form: against float64, and the forms against one another, bit for bit."""

import ctypes

import numpy as np
import pytest

from backends.torch.test_kernels import random_blocks
from thimble.backends.torch.block_products import RUN, TILE, form_of, product_kernel, whole_number_form
from thimble.backends.torch.vectors import FEATURES
from thimble.files.blocks import BLOCKS, dequantize

BLOCK_DTYPES = [dtype for dtype, (values, _) in BLOCKS.items() if values > 1]
PLAIN_DTYPES = [dtype for dtype in BLOCKS if dtype not in BLOCK_DTYPES]
WHOLE_DTYPES = [dtype for dtype in BLOCK_DTYPES if dtype != "Q2_K"]  # whose lows are those of less than a run
ROWS, COLUMNS = 7, 512


def quantised(x):
    """q, scales and scaled sums of each run of 32, as the definition says."""
    runs = x.reshape(len(x), -1, RUN)
    size = np.abs(runs).max(-1)
    inverse = np.divide(np.float32(127), size, out=np.zeros_like(size), where=size > 0)
    q = np.rint(runs * inverse[..., None]).astype(np.int8)
    scales = (size / np.float32(127)).astype(np.float32)
    return q.reshape(x.shape), scales, (q.sum(-1, dtype=np.int32).astype(np.float32) * scales).astype(np.float32)


def by_run(x):
    """The same as the kernel wants it: what all rows have of a run lies together."""
    q, scales, sums = quantised(x)
    return np.ascontiguousarray(q.reshape(len(x), -1, RUN).swapaxes(0, 1)), scales.T.copy(), sums.T.copy()


def activations(tokens, columns=COLUMNS, seed=3):
    return np.random.default_rng(seed).normal(size=(tokens, columns)).astype(np.float32)


def product(raw, dtype, form, x, index=None, rows=slice(0, ROWS)):
    """x Wᵀ by the kernel: float32 (tokens, rows of raw), NaN where it wrote nothing."""
    q, scales, sums = by_run(x) if x.shape[1] % RUN == 0 else (np.zeros(1, np.int8), *[np.zeros(1, np.float32)] * 2)
    out = np.full((len(x), len(raw)), np.nan, np.float32)
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 13)(product_kernel(dtype, form))
    kernel(
        raw.ctypes.data, raw.strides[0], 0 if index is None else index.ctypes.data, x.shape[1], rows.start, rows.stop,
        len(x), x.ctypes.data, q.ctypes.data, scales.ctypes.data, sums.ctypes.data, out.ctypes.data, 4 * len(raw),
    )  # fmt: skip
    return out


def exact(raw, dtype, x):
    return x.astype(np.float64) @ dequantize(raw, dtype, (ROWS, x.shape[1])).astype(np.float64).T


def decoded(x):
    """What quantised activations stand for, float64."""
    q, scales, _ = quantised(x)
    return (q.reshape(len(x), -1, RUN) * scales.astype(np.float64)[..., None]).reshape(x.shape)


def assert_close(found, expected, tolerance):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def here(form):
    """A form that this processor can run."""
    order = ["plain", "avx2", "vnni"]
    if order.index(form) > order.index(whole_number_form()):
        pytest.skip(f"this processor has no instructions for the form {form}")
    return form


@pytest.mark.parametrize("form", ["plain", "avx2", "vnni"])
@pytest.mark.parametrize("dtype", WHOLE_DTYPES)
def test_a_product_of_whole_numbers_is_that_of_what_they_stand_for(dtype, form):
    raw, x = random_blocks(dtype, ROWS, COLUMNS), activations(5)
    assert_close(product(raw, dtype, here(form), x), exact(raw, dtype, decoded(x)), 1e-5)


@pytest.mark.parametrize("form", ["avx2", "vnni"])
@pytest.mark.parametrize("dtype", WHOLE_DTYPES)
def test_every_form_ends_in_the_same_bits(dtype, form):
    for seed in range(5):
        raw, x = random_blocks(dtype, ROWS, COLUMNS, seed), activations(4, seed=seed)
        assert np.array_equal(product(raw, dtype, here(form), x), product(raw, dtype, "plain", x))


@pytest.mark.parametrize("form", ["plain", "avx2", "vnni"])
@pytest.mark.parametrize("dtype", WHOLE_DTYPES)
def test_no_sum_of_the_largest_numbers_is_cut_off(dtype, form):
    """127 · 255 twice is more than 16 bits hold with a sign; so are 128 · 127 four times."""
    raw = random_blocks(dtype, ROWS, COLUMNS)
    raw[:4] = np.where(raw[:4] > 127, 255, 128)
    from thimble.files.blocks import LAYOUTS

    for name in {"scale", "low"} & set(LAYOUTS[dtype].names):
        raw.view(LAYOUTS[dtype])[name] = np.float16(0.01).view(np.uint16)
    x = np.where(activations(4) > 0, np.float32(1), np.float32(-1))
    x[0], x[1] = 1, -1
    assert_close(product(raw, dtype, here(form), x), exact(raw, dtype, decoded(x)), 1e-5)


@pytest.mark.parametrize("dtype", WHOLE_DTYPES)
def test_quantised_activations_cost_no_more_than_their_rounding(dtype):
    raw, x = random_blocks(dtype, ROWS, COLUMNS), activations(3)
    weights = np.abs(dequantize(raw, dtype, (ROWS, COLUMNS)).astype(np.float64))
    step = np.repeat(quantised(x)[1], RUN, axis=1).astype(np.float64)
    error = np.abs(product(raw, dtype, whole_number_form(), x) - exact(raw, dtype, x))
    assert (error <= 0.5001 * step @ weights.T + 1e-4).all()
    assert error.max() > 0  # they were quantised


@pytest.mark.parametrize("dtype", BLOCKS)
def test_a_float_product_is_that_of_the_decoded_weights(dtype):
    raw, x = random_blocks(dtype, ROWS, COLUMNS), activations(5)
    assert_close(product(raw, dtype, "float", x), exact(raw, dtype, x), 1e-5)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 33])
def test_plain_rows_may_have_any_length(dtype, columns):
    raw, x = random_blocks(dtype, ROWS, columns), activations(2, columns)
    assert_close(product(raw, dtype, "float", x), exact(raw, dtype, x), 1e-5)


@pytest.mark.parametrize("dtype", BLOCKS)
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_row_does_not_depend_on_those_beside_it(dtype, is_int8):
    form, raw, x = form_of(dtype, is_int8), random_blocks(dtype, ROWS, COLUMNS), activations(16)
    alone = np.concatenate([product(raw, dtype, form, x[t : t + 1]) for t in range(16)])
    for tokens in range(1, 17):
        assert np.array_equal(product(raw, dtype, form, x[:tokens]), alone[:tokens])


@pytest.mark.parametrize("dtype", ["Q4_1", "Q8_0", "Q6_K"])
def test_a_row_does_not_depend_on_how_many_are_read_at_once(dtype):
    form, raw, x = form_of(dtype, True), random_blocks(dtype, ROWS, COLUMNS), activations(2 * TILE + 3)
    alone = np.concatenate([product(raw, dtype, form, x[t : t + 1]) for t in range(len(x))])
    assert np.array_equal(product(raw, dtype, form, x), alone)


@pytest.mark.parametrize("rows", [1, 8, 9, 24])
def test_rows_that_make_no_group_of_eight_are_multiplied_too(rows):
    raw, x = random_blocks("Q4_1", rows, COLUMNS), activations(3)
    expected = decoded(x) @ dequantize(raw, "Q4_1", (rows, COLUMNS)).astype(np.float64).T
    assert_close(product(raw, "Q4_1", whole_number_form(), x, rows=slice(0, rows)), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["Q4_1", "F32"])
def test_rows_are_where_the_index_says_and_only_those_asked_for_are_written(dtype):
    raw, x = random_blocks(dtype, ROWS, COLUMNS), activations(3)
    index, form = np.random.default_rng(1).permutation(ROWS), form_of(dtype, True)
    out = product(raw, dtype, form, x, index, slice(2, 5))
    assert np.array_equal(out[:, 2:5], product(raw, dtype, form, x)[:, index[2:5]])
    assert np.isnan(out[:, :2]).all()
    assert np.isnan(out[:, 5:]).all()


def test_weights_that_are_not_in_blocks_are_never_multiplied_by_whole_numbers():
    assert {form_of(dtype, True) for dtype in PLAIN_DTYPES} == {"float"}
    assert {form_of(dtype, False) for dtype in BLOCKS} == {"float"}


def test_weights_in_blocks_are_multiplied_by_whole_numbers_if_lows_are_those_of_a_run():
    assert {form_of(dtype, True) for dtype in WHOLE_DTYPES} == {whole_number_form()}
    assert form_of("Q2_K", True) == "float"


def test_the_form_is_the_best_that_the_processor_has():
    assert whole_number_form() == ("vnni" if "avxvnni" in FEATURES or {"avx512vnni", "avx512vl"} <= FEATURES else
                                   "avx2" if "avx2" in FEATURES else "plain")  # fmt: skip
