"""Tensor files, memory-mapped: safetensors (read and written) and GGUF (read).

Opening reads the header only; a tensor's bytes are touched when they are asked for, so a file larger than memory is as
quick to open as a small one. Every length in a file is checked against the size of the file before it is used: a
damaged or hostile file ends in one BaseModelError, never in a crash.

Formats: https://github.com/huggingface/safetensors (README, "Format") and
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What the numbers mean is in `thimble.core.quantize`.
"""

import itertools
import json
import math
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thimble.core.quantize import BLOCKS, dequantize
from thimble.errors import BaseModelError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Types stored one number after the other, in the order in which safetensors sorts tensors (so that each is aligned).
_PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4",
    "U32": "<u4", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
_PLAIN_NAMES = {np.dtype(code).str: name for name, code in _PLAIN.items() if name != "BF16"}
_PLAIN_ORDER = list(_PLAIN)

# Bytes of each type that Thimble can hand out: (values in one block, bytes of one block).
_SIZES = {**{name: (1, np.dtype(code).itemsize) for name, code in _PLAIN.items()}, **BLOCKS}

_GGML_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

# GGUF value types: the numbers as struct codes, then the two of variable length.
_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9

_MAX_HEADER_BYTES = 100_000_000
_MAX_GGUF_DIMENSIONS = 4
_MAX_DIMENSIONS = 32
_PIECE_BYTES = 1 << 24

# What people give by mistake, by its first bytes.
_MISTAKES = {
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch pickle, which can run code when read: convert it to safetensors",
    b"\x80": "a Python pickle, which can run code when read: convert it to safetensors",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "a web page, not the file itself: download it again",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file.

    Attributes:
        name: As the file calls it.
        dtype: `F32`, `BF16`, `Q4_0`, ...; `type 99` for a GGUF type without a name.
        shape: In numpy's order, (out, in) for a matrix.
        offset: Of its first byte, from the start of the file.
        nbytes: Its size; 0 for a GGUF type that Thimble cannot decode.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class TensorFile:
    """An open tensor file.

    Attributes:
        path: Where it lies.
        format: `safetensors` or `gguf`.
        metadata: Its key-value pairs; arrays of a GGUF are decoded to lists when first asked for.
        tensors: What it holds, by name, in the order of the header.
        data: The whole file, memory-mapped.
    """

    path: Path
    format: str
    metadata: Mapping[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap

    def raw(self, name: str) -> Bytes:
        """Return the bytes of a tensor as they lie in the file: uint8 (nbytes,), read-only, nothing is copied."""
        info = self._supported(name)
        return np.frombuffer(self.data, np.uint8, info.nbytes, info.offset)

    def will_need(self, name: str) -> None:
        """Ask the system to read a tensor ahead."""
        self._advise(name, "MADV_WILLNEED", 0, self._supported(name).nbytes)

    def release(self, name: str, begin: int, end: int) -> None:
        """Take bytes of a tensor out of this process; the system keeps them while it has room to spare."""
        self._advise(name, "MADV_DONTNEED", begin, end)

    def _advise(self, name: str, advice: str, begin: int, end: int) -> None:
        if not hasattr(mmap, advice) or end <= begin:  # not every system has it
            return
        offset = self._supported(name).offset
        start = (offset + begin) // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(getattr(mmap, advice), start, offset + end - start)

    def read(self, name: str) -> Floats:
        """Return the numbers of a tensor: float32 (shape), decoded, a new array."""
        info = self._supported(name)
        if info.dtype in BLOCKS:
            return dequantize(self.raw(name), info.dtype, info.shape)
        return self.raw(name).view(_PLAIN[info.dtype]).astype(np.float32).reshape(info.shape)

    def _supported(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise BaseModelError(f"{self.path} has no tensor {name}: it holds {len(self.tensors)} others")
        info = self.tensors[name]
        if info.dtype not in _SIZES:
            raise BaseModelError(
                f"{self.path}: tensor {name} is {info.dtype}, which cannot be decoded; expected one of "
                f"{', '.join(BLOCKS)}: take a file of the same model in one of these types"
            )
        return info


def open_tensors(path: str | Path) -> TensorFile:
    """Open a safetensors or GGUF file, told apart by its first bytes; only the header is read.

    Args:
        path: The file.

    Returns:
        Its metadata and tensors, memory-mapped.

    Raises:
        BaseModelError: If it cannot be opened, is of another format, is cut off or contradicts itself.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BaseModelError(
            f"{path} cannot be opened ({error.strerror}): expected a safetensors or GGUF file"
        ) from None
    except ValueError:  # how mmap refuses an empty file
        raise BaseModelError(f"{path} is empty: download or copy it again") from None
    if data[:4] == b"GGUF":
        return TensorFile(path, "gguf", *_read_gguf(path, data), data)
    if data[8:9] == b"{":
        return TensorFile(path, "safetensors", *_read_safetensors(path, data), data)
    start = data[:32]
    hint = next((hint for magic, hint in _MISTAKES.items() if start.startswith(magic)), f"it begins with {start[:8]!r}")
    raise BaseModelError(f"{path} is neither safetensors nor GGUF: {hint}")


def _damaged(path: Path, problem: str) -> BaseModelError:
    # Names in a hostile file may be megabytes long or hold control characters for the terminal.
    shown = "".join(char if char.isprintable() else "?" for char in problem[:300])
    return BaseModelError(f"{path} is damaged: {shown}; download or copy it again")


def _place(path: Path, info: TensorInfo, size: int) -> TensorInfo:
    """Check that a tensor lies within the file."""
    if info.offset + info.nbytes > size:
        end = info.offset + info.nbytes
        raise _damaged(path, f"tensor {info.name} ends at byte {end:,}, but the file has only {size:,}")
    return info


# GGUF


class _Cursor:
    """Reads a GGUF header from front to back; refuses to go past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, len(b"GGUF")

    def skip(self, size: int) -> int:
        """Move on by `size` bytes, which must exist; return the position before."""
        start = self.position
        if size > len(self.data) - start:
            raise _damaged(
                self.path,
                f"the header needs {size:,} bytes at byte {start:,}, but the file has only {len(self.data):,}",
            )
        self.position += size
        return start

    def number(self, code: str) -> Any:
        """Read one little-endian number of a struct code."""
        form = struct.Struct(f"<{code}")
        return form.unpack_from(self.data, self.skip(form.size))[0]

    def text(self) -> str:
        """Read a string: its length in eight bytes, then UTF-8."""
        size = self.number("Q")
        start = self.skip(size)
        return _decode(self.path, self.data[start : start + size])

    def value(self, kind: int) -> Any:
        """Read a metadata value; of an array only where it lies."""
        if kind in _GGUF_NUMBERS:
            return self.number(_GGUF_NUMBERS[kind])
        if kind == _GGUF_STRING:
            return self.text()
        if kind == _GGUF_ARRAY:
            return self._array()
        raise _damaged(self.path, f"a metadata value has type {kind}, expected 0 to 12")

    def _array(self) -> "_Array":
        kind, count = self.number("I"), self.number("Q")
        array = _Array(self.path, self.data, self.position, count, kind)
        if kind in _GGUF_NUMBERS:
            self.skip(count * struct.calcsize(_GGUF_NUMBERS[kind]))
        elif kind == _GGUF_STRING:
            self._skip_strings(count)
        else:
            raise _damaged(self.path, f"a metadata array holds values of type {kind}, expected numbers or strings")
        return array

    def _skip_strings(self, count: int) -> None:
        # The only loop that runs hundreds of thousands of times when a file is opened, hence written for speed; struct
        # itself refuses to read past the end.
        data, position, length_at = self.data, self.position, struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                position += 8 + length_at(data, position)[0]
        except (struct.error, OverflowError):
            position = len(data) + 1
        self.skip(position - self.position)


@dataclass(frozen=True)
class _Array:
    """A metadata array of a GGUF that has been skipped, not decoded."""

    path: Path
    data: mmap.mmap
    position: int
    count: int
    kind: int

    def decode(self) -> list[Any]:
        if self.kind in _GGUF_NUMBERS:
            return list(struct.unpack_from(f"<{self.count}{_GGUF_NUMBERS[self.kind]}", self.data, self.position))
        cursor = _Cursor(self.path, self.data)
        cursor.position = self.position
        return [cursor.text() for _ in range(self.count)]


class _Metadata(Mapping[str, Any]):
    """Key-value pairs of a GGUF; an array is decoded when first asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = value.decode()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values


def _decode(path: Path, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise _damaged(path, f"the text {text[:40]!r} is not UTF-8") from None


def _read_gguf(path: Path, data: mmap.mmap) -> tuple[_Metadata, dict[str, TensorInfo]]:
    cursor = _Cursor(path, data)
    version = cursor.number("I")
    if version not in (2, 3):
        kind = "big-endian" if version % 65536 == 0 else f"version {version}"
        raise BaseModelError(
            f"{path} is a GGUF file of {kind}: expected little-endian, version 2 or 3; convert it again"
        )
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.text()
        if key in values:
            raise _damaged(path, f"metadata key {key} occurs twice")
        values[key] = cursor.value(cursor.number("I"))
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        info = _read_gguf_tensor(cursor)
        if info.name in tensors:
            raise _damaged(path, f"tensor {info.name} occurs twice")
        tensors[info.name] = info
    return _Metadata(values), _place_gguf_tensors(cursor, values.get("general.alignment", 32), tensors)


def _read_gguf_tensor(cursor: _Cursor) -> TensorInfo:
    """Read one entry of the tensor list; its offset still counts from the start of the data."""
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions > _MAX_GGUF_DIMENSIONS:
        raise _damaged(cursor.path, f"tensor {name} has {dimensions:,} dimensions, expected at most 4")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    dtype = _GGML_TYPES.get(kind, f"type {kind}")
    return TensorInfo(name, dtype, shape, offset, _count_bytes(cursor.path, name, dtype, shape))


def _count_bytes(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Compute the size of a tensor, 0 if its type is not known; refuse a shape that no array can have."""
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise _damaged(path, f"tensor {name} has shape {shape[:_MAX_DIMENSIONS]}, which is too large")
    values, size = _SIZES.get(dtype, (1, 0))
    if values > 1 and (not shape or shape[-1] % values):
        raise _damaged(
            path, f"tensor {name} is {dtype} with rows of {shape[-1:]} values, expected a multiple of {values}"
        )
    return math.prod(shape) // values * size


def _place_gguf_tensors(cursor: _Cursor, alignment: Any, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Make offsets count from the start of the file; the data begin at the first aligned byte after the header."""
    path, size = cursor.path, len(cursor.data)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _damaged(path, f"general.alignment is {alignment!r}, expected a power of two")
    start = -(-cursor.position // alignment) * alignment
    for name, info in tensors.items():
        if info.offset % alignment:
            raise _damaged(path, f"tensor {name} has offset {info.offset}, expected a multiple of {alignment}")
        tensors[name] = _place(path, replace(info, offset=start + info.offset), size)
    return tensors


# safetensors


def _read_safetensors(path: Path, data: mmap.mmap) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise _damaged(path, f"the header is {length:,} bytes long, but the file has only {len(data):,}")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "__metadata__ is not an object of strings")
    size = len(data)
    tensors = {name: _place(path, _parse_entry(path, name, entry, 8 + length), size) for name, entry in header.items()}
    return metadata, tensors


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON pairs; `json` would silently keep the last of two equal keys."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """Check one entry of the header; `start` is where the data begin."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
        raise _damaged(path, f"tensor {name} is not described by dtype, shape and data_offsets")
    needed = _count_bytes(path, name, dtype, tuple(shape))
    found = span[1] - span[0]
    if found < 0 or (dtype in _SIZES and found != needed):
        raise _damaged(path, f"tensor {name} has {found:,} bytes, but {dtype} {tuple(shape)} needs {needed:,}")
    return TensorInfo(name, dtype, tuple(shape), start + span[0], found)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; the same tensors always make the same bytes.

    The file appears under its name only when it is complete and on disk. Tensors are sorted by type, the widest first,
    then by name, as the reference library does.

    Args:
        path: Where; an existing file is replaced.
        tensors: Arrays of numbers or truth values, any shape.
        metadata: Strings to keep beside them.

    Raises:
        TypeError: If an array has a type that safetensors cannot hold.
    """
    arrays = {name: _storable(name, array) for name, array in tensors.items()}
    names = sorted(arrays, key=lambda name: (-_PLAIN_ORDER.index(_PLAIN_NAMES[arrays[name].dtype.str]), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        array, start = arrays[name], end
        end += array.nbytes
        dtype = _PLAIN_NAMES[array.dtype.str]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    parts = (arrays[name].reshape(-1).view(np.uint8).data for name in names)
    _write_atomically(Path(path), itertools.chain([len(text).to_bytes(8, "little"), text], parts))


def rewrite_safetensors(
    file: TensorFile, path: str | Path, changed: Mapping[str, Callable[[], Iterable[bytes | memoryview]]]
) -> None:
    """Write a safetensors file anew with the numbers of some tensors changed, and everything else byte for byte.

    Types and shapes stay, so the header does. Nothing is held in memory but what `changed` hands out at a time.

    Args:
        file: The file as it is.
        path: Where the new one goes; not the same place.
        changed: Name of a tensor to what gives its new bytes, in pieces.
    """
    _write_atomically(Path(path), _rewritten(file, changed))


def _rewritten(
    file: TensorFile, changed: Mapping[str, Callable[[], Iterable[bytes | memoryview]]]
) -> Iterator[bytes | memoryview]:
    # Read, not mapped: pages that are copied once would only count as memory of this process.
    with file.path.open("rb") as old:
        for info in sorted((file.tensors[name] for name in changed), key=lambda info: info.offset):
            yield from _pieces(old, info.offset - old.tell())
            yield from changed[info.name]()
            old.seek(info.offset + info.nbytes)
        yield from _pieces(old, len(file.data) - old.tell())


def _pieces(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file, a few at a time."""
    for start in range(0, size, _PIECE_BYTES):
        yield stream.read(min(_PIECE_BYTES, size - start))


def _storable(name: str, array: ArrayLike) -> NDArray[Any]:
    """Return an array as contiguous little-endian numbers; copied only if it is not so already."""
    array = np.asarray(array)
    array = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    if array.dtype.str not in _PLAIN_NAMES or name == "__metadata__":
        raise TypeError(f"tensor {name} of type {array.dtype} cannot be stored: expected numbers, {list(_PLAIN_NAMES)}")
    return array


def _write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write under another name in the same folder, force it to disk, then rename, so that no half file is ever seen."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk; only POSIX systems let a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
