"""All folders below one, each once: links are followed, and a folder that cannot be read is no empty one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from thimble.errors import DataError


def folders_below(folder: Path, is_skipped: Callable[[str], bool], most_files: int) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it in the order of their names.

    Args:
        folder: Where to begin.
        is_skipped: Whether folders of a name are left out.
        most_files: In all; of more a DataError says that this is no data set.

    Yields:
        tuple[Path, list[str]]: A folder, and the names of its files.

    Raises:
        OSError: If a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    count = 0
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        place = os.stat(parent)
        if (place.st_dev, place.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not is_skipped(name))
        count += len(names)
        if count > most_files:
            raise DataError(f"{folder} holds more than {most_files:,} files: name the folder of the data itself.")
        yield Path(parent), names


def _refuse(error: OSError) -> None:
    raise error
