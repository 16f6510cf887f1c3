"""Files as they are, packed or not: opened so that what is read is what was packed."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from thimble.data.sources.kinds import PACKINGS, other_kind
from thimble.errors import DataError, MissingPackageError, install_line

HEAD_BYTES = 1 << 12
_FIRST_BYTES = {
    b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz",
    b"\x04\x22\x4d\x18": ".lz4",
}  # fmt: skip
_NAMES = {".gz": "gzip", ".zst": "Zstandard", ".bz2": "bzip2", ".xz": "xz", ".lz4": "LZ4"}


@contextmanager
def unpacked(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; what goes wrong while it is read is a DataError with what to do."""
    packing = ""
    try:
        with path.open("rb") as whole:
            packing = _packing(path, whole.peek(HEAD_BYTES)[:HEAD_BYTES])
            with _opened(packing, whole, name) as file:
                if what := other_kind(file.peek(HEAD_BYTES)[:HEAD_BYTES]):
                    raise DataError(f"{name} is {what}.")
                yield cast(IO[bytes], file)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(name, packing, error) from error
    except OSError as error:
        if packing and not error.strerror:  # of bz2 and of pyarrow
            raise _damaged(name, packing, error) from error
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error


def head_of(path: Path, name: str) -> bytes:
    """The first bytes of a file, unpacked."""
    with unpacked(path, name) as file:
        return bytes(cast(Any, file).peek(HEAD_BYTES)[:HEAD_BYTES])


def _packing(path: Path, head: bytes) -> str:
    """How a file is packed, by its first bytes: names lose their suffix, and browsers unpack without telling."""
    found = next((packing for begin, packing in _FIRST_BYTES.items() if head.startswith(begin)), "")
    if found or path.suffix.lower() not in PACKINGS:
        return found
    begin = head.lstrip()[:1]
    is_plain = begin in (b"{", b"[") or (b"\n" in head and b"\0" not in head) or head.startswith(b"PAR1")
    return "" if is_plain else path.suffix.lower()


def _opened(packing: str, whole: io.BufferedReader, name: str) -> Any:
    if packing == ".gz":
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=whole)))
    if packing == ".bz2":
        return io.BufferedReader(cast(Any, bz2.BZ2File(whole)))
    if packing == ".xz":
        return io.BufferedReader(cast(Any, lzma.LZMAFile(whole)))
    return _by_pyarrow(packing, whole, name) if packing else whole


def _by_pyarrow(packing: str, whole: io.BufferedReader, name: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingPackageError(
            f"{name} is packed with {_NAMES[packing]}: reading it needs pyarrow. Install it with: "
            f"{install_line('parquet')}, or unpack the file"
        ) from error
    codec = {".zst": "zstd", ".lz4": "lz4"}[packing]
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(whole, "r"), codec))


def _damaged(name: str, packing: str, error: Exception) -> DataError:
    kind = _NAMES.get(packing, "")
    return DataError(f"{name} cannot be unpacked: {error}. Expected a whole {kind} file; fetch it again.")
