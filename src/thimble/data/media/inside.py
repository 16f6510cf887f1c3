"""Pictures and clips that lie in the rows of a table, as datasets keeps them in Parquet: read as files are."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from thimble.data.spool import Spool


class Inside:
    """A file that lies in a row; its bytes are kept in a file without a name while it is used."""

    def __init__(self, contents: Spool[bytes], content: bytes, name: str, row: str) -> None:
        """Keep `content` among `contents`; `name` is what it was called, or empty, `row` where it stands."""
        self._contents, self._place, self._row = contents, len(contents), row
        self.name, self.suffix, self.stem = name, Path(name).suffix, Path(name).stem
        contents.append(content)

    def open(self) -> IO[bytes]:
        """Its bytes, to be read."""
        return io.BytesIO(self._contents[self._place])

    def __str__(self) -> str:
        return f"{self._row} ({self.name})" if self.name else self._row


MediaFile = Path | Inside


def open_media(file: MediaFile) -> IO[bytes]:
    """A file for reading, wherever it lies; an OSError if it cannot be read: a named pipe would wait for its writer."""
    if isinstance(file, Inside):
        return file.open()
    if file.exists() and not file.is_file():
        raise OSError("it is no file, but a pipe, a socket, a device or a folder")
    return file.open("rb", buffering=0)


def content_inside(value: Any) -> bytes | None:
    """The bytes that a cell of a table holds, by themselves or under `bytes` as datasets has it; None if it has none.

    Bytes that happen to be text come as text from a table.
    """
    found = value.get("bytes") if isinstance(value, Mapping) else value if isinstance(value, bytes) else None
    return found.encode() if isinstance(found, str) else found if isinstance(found, bytes) else None
