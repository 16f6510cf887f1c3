"""What kind of decoder a base is: one description for every Llama-like family, read from config.json or from GGUF.

Knows the families' quirks and their published defaults; knows no weights and no framework. A backend that builds
`DecoderSpec` builds them all: Llama, SmolLM2, SmolLM3, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError, Problems, listing
from thimble.files.untrusted import printable, shown
from thimble.models import gguf_fields
from thimble.models.fields import MOST, check_sizes, flag, group, number, per_layer, positives, whole
from thimble.models.known_fields import GEMMAS, HONOURED, QWENS, ROPE_SETTINGS, check_fields, check_rope_settings
from thimble.models.rope import Rope, make_rope, rope_type


@dataclass(frozen=True)
class DecoderSpec:
    """Everything a backend needs to know to run a base, beside its weights."""

    family: str  # `llama`, `mistral`, `smollm3`, `qwen2`, `qwen3`, `gemma2`, `gemma3` or `phi3`
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the MLP
    num_layers: int  # blocks
    num_heads: int  # query heads of a layer
    num_kv_heads: int  # key heads of a layer, and as many value heads
    head_dim: int  # width of a head
    vocab_size: int  # rows of the embedding
    norm_eps: float  # added to the mean square in every norm
    windows: tuple[int | None, ...]  # per layer: number of latest positions that attention sees, or None for all
    ropes: tuple[Rope | None, ...]  # per layer: its rotary embedding, or None for layers without positions
    attention_scale: float  # factor of q kᵀ
    max_positions: int  # longest row the base was made for
    activation: str = "silu"  # `silu` or `gelu_tanh`, of the gated MLP
    attention_softcap: float | None = None  # scores become cap · tanh(scores / cap), or None
    final_softcap: float | None = None  # the same for logits
    embedding_scale: float = 1.0  # factor of the token embeddings
    has_qk_norm: bool = False  # q and k are RMS-normalised per head
    has_post_norms: bool = False  # outputs of attention and MLP are normalised before they are added (Gemma)
    norm_offset: float = 0.0  # added to norm weights as stored in a Hugging Face folder (1 for Gemma)
    is_fused: bool = False  # q/k/v and gate/up are one matrix each (Phi-3)
    is_tied: bool = False  # the output head is the embedding matrix
    # linear layers of a block that have a bias, such as `self_attn.q_proj`; None: whichever the file has one of (GGUF)
    biases: frozenset[str] | None = None
    notes: tuple[str, ...] = ()  # what is worth telling of how the description was read

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

    @property
    def about(self) -> str:
        """The family, in words for people."""
        return self.family

    @property
    def shares_prefixes(self) -> bool:
        """Whether a token is turned alike in a long row and in a short one, so that rows may share it."""
        return not any(rope is not None and rope.long_inv_freq is not None for rope in self.ropes)

    @property
    def checkpointable_blocks(self) -> int:
        """Blocks that can run under activation checkpointing: all."""
        return self.num_layers

    @property
    def adapter_settings(self) -> Mapping[str, bool]:
        """Fields of PEFT's config that adapters have beyond those of a plain one: none."""
        return {}

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Path of every linear layer of the blocks and its (out, in), in the order they run."""
        h, m, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        if self.is_fused:
            shapes = {"self_attn.qkv_proj": (q + 2 * kv, h), "self_attn.o_proj": (h, q)}
            shapes |= {"mlp.gate_up_proj": (2 * m, h), "mlp.down_proj": (h, m)}
        else:
            shapes = {"self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
            shapes |= {"self_attn.o_proj": (h, q), "mlp.gate_proj": (m, h), "mlp.up_proj": (m, h)}
            shapes |= {"mlp.down_proj": (h, m)}
        return {f"model.layers.{i}.{name}": shape for i in range(self.num_layers) for name, shape in shapes.items()}

    def parameter_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Parameters that are no layer's weight and can be adapted: none."""
        return {}

    def bias_problems(self, names: Collection[str]) -> list[str]:
        """What is wrong with the biases among the names of tensors: those that are lacking, or that nobody reads."""
        if self.biases is None:
            return []
        possible = {f"{path}.bias": path.split(".", 3)[3] in self.biases for path in self.linear_shapes()}
        lacking = [name for name, is_read in possible.items() if is_read and name not in names]
        unread = [name for name, is_read in possible.items() if not is_read and name in names]
        problems = [f"lacks {listing(lacking, 3)}, which config.json asks for: copy the base again"] if lacking else []
        if unread:
            which = "mlp_bias" if all(".mlp." in name for name in unread) else "attention_bias"
            problems.append(
                f"holds {listing(unread, 3)}, which a {self.family} of this config.json does not read: set {which} to "
                "true there if the base was trained with them, or else take them out"
            )
        return problems


SUPPORTED = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3")

# What each family's own code takes when config.json leaves a field out (the defaults of its config class).
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "smollm3": {
        "num_key_value_heads": 4, "rope_theta": 2000000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4,
        "max_position_embeddings": 32768,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_position_embeddings": 32768},
    "gemma2": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
        "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    },
    "gemma3": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
    },
    "phi3": {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
}  # fmt: skip
TEXT_MODELS = {"gemma3": "gemma3_text", "mistral3": "mistral"}  # of wrappers with vision, where text_config names none
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Read the description of a Hugging Face folder from its config.json, of transformers 4 or 5."""
    kind = config.get("model_type")
    if "text_config" in config and kind in ("gemma3", "mistral3"):
        text = group(config, "text_config")
        config = {"tie_word_embeddings": True, **config, "model_type": TEXT_MODELS[kind], **text}
        kind = config["model_type"]
    if not isinstance(kind, str) or kind not in SUPPORTED:
        raise BaseModelError(f"config.json names model_type {shown(kind)}: supported are {', '.join(SUPPORTED)}")
    family = kind.removesuffix("_text")
    problems, fields = Problems(), {**DEFAULTS[family], **config}  # a null is a value: Mistral v0.3 has no window
    notes = problems.attempt(check_fields, family, fields)
    try:
        spec = problems.attempt(_build, family, fields)
        if spec is None or notes is None:
            raise BaseModelError(*problems.found)
        return replace(spec, biases=_biases(family, fields), notes=notes)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = printable(f"{type(error).__name__}: {error}")
        raise BaseModelError(f"config.json cannot be used ({what}): copy the base again") from None


def _build(family: str, fields: dict[str, Any]) -> DecoderSpec:
    check_sizes(fields)
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    kv_heads = fields.get("num_key_value_heads") or heads
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise BaseModelError(
            f"{heads:,} heads of {head_dim:,} numbers share {kv_heads:,} key heads: expected an even width, and a "
            "whole number of heads for each key head"
        )
    is_gemma = family in GEMMAS
    scalar = number(fields, "query_pre_attn_scalar", 1e-3, 1e6) if is_gemma else head_dim
    return DecoderSpec(
        family=family, hidden_size=fields["hidden_size"], intermediate_size=fields["intermediate_size"],
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, vocab_size=fields["vocab_size"],
        norm_eps=number({"rms_norm_eps": 1e-6, **fields}, "rms_norm_eps", 1e-12, 0.1),
        windows=_windows(family, fields, layers), ropes=_ropes(family, fields, layers, head_dim),
        attention_scale=scalar**-0.5,
        max_positions=whole(fields, "max_position_embeddings", 1, MOST["max_position_embeddings"], 2048),
        activation=_activation(fields.get("hidden_activation" if is_gemma else "hidden_act", "silu")),
        attention_softcap=_softcap(family, fields, "attn_logit_softcapping"),
        final_softcap=_softcap(family, fields, "final_logit_softcapping"),
        embedding_scale=math.sqrt(fields["hidden_size"]) if is_gemma else 1.0,
        has_qk_norm=family in ("qwen3", "gemma3"), has_post_norms=is_gemma, norm_offset=1.0 if is_gemma else 0.0,
        is_fused=family == "phi3", is_tied=flag(fields, "tie_word_embeddings"),
    )  # fmt: skip


def _softcap(family: str, fields: Mapping[str, Any], name: str) -> float | None:
    return None if family not in HONOURED[name] or fields.get(name) is None else number(fields, name, 1e-3, 1e6)


def _biases(family: str, fields: Mapping[str, Any]) -> frozenset[str]:
    """Linear layers of a block that have a bias; of Qwen 2 those of q, k and v, whatever config.json says."""
    attention = ATTENTION[:3] if family == "qwen2" else ()
    if family in HONOURED["attention_bias"] and flag(fields, "attention_bias"):
        attention = ATTENTION
    mlp = MLP if family in HONOURED["mlp_bias"] and flag(fields, "mlp_bias") else ()
    return frozenset([*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)])


def _activation(name: Any) -> str:
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    if not isinstance(name, str) or name not in known:
        raise BaseModelError(f"the base uses the activation {shown(name)}: supported are {listing(known)}")
    return known[name]


def _windows(family: str, fields: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    locals_ = _local_layers(family, fields, layers)
    if not any(locals_):
        return (None,) * layers
    window = whole(fields, "sliding_window", 1, MOST["max_position_embeddings"])
    return tuple(window if is_local else None for is_local in locals_)


def _local_layers(family: str, fields: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers see only a window, by the published pattern where config.json does not list them."""
    has_window = family in HONOURED["sliding_window"] and fields.get("sliding_window") is not None
    if family in HONOURED["use_sliding_window"]:
        has_window &= flag(fields, "use_sliding_window")
    if family not in HONOURED["layer_types"]:
        return [has_window] * layers
    kinds = per_layer(fields, "layer_types", layers, ("sliding_attention", "full_attention"))
    if kinds is not None:
        found = [kind == "sliding_attention" for kind in kinds]
        if any(found) and not has_window and family not in GEMMAS:
            raise BaseModelError(
                "layer_types has sliding_attention, but use_sliding_window is off or sliding_window missing: copy the "
                "base again"
            )
        return found
    if family in GEMMAS:
        every = 2 if family == "gemma2" else whole(fields, "sliding_window_pattern", 1, MOST["num_hidden_layers"])
        return [(i + 1) % every != 0 for i in range(layers)]
    if family in QWENS:
        first = whole(fields, "max_window_layers", 0, 1 << 20, 28)
        return [has_window and i >= first for i in range(layers)]
    return [has_window and not keep for keep in _layers_with_positions(fields, layers)]


def _layers_with_positions(fields: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers of a SmolLM3 turn queries and keys."""
    keeps = per_layer(fields, "no_rope_layers", layers, (0, 1))
    every = whole(fields, "no_rope_layer_interval", 1, MOST["num_hidden_layers"]) if keeps is None else 0
    return [bool(keep) for keep in keeps] if keeps else [(i + 1) % every != 0 for i in range(layers)]


def _ropes(family: str, fields: Mapping[str, Any], layers: int, head_dim: int) -> tuple[Rope | None, ...]:
    if family == "gemma3":
        full, local = (make_rope(scaling, fields, head_dim) for scaling in _gemma3_scaling(fields))
        return tuple(local if is_local else full for is_local in _local_layers(family, fields, layers))
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    scaling = group(fields, name)
    if family == "phi3" and rope_type(scaling) == "yarn":
        scaling["rope_type"] = "longrope"  # its name in the first files of Phi-3
    if not fields.get("rotary_dim"):  # which GGUF has
        _check_rope(family, name, scaling)
    full = make_rope(scaling, fields, head_dim, fields.get("rotary_dim", 0))
    keeps = _layers_with_positions(fields, layers) if family == "smollm3" else [True] * layers
    return tuple(full if keep else None for keep in keeps)


def _gemma3_scaling(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of layers that see everything, and of those with a window; transformers 5 has a set for each."""
    given = group(fields, "rope_parameters")
    if given and not (given.get("full_attention") and given.get("sliding_attention")):
        has, lacks = ("full_attention", "sliding_attention")[:: 1 if given.get("full_attention") else -1]
        raise BaseModelError(f"rope_parameters has {has} without {lacks}: copy the base again")
    full = {**group(given, "full_attention"), **group(fields, "rope_scaling")}
    local = {"rope_theta": fields["rope_local_base_freq"], **group(given, "sliding_attention")}
    if not fields.get("rotary_dim"):
        for name, scaling in (("full_attention", full), ("sliding_attention", local)):
            _check_rope("gemma3", f"{name} of the rotary embedding", scaling)
    return full, local


def _check_rope(family: str, name: str, scaling: Mapping[str, Any]) -> None:
    """Refuse settings that the type of the scaling does not use, or that the family does not know."""
    kind = rope_type(scaling)
    if not isinstance(kind, str) or kind not in ROPE_SETTINGS:
        return  # refused by its own name
    problems = check_rope_settings(name, scaling, kind, is_nested=family == "gemma3")
    if family == "phi3" and kind not in ("default", "longrope"):
        problems.append(f"{name} has rope_type {shown(kind)}: a phi3 knows longrope alone")
    if family not in HONOURED["partial_rotary_factor"] and scaling.get("partial_rotary_factor") not in (None, 1):
        problems.append(f"{name} has partial_rotary_factor {shown(scaling['partial_rotary_factor'])}: a {family} "
                        "turns whole heads")  # fmt: skip
    if problems:
        raise BaseModelError(*problems)


def spec_from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, is_tied: bool, divisors: Mapping[str, NDArray[np.float32]]
) -> DecoderSpec:
    """Read the description of a GGUF file: its metadata, and the rows of its embedding, which may be the head as well.

    `divisors` are rotary divisors, (dim / 2,), by tensor name (`rope_freqs.weight`, `rope_factors_long.weight` ...).
    """
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in gguf_fields.FAMILIES:
        raise BaseModelError(
            f"the GGUF holds architecture {shown(family)}: supported are {', '.join(gguf_fields.FAMILIES)}"
        )
    long, short = (divisors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    try:
        fields, notes = gguf_fields.fields_of(family, metadata, long is not None)
        fields |= {"vocab_size": vocab_size, "tie_word_embeddings": is_tied}
        if long is not None:
            fields["rope_scaling"] |= {"long_factor": long, "short_factor": short}
        return replace(_with_divisors(_build(family, fields), divisors), notes=notes)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = printable(f"{type(error).__name__}: {error}")
        raise BaseModelError(f"the GGUF metadata cannot be used ({what}): download the file again") from None


def _with_divisors(spec: DecoderSpec, divisors: Mapping[str, NDArray[np.float32]]) -> DecoderSpec:
    """Apply `rope_freqs.weight`, in which the converter stores Llama 3.1's scaling."""
    if "rope_freqs.weight" not in divisors:
        return spec
    by = {id(rope): positives(divisors, "rope_freqs.weight", len(rope.inv_freq)) for rope in spec.ropes if rope}
    ropes = (rope and replace(rope, inv_freq=rope.inv_freq / by[id(rope)]) for rope in spec.ropes)
    return replace(spec, ropes=tuple(ropes))
