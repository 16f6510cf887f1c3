"""What a tensor file says of each tensor, and the checks that both formats share.

Every length is checked against the size of the file before it is used: a damaged or hostile file ends in one
BaseModelError, never in a crash.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thimble.errors import BaseModelError
from thimble.files.blocks import BLOCKS
from thimble.files.untrusted import printable

# Types stored one number after the other, in the order in which safetensors sorts tensors (so that each is aligned).
PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4",
    "U32": "<u4", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip

# Bytes of each type that Thimble can hand out: (values in one block, bytes of one block).
SIZES = {**{name: (1, np.dtype(code).itemsize) for name, code in PLAIN.items()}, **BLOCKS}

MOST_TENSORS = 50_000  # in one file; a shard of the largest models holds some hundreds
MOST_NAME_CHARACTERS = 512
MOST_HEADER_BYTES = 1 << 24  # of safetensors; 50,000 entries take 8 million
MOST_DIMENSIONS = 32


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    name: str  # as the file calls it
    dtype: str  # `F32`, `BF16`, `Q4_0`, ...; `type 99` for a GGUF type without a name
    shape: tuple[int, ...]  # in numpy's order, (out, in) for a matrix
    offset: int  # of its first byte, from the start of the file
    nbytes: int  # its size; 0 for a GGUF type that Thimble cannot decode


def damaged(path: Path, problem: str) -> BaseModelError:
    """The error for a file that contradicts itself; what the file calls things is shortened and made printable."""
    return BaseModelError(f"{path} is damaged: {printable(problem)}; download or copy it again")


def check_name(path: Path, name: str) -> str:
    """Return the name of a tensor; refuse one that is empty, endless or holds control characters."""
    if not 1 <= len(name) <= MOST_NAME_CHARACTERS or not name.isprintable():
        raise damaged(
            path,
            f"a tensor is called {name[:40]!r}: expected 1 to {MOST_NAME_CHARACTERS} characters that can be printed",
        )
    return name


def check_place(path: Path, info: TensorInfo, size: int) -> TensorInfo:
    """Return a tensor that lies within the file; refuse one that does not."""
    if info.offset + info.nbytes > size:
        end = info.offset + info.nbytes
        raise damaged(path, f"tensor {info.name} ends at byte {end:,}, but the file has only {size:,}")
    return info


def count_numbers(path: Path, name: str, shape: tuple[int, ...]) -> int:
    """How many numbers a tensor holds; refuse a shape that no array can have."""
    if len(shape) > MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise damaged(path, f"tensor {name} has shape {shape[:MOST_DIMENSIONS]}, which is too large")
    return math.prod(shape)
