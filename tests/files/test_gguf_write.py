"""GGUF files written here, read by the reference package and by our own reader."""

import gguf
import numpy as np
import pytest

from thimble.files.gguf_write import NewTensor, write_gguf
from thimble.files.tensors import open_tensors

METADATA = {
    "general.architecture": "llama",
    "a.flag": np.bool_(True),
    "a.small": np.uint32(7),
    "a.negative": np.int32(-7),
    "a.large": np.uint64(1 << 40),
    "a.half": np.float32(0.5),
    "a.texts": ["one", "zwei", "三", ""],
    "a.numbers": np.array([1, 2, 3], np.int32),
    "a.floats": np.array([0.25, -1.5], np.float32),
}


def tensor(name, values, dtype="F32"):
    return NewTensor(name, dtype, values.shape, lambda: [values.tobytes()])


def test_the_reference_package_reads_what_was_written(tmp_path):
    random = np.random.default_rng(0)
    odd, even = random.standard_normal((3, 5)).astype(np.float32), random.standard_normal((4, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(even, gguf.GGMLQuantizationType.Q8_0)
    packed = NewTensor("blk.0.q", "Q8_0", even.shape, lambda: [blocks[:2].tobytes(), blocks[2:].tobytes()])
    write_gguf(tmp_path / "x.gguf", METADATA, [tensor("odd", odd), packed, tensor("even", even)])
    found = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        field = found.get_field(key)
        assert np.array_equal(field.contents(), value.tolist() if isinstance(value, np.ndarray) else value), key
    kinds = {key: found.get_field(key).types[-1].name for key in METADATA}
    assert list(kinds.values()) == [
        "STRING",
        "BOOL",
        "UINT32",
        "INT32",
        "UINT64",
        "FLOAT32",
        "STRING",
        "INT32",
        "FLOAT32",
    ]
    by_name = {one.name: one for one in found.tensors}
    np.testing.assert_array_equal(by_name["odd"].data, odd)
    np.testing.assert_array_equal(by_name["even"].data, even)
    np.testing.assert_array_equal(by_name["blk.0.q"].data, blocks)
    ours = open_tensors(tmp_path / "x.gguf")
    assert dict(ours.metadata)["a.texts"] == METADATA["a.texts"]
    np.testing.assert_array_equal(ours.read("odd"), odd)


def test_a_tensor_of_another_length_leaves_no_file(tmp_path):
    short = NewTensor("x", "F32", (2, 4), lambda: [bytes(8)])
    with pytest.raises(ValueError, match="x has 8 bytes: expected 32 for F32"):
        write_gguf(tmp_path / "x.gguf", {}, [short])
    assert list(tmp_path.iterdir()) == []
