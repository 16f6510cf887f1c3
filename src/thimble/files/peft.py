"""The adapter folder, in exactly PEFT's layout, so that PEFT, vLLM and friends load it unchanged.

On disk: `adapter_config.json` and `adapter_model.safetensors` with `base_model.model.<path>.lora_A.weight` (rank, in)
and `.lora_B.weight` (out, rank). Knows no framework and no base.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from thimble.core.adapter import Adapter, is_finite
from thimble.core.lowrank import Factors
from thimble.core.method import MOST_SCALE
from thimble.errors import AdapterError, BaseModelError, InputError, as_word, listing
from thimble.files.peft_config import MAX_RANK, AdapterConfig, read_adapter_config
from thimble.files.tensors import TensorFile, open_tensors, write_safetensors
from thimble.files.untrusted import names_in, printable, some

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PARTS = (CONFIG_FILE, WEIGHTS_FILE)
KEY = re.compile(
    r"^base_model\.model\.(?P<path>[A-Za-z0-9_.\-]{1,512})\.lora_(?P<side>A\.weight|B\.weight|magnitude_vector)$"
)
# What classes of transformers, by their versions, put in front of the layers of a text model: alone, without its head,
# or inside of a model of text and images (`model.language_model.` since 4.52, the other way round before).
PREFIXES = (
    "model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.",
    "text_model.model.", "text_model.", "model.language_model.model.",
)  # fmt: skip
PLAIN = PREFIXES[0]
A, B, MAGNITUDE = "A.weight", "B.weight", "magnitude_vector"  # sides of a layer, as its tensors are called
MOST_TRIES = 20  # to read an adapter that is being replaced
MOST_HEADER_BYTES, MOST_TENSORS = 8_000_000, 20_000
MOST_BYTES = 1 << 32  # of the numbers of an adapter
PICKLE = "adapter_model.bin"
TO_SAFETENSORS = (
    "if you trust it, convert it with safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
    "'adapter_model.safetensors')"
)

# What PEFT 0.21 writes for a plain LoRA adapter, field by field, so that its loader finds nothing missing.
PEFT_FIELDS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 0, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 0,
    "rank_pattern": {}, "revision": None, "target_modules": [], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter so that saving what was loaded gives the same bytes.

    Args:
        adapter: The adapter; every number must be finite.
        folder: Made if missing.

    Raises:
        AdapterError: If a number is NaN or Inf.
    """
    if not adapter.is_finite():
        raise AdapterError(f"the adapter for {folder} holds numbers that are NaN or Inf: it is not written")
    folder.mkdir(parents=True, exist_ok=True)
    adapter = adapter.plain()
    tensors: dict[str, Any] = {}
    for path, factors in _named_for_peft(adapter).items():
        sides = {A: factors.A, B: factors.B} | ({} if factors.magnitude is None else {MAGNITUDE: factors.magnitude})
        tensors |= {f"base_model.model.{path}.lora_{side}": values for side, values in sides.items()}
    write_safetensors(folder / WEIGHTS_FILE, tensors, {**adapter.notes, "format": "pt"})
    text = json.dumps(_config_fields(adapter), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _config_fields(adapter: Adapter) -> dict[str, Any]:
    """PEFT's fields: the commonest rank and alpha, and patterns for the layers that differ."""
    layers = _named_for_peft(adapter)
    ranks = {path: factors.rank for path, factors in layers.items()}
    alphas = {path: factors.scale * factors.rank for path, factors in layers.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        **PEFT_FIELDS,
        "base_model_name_or_path": adapter.base or None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        # A short name would adapt the layers of the vision part too, which are called the same.
        "target_modules": _shortest_targets(layers) if adapter.prefix in PREFIXES[:2] else sorted(layers),
        "use_dora": any(factors.magnitude is not None for factors in adapter.layers.values()),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
    }


def _named_for_peft(adapter: Adapter) -> dict[str, Factors]:
    """Layers by the paths of the modules that PEFT adapts."""
    return {
        adapter.prefix + path.removeprefix(PLAIN) if path.startswith(PLAIN + "layers.") else path: factors
        for path, factors in adapter.layers.items()
    }


def layer_of(name: str) -> str | None:
    """The path of the layer that a tensor of an adapter belongs to, as in a plain text model; None if to none."""
    match = KEY.match(name)
    return _plain_path(match["path"])[0] if match else None


def _plain_path(path: str) -> tuple[str, str | None]:
    """The path of a layer in a plain text model, and the prefix it had; other modules keep theirs, and have none."""
    prefix, _, rest = path.partition("layers.")
    return (f"{PLAIN}layers.{rest}", prefix) if rest and prefix in PREFIXES else (path, None)


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0] if values else 0


def _shortest_targets(paths: Mapping[str, Any]) -> list[str]:
    """Last parts of the paths where each occurs in every block from 0 on, else the whole paths.

    PEFT adapts every layer that a short name ends, so a short name must leave out no block. How many blocks the base
    has is not known here: an adapter of its first blocks alone names them in full only if their kinds differ.
    """
    kinds: dict[str, set[str]] = {}
    for path in paths:
        block, _, kind = path.rpartition(".")
        kinds.setdefault(kind, set()).add(block.rsplit(".", 1)[0])
    blocks = set().union(*kinds.values())
    numbers = sorted(int(block.rsplit(".", 1)[-1]) for block in blocks if block.rsplit(".", 1)[-1].isdigit())
    is_regular = all(found == blocks for found in kinds.values()) and numbers == list(range(len(blocks)))
    return sorted(kinds) if is_regular else sorted(paths)


def find_adapter(path: str | Path) -> Path:
    """The adapter folder for a path that names it or the run folder around it."""
    path = Path(path)
    for folder in (path, path / "adapter"):
        if all(os.path.lexists(folder / name) for name in _PARTS):
            return folder  # whether these are files is seen when they are opened
    try:
        found = names_in(path)
        state = f"holds {listing(found) or 'nothing'}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        found, state = [], f"cannot be opened ({getattr(error, 'strerror', None) or error})"
        state = "does not exist" if isinstance(error, FileNotFoundError) else state
        state = "is not a folder" if isinstance(error, NotADirectoryError) else state
    runs = [name for name in found if all(os.path.lexists(path / name / "adapter" / part) for part in _PARTS)]
    hint = f"; name one of its run folders, such as {as_word(str(path / runs[0]))}" if runs else ""
    hint += f"; {PICKLE} is a pickle, which can run code when read: {TO_SAFETENSORS}" if PICKLE in found else ""
    raise AdapterError(
        f"adapter {printable(str(path))} {state}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or the run "
        f"folder around it{hint}"
    )


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter that Thimble or PEFT wrote; nothing is loaded unless all of it is sound.

    Args:
        path: An adapter folder or a run folder.

    Returns:
        The adapter, float32, with the scale that PEFT would compute for each layer.

    Raises:
        AdapterError: Naming every problem found.
    """
    for _ in range(MOST_TRIES):
        folder = find_adapter(path)
        before = _identity(folder)
        try:
            adapter = _load(folder)
        except InputError:
            if _identity(folder) == before:
                raise
            continue  # another one was published, and this one is gone
        if _identity(folder) == before:  # both files are of one adapter: none was published between them
            return adapter
    raise AdapterError(f"adapter {path} was replaced {MOST_TRIES} times while it was read: try again later")


def _identity(folder: Path) -> tuple[int, int, int]:
    """What changes when another folder takes the place of this one; numbers of inodes alone are used again."""
    try:
        found = folder.stat()
    except OSError:
        return (0, 0, 0)
    return found.st_ino, found.st_ctime_ns, found.st_mtime_ns


def _load(folder: Path) -> Adapter:
    config = read_adapter_config(folder / CONFIG_FILE)
    try:
        file = open_tensors(folder / WEIGHTS_FILE, MOST_HEADER_BYTES, MOST_TENSORS)
    except BaseModelError as error:
        raise AdapterError(*error.problems) from None
    if file.format != "safetensors":
        raise AdapterError(f"{file.path} is a {file.format} file: expected the safetensors that PEFT writes")
    sides = _pair_tensors(folder, file, config.use_dora)
    _refuse(folder, _check_sizes(config, file, sides))
    prefixes = {prefix for layer in sides if (prefix := _plain_path(layer)[1]) is not None}
    if len(prefixes) > 1:
        found = listing(f"{prefix}layers" for prefix in PREFIXES if prefix in prefixes)
        _refuse(folder, [f"its layers lie in {found}: expected one of these; save it again from one model"])
    layers = {}
    for layer, names in sides.items():
        number = config.scale(layer, file.tensors[names[A]].shape[0])
        magnitude = file.read(names[MAGNITUDE]) if MAGNITUDE in names else None
        layers[_plain_path(layer)[0]] = Factors(file.read(names[A]), file.read(names[B]), number, magnitude)
    broken = [layer for layer, factors in layers.items() if not is_finite(factors)]
    _refuse(folder, [f"{layer} holds numbers that are NaN or Inf: train it again" for layer in broken])
    notes = {name: text for name, text in file.metadata.items() if name != "format"}
    return Adapter(layers, config.base, notes, prefix=next(iter(prefixes), PLAIN))


def _refuse(folder: Path, problems: Iterable[str]) -> None:
    """Raise one error that holds the problems, if there are any."""
    if told := some(problems):
        raise AdapterError(*(f"adapter {folder}: {problem}" for problem in told))


def _check_sizes(config: AdapterConfig, file: TensorFile, sides: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What the config says of each layer and its tensors do not, and the other way round."""
    problems = []
    if sum(info.nbytes for info in file.tensors.values()) > MOST_BYTES:
        problems.append(f"its tensors take more than {MOST_BYTES:,} bytes, which no adapter does")
    for layer, names in sides.items():
        rank = file.tensors[names[A]].shape[0]
        allowed, number = config.allowed_ranks(layer), config.scale(layer, rank)
        if rank not in allowed:
            wanted = " or ".join(map(str, sorted(allowed)))
            problems.append(
                f"{layer} has tensors of rank {rank}, but {CONFIG_FILE} gives it {wanted}: expected the same"
            )
        if number > MOST_SCALE:
            problems.append(f"{layer} is scaled by {number:,.0f}: expected alpha / rank of at most {MOST_SCALE:,.0f}")
    return problems


def _pair_tensors(folder: Path, file: TensorFile, use_dora: bool) -> dict[str, dict[str, str]]:
    """Names of the tensors by layer and side; refuses those that are anything else or do not fit together."""
    sides: dict[str, dict[str, str]] = {}
    problems = []
    for name, info in file.tensors.items():
        match = KEY.match(name)
        is_vector = bool(match) and match[2] == MAGNITUDE  # type: ignore[index]
        if not match or len(info.shape) != (1 if is_vector else 2) or info.dtype not in ("F32", "F16", "BF16"):
            problems.append(f"tensor {name} {info.dtype} {info.shape} is not a LoRA matrix in PEFT's layout")
            continue
        sides.setdefault(match["path"], {})[match["side"]] = name
    expected = (A, B, MAGNITUDE) if use_dora else (A, B)
    for layer, names in sides.items():
        if sorted(names) != sorted(expected):
            found, wanted = (listing(f"lora_{side}" for side in part) for part in (names, expected))
            problems.append(f"{layer} has {found}: expected {wanted}")
            continue
        a, b = file.tensors[names[A]].shape, file.tensors[names[B]].shape
        if a[0] != b[1] or not 1 <= a[0] <= MAX_RANK or 0 in a + b:
            problems.append(f"{layer} has A {a} and B {b}: expected (rank, in) and (out, rank), rank 1 to {MAX_RANK}")
        if use_dora and file.tensors[names[MAGNITUDE]].shape != b[:1]:
            shape = file.tensors[names[MAGNITUDE]].shape
            problems.append(f"{layer} has a magnitude of shape {shape}: expected {b[:1]}")
    if not sides and not problems:
        problems.append("it holds no LoRA matrices")
    _refuse(folder, problems)
    return sides
