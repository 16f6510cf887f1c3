"""The header of a GGUF file: metadata and the list of tensors, with a bound on everything that is counted.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The numbers of pairs, tensors and array items are
known before they are read, and refused if no model has so many: the time a header takes is bounded whatever it says.
"""

import itertools
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thimble.errors import BaseModelError
from thimble.files.tensor_info import MOST_TENSORS, SIZES, TensorInfo, check_name, check_place, count_numbers, damaged
from thimble.files.untrusted import shown

GGML_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

# GGUF value types: the numbers as struct codes, then the two of variable length.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

_MOST_DIMENSIONS = 4
_MOST_PAIRS = 1 << 14
_MOST_KEY_BYTES = (1 << 16) - 1  # as the format says
_MOST_TEXT_BYTES = 1 << 24  # of all keys, values and names together, and of one array
_MOST_ITEMS = 1 << 22  # of all metadata arrays together; the largest vocabulary with its merges takes 1.3 million


class _Cursor:
    """Reads a GGUF header from front to back; refuses to go past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, len(b"GGUF")
        self.text_left, self.items_left = _MOST_TEXT_BYTES, _MOST_ITEMS

    def skip(self, size: int) -> int:
        """Move on by `size` bytes, which must exist; return the position before."""
        start = self.position
        if size > len(self.data) - start:
            raise damaged(
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
        self.text_left -= size
        if self.text_left < 0:
            raise damaged(self.path, f"its header holds more than {_MOST_TEXT_BYTES:,} bytes of text")
        text = self.data[start : start + size]
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise damaged(self.path, f"the text {text[:40]!r} is not UTF-8") from None

    def key(self) -> str:
        """Read the name of a metadata value."""
        key = self.text()
        if not 1 <= len(key) <= _MOST_KEY_BYTES or not key.isprintable():
            raise damaged(self.path, f"a metadata key is {key[:40]!r}: expected 1 to {_MOST_KEY_BYTES:,} characters")
        return key

    def count(self, most: int, what: str) -> int:
        """Read how many there are of something, before any of them is looked at."""
        count = int(self.number("Q"))
        if count > most:
            raise damaged(self.path, f"it says that it holds {count:,} {what}, expected at most {most:,}")
        return count

    def value(self, kind: int) -> Any:
        """Read a metadata value; of an array only where it lies."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        raise damaged(self.path, f"a metadata value has type {kind}, expected 0 to 12")

    def _array(self) -> "_Array":
        kind, count = self.number("I"), self.count(self.items_left, "items in metadata arrays")
        self.items_left -= count
        array = _Array(self.path, self.data, self.position, count, kind)
        if kind in NUMBERS:
            self.skip(count * struct.calcsize(NUMBERS[kind]))
        elif kind == STRING:
            self._skip_strings(count)
        else:
            raise damaged(self.path, f"a metadata array holds values of type {kind}, expected numbers or strings")
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
        if self.kind in NUMBERS:
            return list(struct.unpack_from(f"<{self.count}{NUMBERS[self.kind]}", self.data, self.position))
        cursor = _Cursor(self.path, self.data)
        cursor.position = self.position
        return [cursor.text() for _ in range(self.count)]


class Metadata(Mapping[str, Any]):
    """Key-value pairs of a GGUF; an array is decoded when first asked for."""

    def __init__(self, data: mmap.mmap, values: dict[str, Any], places: dict[str, slice]) -> None:
        self._data, self._values, self._places = data, values, places

    def packed(self, key: str) -> bytes:
        """A value as it lies in the file, behind the number of its type."""
        return self._data[self._places[key]]

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


def read_header(path: Path, data: mmap.mmap) -> tuple[Metadata, dict[str, TensorInfo]]:
    """Read the metadata, whose arrays are decoded when first asked for, and the tensors by name in the file's order."""
    cursor = _Cursor(path, data)
    version = cursor.number("I")
    if version not in (2, 3):
        kind = "big-endian" if version % 65536 == 0 else f"version {version}"
        raise BaseModelError(
            f"{path} is a GGUF file of {kind}: expected little-endian, version 2 or 3; convert it again"
        )
    num_tensors, num_pairs = cursor.count(MOST_TENSORS, "tensors"), cursor.count(_MOST_PAIRS, "metadata values")
    values: dict[str, Any] = {}
    places: dict[str, slice] = {}
    for _ in range(num_pairs):
        key = cursor.key()
        if key in values:
            raise damaged(path, f"metadata key {key} occurs twice")
        start = cursor.position
        values[key] = cursor.value(cursor.number("I"))
        places[key] = slice(start, cursor.position)
    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        info = _read_tensor(cursor)
        if info.name in tensors:
            raise damaged(path, f"tensor {info.name} occurs twice")
        tensors[info.name] = info
    return Metadata(data, values, places), _place_tensors(cursor, values.get("general.alignment", 32), tensors)


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    """Read one entry of the tensor list; its offset still counts from the start of the data."""
    name, dimensions = check_name(cursor.path, cursor.text()), cursor.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise damaged(cursor.path, f"tensor {name} has {dimensions:,} dimensions, expected at most 4")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    dtype, numbers = GGML_TYPES.get(kind, f"type {kind}"), count_numbers(cursor.path, name, shape)
    if not numbers:
        raise damaged(cursor.path, f"tensor {name} has shape {shape}: expected sizes from 1")
    values, size = SIZES.get(dtype, (1, 0))
    if values > 1 and (not shape or shape[-1] % values):
        wanted = f"expected a multiple of {values}"
        raise damaged(cursor.path, f"tensor {name} is {dtype} with rows of {shape[-1:]} values, {wanted}")
    return TensorInfo(name, dtype, shape, offset, numbers // values * size)


def _place_tensors(cursor: _Cursor, alignment: Any, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Make offsets count from the start of the file; the data begin at the first aligned byte behind the header."""
    path, size = cursor.path, len(cursor.data)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise damaged(path, f"general.alignment is {shown(alignment)}, expected a power of two")
    start = -(-cursor.position // alignment) * alignment
    for name, info in tensors.items():
        if info.offset % alignment:
            raise damaged(path, f"tensor {name} has offset {info.offset}, expected a multiple of {alignment}")
        tensors[name] = check_place(path, replace(info, offset=start + info.offset), size)
    for before, info in itertools.pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
        # Of tensors of an unknown type only the first byte is known.
        if info.offset < before.offset + before.nbytes or info.offset == before.offset:
            raise damaged(path, f"tensors {before.name} and {info.name} overlap at byte {info.offset:,}")
    return tensors
