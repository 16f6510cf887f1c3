"""Which base an adapter was trained on: what is written down of it, and how it is found again.

An adapter carries the quick fingerprint of its base in the header of its tensors, so that its bytes do not depend on
what the base is called, and in its config what PEFT opens (`base_model_name_or_path`); no other path, since adapters
are passed on. The run folder around it knows the base's name and where it was, in manifest.json. All of this is text
from anybody: a base that it names is opened as carefully as one that the user names, and nothing is fetched.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thimble.core.adapter import Adapter
from thimble.errors import AdapterError, InputError, as_word, listing
from thimble.files.peft import find_adapter
from thimble.files.peft_config import MOST_PATH_CHARACTERS
from thimble.files.untrusted import printable, read_bytes
from thimble.models.base import Base, default_base, open_base
from thimble.models.frozen_base import FrozenBase
from thimble.models.hub_cache import HUB_ADDRESS, cached_snapshot, hub_name_of, is_hub_form

FINGERPRINT = "base_fingerprint"  # note of an adapter
# The same of one that was trained for another task than text: the task, its classes as JSON, the function of the user's
# own that made its base, and how inputs are made, as JSON.
TASK, LABELS, FUNCTION, PREPROCESSING = "task", "labels", "function", "preprocessing"
MOST_TRIED = 16  # GGUF files of a folder whose hashes are looked at
DEFAULT_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the default base was made from
# Metadata of a GGUF that name the model it was converted from. `general.base_model` is no such: it is what that model
# was fine-tuned from, with other weights.
_CONVERTED_FROM = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")
NAME_IT = "name the one that the adapter was trained on with --base"
_MOST_MANIFEST_BYTES = 8_000_000
_MOST_SHOWN = 12  # characters of a fingerprint


def base_notes(fingerprint: str) -> dict[str, str]:
    """What the notes of an adapter say of its base: its quick fingerprint, and neither its name nor where it lies."""
    return {FINGERPRINT: fingerprint}


def labels_of(adapter: Adapter) -> tuple[str, ...] | None:
    """The classes that an adapter tells apart, by its notes; None if the note is damaged."""
    try:
        found = json.loads(adapter.notes.get(LABELS, "[]"))
    except ValueError:
        return None
    is_whole = isinstance(found, list) and all(isinstance(label, str) for label in found)
    return tuple(found) if is_whole else None


def peft_name(base: Base) -> str:
    """What `base_model_name_or_path` says, so that PEFT opens it: a hub name where one is known, else a folder.

    A GGUF file of which no hub name is known is opened by the folder that holds it, with `gguf_file=<its name>`.
    """
    if (hub_name := hub_name_of(base.path)) and is_hub_form(hub_name):  # one without an owner is not found again
        return hub_name
    path = os.path.abspath(base.path if base.metadata is None else base.path.parent)
    is_readable = len(path) <= MOST_PATH_CHARACTERS and (path + " ").isprintable()  # by whoever reads adapters
    return _converted_from(base) or (path if is_readable else printable(base.name))


def known_hub_name(adapter: Adapter) -> str:
    """The hub name of the base of an adapter; empty if it names a folder, or none."""
    return adapter.base if is_hub_form(adapter.base) and not os.path.lexists(adapter.base) else ""


def license_of(base: FrozenBase) -> str:
    """The license that a base says it is under, in its metadata or on the card in its folder; empty if it says none."""
    found: object = (base.metadata or {}).get("general.license")
    if base.metadata is None:
        with contextlib.suppress(InputError, OSError):
            card = read_bytes(base.path / "README.md", _MOST_MANIFEST_BYTES, AdapterError).decode(errors="replace")
            front = re.match(r"---\r?\n(.*?)\n---", card, re.DOTALL)
            line = re.search(r"^license: *([^\s#]+)", front[1], re.MULTILINE) if front else None
            found = line[1].strip("\"'") if line else ""
    return found if isinstance(found, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,40}", found) else ""


def _converted_from(base: Base) -> str | None:
    """The hub name of the model that a GGUF file was made from, if that is known."""
    for key in _CONVERTED_FROM:
        text = (base.metadata or {}).get(key)
        name = text.removeprefix(HUB_ADDRESS).strip("/") if isinstance(text, str) else ""
        if is_hub_form(name) and not name.lower().endswith("gguf"):
            return name
    return DEFAULT_HUB_NAME if _is_default(base.path) else None


def _is_default(path: Path) -> bool:
    with contextlib.suppress(InputError, OSError):
        return path.samefile(default_base())
    return False


def manifest_entry(base: FrozenBase, folder: Path, fingerprint: str) -> dict[str, str]:
    """What the manifest of a run folder says of its base beside its name: where it is, and its quick fingerprint."""
    path, folder = os.path.abspath(base.path), Path(os.path.abspath(folder))
    entry = {"path": path, "quick_fingerprint": fingerprint}
    with contextlib.suppress(ValueError):  # another drive
        entry["path_from_run"] = os.path.relpath(path, folder)
    return entry


# ---- found again ----------------------------------------------------------------------------------------------------


def base_of(adapters: Mapping[str, Adapter]) -> Base:
    """The base that adapters, by the path the user gave, were trained on; an AdapterError if it is not one base, here.

    A base that was moved is found beside the run if it moved along, and by its hash.
    """
    found = {path: _find(path, adapter) for path, adapter in adapters.items()}
    if len({base.quick_fingerprint() for base in found.values()}) > 1:
        told = listing(f"{as_word(path)} on {as_word(str(base.path))}" for path, base in found.items())
        raise AdapterError(
            f"the adapters were trained on different bases, {told}: use those of one base, or name with --base the one "
            "to use for all"
        )
    return next(iter(found.values()))


def _find(path: str, adapter: Adapter) -> Base:
    """The first place that holds the base an adapter was trained on, by its hash; else what lies at the named place."""
    folder = find_adapter(path)
    manifest = manifest_base(folder.parent)
    wanted = adapter.notes.get(FINGERPRINT) or _text(manifest, "quick_fingerprint")
    changed: Base | None = None
    for place, is_named in _places(folder, manifest, adapter, wanted):
        found = _opened(place)
        if found and is_named and not changed:
            changed = found
        if found and (is_named if not wanted else found.quick_fingerprint() == wanted):
            return found
    if changed:
        return changed
    name = _text(manifest, "name") or adapter.base
    if not name:
        raise AdapterError(
            f"adapter {path} does not say which base it belongs to: {NAME_IT}, a GGUF file, a Hugging Face folder or a "
            "hub name"
        )
    was = _text(manifest, "path") or (adapter.base if os.path.isabs(adapter.base) else "")
    told = f" (it was {printable(was)})" if was else ""
    typed = as_word(adapter.base if is_hub_form(adapter.base) else name)
    raise AdapterError(
        f"the base of adapter {path}, {printable(name)}, is not found{told}: {NAME_IT}, where it lies now, as in "
        f"--base {printable(typed)}"
    )


def _places(folder: Path, manifest: Mapping[str, Any], adapter: Adapter, wanted: str) -> Iterator[tuple[Path, bool]]:
    """Where the base may lie, and whether that place is named; what is only guessed has to have the right hash."""
    run, name = folder.parent, _text(manifest, "name")
    if path := _text(manifest, "path"):
        yield Path(path), True
    if path := _text(manifest, "path_from_run"):
        yield Path(os.path.normpath(run / path)), True
    if adapter.base:  # of a GGUF file it is the folder, in which another one is no more than a guess
        place = Path(adapter.base)
        yield place, not place.is_dir() or (place / "config.json").is_file()
    if (snapshot := cached_snapshot(adapter.base)) is not None:
        yield snapshot, True
    with contextlib.suppress(InputError):
        default = default_base()
        yield default, adapter.base in (DEFAULT_HUB_NAME, default.name)
    for beside in (*([Path(adapter.base)] if adapter.base else []), folder, run, run.parent, run.parent.parent, Path()):
        if name and os.path.basename(name) == name:
            yield beside / name, False
        yield from ((file, False) for file in (sorted(beside.glob("*.gguf"))[:MOST_TRIED] if wanted else ()))


def _opened(place: Path) -> Base | None:
    """What lies at a place, if it is a base."""
    try:
        return open_base(place) if os.path.lexists(place) else None
    except (InputError, OSError, ValueError):  # ValueError: a NUL in the name
        return None


def manifest_base(run: Path) -> dict[str, Any]:
    """What the manifest of the run folder around an adapter says of the base; nothing if there is none to read."""
    with contextlib.suppress(InputError, OSError, ValueError, RecursionError):
        found = json.loads(read_bytes(run / "manifest.json", _MOST_MANIFEST_BYTES, AdapterError))
        base = found.get("base") if isinstance(found, dict) else None
        return base if isinstance(base, dict) else {}
    return {}


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


# ---- compared -------------------------------------------------------------------------------------------------------


def difference(path: str, adapter: Adapter, base: Base) -> str | None:
    """Why a base may not be the one that an adapter of its shape was trained on, in a sentence; None if it is."""
    wanted, name = adapter.notes.get(FINGERPRINT, ""), _known_name(path, adapter)
    if wanted:
        has = base.quick_fingerprint()
        if has == wanted:
            return None
        hashes = f" (hash {printable(wanted[:_MOST_SHOWN])}, not {has[:_MOST_SHOWN]})"
        called = f"{printable(name)} of other weights" if name == base.name else printable(name or "another base")
    elif not name or _same_name(adapter.base or name, base):
        return None
    else:
        hashes, called = "", printable(name)
    return (
        f"adapter {path} was trained on {called}{hashes}, and {base.name} is used: an update does well on the same "
        "model in another precision, and harm on any other"
    )


def _known_name(path: str, adapter: Adapter) -> str:
    """What the base of an adapter is called, by the run folder around it or by PEFT's field."""
    with contextlib.suppress(InputError, OSError):
        if name := _text(manifest_base(find_adapter(path).parent), "name"):
            return name
    return adapter.base


def _same_name(name: str, base: Base) -> bool:
    """Whether a name without a hash may be that of a base: a path, a hub name, or the name of a file."""
    names = [base.name, base.path.name, peft_name(base), str((base.metadata or {}).get("general.name", ""))]
    return _as_file_name(name) in map(_as_file_name, filter(None, names))


def _as_file_name(name: str) -> str:
    """The last part of a name, as llama.cpp's converter makes a name for people of it and back."""
    return os.path.basename(name.rstrip("/")).lower().replace(" ", "-")
