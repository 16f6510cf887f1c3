"""Decoded pictures or clips: kept in memory while there is room, else decoded again, ahead of when they are needed."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from thimble.errors import DataError, RunError
from thimble.models.machine import usable_cores

Array = NDArray[Any]


class Decoded:
    """Arrays of files by their numbers; what comes of each depends on its file alone, not on threads or on the room.

    Files are decoded by threads: the decoders of Pillow and libsndfile leave the interpreter free. Of files that do not
    all fit, the first are kept and none is given up for another: a run goes through all of them in turn, and whatever
    is dropped last would be wanted next. Asked by one thread.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], Array], most_bytes: int) -> None:
        """Read `paths` with `read`, and keep at most so many bytes of what comes of it."""
        self._paths, self._read, self._room = paths, read, most_bytes
        self._kept: dict[int, Array] = {}
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
        found = {number: self._kept[number] for number in numbers if number in self._kept}
        for number in dict.fromkeys(numbers):
            if number not in found:
                found[number] = self._arrived(number)
        return [found[number] for number in numbers]

    def _begin(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number not in self._kept and number not in self._coming:
                self._coming[number] = self._pool.submit(partial(self._decode, number))

    def _arrived(self, number: int) -> Array:
        array = self._coming.pop(number).result()
        if array.nbytes <= self._room:
            self._kept[number] = array
            self._room -= array.nbytes
        return array

    def _decode(self, number: int) -> Array:
        try:
            array = self._read(self._paths[number])
        except DataError as error:
            raise RunError(
                f"{self._paths[number]} {error.problems[0]}. It was whole when the run began: put it back and go on "
                "with --resume"
            ) from error
        array.flags.writeable = False
        return array
