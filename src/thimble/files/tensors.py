"""Tensor files, memory-mapped: safetensors (read and written) and GGUF (read).

Opening reads the header only; a tensor's bytes are touched when they are asked for, so a file larger than memory is as
quick to open as a small one. What a header may say is checked in `gguf_header` and `safetensors_header`; what the
numbers mean is in `thimble.files.blocks`.
"""

import itertools
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thimble.errors import BaseModelError
from thimble.files import gguf as gguf_header
from thimble.files import safetensors as safetensors_header
from thimble.files.atomic import write_atomic
from thimble.files.blocks import BLOCKS, dequantize
from thimble.files.tensor_info import MOST_HEADER_BYTES, MOST_TENSORS, PLAIN, SIZES, TensorInfo
from thimble.files.untrusted import open_plain

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_PLAIN_NAMES = {np.dtype(code).str: name for name, code in PLAIN.items() if name != "BF16"}
_PLAIN_ORDER = list(PLAIN)
_PIECE_BYTES = 1 << 24

# What people give by mistake, by its first bytes.
_MISTAKES = {
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch pickle, which can run code when read: convert it to safetensors",
    b"\x80": "a Python pickle, which can run code when read: convert it to safetensors",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "a web page, not the file itself: download it again",
    **{magic: f"packed with {name}: unpack it" for magic, name in (
        (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "Zstandard"),
        (b"7z\xbc\xaf", "7-Zip"))},
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), "a file of llama.cpp from before GGUF: take a GGUF of the same model"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TensorFile:
    """An open tensor file."""

    path: Path  # where it lies
    format: str  # `safetensors` or `gguf`
    metadata: Mapping[str, Any]  # its key-value pairs; arrays of a GGUF are decoded to lists when first asked for
    tensors: dict[str, TensorInfo]  # what it holds, by name, in the order of the header
    data: mmap.mmap  # the whole file, memory-mapped

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
        return self.raw(name).view(PLAIN[info.dtype]).astype(np.float32).reshape(info.shape)

    def _supported(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise BaseModelError(f"{self.path} has no tensor {name}: it holds {len(self.tensors)} others")
        info = self.tensors[name]
        if info.dtype not in SIZES:
            raise BaseModelError(
                f"{self.path}: tensor {name} is {info.dtype}, which cannot be decoded; expected one of "
                f"{', '.join(BLOCKS)}: take a file of the same model in one of these types"
            )
        return info


def open_tensors(
    path: str | Path, most_header_bytes: int = MOST_HEADER_BYTES, most_tensors: int = MOST_TENSORS
) -> TensorFile:
    """Open a safetensors or GGUF file, told apart by its first bytes, memory-mapped; only the header is read.

    A BaseModelError if it cannot be opened, is of another format, is cut off or contradicts itself. The limits hold for
    safetensors.
    """
    path = Path(path)
    with open_plain(path, BaseModelError) as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BaseModelError(f"{path} cannot be mapped ({error.strerror}): expected a file on a disk") from None
        except ValueError:  # how mmap refuses an empty file
            raise BaseModelError(f"{path} is empty: download or copy it again") from None
    if data[:4] == b"GGUF":
        return TensorFile(path, "gguf", *gguf_header.read_header(path, data), data)
    if data[8:9] == b"{":
        header = safetensors_header.read_header(path, data, most_header_bytes, most_tensors)
        return TensorFile(path, "safetensors", *header, data)
    start = data[:32]
    hint = next((hint for magic, hint in _MISTAKES.items() if start.startswith(magic)), f"it begins with {start[:8]!r}")
    raise BaseModelError(f"{path} is neither safetensors nor GGUF: {hint}")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, ArrayLike], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file of numbers or truth values; the same tensors always make the same bytes.

    The file appears under its name only when it is complete and on disk. Tensors are sorted by type, the widest first,
    then by name, as the reference library does. A TypeError for an array of a type that safetensors cannot hold.
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
    write_atomic(Path(path), itertools.chain([len(text).to_bytes(8, "little"), text], parts))


def rewrite_safetensors(
    file: TensorFile, path: str | Path, changed: Mapping[str, Callable[[], Iterable[bytes | memoryview]]]
) -> None:
    """Write a safetensors file anew, elsewhere, with the numbers of some tensors changed and all else byte for byte.

    Types and shapes stay, so the header does. Nothing is held in memory but the pieces that `changed` hands out.
    """
    write_atomic(Path(path), _rewritten(file, changed))


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
