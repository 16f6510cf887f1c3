"""Checkpoints of a run: atomic, on disk before an older one goes, found by looking and never by a pointer.

A checkpoint is filled in a folder of its own, its manifest of hashes last, which holds its own hash too; everything is
synced to disk, then the folder is given its name in one step, and that is synced too. After a crash or a power cut
there is the old state or the new one. All of it is safetensors and JSON: nothing is unpickled.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.data.encode import Row
from thimble.errors import ConfigError, listing
from thimble.events import EventLog
from thimble.files.atomic import sync
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models.base import Base
from thimble.report.keys import with_new_keys
from thimble.training.run_folder import STEPS, atomic_folder, hash_file, make_folder, read_json, write_json

FOLDER = "checkpoints"
STATE, MANIFEST = "state.safetensors", "manifest.json"
KEPT = 2
NAMED = "step-" + "[0-9]" * 8
UNFINISHED = ".*.tmp"
HASHED = ("base", "data")
NOTED = (*HASHED, "pooling")  # of what a run is made of, beside what was measured before its first step
BEFORE = "before.json"  # of the run folder
# Since the release before, in what a run continues with; beside the keys that reports have too.
RENAMED = {"way": "execution", "recomputed_blocks": "checkpointed_blocks"}
REWORDED = {"side by side": "in parallel", "blocks computed again": "blocks checkpointed"}


@dataclass(frozen=True)
class Checkpoint:
    """Where a run can be resumed."""

    step: int  # steps done
    state: dict[str, NDArray[np.float32]]  # arrays by name
    progress: dict[str, Any]  # plain data to continue with
    origin: dict[str, str]  # what the run was made of, by hash, and what it ran on
    damaged: tuple[str, ...] = ()  # newer ones that were left out because their hashes do not match


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, NDArray[Any]], progress: Mapping[str, Any], origin: Mapping[str, str]
) -> None:
    """Publish a checkpoint in a run folder, then remove older ones."""
    place = folder / FOLDER
    target = place / _name(step)
    if (folder / STEPS).exists():
        sync(folder / STEPS)  # a run that goes on from here keeps the log up to here
    if _read(target) is None:
        shutil.rmtree(target, ignore_errors=True)  # damaged, if it is there
        with atomic_folder(target) as temporary:
            write_safetensors(temporary / STATE, dict(state))
            files = {STATE: hash_file(temporary / STATE)}  # read back: what is on disk is what is vouched for
            manifest = {"step": step, "progress": dict(progress), "origin": dict(origin), "files": files}
            write_json(temporary / MANIFEST, {**manifest, "sha256": _seal(manifest)})
    else:  # a run resumed from an older one comes to the same state, whose names may not be on disk yet
        make_folder(place)
        sync(place)
    # What is newer than this one is damaged, or it would have been gone on from: it must not crowd out valid ones.
    valid = (path for path in checkpoint_folders(folder) if path < target and _read(path) is not None)
    kept = {target, *itertools.islice(valid, KEPT - 1)}
    for path in checkpoint_folders(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose hashes match; None if there is none."""
    damaged: list[str] = []
    for path in checkpoint_folders(folder):
        manifest = _read(path)
        if manifest is None:
            damaged.append(path.name)
            continue
        tensors = open_tensors(path / STATE)
        state = {name: tensors.read(name) for name in tensors.tensors}
        progress, origin = _renamed(manifest["progress"]), _renamed(manifest["origin"])
        progress |= {name: _renamed(progress[name]) for name in ("execution", "guard") if name in progress}
        for old, new in REWORDED.items() if "execution" in origin else ():
            origin["execution"] = origin["execution"].replace(old, new)
        return Checkpoint(manifest["step"], state, progress, origin, tuple(damaged))
    return None


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of today: the release before had others."""
    return with_new_keys({RENAMED.get(name, name): value for name, value in values.items()})


def clear_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, when the run needs them no more; only once what it leaves is on disk."""
    sync(folder)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what a run that was killed left half-written; only its successor, who holds the lock, may do so."""
    sync(folder)  # an adapter may have been exchanged: the earlier one goes when that is on disk
    for path in (*(folder / FOLDER).glob(UNFINISHED), *folder.glob(UNFINISHED)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_folders(folder: Path) -> list[Path]:
    """All checkpoints of a run folder, damaged or not, the newest first."""
    return sorted((folder / FOLDER).glob(NAMED), reverse=True)


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, so that no bit of it flips unnoticed."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, if it and the state are what was saved under this name."""
    manifest = read_json(path / MANIFEST)
    try:
        is_valid = (
            manifest.pop("sha256") == _seal(manifest)
            and path.name == _name(manifest["step"])
            and manifest["files"] == {STATE: hash_file(path / STATE)}
            and {"progress", "origin"} <= manifest.keys()
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return manifest if is_valid else None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder, made if need be, so that no other run writes to it; the system lets go if the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = _hold(folder)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # refuses one that holds anything
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _hold(folder: Path) -> int | None:
    """The handle whose closing lets go of the folder; None where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    # Some file systems lock only what is open to be written, which a folder never is.
    for place, flags in ((folder, os.O_RDONLY), (folder / ".lock", os.O_RDWR | os.O_CREAT)):
        handle = os.open(place, flags)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"--out is {folder}, in which another run is at work: wait until it ends, or name another folder"
            ) from None
        except OSError:
            os.close(handle)
            continue
        return handle
    return None


def origin_of(base: Base, rows: Iterable[Row], **runs_on: str) -> dict[str, str]:
    """What a run is made of, by hash (`base`, `data`), and what the last digits of its sums depend on (`runs_on`)."""
    data = hashlib.sha256()
    for row in rows:
        for array in (row.ids, row.labels):
            data.update(len(array).to_bytes(8, "little"))
            data.update(np.ascontiguousarray(array).data)
    return {"base": base.quick_fingerprint(), "data": data.hexdigest(), **runs_on}


def saved_origin(folder: Path) -> dict[str, str] | None:
    """Base and data, by hash, that a run was measured on before its first step; None if that is not known."""
    origin = (read_json(folder / BEFORE) or {}).get("origin")
    return origin if isinstance(origin, dict) and set(HASHED) <= origin.keys() else None


def check_origin(
    began: Mapping[str, str], origin: Mapping[str, str], places: Mapping[str, str], accepts_changes: bool, log: EventLog
) -> None:
    """Refuse to go on with another base or other data than the run began with; say what may make the last digits
    differ. `places` says where base and data lie now.
    """
    changed = [name for name, value in began.items() if origin.get(name) != value]
    what = " and ".join(f"the {name}" for name in HASHED if name in changed)
    if what and not accepts_changes:
        found = listing(f"{places[name]} differs from the {name} it began with" for name in HASHED if name in changed)
        raise ConfigError(
            f"{what} changed since the run to resume began, so it cannot end as it would have: {found}; name what it "
            "began with, wherever that lies now, begin another run with another --out, or add --accept-changes"
        )
    if what:
        log.warning(f"{what} changed since the run began: it goes on with what is there now")
    others = [f"{name} was {began[name]}, is {origin.get(name)}" for name in changed if name not in HASHED]
    if others:
        log.warning(f"the last digits may differ from those of an uninterrupted run: {'; '.join(others)}")
