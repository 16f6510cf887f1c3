"""Where a base lies: a GGUF file, a Hugging Face folder, a folder of GGUF files, the hub's cache, Ollama's store."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import names_in, parse_json_object, printable, read_bytes
from thimble.models.gguf_base import PART
from thimble.models.hub_cache import cached_name, hub_name_of
from thimble.models.weight_files import UNFINISHED

MOST_MANIFEST_BYTES, MOST_REF_BYTES = 1 << 20, 1 << 10
MOST_SHOWN = 12  # pieces of a file in a command
_PACKED = (".gz", ".xz", ".bz2", ".zst", ".zip", ".7z", ".rar", ".tar", ".tgz", ".lz4")
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_NO_MODELS = re.compile(r".*(mmproj|imatrix).*|ggml-vocab.*", re.IGNORECASE)  # GGUF files beside those of models
_OLLAMA_BLOB = re.compile(r"sha256-[0-9a-f]{64}")
_OLLAMA_NAME = re.compile(r"[a-z][\w.-]+:[\w.-]+")
# An address, from which a path takes a slash; of a model on the hub, with its name.
_ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/+((www\.)?(huggingface\.co|hf\.co)/(?P<name>[\w.-]+/[\w.-]+))?")
# A file cut into pieces of bytes, by how its pieces are called.
_PIECE = re.compile(r"(?P<whole>.+\.gguf)[._-]((split|part)[._-]?)?([a-z]{1,2}|\d{1,5})([._-]?of[._-]?\d{1,5})?")


@dataclass(frozen=True)
class Place:
    """Where a base was found."""

    path: Path  # the GGUF file or the Hugging Face folder
    name: str  # what it is called in messages and in adapters
    notes: tuple[str, ...] = ()  # what was chosen on the way


def find_place(path: Path) -> Place:
    """Find the file or folder that a path stands for; a BaseModelError that says what lies there if there is none."""
    if path.is_dir():
        return _in_folder(path)
    if not os.path.lexists(path):
        raise BaseModelError(
            f"base {printable(str(path))} does not exist: expected a GGUF file, a Hugging Face folder or a hub name "
            f"such as owner/name{_elsewhere(str(path))}"
        )
    _check_whole(path)
    return Place(path, path.name)


def _elsewhere(name: str) -> str:
    """What to name instead of an address or a name of Ollama's; empty for any other."""
    if _OLLAMA_NAME.fullmatch(name):
        return f"; a model of Ollama lies in a file, which ollama show {name} --modelfile tells behind FROM"
    address = _ADDRESS.match(name)
    if not address:
        return ""
    if address["name"]:
        return f"; name a model of the hub as a hub name: {address['name']}"
    return "; nothing is fetched from an address: download the file, and name it here"


def _in_folder(folder: Path) -> Place:
    """The base that a folder holds, which it says by its files."""
    names = set(names_in(folder))
    snapshots = folder / "snapshots" if cached_name(folder.name) else folder
    if snapshots.name == "snapshots" and cached_name(snapshots.parent.name) and snapshots.is_dir():
        return _snapshot(snapshots)
    models = [name for name in names if cached_name(name)]
    if models and "config.json" not in names:
        raise BaseModelError(
            f"base {folder} is a cache of the hub's client and holds {listing(sorted(models), 6)}: name one of these "
            "folders"
        )
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if "config.json" in names and (has_weights or not _ggufs(folder)):
        return Place(folder, _name_of(folder))
    if _ggufs(folder):
        return _only_gguf(folder)
    _refuse_other_folders(folder, names)
    return Place(folder, _name_of(folder))  # refused where it is opened, for want of config.json


def _name_of(folder: Path) -> str:
    """The name of a folder; in the hub's cache owner/name, not the hash of the commit."""
    return hub_name_of(folder) or folder.name or folder.resolve().name


def _snapshot(snapshots: Path) -> Place:
    """The snapshot that refs/main names, or the only one."""
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    ref, owner = snapshots.parent / "refs" / "main", snapshots.parent
    if ref.is_file():
        commit = read_bytes(ref, MOST_REF_BYTES, BaseModelError).decode(errors="replace").strip()
        chosen = next((path for path in found if path.name == commit), None)
        if chosen is None:
            raise BaseModelError(
                f"base {owner} has no snapshot {printable(commit, 60)}, which refs/main names, but "
                f"{listing([path.name for path in found], 3) or 'none'}: download it again, or name one of them"
            )
    elif len(found) == 1:
        chosen = found[0]
    else:
        raise BaseModelError(
            f"base {owner} has the snapshots {listing([path.name for path in found], 4) or '(none)'} and no refs/main "
            "that chooses: name the folder of one"
        )
    place = _in_folder(chosen)
    why = "which refs/main names" if ref.is_file() else "the only one"
    return Place(place.path, place.name, (*place.notes, f"the base is snapshot {chosen.name} of {owner.name}, {why}"))


def _ggufs(folder: Path) -> list[Path]:
    """The GGUF files of models in a folder; of one in parts the first."""
    found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(".gguf"))
    models = [path for path in found if not _NO_MODELS.fullmatch(path.name)]
    firsts: dict[str, Path] = {}
    for path in models:
        match = PART.fullmatch(path.name)
        firsts.setdefault(f"{match['stem']}-of-{match['count']}" if match else path.name, path)
    return list(firsts.values())


def _only_gguf(folder: Path) -> Place:
    files = _ggufs(folder)
    if len(files) > 1:
        raise BaseModelError(
            f"base {folder} holds {len(files)} GGUF models, {listing([path.name for path in files], 6)}: name one, "
            f"such as {files[0]}"
        )
    return Place(files[0], files[0].name, (f"the base is {files[0].name}, the only GGUF model in {folder.name}",))


def _refuse_other_folders(folder: Path, names: set[str]) -> None:
    """Say what a folder is that holds no base, as far as its files tell."""
    if "adapter_config.json" in names:
        raise BaseModelError(
            f"{folder} is an adapter, not a base: name with --base the model that it was trained on, and the adapter "
            "with --adapter"
        )
    if os.path.lexists(folder / "adapter" / "adapter_config.json"):
        raise BaseModelError(
            f"{folder} is the run folder of an adapter, not a base: name with --base the model that it was trained on, "
            "and the folder with --adapter"
        )
    for blobs in (folder, folder / "blobs", folder / "models" / "blobs"):
        if blobs.is_dir() and (models := _ollama_models(blobs)):
            raise BaseModelError(
                f"base {folder} is the store of Ollama, in which each model lies in a file: name one, such as "
                f"{models[0]} (ollama show MODEL --modelfile tells which is whose, behind FROM)"
            )
    pieces = sorted(name for name in names if _PIECE.fullmatch(name) and not name.lower().endswith(_PACKED))
    if pieces:
        raise BaseModelError(_joining(folder / pieces[0]))
    folders = [path for path in folder.iterdir() if path.is_dir()]
    inner = sorted(path.name for path in folders if os.path.lexists(path / "config.json") or any(path.glob("*.gguf")))
    if inner and "config.json" not in names:
        raise BaseModelError(
            f"base {folder} has no config.json, but bases lie in its folders {listing(inner, 4)}: name one, such as "
            f"{folder / inner[0]}"
        )
    if {"params.json", "consolidated.00.pth"} & names:
        raise BaseModelError(
            f"base {folder} has no config.json; it holds weights in the layout of their makers' own programs "
            f"({listing(sorted(names), 4)}): take the folder that transformers opens, often the one around it"
        )


def _ollama_models(blobs: Path) -> list[Path]:
    """The files of a store that begin as a GGUF does, the largest first: others are licenses, templates, adapters."""
    found = []
    for path in (blobs / name for name in names_in(blobs) if _OLLAMA_BLOB.fullmatch(name)):
        with path.open("rb") as stream:
            found += [path] if stream.read(4) == b"GGUF" else []
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def _check_whole(path: Path) -> None:
    """Refuse a file that is a piece of one, a download that has not ended, or Ollama's description of a model."""
    if path.name.endswith(UNFINISHED):
        raise BaseModelError(f"base {path} is a download that has not ended: download it again")
    if path.suffix.lower() in _PACKED:
        raise BaseModelError(f"base {path} is a packed file: unpack it, and name what comes out")
    if path.suffix in (".json", ".jinja") or path.name in ("tokenizer.model", "merges.txt"):
        raise BaseModelError(f"base {path} is one file of a base: name the folder around it, {path.parent}")
    if _PIECE.fullmatch(path.name) and not path.name.lower().endswith(".gguf"):
        raise BaseModelError(_joining(path))
    if not path.suffix and path.is_file() and path.stat().st_size <= MOST_MANIFEST_BYTES:
        _refuse_manifest(path)


def _joining(path: Path) -> str:
    """How the pieces of a file become one."""
    match = _PIECE.fullmatch(path.name)
    whole = match["whole"] if match else path.name
    pieces = [name for name in names_in(path.parent) if (m := _PIECE.fullmatch(name)) and m["whole"] == whole]
    pieces.sort(key=lambda name: re.sub(r"\d+", lambda digits: digits[0].zfill(9), name))  # part2 before part10
    more = " ..." if len(pieces) > MOST_SHOWN else ""
    return (
        f"base {path} is a piece of a file that was cut ({listing(pieces, 4)}): join the pieces in their order, in "
        f"{path.parent}: cat {shlex.join(pieces[:MOST_SHOWN])}{more} > {shlex.quote(whole)}"
    )


def _refuse_manifest(path: Path) -> None:
    """Refuse Ollama's description of a model with the path of the file that holds its weights."""
    try:
        layers = parse_json_object(read_bytes(path, MOST_MANIFEST_BYTES, BaseModelError)).get("layers")
    except (ValueError, BaseModelError):
        return  # refused by content where it is opened
    entries = [entry for entry in layers if isinstance(entry, dict)] if isinstance(layers, list) else []
    models = [str(entry.get("digest")) for entry in entries if entry.get("mediaType") == _OLLAMA_MODEL]
    if models and re.fullmatch(r"sha256:[0-9a-f]{64}", models[0]):
        blob = models[0].replace(":", "-")
        stores = [parent / "blobs" / blob for parent in path.parents if (parent / "blobs" / blob).is_file()]
        where = f"name that file, {stores[0]}" if stores else f"name the file blobs/{blob} of Ollama's store"
        raise BaseModelError(f"base {path} is Ollama's description of a model, whose weights lie in a file: {where}")
