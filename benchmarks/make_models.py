"""Models with random weights in the shapes of known ones, as GGUF files: speed and memory do not ask what was learned.

`python benchmarks/make_models.py 1b Q8_0 out.gguf` writes one, tensor by tensor, so that 8B needs no memory. Tokenizer
and template are those of the default base; a larger vocabulary is filled up with tokens that no text contains.
"""

import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# hidden, intermediate, layers, heads, key heads, vocabulary, whether the head is the embedding
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 49152, True),
    "360m": (960, 2560, 32, 15, 5, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "1.7b": (2048, 8192, 24, 32, 32, 49152, True),
    "3b": (3072, 8192, 28, 24, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
GGML_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
BLOCK_TYPES = {
    "Q4_0": (32, np.dtype([("scale", "<f2"), ("quants", "u1", 16)])),
    "Q8_0": (32, np.dtype([("scale", "<f2"), ("quants", "i1", 32)])),
}
ALIGNMENT = 32
STEP = 1 << 22  # numbers made at a time
UINT32, INT32 = 4, 5  # GGUF's numbers of these types


def tensors(shape: str, dtype: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Names, shapes (out, in) and types of all tensors."""
    hidden, inner, layers, heads, kv_heads, vocab, is_tied = SHAPES[shape]
    kv = hidden // heads * kv_heads
    found: list[tuple[str, tuple[int, ...], str]] = [("token_embd.weight", (vocab, hidden), dtype)]
    for n in range(layers):
        found += [(f"blk.{n}.{name}.weight", (hidden,), "F32") for name in ("attn_norm", "ffn_norm")]
        sizes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
                 "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
                 "ffn_down": (hidden, inner)}  # fmt: skip
        found += [(f"blk.{n}.{name}.weight", size, dtype) for name, size in sizes.items()]
    found.append(("output_norm.weight", (hidden,), "F32"))
    return found if is_tied else [*found, ("output.weight", (vocab, hidden), dtype)]


def num_numbers(shape: str) -> int:
    """Numbers in the matrices of a model; a tied head counts once."""
    return sum(math.prod(size) for _, size, _ in tensors(shape, "F32") if len(size) == 2)


def num_bytes(size: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    count = math.prod(size)
    if dtype in BLOCK_TYPES:
        values, block = BLOCK_TYPES[dtype]
        return count // values * block.itemsize
    return count * (4 if dtype == "F32" else 2)


def contents(size: tuple[int, ...], dtype: str, random: np.random.Generator) -> Iterator[bytes]:
    """The bytes of a tensor, a few million numbers at a time; spread as 1 / sqrt(in), so that activations stay sane."""
    if len(size) == 1:
        yield np.ones(size, "<f4").tobytes()
        return
    left, spread = math.prod(size), 1 / np.sqrt(size[1])
    while left:
        count = min(left, STEP)
        yield _random_numbers(count, dtype, spread, random)
        left -= count


def _random_numbers(count: int, dtype: str, spread: float, random: np.random.Generator) -> bytes:
    if dtype == "BF16":
        values = random.standard_normal(count, np.float32) * np.float32(spread)
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    values, block = BLOCK_TYPES[dtype]
    blocks = np.frombuffer(random.bytes(count // values * block.itemsize), block).copy()
    blocks["scale"] = spread / {"Q4_0": 4.2, "Q8_0": 74.0}[dtype]  # of whole numbers that are uniform
    if dtype == "Q4_0":  # stored with 8 added; without -8, their mean is 0
        quants = blocks["quants"]
        blocks["quants"] = quants | np.where(quants & 15, 0, 8) | np.where(quants >> 4, 0, 128)
    return blocks.tobytes()


def write_model(shape: str, dtype: str, path: Path) -> Path:
    """Write a model unless it is there; returns the path."""
    if path.exists():
        return path
    random, found = np.random.default_rng(0), tensors(shape, dtype)
    offsets, end = [], 0
    for _, size, kind in found:
        offsets.append(end)
        end += -(-num_bytes(size, kind) // ALIGNMENT) * ALIGNMENT
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        pairs = metadata(shape)
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(found), len(pairs)))
        for key, value in pairs.items():
            _write_text(file, key)
            _write_value(file, value)
        for (name, size, kind), offset in zip(found, offsets, strict=True):
            _write_text(file, name)
            file.write(struct.pack(f"<I{len(size)}QIQ", len(size), *reversed(size), GGML_TYPES[kind], offset))
        _align(file)
        for _, size, kind in found:
            for chunk in contents(size, kind, random):
                file.write(chunk)
            _align(file)
    part.rename(path)
    return path


def metadata(shape: str) -> dict[str, Any]:
    """Key-value pairs: the shape's own sizes, and the tokenizer of the default base."""
    from thimble.models.base import open_base  # here, because peers read SHAPES where Thimble is not installed

    hidden, inner, layers, heads, kv_heads, vocab, _ = SHAPES[shape]
    source = open_base(None).metadata
    assert source is not None
    pairs = {key: source[key] for key in source if key.startswith("tokenizer.")}
    filling = range(len(pairs["tokenizer.ggml.tokens"]), vocab)
    pairs["tokenizer.ggml.tokens"] = [*pairs["tokenizer.ggml.tokens"], *(f"<unused_{n}>" for n in filling)]
    pairs["tokenizer.ggml.token_type"] = [*pairs["tokenizer.ggml.token_type"], *(5 for _ in filling)]
    ours = {
        "block_count": layers, "context_length": 8192, "embedding_length": hidden, "feed_forward_length": inner,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads, "vocab_size": vocab,
        "rope.dimension_count": hidden // heads, "rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    return {"general.architecture": "llama", **{f"llama.{key}": value for key, value in ours.items()}, **pairs}


def _write_text(file: BinaryIO, text: str) -> None:
    data = text.encode()
    file.write(struct.pack("<Q", len(data)) + data)


def _write_value(file: BinaryIO, value: Any) -> None:
    kind = _kind(value)
    file.write(struct.pack("<I", kind))
    if kind == 9:
        of = _kind(value[0])
        file.write(struct.pack("<IQ", INT32 if of == UINT32 else of, len(value)))  # as llama.cpp wants types of tokens
    for item in value if kind == 9 else [value]:
        if isinstance(item, str):
            _write_text(file, item)
        else:
            file.write(struct.pack({UINT32: "<I", 6: "<f", 7: "<?"}[_kind(item)], item))


def _kind(value: Any) -> int:
    """GGUF's number of a type: uint32, float32, bool, string or array."""
    kinds = {bool: 7, int: UINT32, float: 6, str: 8, list: 9}
    return kinds[type(value)]


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


if __name__ == "__main__":
    write_model(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
