"""Decoded pictures or clips: decoded ahead of when they are needed, and kept in a file without a name."""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.data.media.inside import MediaFile
from thimble.data.spool import Spool
from thimble.errors import DataError, DoesNotFitError, RunError, escaped
from thimble.models.machine import cache_folder, usable_cores

MOST_KEPT_BYTES = 4 << 30  # of decoded files, and at most half of the free disk

Array = NDArray[Any]


class Kept(NamedTuple):
    """Where an array lies in the file, and what its bytes are."""

    place: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Decoded:
    """Arrays of files by their numbers; what comes of each depends on its file alone, not on threads or on the room.

    Files are decoded by threads: the decoders of Pillow and libsndfile leave the interpreter free. In memory are those
    that were asked for and those that are expected; what was decoded is kept on disk, where the system holds it in
    memory that nobody else wants. Of files that do not all fit, the first are kept and none is given up for another: a
    run goes through all of them in turn, and whatever is dropped last would be wanted next. Asked by one thread.
    """

    def __init__(
        self, paths: Sequence[MediaFile], read: Callable[[MediaFile], Array], most_bytes: int = MOST_KEPT_BYTES
    ) -> None:
        """Read `paths` with `read`, and keep at most so many bytes of what comes of it."""
        self._paths, self._read, self._room = paths, read, min(most_bytes, _free_bytes() // 2)
        self._file: Spool[bytes] = Spool(bytes, bytes)
        self._kept: dict[int, Kept] = {}
        self._coming: dict[int, Future[Array]] = {}
        self._pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode")

    def expect(self, numbers: Sequence[int]) -> None:
        """Begin to decode what will be asked for next; what was expected before and is not any more is given up."""
        wanted = set(numbers)
        for number in [number for number in self._coming if number not in wanted]:
            self._coming.pop(number).cancel()
        self._begin(numbers)

    def arrays(self, numbers: Sequence[int]) -> list[Array]:
        """The arrays of some files, not to be written to; a RunError if one cannot be decoded any more."""
        self._begin(numbers)
        found = {number: self._array(number) for number in dict.fromkeys(numbers)}
        return [found[number] for number in numbers]

    def _array(self, number: int) -> Array:
        if kept := self._kept.get(number):
            return np.frombuffer(self._file[kept.place], kept.dtype).reshape(kept.shape)
        array = self._coming.pop(number).result()
        if array.nbytes <= self._room:
            self._keep(number, array)
        return array

    def _keep(self, number: int, array: Array) -> None:
        try:
            self._file.append(array.tobytes())
        except DoesNotFitError:  # the disk is full: the others are decoded again
            self._room = 0
            return
        self._kept[number] = Kept(len(self._file) - 1, array.shape, array.dtype)
        self._room -= array.nbytes

    def _begin(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number not in self._kept and number not in self._coming:
                self._coming[number] = self._pool.submit(partial(self._decode, number))

    def _decode(self, number: int) -> Array:
        try:
            array = self._read(self._paths[number])
        except DataError as error:
            raise lost(self._paths[number], error) from error
        array.flags.writeable = False
        return array


def lost(path: MediaFile, error: DataError) -> RunError:
    """What to do about a file that was whole when the run began, and cannot be decoded any more."""
    return RunError(
        f"{escaped(str(path))} {error.problems[0]}. It was whole when the run began: put it back and go on with "
        "--resume"
    )


def _free_bytes() -> int:
    place = next(folder for folder in (cache_folder(), *cache_folder().parents) if folder.is_dir())
    return shutil.disk_usage(place).free
