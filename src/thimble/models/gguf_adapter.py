"""A LoRA adapter as llama.cpp reads it, brought to the names and the row order of transformers.

Written by llama.cpp's converter, by trainers that end in GGUF, and by `thimble export`. Such a file says too little to
be read alone: which rows of B belong to which, and what the tensors are called, depends on the base.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from thimble.core.adapter import Adapter, is_finite
from thimble.core.lowrank import Factors
from thimble.core.method import MOST_SCALE
from thimble.errors import AdapterError, BaseModelError, listing
from thimble.files.peft_config import MAX_RANK, MOST_PATH_CHARACTERS
from thimble.files.tensors import TensorFile, open_tensors
from thimble.files.untrusted import printable, shown
from thimble.models.base import Base
from thimble.models.gguf_names import GgufName, architecture, gguf_name
from thimble.models.hub_cache import HUB_ADDRESS, is_hub_form

SIDES = (".lora_a", ".lora_b")
MOST_BYTES = 1 << 32  # of the numbers of an adapter
_MERGE = (
    "load the adapter that it was converted from with PEFT and write the merged model (merge_and_unload, then "
    "save_pretrained), a folder for --base"
)


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a file that begins as a GGUF does."""
    try:
        with Path(path).open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def is_gguf_adapter(path: str | Path) -> bool:
    """Whether a path names a GGUF file that says of itself that it is an adapter."""
    try:
        return is_gguf(path) and open_tensors(path).metadata.get("general.type") == "adapter"
    except BaseModelError:
        return False


def load_gguf_adapter(path: str | Path, base: Base | None) -> Adapter:
    """Read a GGUF adapter for a base; nothing is loaded unless all of it is sound.

    Args:
        path: The file.
        base: What it was made for.

    Returns:
        The adapter, float32, with the scale that llama.cpp gives each layer.

    Raises:
        AdapterError: Naming every problem found.
    """
    try:
        file = open_tensors(path)
    except BaseModelError as error:
        raise AdapterError(*error.problems) from None
    if base is None:
        raise AdapterError(
            f"adapter {path} is a GGUF file, which only makes sense beside its base: name it with --base"
        )
    alpha = _check_kind(file, base)
    layers, problems = {}, []
    for layer, (a, b, name) in _pairs(file, base).items():
        try:
            layers[layer] = _factors(file, a, b, name, alpha)
        except AdapterError as error:
            problems += error.problems
    if problems:
        raise AdapterError(*problems[:5])
    return Adapter(layers, _base_name(file), _notes(file))


def _base_name(file: TensorFile) -> str:
    """What the file calls its base: the hub name, which llama.cpp's converter gives as an address, or the name."""
    address, name = (file.metadata.get(f"general.base_model.0.{key}", "") for key in ("repo_url", "name"))
    hub_name = str(address).removeprefix(HUB_ADDRESS).strip("/")
    text = hub_name if is_hub_form(hub_name) else str(name)
    return text if len(text) <= MOST_PATH_CHARACTERS else ""


def gguf_sizes(path: str | Path, base: Base) -> list[tuple[str, int]]:
    """The layers of a GGUF adapter that can be loaded, with the bytes that they take in the file."""
    file = open_tensors(path)
    return [(layer, file.tensors[a].nbytes + file.tensors[b].nbytes) for layer, (a, b, _) in _pairs(file, base).items()]


def _check_kind(file: TensorFile, base: Base) -> float:
    """Refuse what is no LoRA adapter of this architecture; return alpha."""
    kinds = [file.metadata.get(key) for key in ("general.type", "adapter.type")]
    if kinds != ["adapter", "lora"]:
        if "token_embd.weight" in file.tensors:
            raise AdapterError(f"{file.path} is a base and no adapter: name it with --base")
        raise AdapterError(
            f"{file.path} is no LoRA adapter (type {shown(kinds[0])}, {shown(kinds[1])}): expected a GGUF adapter"
        )
    problems, arch, alpha = [], file.metadata.get("general.architecture"), file.metadata.get("adapter.lora.alpha", 0.0)
    if arch != architecture(base):
        problems.append(f"adapter {file.path} is for {shown(arch)}, and {base.name} is {architecture(base)}")
    if type(alpha) not in (int, float) or not 0 <= alpha <= MOST_SCALE * MAX_RANK:
        problems.append(f"adapter {file.path} has the alpha {shown(alpha)}: expected a number from 0")
    if "adapter.alora.invocation_tokens" in file.metadata:
        problems.append(f"adapter {file.path} is an aLoRA, which begins at certain tokens: that is not supported")
    if sum(info.nbytes for info in file.tensors.values()) > MOST_BYTES:
        problems.append(f"adapter {file.path} holds more than {MOST_BYTES:,} bytes of numbers, which no adapter does")
    if problems:
        raise AdapterError(*problems)
    return float(alpha)


def _pairs(file: TensorFile, base: Base) -> dict[str, tuple[str, str, GgufName]]:
    """Names of A and B by layer, in the order of the base; refuses tensors that are neither."""
    known = {gguf_name(base, f"{layer}.weight").name: layer for layer in base.spec.linear_shapes()}
    names = {name.removesuffix(side) for name in file.tensors for side in SIDES if name.endswith(side)}
    other = [name for name in file.tensors if not name.endswith(SIDES)]
    outside = sorted(name for name in names if name not in known)
    single = sorted(name for name in names if any(name + side not in file.tensors for side in SIDES))
    problems = (
        [f"adapter {file.path} holds {listing(map(printable, other), 2)}: expected lora_a and lora_b alone; {_MERGE}"]
        if other
        else []
    )
    if outside:
        problems.append(
            f"adapter {file.path} adapts {listing(map(printable, outside), 2)}: only the linear layers of the blocks "
            f"of {base.name} can be adapted here; {_MERGE}"
        )
    if single:
        problems.append(f"adapter {file.path} has only one side of {listing(map(printable, single), 2)}")
    if not names:
        problems.append(f"adapter {file.path} holds no LoRA matrices")
    if problems:
        raise AdapterError(*problems)
    found = {known[name]: (name + SIDES[0], name + SIDES[1]) for name in names}
    return {
        layer: (*found[layer], gguf_name(base, f"{layer}.weight"))
        for layer in base.spec.linear_shapes()
        if layer in found
    }


def _factors(file: TensorFile, a: str, b: str, name: GgufName, alpha: float) -> Factors:
    shapes = file.tensors[a].shape, file.tensors[b].shape
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1] or shapes[0][0] > MAX_RANK:
        raise AdapterError(f"{name.name} has A {shapes[0]} and B {shapes[1]}: expected (rank, in) and (out, rank)")
    rank = shapes[0][0]
    left = _read(file, a), _read(file, b)
    rows = left[1]
    if name.order is not None and len(rows) == len(name.order):
        rows = np.empty_like(left[1])
        rows[name.order] = left[1]
    factors = Factors(left[0], rows, alpha / rank if alpha else 1.0)
    if not is_finite(factors) or factors.scale > MOST_SCALE:
        raise AdapterError(f"{name.name} holds numbers that are NaN or Inf, or is scaled by {factors.scale:g}")
    return factors


def _read(file: TensorFile, name: str) -> np.ndarray:
    try:
        return file.read(name)
    except BaseModelError as error:
        raise AdapterError(*error.problems) from None


def _notes(file: TensorFile) -> Mapping[str, str]:
    prefix = "thimble."
    return {
        key.removeprefix(prefix): text
        for key, text in file.metadata.items()
        if key.startswith(prefix) and type(text) is str
    }
