"""What the frozen blocks below the lowest adapted one make of rows: computed once a run and kept in a file.

Nothing below the lowest adapter changes in training, so from the second epoch on a row begins where the adapters do
(Matsutani et al., arXiv:2410.21073, do so for small networks). The file has no name: it belongs to one process, with
its base and compute type, and is gone when that ends, however it does.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from thimble.backends.torch.frozen import as_numpy
from thimble.data.batches import Batch

MOST_BYTES, MOST_SHARE = 20_000_000_000, 0.5  # of a file, and of what is free on the disk


class _Place(NamedTuple):
    """Where the features of a row are, and what they sum up to."""

    offset: int
    checksum: int


class Features:
    """Hidden states of rows before block number `lowest`, by their tokens, (tokens, width), in a file.

    Raises OSError if the disk has no room for so many tokens in all.
    """

    def __init__(self, file: BinaryIO, lowest: int, width: int, compute: torch.dtype, tokens: int) -> None:
        self.file, self.lowest, self.width, self.compute = file, lowest, width, compute
        self._places: dict[bytes, _Place] = {}
        self._end = 0  # of what is written
        self._lock = threading.Lock()  # of the two before it
        if not hasattr(os, "posix_fallocate"):
            raise OSError(0, "this system cannot reserve room in a file")
        room, needed = os.fstatvfs(file.fileno()), tokens * width * compute.itemsize
        free = room.f_bavail * room.f_frsize
        if needed > min(MOST_BYTES, MOST_SHARE * free):
            raise OSError(0, f"it takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on the disk")
        os.posix_fallocate(file.fileno(), 0, max(1, needed))

    def put(self, batch: Batch, hidden: torch.Tensor) -> None:
        """Keep the rows of a batch, of which hidden states are given, (tokens, width); raises OSError."""
        for row, span in _rows(batch):
            content = memoryview(as_numpy(hidden[span].contiguous())).cast("B")
            with self._lock:
                offset, self._end = self._end, self._end + len(content)
            written = os.pwrite(self.file.fileno(), content, offset)
            if written != len(content):
                raise OSError(0, "the disk is full")
            with self._lock:
                self._places[_key(row)] = _Place(offset, zlib.crc32(content))

    def get(self, batch: Batch) -> torch.Tensor | None:
        """The hidden states of a batch, (tokens, width); None if a row is not there or not as it was written."""
        out = torch.empty(batch.tokens, self.width, dtype=self.compute)
        return out if all(self._read(row, out[span]) for row, span in _rows(batch)) else None

    def _read(self, row: NDArray[np.int32], out: torch.Tensor) -> bool:
        """Read the features of a row, and say whether they are what was written."""
        place, content = self._places.get(_key(row)), memoryview(as_numpy(out)).cast("B")
        if place is None:
            return False
        try:
            count = os.preadv(self.file.fileno(), [content], place.offset)
        except OSError:
            return False
        return count == len(content) and zlib.crc32(content) == place.checksum


def _rows(batch: Batch) -> Sequence[tuple[NDArray[np.int32], slice]]:
    spans = [slice(*span) for span in zip(batch.starts, batch.starts[1:], strict=False)]
    return [(batch.ids[span], span) for span in spans]


def _key(row: NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()
