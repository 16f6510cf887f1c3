"""Files that are whole or not there, also after a power cut."""

import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

# What file systems say that cannot sync, or cannot rename over a file: some of networks and some in user space.
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def write_atomic(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file so that a reader, and whoever looks after a crash, sees the old content or the new, never a part.

    It is written under another name in the same folder, forced to disk, then renamed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.writelines(parts)
            file.flush()
            _sync_handle(file.fileno())
        _replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk; only POSIX systems let a folder be opened."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        _sync_handle(handle)
    finally:
        os.close(handle)


def _sync_handle(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise


def _replace(source: Path, target: Path) -> None:
    """Give a file the name of another one; where the system has no such step, the other one goes first."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in (*NOT_OFFERED, errno.EEXIST) or not target.exists():
            raise
        target.unlink()
        os.rename(source, target)
