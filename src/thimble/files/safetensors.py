"""The header of a safetensors file: read as strictly as the reference reads it, and in some things more so.

Format: https://github.com/huggingface/safetensors (README, "Format"). The data of all tensors tile the rest of the
file: no overlap, no hole, nothing behind them. Beside that, no key occurs twice, entries hold nothing else, and names
can be printed.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thimble.files.tensor_info import TensorInfo, check_name, check_place, count_numbers, damaged
from thimble.files.untrusted import parse_json_object

# Bits of each type of the format; Thimble lists them all and reads those in `tensor_info.PLAIN`.
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_FIELDS = {"dtype", "shape", "data_offsets"}


def read_header(
    path: Path, data: mmap.mmap, most_bytes: int, most_tensors: int
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Read the metadata, and the tensors by name in the order of the header, of a file called `path` in messages."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        raise damaged(path, f"the header is {length:,} bytes long, but the file has only {len(data):,}")
    if length > most_bytes:
        raise damaged(path, f"the header is {length:,} bytes long, expected at most {most_bytes:,}")
    try:
        header = parse_json_object(data[8 : 8 + length])
    except ValueError as error:
        raise damaged(path, f"its header cannot be read: {error}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise damaged(path, "__metadata__ is not an object of strings")
    if len(header) > most_tensors:
        raise damaged(path, f"it holds {len(header):,} tensors, expected at most {most_tensors:,}")
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_tiling(path, tensors, 8 + length, len(data))
    return metadata, tensors


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """Check one entry of the header; `start` is where the data begin."""
    check_name(path, name)
    entry = entry if isinstance(entry, dict) and entry.keys() == _FIELDS else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise damaged(path, f"tensor {name} is not described by dtype, shape and data_offsets alone")
    if dtype not in _BITS:
        raise damaged(path, f"tensor {name} is of type {dtype[:20]}, which safetensors does not have")
    numbers, found = count_numbers(path, name, tuple(shape)), span[1] - span[0]
    if 8 * found != numbers * _BITS[dtype]:
        needed = f"{-(-numbers * _BITS[dtype] // 8):,}"
        raise damaged(path, f"tensor {name} has {found:,} bytes, but {dtype} {tuple(shape)} needs {needed}")
    return TensorInfo(name, dtype, tuple(shape), start + span[0], found)


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Refuse data that overlap, and bytes that belong to no tensor: something could hide in them."""
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        check_place(path, info, size)
        if info.offset != end:
            raise damaged(
                path,
                f"tensor {info.name} begins at byte {info.offset:,}, but the one before it ends at {end:,}: expected "
                "no hole and no overlap",
            )
        end += info.nbytes
    if end != size:
        raise damaged(path, f"its tensors end at byte {end:,}, but the file has {size:,}: expected nothing behind them")
