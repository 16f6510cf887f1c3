"""What storage promises when a process is stopped, a disk is full or fails, and while others read."""

import errno
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from stress import Line
from stress.disk import Disk, Do, Operation
from stress.made import MEMORY, began_run, goes_on, is_step, number_of, publish, read_number, save
from thimble.files.peft import load_adapter
from thimble.training.checkpoint import FOLDER, Checkpoint, latest_checkpoint
from thimble.training.run_folder import atomic_folder

KILLED, NOT_CUT, FAILED = 9, 8, 7  # exit codes: stopped where it was to be; no write is there; an error

# ---- stopped at every operation -------------------------------------------------------------------------------------


class Stopping(Disk):
    """Ends the process before, after or in the midst of one operation."""

    def __init__(self, root: Path, at: int, when: str) -> None:
        super().__init__(root)
        self.left, self.when = at, when

    def happen(self, operation: Operation, do: Do) -> Any:
        self.left -= 1
        if self.left == -1 and self.when == "before":
            os._exit(KILLED)
        if self.left == -1 and self.when == "midst":
            if operation.kind != "write":
                os._exit(NOT_CUT)
            do(operation.data[: len(operation.data) // 2])
            os._exit(KILLED)
        try:
            return do(operation.data)
        finally:
            if self.left == -1:
                os._exit(KILLED)


def _exit_code(folder: Path, at: int, when: str) -> int:
    """Save and publish in a process of its own, which ends at an operation."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = FAILED
    try:
        with Stopping(folder, at, when):
            save(folder, 3)
            publish(folder, 3)
        code = 0
    finally:
        os._exit(code)


def _light() -> Any:
    """Processes that hold no more than these programs need: quick to fork, and without threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stress.storage"])
    return context


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _damaged(folder: Path) -> None:
    """The step that is to be saved is there, and damaged."""
    began_run(folder)
    shutil.copytree(folder / FOLDER / "step-00000002", folder / FOLDER / "step-00000003")


def _left(folder: Path) -> None:
    """Another process was killed before."""
    began_run(folder)
    for name in (f"{FOLDER}/.step-00000009.tmp", ".adapter.tmp", ".adapter.old"):
        shutil.copytree(folder / "adapter", folder / name)


BEGINNINGS = (began_run, _nothing, _damaged, _left)


def stopped_saves(count: int) -> Line:
    """End a process at every operation of a save and a publish, before it, after it and in the midst of a write.

    Args:
        count: In how many kinds of run folder.
    """
    began = time.perf_counter()
    with _light().Pool(1) as pool:
        results = pool.apply(_stop_everywhere, (count,))
    tried, wrong = sum(code == KILLED for code, _ in results), sum(not is_valid for _, is_valid in results)
    note = f"{len(results) // 3} operations of saves and publishes"
    return Line("saves stopped at every operation", tried, wrong, time.perf_counter() - began, note)


def _stop_everywhere(count: int) -> list[tuple[int, bool]]:
    results = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        for begin in BEGINNINGS[:count]:
            begun = Path(place, begin.__name__)
            begin(begun)
            for at in itertools.count():
                results += [_stopped(begun, at, when) for when in ("before", "midst", "after")]
                if results[-3][0] == 0:
                    break
    return results


def _stopped(begun: Path, at: int, when: str) -> tuple[int, bool]:
    """The exit code of a process that is stopped, and whether it left the old or the new, and the run goes on."""
    folder = begun.with_name("stopped")
    shutil.copytree(begun, folder)
    old = (latest_checkpoint(folder), read_number(folder))
    code = _exit_code(folder, at, when)
    found, number = latest_checkpoint(folder), read_number(folder)
    is_valid = code in (0, KILLED, NOT_CUT) and number in (old[1], 3)
    is_valid = is_valid and (is_step(found, 3) or (is_step(found, old[0].step) if old[0] else found is None))
    is_valid = is_valid and goes_on(folder)
    shutil.rmtree(folder)
    return code, is_valid


# ---- full disks -----------------------------------------------------------------------------------------------------


class Failing(Disk):
    """A disk that takes so many bytes, and on which one operation of a kind fails."""

    def __init__(self, root: Path, room: float = np.inf, kind: str = "", at: int = -1, code: int = 0) -> None:
        super().__init__(root)
        self.room, self.kind, self.at, self.code = room, kind, at, code
        self.written, self.of_kind, self.failed = 0, 0, ""

    def happen(self, operation: Operation, do: Do) -> Any:
        if operation.kind == self.kind or (self.kind == "open" and operation.kind == "create"):
            self.of_kind += 1
            if self.of_kind == self.at + 1:
                self.failed = f"{operation.kind} {operation.path}"
                raise OSError(self.code, os.strerror(self.code))
        if operation.kind != "write":
            return do(operation.data)
        data = operation.data[: int(min(self.room - self.written, len(operation.data)))]
        self.written += len(data)
        if len(data) < len(operation.data):
            self.failed = f"write {operation.path}"
            if data:
                return do(data)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return do(data)


def full_disks(count: int) -> Line:
    """Fail at byte k of a save and a publish, and at each sync, open and new folder.

    Args:
        count: How many k.
    """
    began, tried, wrong = time.perf_counter(), 0, []
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        begun = Path(place, "begun")
        began_run(begun)

        def attempt(**options: Any) -> Failing:
            nonlocal tried
            folder = Path(place, "full")
            shutil.copytree(begun, folder)
            disk = Failing(folder, **options)
            problem = _after_failure(folder, disk)
            tried += bool(disk.failed)
            if problem:
                wrong.append(f"{problem} after {disk.failed} ({options})")
            shutil.rmtree(folder)
            return disk

        whole = attempt().written
        for number in range(count):
            attempt(room=number * whole // count)
        for kind, code in (("fsync", errno.EIO), ("open", errno.EMFILE), ("mkdir", errno.EROFS), ("rename", errno.EIO)):
            for at in itertools.count():
                if not attempt(kind=kind, at=at, code=code).failed:
                    break
    for text in wrong[:10]:
        print("   ", text)
    return Line("full and failing disks", tried, len(wrong), time.perf_counter() - began, f"{whole:,} bytes written")


def _after_failure(folder: Path, disk: Failing) -> str:
    """Save and publish on a disk that fails; which promise is broken, nothing if none."""
    for work, kept in ((save, lambda: latest_checkpoint(folder)), (publish, lambda: read_number(folder))):
        error: Exception | None = None
        with disk:
            try:
                work(folder, 3)
            except Exception as raised:
                error = raised
        found = kept()
        step = found.step if isinstance(found, Checkpoint) else found
        if error and not isinstance(error, OSError):
            return f"{type(error).__name__}"
        if step != 3 and not (error and step == 2):
            return f"{work.__name__} left {step}"
        if isinstance(found, Checkpoint) and not is_step(found, found.step):
            return "a checkpoint is not what was saved"
        if (error or not disk.failed) and any("tmp" in path.name or "old" in path.name for path in folder.rglob("*")):
            return f"{work.__name__} left something half-written"
    return "" if goes_on(folder) else "the run cannot go on"


# ---- readers while an adapter is replaced ---------------------------------------------------------------------------


def _read_on(folder: str, is_over: Any, counts: Any) -> None:
    """Read the adapter until told to stop, in a process of its own; counts reads, mixtures and errors."""
    while not is_over.is_set():
        try:
            counts[1] += number_of(load_adapter(folder)) is None
        except Exception as error:
            if not counts[2]:
                print("   ", f"{type(error).__name__}: {error}"[:200], flush=True)
            counts[2] += 1
        counts[0] += 1


def publishes(count: int) -> Line:
    """Replace an adapter `count` times while two processes read it, ten times as often."""
    began, context, published = time.perf_counter(), _light(), 0
    with tempfile.TemporaryDirectory() as place:
        publish(Path(place), 0)
        is_over, counts = context.Event(), [context.Array("q", 3) for _ in range(2)]
        readers = [context.Process(target=_read_on, args=(place, is_over, one)) for one in counts]
        for reader in readers:
            reader.start()
        while published < count or sum(one[0] for one in counts) < 10 * count:
            published += 1
            publish(Path(place), published)
        is_over.set()
        for reader in readers:
            reader.join()
        reads, torn, errors = (sum(one[number] for one in counts) for number in range(3))
        left = [path.name for path in Path(place).iterdir() if path.name != "adapter"]
    wrong = torn + errors + len(left) + sum(bool(reader.exitcode) for reader in readers)
    note = f"{published:,} publishes, {torn} mixtures, {errors} errors"
    return Line("adapters read while replaced", reads, wrong, time.perf_counter() - began, note)


# ---- modes ----------------------------------------------------------------------------------------------------------


def modes(count: int) -> Line:
    """Files and folders are made with the modes that the umask leaves, `count` times for each of three."""
    began, tried, wrong = time.perf_counter(), 0, 0
    for mask in (0o077, 0o022, 0o002) * count:
        with tempfile.TemporaryDirectory(dir=MEMORY) as place:
            before = os.umask(mask)
            try:
                began_run(Path(place, "runs", "run"))
                with atomic_folder(Path(place, "runs", "export")) as folder:
                    (folder / "config.json").write_text("{}")
            finally:
                os.umask(before)
            for path in Path(place).rglob("*"):
                tried += 1
                wrong += path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~mask
    return Line("modes of files", tried, wrong, time.perf_counter() - began, "umask 077, 022 and 002")
