"""The adapter folder, in exactly PEFT's layout, so that PEFT, vLLM and friends load it unchanged.

On disk: `adapter_config.json` and `adapter_model.safetensors`, whose tensors `thimble.files.peft_tensors` names. Knows
no framework and no base.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.adapter import Adapter, is_finite
from thimble.core.lowrank import Factors
from thimble.core.method import MOST_SCALE
from thimble.errors import AdapterError, BaseModelError, InputError, listing
from thimble.files.foreign_adapters import MOST_HEADER_BYTES, MOST_TENSORS, PARTS, trained_beside, what_lies_there
from thimble.files.peft_config import CONFIG_FILE as CONFIG_FILE
from thimble.files.peft_config import WEIGHTS_FILE as WEIGHTS_FILE
from thimble.files.peft_config import AdapterConfig, pattern_of, read_adapter_config
from thimble.files.peft_parameters import SETTING, parameters_of, wrapped, wrappers
from thimble.files.peft_tensors import COUNTER, ROOT, LayerTensors, outermost, path_of, sort_tensors, tensors_of
from thimble.files.tensor_info import TensorInfo
from thimble.files.tensors import TensorFile, open_tensors, write_safetensors
from thimble.files.untrusted import names_in, printable, some

# What classes of transformers, by their versions, put in front of the layers of a text model: alone, without its head,
# or inside of a model of text and images (`model.language_model.` since 4.52, the other way round before).
PREFIXES = (
    "model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.",
    "text_model.model.", "text_model.", "model.language_model.model.",
)  # fmt: skip
PLAIN = PREFIXES[0]
TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # of PEFT: without a head the layers say nothing
MOST_TRIES = 20  # to read an adapter that is being replaced
MOST_BYTES = 1 << 32  # of the numbers of an adapter

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


def save_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write an adapter so that saving what was loaded gives the same bytes.

    Args:
        adapter: The adapter; every number must be finite.
        folder: Made if missing.

    Raises:
        AdapterError: If a number is NaN or Inf.
    """
    folder = Path(folder)
    if not adapter.is_finite():
        raise AdapterError(f"the adapter for {folder} holds numbers that are NaN or Inf: it is not written")
    folder.mkdir(parents=True, exist_ok=True)
    adapter = adapter.plain()
    layers = named_for_peft(adapter)
    tensors = dict(tensors_of(layers, _parameters(adapter)))
    around = wrappers(layers)
    tensors |= {ROOT + wrapped(name, around): values for name, values in adapter.replaced.items()}
    write_safetensors(folder / WEIGHTS_FILE, tensors, {**adapter.notes, "format": "pt"})
    text = json.dumps(_config_fields(adapter), indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _config_fields(adapter: Adapter) -> dict[str, Any]:
    """PEFT's fields: the commonest rank and alpha, and patterns for the layers that differ."""
    layers = named_for_peft(adapter)
    holders = {path: factors for path, factors in layers.items() if outermost(path, layers) == path}
    ranks = {path: factors.rank // max(1, factors.layout.experts) for path, factors in holders.items()}
    alphas = {path: factors.scale * ranks[path] for path, factors in holders.items()}
    targets = {path: factors for path, factors in holders.items() if not factors.layout.experts}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    # A short name would adapt the layers of the vision part too, which are called the same.
    is_text = adapter.prefix in PREFIXES[:2] and "task_type" not in adapter.settings
    return {
        **PEFT_FIELDS,
        **adapter.settings,
        "base_model_name_or_path": adapter.base or None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "modules_to_save": modules_to_save(adapter) or None,
        "target_modules": _shortest_targets(targets) if is_text else sorted(targets),
        "target_parameters": _parameters(adapter) or None,
        "use_dora": adapter.has_magnitudes,
        "rank_pattern": pattern_of(ranks, rank),
        "alpha_pattern": pattern_of(alphas, alpha),
    }


def _parameters(adapter: Adapter) -> list[str]:
    """The adapted parameters by their names in PEFT, in the order of their modules."""
    names = dict(zip(adapter.layers, named_for_peft(adapter), strict=True))
    return [names[path] for path in parameters_of(adapter)]


def modules_to_save(adapter: Adapter) -> list[str]:
    """The modules that were trained whole: all that have a tensor of their own but those whose biases alone were.

    Of one inside of another the outer one: PEFT fails to load modules that are named as parts of one another.
    """
    has_biases = adapter.settings.get("bias", "none") != "none"
    owners: dict[str, list[str]] = {}
    for name in adapter.replaced:
        owners.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    layers = named_for_peft(adapter)
    whole = {
        owner
        for owner, names in owners.items()
        if owner not in layers and not (has_biases and all("bias" in name for name in names))
    }
    return sorted(path for path in whole if not any(path.startswith(f"{outer}.") for outer in whole))


def named_for_peft(adapter: Adapter) -> dict[str, Factors]:
    """Layers by the paths of the modules that PEFT adapts."""
    return {
        adapter.prefix + path.removeprefix(PLAIN) if path.startswith(PLAIN + "layers.") else path: factors
        for path, factors in adapter.layers.items()
    }


def named_for_text(layers: Mapping[str, Factors]) -> tuple[dict[str, Factors], list[str]]:
    """The other way round: layers by their paths in a plain text model, and the prefixes they had, at best one."""
    paths = {path: _plain_path(path) for path in layers}
    found = {prefix for _, prefix in paths.values() if prefix is not None}
    return {paths[path][0]: factors for path, factors in layers.items()}, [p for p in PREFIXES if p in found]


def layer_of(name: str) -> str | None:
    """The path of the layer that a tensor of an adapter belongs to, as in a plain text model; None if to none."""
    path = path_of(name)
    return _plain_path(path)[0] if path else None


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
        if all(os.path.lexists(folder / name) for name in PARTS):
            return folder  # whether these are files is seen when they are opened
    try:
        found = names_in(path)
        state = f"holds {listing(found) or 'nothing'}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        found, state = [], f"cannot be opened ({getattr(error, 'strerror', None) or error})"
        state = "does not exist" if isinstance(error, FileNotFoundError) else state
        state = "is not a folder" if isinstance(error, NotADirectoryError) else state
    known = what_lies_there(path, found)
    raise AdapterError(
        f"adapter {printable(str(path))} {state}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, or the run "
        f"folder around it{'; ' * bool(known)}{known}"
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
    tensors = sort_tensors(file, config)
    _refuse(folder, tensors.problems + trained_beside(folder))
    _refuse(folder, _check_sizes(config, file, tensors.layers))
    read = {
        path: layer.read(file, config.scale(outermost(path, tensors.layers), layer.rank))
        for path, layer in tensors.layers.items()
    }
    layers, prefixes = named_for_text(read)
    if len(prefixes) > 1:
        found = listing(f"{prefix}layers" for prefix in prefixes)
        _refuse(folder, [f"its layers lie in {found}: expected one of these; save it again from one model"])
    replaced = {name: _read_whole(file, info) for name, info in tensors.replaced.items()}
    broken = [layer for layer, factors in read.items() if not is_finite(factors)]
    broken += [name for name, values in replaced.items() if not np.isfinite(values).all()]
    _refuse(folder, [f"{name} holds numbers that are NaN or Inf: train it again" for name in broken])
    notes = {name: text for name, text in file.metadata.items() if name != "format"}
    is_text = bool(prefixes) and not replaced and config.task_type not in TASKS_WITH_HEAD
    settings = _settings(config, is_text)
    if parameters := tuple(path for path, factors in layers.items() if factors.layout.experts):
        settings[SETTING] = parameters
    return Adapter(layers, config.base, notes, {}, next(iter(prefixes), PLAIN), replaced, settings)


def _read_whole(file: TensorFile, info: TensorInfo) -> NDArray[Any]:
    values = file.read(info.name)
    return values.astype(np.int64) if info.name.endswith(COUNTER) else values


def _settings(config: AdapterConfig, is_text: bool) -> dict[str, Any]:
    """What the config says that is not so of a plain adapter of a text model."""
    found = {"bias": config.bias, "fan_in_fan_out": config.fan_in_fan_out}
    found |= {} if is_text else {"task_type": config.task_type, "auto_mapping": config.auto_mapping}
    return {name: value for name, value in found.items() if value != PEFT_FIELDS[name]}


def _refuse(folder: Path, problems: Iterable[str]) -> None:
    """Raise one error that holds the problems, if there are any."""
    if told := some(problems):
        raise AdapterError(*(f"adapter {folder}: {problem}" for problem in told))


def _check_sizes(config: AdapterConfig, file: TensorFile, layers: Mapping[str, LayerTensors]) -> list[str]:
    """What the config says of each layer and its tensors do not, and the other way round."""
    problems = []
    if sum(info.nbytes for info in file.tensors.values()) > MOST_BYTES:
        problems.append(f"its tensors take more than {MOST_BYTES:,} bytes, which no adapter does")
    for layer, tensors in layers.items():
        rank = tensors.rank
        holder = outermost(layer, layers)
        allowed, number = config.allowed_ranks(holder), config.scale(holder, rank)
        if rank not in allowed:
            wanted = " or ".join(map(str, sorted(allowed)))
            problems.append(
                f"{layer} has tensors of rank {rank}, but {CONFIG_FILE} gives it {wanted}: expected the same"
            )
        if number > MOST_SCALE:
            problems.append(f"{layer} is scaled by {number:,.0f}: expected alpha / rank of at most {MOST_SCALE:,.0f}")
    return problems
