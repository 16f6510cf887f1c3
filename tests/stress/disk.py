"""Between a program and its files: every operation under one folder can be watched, stopped or refused."""

import builtins
import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from thimble.training import run_folder

Do = Callable[[bytes], Any]


@dataclass(frozen=True)
class Operation:
    """One system call that reads or changes files.

    Attributes:
        kind: open (to read), create, append, write, fsync, rename, exchange, mkdir, unlink or rmdir.
        path: From the folder that is watched.
        other: The second name of a rename or exchange.
        data: What is written.
        offset: Where in the file.
    """

    kind: str
    path: str
    other: str = ""
    data: bytes = b""
    offset: int = 0


class Disk:
    """While entered, operations on files under a folder pass through `happen`, which kinds of trouble override."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.abspath(root)
        self.places: dict[int, str] = {}  # of open handles
        self.stack = ExitStack()

    def happen(self, operation: Operation, do: Do) -> Any:
        """Do an operation; of a write, as much as is handed to `do`."""
        return do(operation.data)

    def __enter__(self) -> Self:
        self.open, self.open_handle, self.fsync = io.open, os.open, os.fsync
        replaced = {
            (os, "open"): self._open_handle, (os, "fsync"): self._fsync, (os, "rename"): self._two("rename", os.rename),
            (os, "replace"): self._two("rename", os.replace), (os, "mkdir"): self._one("mkdir", os.mkdir),
            (os, "unlink"): self._one("unlink", os.unlink), (os, "rmdir"): self._one("rmdir", os.rmdir),
            (io, "open"): self._open, (builtins, "open"): self._open,
            (run_folder, "_exchange"): self._two("exchange", run_folder._exchange),
        }  # fmt: skip
        for (module, name), function in replaced.items():
            self.stack.enter_context(patch.object(module, name, function))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """A path from the root; None if it is outside, where nothing is watched."""
        if isinstance(path, int):
            return self.places.get(path)
        begin = "" if dir_fd is None else os.path.join(self.root, self.places.get(dir_fd, "/"))
        place = os.path.relpath(os.path.join(begin, os.fspath(path)), self.root)
        return None if place.startswith("..") else place

    def _one(self, kind: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, dir_fd: int | None = None) -> Any:
            place = self._place(path, dir_fd)
            if place is None:
                return true(path, *arguments, dir_fd=dir_fd)
            return self.happen(Operation(kind, place), lambda _: true(path, *arguments, dir_fd=dir_fd))

        return call

    def _two(self, kind: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def call(one: Any, other: Any) -> Any:
            place = self._place(one)
            if place is None:
                return true(one, other)
            return self.happen(Operation(kind, place, self._place(other) or ""), lambda _: true(one, other))

        return call

    def _open_handle(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        if place is None:
            return self.open_handle(path, flags, mode, dir_fd=dir_fd)
        kind = "create" if flags & os.O_CREAT else "open"
        handle = self.happen(Operation(kind, place), lambda _: self.open_handle(path, flags, mode, dir_fd=dir_fd))
        self.places[handle] = place
        return int(handle)

    def _fsync(self, handle: int) -> None:
        place = self._place(handle)
        if place is None:
            return self.fsync(handle)
        return self.happen(Operation("fsync", place), lambda _: self.fsync(handle))

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        place = self._place(file)
        if place is None:
            return self.open(file, mode, buffering, *text, **options)
        if mode.strip("bt") == "r":
            do = lambda _: self.open(file, mode, buffering, *text, **options)  # noqa: E731
            return self.happen(Operation("open", place), do)
        kind = "append" if "a" in mode else "create"
        raw = self.happen(Operation(kind, place), lambda _: _Raw(self, place, file, mode.strip("bt")))
        self.places[raw.fileno()] = place
        stream = io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *text, **options)


class _Raw(io.FileIO):
    """A file whose writes are watched, below Python's buffer."""

    def __init__(self, disk: Disk, place: str, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self.disk, self.place = disk, place

    def write(self, data: Any) -> int:
        operation = Operation("write", self.place, data=bytes(data), offset=self.tell())
        return int(self.disk.happen(operation, super().write))


class Record(Disk):
    """Writes down what was done."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.operations: list[Operation] = []

    def happen(self, operation: Operation, do: Do) -> Any:
        done = do(operation.data)
        if operation.kind != "exchange" or done:  # where names cannot be exchanged, nothing was
            self.operations.append(operation)
        return done
