"""Causal language models of families that Thimble's own engine does not have: described by transformers itself.

The model is built without numbers, on torch's device `meta`, so its layers are found by their kinds and no weight is
read. Code of the folder's own is never run.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thimble.errors import BaseModelError, MissingPackageError, install_line, listing
from thimble.files.peft import PLAIN, named_for_text
from thimble.files.peft_parameters import SETTING
from thimble.files.untrusted import printable, shown
from thimble.models.fields import MOST
from thimble.models.machine import prepare_threads

MOST_COUNTED = 4096  # layers, heads or experts
NO_BOUND = 131_072  # tokens, where neither the config nor positions that were learned bound a row
_COUNTS = re.compile(r"(layers?|blocks?|heads?|experts?)$")
_POSITIONS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_positions", "n_ctx")
# Names that PEFT takes for those of experts, in families whose weights are read by the rules of these two.
_EXPERTS = {"qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"), "mixtral": ("gate", "w1", "w2", "w3")}
# Layers that PEFT refuses to adapt in such families, and one whose weight is used without a call of it.
_STATE_SPACE = dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj", "dt_proj"))
_LENGTH_ROPES = ("dynamic", "longrope")  # that turn a token otherwise in a long row than in a short one


@dataclass(frozen=True)
class TransformersSpec:
    """A model of transformers, as far as planning asks; see thimble.models.model_spec.ModelSpec."""

    family: str  # model_type of config.json
    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_positions: int
    kv_size: int  # an upper bound, where the config does not say how many key heads there are
    checkpointable_blocks: int
    modules: Mapping[
        str, str
    ]  # paths of layers that can be adapted, in the order they run, and what they are in the model
    shapes: Mapping[str, tuple[int, int]]  # (out, in) of each of them, by its path
    turned: frozenset[str]  # paths of those whose weight lies as (in, out): the `Conv1D` of GPT-2
    converted: frozenset[str]  # paths of those whose weight transformers makes of what the file holds
    prefix: str  # what stands in front of `layers.0...` in the names of modules, where paths begin with `model.`
    root: str  # what stands in front of all names in the model but those of the head, and is left out in some files
    parameters: Mapping[str, str] = field(default_factory=dict)  # paths of those of experts, and what they are called
    experts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # (experts, out, in) of each, by its path
    depends_on_length: bool = False  # whether a token is turned otherwise in a long row than in a short one
    notes: tuple[str, ...] = ()

    shares_prefixes = False

    @property
    def about(self) -> str:
        """The family, and how it runs."""
        return (
            f"{self.family}, no family of Thimble's own engine: it runs through transformers, slower and in more memory"
        )

    @property
    def adapter_settings(self) -> Mapping[str, Any]:
        """Fields of PEFT's config: whether weights lie as (in, out), and the parameters in the order of the model."""
        found = {"fan_in_fan_out": True} if self.turned and len(self.turned) == len(self.shapes) else {}
        return {**found, SETTING: tuple(self.experts)} if self.experts else found

    @property
    def largest_parameter(self) -> int:
        """Numbers of the largest parameter that is no layer's weight; 0 without any."""
        return max((math.prod(shape) for shape in self.experts.values()), default=0)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Path of every linear layer that can be adapted and its (out, in), in the order they run."""
        return dict(self.shapes)

    def parameter_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Name of every parameter of three dimensions that is no layer's weight, and its (experts, out, in)."""
        return dict(self.experts)


def check_installed(family: str) -> None:
    """Say what to install, if transformers is missing."""
    prepare_threads()
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            f"the base is a {printable(family)}, no family of Thimble's own engine: it runs through transformers, "
            f"which is not installed; run {install_line('models')}"
        ) from None


def describe(folder: Path, fields: Mapping[str, Any]) -> TransformersSpec:
    """Describe a Hugging Face folder; reads no weights.

    Args:
        folder: That of config.json.
        fields: Its fields, among them a `model_type`.

    Returns:
        The description, by the model that transformers builds of it without numbers.

    Raises:
        BaseModelError: If transformers has no causal language model of this kind, or cannot build it.
        MissingPackageError: If transformers is missing.
    """
    family = str(fields["model_type"])
    check_installed(family)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    if family not in CLASSES:
        raise BaseModelError(
            f"config.json names model_type {shown(family)}, of which transformers has no causal language model: "
            "expected a model that writes text, of a type that this version of transformers knows"
        )
    _check_counts(fields)
    _check_head(fields.get("architectures"), CLASSES[family])
    try:
        config = read_config(folder)
        model = _built(config)
        return _described(family, config, model)
    except BaseModelError:
        raise
    except Exception as error:  # whatever the code of a family raises on fields that it cannot use
        what = printable(f"{type(error).__name__}: {error}", 300)
        raise BaseModelError(
            f"base {folder}: transformers cannot build a {family} from its config.json ({what}): copy the base again, "
            "or take a version of transformers that knows it"
        ) from None


def read_config(folder: Path) -> Any:
    """The config of a folder as transformers reads it; weights are what the files hold, so nothing is quantised."""
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


class quiet:
    """Within this, transformers neither warns nor draws progress bars."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level, self._draws = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._draws:
            logging.enable_progress_bar()


def _check_counts(fields: Mapping[str, Any]) -> None:
    """Refuse numbers of layers and the like that no model has, before as many modules are made."""
    wrong = []
    for name, value in fields.items():
        most = MOST_COUNTED if _COUNTS.search(name) else MOST.get(name, 1 << 31)
        if type(value) is int and value > most:
            wrong.append(f"config.json: {printable(name)} is {shown(value)}: expected at most {most:,}")
    if wrong:
        raise BaseModelError(*wrong)


def _check_head(names: Any, expected: str) -> None:
    """Refuse a folder whose config names a class without a language head: classifiers, encoders, embedding models."""
    if not isinstance(names, list) or not names or expected in names:
        return
    if any(isinstance(name, str) and re.search(r"ForCausalLM$|LMHead", name) for name in names):
        return
    raise BaseModelError(
        f"config.json names the architecture {shown(names[0])}, which has no language head: expected {expected}. Use "
        "the language model that it was made from"
    )


def _built(config: Any) -> Any:
    """The model without numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model


def _described(family: str, config: Any, model: Any) -> TransformersSpec:
    from transformers.modeling_layers import GradientCheckpointingLayer

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = _linear_layers(model, head)
    unknown = _unknown_to_peft(family)
    left_out = [path for path in found if path.rpartition(".")[2] in unknown]
    found = {path: layer for path, layer in found.items() if path not in left_out}
    if not found:
        raise BaseModelError(f"a {family} has no linear layer that an adapter could update")
    modules, prefixes = named_for_text({path: path for path in found})
    stacks = _stacks(model)
    parameters, _ = named_for_text({path: path for path in stacks})
    text = config.get_text_config(decoder=True)
    layers, heads = int(text.num_hidden_layers), getattr(text, "num_attention_heads", 1)
    blocks = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    return TransformersSpec(
        family=family, hidden_size=int(text.hidden_size), num_layers=layers,
        num_heads=heads if type(heads) is int else 1, vocab_size=embedding.weight.shape[0],
        max_positions=_max_positions(text), kv_size=_kv_size(text),
        checkpointable_blocks=blocks if blocks == layers else 0, modules=modules,
        shapes={path: _shape(found[name]) for path, name in modules.items()},
        turned=frozenset(path for path, name in modules.items() if _is_turned(found[name])),
        converted=_converted(model, modules), prefix=next(iter(prefixes), PLAIN), root=model.base_model_prefix,
        parameters=parameters, experts={path: stacks[name] for path, name in parameters.items()},
        depends_on_length=_depends_on_length(text), notes=_notes(family, model, stacks, left_out),
    )  # fmt: skip


def _unknown_to_peft(family: str) -> tuple[str, ...]:
    """Names of layers that PEFT would not adapt, or would take for others, in this family."""
    from transformers import conversion_mapping

    rules = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return _STATE_SPACE.get(family) or _EXPERTS.get(rules.get(family, ""), ())


def _stacks(model: Any) -> dict[str, tuple[int, int, int]]:
    """Parameters of three dimensions that are no layer's weight, by name: (experts, out, in), however they lie."""
    from torch import nn

    found = {}
    for path, module in model.named_modules():
        own = [] if isinstance(module, nn.Conv1d) or not path else module.named_parameters(recurse=False)
        for name, parameter in own:
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                experts, rows, columns = parameter.shape
                is_turned = getattr(module, "is_transposed", False)
                found[f"{path}.{name}"] = (experts, columns, rows) if is_turned else (experts, rows, columns)
    return found


def _notes(
    family: str, model: Any, stacks: Mapping[str, tuple[int, int, int]], left_out: Sequence[str]
) -> tuple[str, ...]:
    """What adapters reach by name alone, as experts that are one parameter; and what PEFT knows otherwise."""
    experts = sum(math.prod(shape) for shape in stacks.values())
    every, told = sum(parameter.numel() for parameter in model.parameters()), []
    if experts:
        names = ",".join(dict.fromkeys(".".join(path.split(".")[-2:]) for path in stacks))
        told.append(
            f"{experts / every:.0%} of the parameters of this {family} lie in tensors of three dimensions, as those of "
            f"experts do, which are adapted if they are named: --target-parameters {names}"
        )
    if left_out:
        kinds = listing(dict.fromkeys(path.rpartition(".")[2] for path in left_out))
        told.append(f"{kinds} of a {family} are left as they are: PEFT takes them for others, or refuses to adapt them")
    return tuple(told)


def _linear_layers(model: Any, head: Any) -> dict[str, Any]:
    """Linear layers by path, but for the head and those that share their weight."""
    from torch import nn

    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        path: module
        for path, module in model.named_modules()
        if module is not head
        and (isinstance(module, nn.Linear) or _is_turned(module))
        and owners[id(module.weight)] == 1
    }


def _is_turned(module: Any) -> bool:
    """Whether a layer is transformers' `Conv1D`, linear with its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if _is_turned(module) else (rows, columns)


def _converted(model: Any, modules: Mapping[str, str]) -> frozenset[str]:
    """Layers whose weights transformers cuts, joins or reorders while it reads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    steps = [step for step in get_model_conversion_mapping(model) if getattr(step, "operations", None)]
    targets = [re.compile(pattern) for step in steps for pattern in step.target_patterns]
    return frozenset(
        path for path, name in modules.items() if any(target.search(f"{name}.weight") for target in targets)
    )


def _depends_on_length(text: Any) -> bool:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    groups = [rope, *(group for group in rope.values() if isinstance(group, dict))]
    return any(group.get(name) in _LENGTH_ROPES for group in groups for name in ("rope_type", "type"))


def _kv_size(text: Any) -> int:
    heads, all_heads, width = (
        getattr(text, name, None) for name in ("num_key_value_heads", "num_attention_heads", "hidden_size")
    )
    head_dim = getattr(text, "head_dim", None) or (width // all_heads if type(all_heads) is int and all_heads else 0)
    return heads * head_dim if type(heads) is int and type(head_dim) is int and head_dim else int(width)


def _max_positions(text: Any) -> int:
    found = [getattr(text, name, None) for name in _POSITIONS]
    return next(
        (value for value in found if type(value) is int and 0 < value <= MOST["max_position_embeddings"]), NO_BOUND
    )
