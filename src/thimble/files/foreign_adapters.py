"""What lies where an adapter was expected: one of another tool, a folder around adapters, a part of one.

Names of files say most; of a safetensors file that is no adapter of PEFT's the header is read, and nothing else.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

from thimble.errors import BaseModelError, as_word
from thimble.files.peft_config import CONFIG_FILE, WEIGHTS_FILE
from thimble.files.tensors import open_tensors

PARTS = (CONFIG_FILE, WEIGHTS_FILE)
PICKLE, MLX_FILE, DIFFUSERS_FILE = "adapter_model.bin", "adapters.safetensors", "pytorch_lora_weights.safetensors"
TO_SAFETENSORS = (
    "if you trust it, convert it with safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
    "'adapter_model.safetensors')"
)
MOST_HEADER_BYTES, MOST_TENSORS, MOST_LOOKED_AT = 8_000_000, 20_000, 4
_MLX = (
    "it is an adapter of mlx-lm, which names and turns the matrices in another way: mlx_lm.fuse writes the whole model "
    "with it, a folder for --base"
)
# What tools write beside PEFT's two files, of tensors that the model was trained with too.
_BESIDE = {
    **dict.fromkeys(("new_embeddings.safetensors", "new_embeddings.bin"), "embeddings of tokens that were added"),
    **dict.fromkeys(("non_lora_trainables.bin", "non_lora_state_dict.bin"), "weights that were trained whole"),
    "mm_projector.bin": "the projector between pictures and text",
}
_PICTURES = "for a model that makes pictures: only adapters of language models can be used here"
# How tensors are called in LoRA files of models that make pictures.
_OF_DIFFUSERS = re.compile(
    r"(unet|transformer|text_encoder(_\d)?|diffusion_model)\..+\.(lora_[AB]|lora\.(up|down))\b.*"
)
_OF_KOHYA = re.compile(r"(lora_(unet|te\d?|transformer)_|lora_prior_).+\.(lora_(up|down|mid)\.weight|alpha)")


def what_lies_there(path: Path, found: Collection[str]) -> str:
    """What a path leads to that is no adapter folder.

    Args:
        path: What was named.
        found: Names of what lies in it; none of a file.

    Returns:
        What it is and what to do; empty if that is not known.
    """
    if path.name in PARTS and path.is_file():
        folder = path.parent
        lacking = [name for name in PARTS if not os.path.lexists(folder / name)]
        return _lacking(folder, lacking[0]) if lacking else f"name the folder around it, {as_word(str(folder))}"
    if MLX_FILE in found or path.name == MLX_FILE:
        return _MLX
    if not os.path.lexists(path):
        is_of_hub = _is_hub_form(str(path)) and not path.parent.is_dir()  # else it lies beside others, or should
        return f"one on the hub is fetched by hf download {path}, which prints the folder to name" * is_of_hub
    if (path / "snapshots").is_dir():  # of the hub's cache
        path, found = path / "snapshots", sorted(os.listdir(path / "snapshots"))
    for kind, inner in (("run folders", "adapter"), ("folders", "")):
        places = [name for name in found if all(os.path.lexists(path / name / inner / part) for part in PARTS)]
        if places:
            return f"name one of its {kind}, such as {as_word(str(path / max(places, key=_in_order)))}"
    if PICKLE in found:
        return f"{PICKLE} is a pickle, which can run code when read: {TO_SAFETENSORS}"
    if "config.json" in found:
        return "it is a base: name it with --base"
    if WEIGHTS_FILE in found:
        return _lacking(path, CONFIG_FILE)
    return _of_pictures([path] if path.is_file() else [path / name for name in sorted(found)])


def _is_hub_form(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", name) is not None


def trained_beside(folder: Path) -> list[str]:
    """What belongs to an adapter and is not part of it, so that it would answer without; with what to do."""
    return [
        f"{name} lies beside it, {what}, and is not read: write the merged model with the tool that made both, a "
        "folder for --base; or take the file away, if the adapter is to run without"
        for name, what in _BESIDE.items()
        if os.path.lexists(folder / name)
    ]


def _in_order(name: str) -> list[str]:
    """What folders are sorted by: checkpoint-9 before checkpoint-100."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _lacking(folder: Path, name: str) -> str:
    what = "rank and alpha" if name == CONFIG_FILE else "the weights"
    return f"{name} is missing, which holds {what}: copy it into {as_word(str(folder))} from where the adapter was made"


def _of_pictures(files: Collection[Path]) -> str:
    """Whether one of some files is a LoRA for a model that makes pictures, by the names of its tensors."""
    for path in [path for path in files if path.suffix == ".safetensors"][:MOST_LOOKED_AT]:
        if path.name == DIFFUSERS_FILE:
            return f"{path.name} is a LoRA of diffusers, {_PICTURES}"
        try:
            names = open_tensors(path, MOST_HEADER_BYTES, MOST_TENSORS).tensors
        except (BaseModelError, OSError):
            continue
        for tool, pattern in (("diffusers", _OF_DIFFUSERS), ("kohya", _OF_KOHYA)):
            if any(map(pattern.fullmatch, names)):
                return f"{path.name} is a LoRA in the layout of {tool}, {_PICTURES}"
    return ""
