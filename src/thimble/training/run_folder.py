"""The folder a training run leaves behind: config, log, checkpoints, adapter, report and a manifest of hashes.

config.yaml           every option, with what `auto` chose
metrics.jsonl         one object a step
start/                the initial A and B, where they cannot be drawn again from the seed alone
before.json           the evaluation before training, saved so that a resumed run need not repeat it
checkpoints/step-N/   state.safetensors and manifest.json (hashes); a folder counts only if they match
adapter/              the result, in PEFT's layout, here before it is measured; and a card for the hub, README.md
report.json           the report as data, and report.html for people
manifest.json         hashes of base, data and result
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from thimble.core.adapter import Adapter
from thimble.errors import ConfigError, DoesNotFitError, escaped
from thimble.files.atomic import sync, write_atomic
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from thimble.report.card import CARD, is_ours

START, STEPS = "start", "metrics.jsonl"
MOST_NAME_BYTES = 200  # of a folder that is named after data: systems allow 255


def choose_folder(out: str | None, data: str) -> Path:
    """The run folder: `out`, or the first free `runs/<data name>-<number>`."""
    if out:
        return Path(out)
    stem = _plain_name(Path(data).name.lstrip(".").split(".")[0]) or "data"
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder


def _plain_name(name: str) -> str:
    """A name without what cannot be seen or is no text, that leaves room for more."""
    seen = "".join(char if escaped(char) == char else "_" for char in name)
    return seen.encode()[:MOST_NAME_BYTES].decode(errors="ignore")


def check_folder(folder: Path, is_resumed: bool, needed_bytes: int) -> None:
    """Refuse a run folder that would be overwritten (unless it is resumed), cannot be written, or has no room."""
    _check_name(folder)
    if not is_resumed and _is_filled(folder):
        raise ConfigError(f"--out is {folder}, which exists: name another folder, or add --resume to continue that run")
    check_room(folder, needed_bytes)


def check_new_folder(folder: Path, needed_bytes: int) -> None:
    """Refuse a folder that holds anything, cannot be written, or has no room."""
    _check_name(folder)
    if _is_filled(folder):
        raise ConfigError(f"--out is {folder}, which exists and is not empty: name another folder")
    check_room(folder, needed_bytes)


def _check_name(folder: Path) -> None:
    """Refuse what no folder can be called."""
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out is {folder}, which cannot be a folder ({why}): name another folder") from None


def _is_filled(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def check_new_file(path: str | None, option: str) -> None:
    """Refuse a file to write, if one is named, that exists or whose place cannot be written."""
    if path and path.endswith("/"):
        raise ConfigError(f"{option} is {path}, a folder: name a file in it, such as {path}answers.jsonl")
    if path and Path(path).exists():
        raise ConfigError(f"{option} is {path}, which exists: name another file")
    if path:
        check_room(Path(path), 0, option)


def check_room(folder: Path, needed_bytes: int, option: str = "--out") -> None:
    """Refuse a folder or file, there or not, that cannot be written, or whose disk has no room."""
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{option} is {folder}, but {parent} cannot be written to: name another place")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise DoesNotFitError(
            f"the disk of {folder} has {free / 1e6:.0f} MB free and the run writes up to {needed_bytes / 1e6:.0f} MB: "
            "free some room or name another folder with --out"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside its place, which is empty or free, and move it there in one step, or leave nothing."""
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name[: MOST_NAME_BYTES // 4]}.tmp")  # a name may take all the room there is
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    try:
        yield temporary
        sync_tree(temporary)
        if folder.exists():
            folder.rmdir()  # refuses one that was filled meanwhile
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that no power cut takes their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in folder.absolute().parents:  # all: a process may have died after it made one
        with contextlib.suppress(OSError):  # closed to us, or of a system that cannot
            sync(parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that is not UTF-8 stands in JSON and YAML as they escape such things.
    write_atomic(path, [text.encode(errors="backslashreplace")])


def write_json(path: Path, value: Any) -> None:
    """Write JSON with `write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, or None if there is none to read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the resolved options as YAML."""
    import yaml

    head = "# The run, repeated by: thimble train --config config.yaml --out another/folder\n"
    write_text(folder / "config.yaml", head + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def read_config(folder: Path) -> dict[str, Any]:
    """The options that `write_config` wrote, or none if they cannot be read."""
    import yaml

    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def publish_adapter(folder: Path, adapter: Adapter, name: str = "adapter") -> Path:
    """Write an adapter beside its place in the run folder and move it there in one step, replacing an earlier one.

    At every moment the place holds the old adapter or the new one, where the system can exchange two names.
    """
    target, temporary, old = (folder / part for part in (name, f".{name}.tmp", f".{name}.old"))
    make_folder(folder)
    if old.exists() and not target.exists():
        os.rename(old, target)  # a process died between two names
    sync(folder)  # one may have died after it exchanged them: the earlier adapter goes when that is on disk
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_adapter(adapter, temporary)
        card = target / CARD
        if card.is_file() and not is_ours(card):  # one of ours is written anew when the run is done
            shutil.copyfile(card, temporary / CARD)
        sync_tree(temporary)
        if not target.exists():
            os.rename(temporary, target)
        elif not _exchange(temporary, target):
            _rename_both(temporary, target, old)
        sync(folder)
    finally:  # what could not be published, or, once the names are on disk, the earlier one
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
    return target


def _rename_both(temporary: Path, target: Path, old: Path) -> None:
    """Replace a folder in two steps, or not at all."""
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; whether the system could."""
    import ctypes

    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


class StepLog:
    """metrics.jsonl: one object a step, cut back to the checkpoint when a run is resumed."""

    def __init__(self, path: Path, done_steps: int = 0) -> None:
        kept = [row for row in read_steps(path) if row["step"] <= done_steps] if done_steps else []
        write_text(path, _as_lines(kept))
        self._path, self._stream = path, path.open("a", encoding="utf-8")
        self._unwritten: list[dict[str, Any]] = []  # on a full disk

    def add(self, row: dict[str, Any]) -> None:
        """Append a step; one that finds no room is written when there is some again."""
        self._unwritten.append(row)
        with contextlib.suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Have every step in the file, which after a failed write (OSError) is written anew: half a line may end it."""
        rows = self._unwritten
        try:
            if self._stream.closed:
                before = [row for row in read_steps(self._path) if row["step"] < rows[0]["step"]]
                write_text(self._path, _as_lines([*before, *rows]))
                self._stream = self._path.open("a", encoding="utf-8")
            else:
                self._stream.write(_as_lines(rows))
                self._stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # what is buffered cannot be written either
                self._stream.close()
            raise
        self._unwritten = []

    def close(self) -> None:
        """Close the file, with every step in it as far as there is room."""
        with contextlib.suppress(OSError):
            self.flush()
        with contextlib.suppress(OSError):
            self._stream.close()


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a log, up to a line that was cut off or damaged."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            break
    return rows


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_tree(folder: Path) -> None:
    """Have a folder and all that is in it reach the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_manifest(folder: Path, base: Mapping[str, Any], data: Mapping[str, str], version: str) -> None:
    """Write what the run was made of, with the place of its base, and what it made, by SHA-256."""
    made = [folder / "adapter" / name for name in (CONFIG_FILE, WEIGHTS_FILE)]  # its card may be changed by its owner
    results = {str(path.relative_to(folder)): hash_file(path) for path in made}
    manifest = {"thimble": version, "base": dict(base), "data": dict(data), "result": results}
    write_json(folder / "manifest.json", manifest)
