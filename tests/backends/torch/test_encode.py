"""The oracle is llama.cpp itself: the library inside of xllamacpp has its encoders. Equal means equal bytes."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from thimble.backends.torch.encode import ENCODABLE, encode
from thimble.errors import BaseModelError
from thimble.files.blocks import dequantize

xllamacpp = pytest.importorskip("xllamacpp")
BLOCKS = [dtype for dtype in ENCODABLE if dtype.startswith("Q")]
LIBRARY = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))


def of_llama_cpp(values, dtype, importance=None):
    """ggml_quantize_chunk: (type, source, target, first value, rows, columns, importance) -> bytes written."""
    kind = gguf.GGMLQuantizationType[dtype]
    count, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((len(values), values.shape[1] // count * size), np.uint8)
    call = LIBRARY.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    call.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weights = None if importance is None else importance.ctypes.data
    assert call(int(kind), values.ctypes.data, out.ctypes.data, 0, *values.shape, weights) == out.nbytes
    return out


def weights(rows=150, columns=768, seed=1):
    """Normal weights, and what breaks naive code: zeros, a constant, one sign, runs of zeros, small, an outlier."""
    random = np.random.default_rng(seed)
    w = random.normal(0, 0.05, (rows, columns)).astype(np.float32)
    w[0], w[1], w[2], w[3], w[4], w[5, 7] = 0, 0.25, -0.25, np.abs(w[3]), -np.abs(w[4]), 30
    w[6] *= 1e-6
    w[7, :300], w[8, 100:], w[9, ::3] = 0, 0, 0
    w[10] = np.repeat(random.normal(0, 1, columns // 32) * 10.0 ** random.integers(-6, 1, columns // 32), 32)
    w[11:30] *= 10.0 ** random.integers(-5, 2, (19, columns))
    w[30:40] = np.round(w[30:40] * 40) / 40  # many ties
    return w


def importances(columns=768):
    random = np.random.default_rng(2)
    return {
        "none": None,
        "uneven": (random.random(columns) ** 4).astype(np.float32),
        "wide": (10.0 ** random.uniform(-8, 3, columns)).astype(np.float32),
        "zeros": (random.random(columns) * (random.random(columns) > 0.5)).astype(np.float32),
    }


@pytest.mark.parametrize("kind", importances())
@pytest.mark.parametrize("dtype", BLOCKS)
def test_encoding_gives_the_bytes_of_llama_cpp(dtype, kind):
    values, importance = weights(), importances()[kind]
    found, expected = encode(values, dtype, importance), of_llama_cpp(values, dtype, importance)
    rows = np.flatnonzero((found != expected).any(1))
    assert rows.size == 0, rows


@pytest.mark.parametrize("dtype", BLOCKS)
def test_rows_are_encoded_alike_however_many_come_at_once(dtype):
    values, importance = weights(), importances()["uneven"]
    single = np.concatenate([encode(values[row : row + 1], dtype, importance) for row in range(0, 150, 7)])
    assert np.array_equal(single, encode(values, dtype, importance)[::7])


@pytest.mark.parametrize("dtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_importance_makes_errors_smaller_where_it_is_large(dtype):
    values, importance = weights()[40:], np.ones(768, np.float32)
    importance[::8] = 1000
    errors = [
        np.square(dequantize(encode(values, dtype, given), dtype, values.shape) - values)[:, ::8].mean()
        for given in (None, importance)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_what_does_not_fit_is_refused():
    for dtype in BLOCKS:
        with pytest.raises(BaseModelError, match="does not fit float16"):
            encode(np.full((1, 256), 1e9, np.float32) * np.linspace(-1, 1, 256, dtype=np.float32), dtype)
    with pytest.raises(BaseModelError, match="expected a multiple of 256"):
        encode(np.ones((2, 96), np.float32), "Q4_K")
