"""Writing GGUF files, version 3: header first, then the tensors one after the other, whole or not at all.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is held in memory but the tensor that is
being written.
"""

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thimble.files.atomic import write_atomic
from thimble.files.gguf import ARRAY, GGML_TYPES, NUMBERS, STRING
from thimble.files.tensor_info import SIZES

ALIGNMENT = 32
_TYPES = {name: number for number, name in GGML_TYPES.items()}
_KINDS = {np.dtype(f"<{code}" if code != "?" else "?"): kind for kind, code in NUMBERS.items()}
_Parts = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str  # as the format calls it, such as `blk.0.attn_q.weight`
    dtype: str  # `F32`, `Q8_0` ...
    shape: tuple[int, ...]  # as numpy has it, (rows, columns); a row of a block type is whole blocks
    parts: Callable[[], _Parts]  # makes its bytes, in order

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        values, size = SIZES[self.dtype]
        return int(np.prod(self.shape)) // values * size


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Write a GGUF file; it appears under its name only when it is complete and on disk.

    Metadata values are text, truth values, numbers of a numpy type (`np.uint32(2)`), numpy arrays, or lists of text:
    the type is written as given, since readers ask for exactly the one they expect. Bytes are a value of another file,
    `Metadata.packed`. A ValueError if a tensor's parts are not as long as its type and shape say.
    """
    write_atomic(path, _file(metadata, tensors))


def _file(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> Iterator[bytes | memoryview]:
    offsets = [0, *itertools.accumulate(_aligned(tensor.nbytes) for tensor in tensors)]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    for tensor, offset in zip(tensors, offsets, strict=False):
        sizes = tensor.shape[::-1]
        header += _text(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        header += struct.pack("<IQ", _TYPES[tensor.dtype], offset)
    yield header + bytes(_aligned(len(header)) - len(header))
    for tensor in tensors:
        size = 0
        for part in tensor.parts():
            size += memoryview(part).nbytes
            yield part
        if size != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {size:,} bytes: expected {tensor.nbytes:,} for {tensor.dtype}")
        yield bytes(_aligned(size) - size)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    packed = text.encode()
    return struct.pack("<Q", len(packed)) + packed


def _value(value: Any) -> bytes:
    """A metadata value behind the number of its type."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    numbers = np.asarray(value)
    kind = _KINDS[numbers.dtype]
    form = struct.pack("<I", kind) if numbers.ndim == 0 else struct.pack("<IIQ", ARRAY, kind, numbers.size)
    return form + numbers.tobytes()
