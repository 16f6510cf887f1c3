"""What is told of a base of any kind, and what its files are known by: a hash of all their bytes, or of samples."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file, for a quick hash


class FrozenBase(Protocol):
    """What is told of a base of any kind."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def path(self) -> Path:
        """The file or folder that it was read from."""

    @property
    def loader(self) -> str:
        """The class of transformers that opens it, or the function of the user's own that makes it."""

    @property
    def metadata(self) -> Mapping[str, object] | None:
        """What a GGUF file says of itself; None for all others."""

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""

    def quick_fingerprint(self) -> str:
        """A hash of samples of its files."""

    def fingerprint(self) -> str:
        """A hash of its files."""


def quick_hash(files: Iterable[Path]) -> str:
    """SHA-256 of the size of each file and of samples spread over it, hexadecimal; takes milliseconds."""
    total = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        total.update(size.to_bytes(8, "little"))
        with path.open("rb") as stream:
            for number in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                total.update(stream.read(SAMPLE_BYTES))
    return total.hexdigest()


def whole_hash(files: Iterable[Path]) -> str:
    """SHA-256 of the SHA-256 of each file, hexadecimal; takes about a second per gigabyte."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
