"""Items kept in a file without a name instead of in memory, so that a million examples take little of it.

Reads like a list. The system removes the file when the process ends, however it ends. What an item is made of is the
owner's business: it hands in how to write one and how to read it back.
"""

import contextlib
import io
import shutil
import tempfile
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Generic, TypeVar

from thimble.errors import DoesNotFitError
from thimble.models.machine import cache_folder

T = TypeVar("T")
CHECKED_BYTES = 1 << 26  # that are written until the disk is looked at again


class Room:
    """What grows on a disk, and may take half of what is free there: a stream without an end must not fill it.

    Args:
        place: A folder of the disk, or a file that is open there.
    """

    def __init__(self, place: Path | IO[bytes]) -> None:
        self._place = place if isinstance(place, Path) else place.fileno()
        self._taken, self._checked = 0, 0

    def take(self, size: int) -> None:
        """Count bytes that are about to be written; a DoesNotFitError if they are too many."""
        self._taken += size
        if self._taken < self._checked + CHECKED_BYTES:
            return
        self._checked = self._taken
        free = shutil.disk_usage(self._place).free  # what was taken is no part of it any more
        if self._taken > free:
            raise DoesNotFitError(
                f"the examples take {self._taken / 1e9:.1f} GB of the disk they are kept on while they are used, and "
                f"leave {free / 1e9:.1f} GB there: give fewer of them (a generator or a stream has to end), or name a "
                "place with more room with TMPDIR and XDG_CACHE_HOME"
            )


class Spool(Generic[T]):
    """A list on disk, to which items are appended, each as the bytes that `pack` makes of it.

    >>> words = Spool(str.encode, bytes.decode)
    >>> words.append("one"), words.append("two"), len(words), words[1]
    (None, None, 2, 'two')
    """

    def __init__(self, pack: Callable[[T], bytes], unpack: Callable[[bytes], T]) -> None:
        self._pack, self._unpack = pack, unpack
        self._file = _nameless_file()
        self._closing = weakref.finalize(self, _close, self._file)  # else Python warns of it
        self._room = None if isinstance(self._file, io.BytesIO) else Room(self._file)
        self._ends = array("q", [0])
        self._lock = threading.Lock()  # a file has one position

    def append(self, item: T) -> None:
        """Add an item at the end."""
        packed = self._pack(item)
        if self._room:
            self._room.take(len(packed))
        try:
            with self._lock:
                self._file.seek(self._ends[-1])
                self._file.write(packed)
        except OSError as error:
            raise DoesNotFitError(
                f"the examples are kept in a file in {cache_folder()} while they are used, which cannot be written "
                f"({error.strerror or error}): free some room there, or name another place with XDG_CACHE_HOME"
            ) from None
        self._ends.append(self._ends[-1] + len(packed))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> T:
        if not -len(self) <= number < len(self):  # where iteration ends
            raise IndexError(f"item {number} of {len(self)}")
        begin, end = (self._ends[number % len(self) + side] for side in (0, 1))
        with self._lock:
            self._file.seek(begin)
            return self._unpack(self._file.read(end - begin))

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(len(self)))


class Chosen(Generic[T]):
    """Some items of another list, in a given order; nothing is copied."""

    def __init__(self, items: "Items[T]", numbers: Iterable[int]) -> None:
        self._items, self._numbers = items, array("q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> T:
        return self._items[self._numbers[number]]

    def __iter__(self) -> Iterator[T]:
        return (self._items[number] for number in self._numbers)


Items = Spool[T] | Chosen[T] | Sequence[T]


def _close(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # what no room was found for finds none now; that was told
        file.close()


def _nameless_file() -> IO[bytes]:
    """A temporary file beside the measurements of this machine: the system's own place for them may be memory."""
    folder = cache_folder()
    with contextlib.suppress(OSError):  # a home that cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    with contextlib.suppress(OSError):  # no place can be
        return tempfile.TemporaryFile()
    return io.BytesIO()
