"""What kind of decoder a base is: one description for every Llama-like family, read from config.json or from GGUF.

Knows the families' quirks and their published defaults; knows no weights and no framework. A backend that builds
`DecoderSpec` builds them all: Llama, SmolLM2, SmolLM3, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import printable, shown
from thimble.models.fields import MOST, check_sizes, flag, group, number, per_layer, positives, whole
from thimble.models.rope import Rope, make_rope


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

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

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


SUPPORTED = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3")

# What each family's own code takes when config.json leaves a field out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "smollm3": {"rope_theta": 2000000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    "gemma2": {
        "head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "sliding_window": 4096, "tie_word_embeddings": True,
    },
    "gemma3": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "tie_word_embeddings": True,
    },
    "phi3": {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}  # fmt: skip


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Read the description of a Hugging Face folder from its config.json, of transformers 4 or 5."""
    if "text_config" in config and config.get("model_type") in ("gemma3", "mistral3"):
        config = {"tie_word_embeddings": True, **group(config, "text_config")}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in SUPPORTED:
        raise BaseModelError(f"config.json names model_type {shown(kind)}: supported are {', '.join(SUPPORTED)}")
    family = kind.removesuffix("_text")
    fields = {**DEFAULTS.get(family, {}), **config}  # a null is a value: Mistral v0.3 has no window
    try:
        return _build(family, fields)
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
    is_gemma = family.startswith("gemma")
    scalar = number(fields, "query_pre_attn_scalar", 1e-3, 1e6) if is_gemma else head_dim
    return DecoderSpec(
        family=family, hidden_size=fields["hidden_size"], intermediate_size=fields["intermediate_size"],
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, vocab_size=fields["vocab_size"],
        norm_eps=number(fields, "rms_norm_eps", 1e-12, 0.1, 1e-6),
        windows=_windows(family, fields, layers), ropes=_ropes(family, fields, layers, head_dim),
        attention_scale=scalar**-0.5,
        max_positions=whole(fields, "max_position_embeddings", 1, MOST["max_position_embeddings"], 2048),
        activation=_activation(fields.get("hidden_activation") or fields.get("hidden_act") or "silu"),
        attention_softcap=_softcap(fields, "attn_logit_softcapping"),
        final_softcap=_softcap(fields, "final_logit_softcapping"),
        embedding_scale=math.sqrt(fields["hidden_size"]) if is_gemma else 1.0,
        has_qk_norm=family in ("qwen3", "gemma3"), has_post_norms=is_gemma, norm_offset=1.0 if is_gemma else 0.0,
        is_fused=family == "phi3", is_tied=flag(fields, "tie_word_embeddings"),
    )  # fmt: skip


def _softcap(fields: Mapping[str, Any], name: str) -> float | None:
    return None if fields.get(name) is None else number(fields, name, 1e-3, 1e6)


def _activation(name: Any) -> str:
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    if not isinstance(name, str) or name not in known:
        raise BaseModelError(f"the base uses the activation {shown(name)}: supported are {listing(known)}")
    return known[name]


def _windows(family: str, fields: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    is_on = family not in ("qwen2", "qwen3", "smollm3") or flag(fields, "use_sliding_window")
    if not fields.get("sliding_window") or not is_on:
        return (None,) * layers
    window = whole(fields, "sliding_window", 1, MOST["max_position_embeddings"])
    return tuple(window if is_local else None for is_local in _local_layers(family, fields, layers))


def _local_layers(family: str, fields: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers see only a window, by the published pattern where config.json does not list them."""
    kinds = per_layer(fields, "layer_types", layers, ("sliding_attention", "full_attention"))
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    if family == "gemma2":
        return [i % 2 == 0 for i in range(layers)]
    if family == "gemma3":
        name = "_sliding_window_pattern" if fields.get("_sliding_window_pattern") else "sliding_window_pattern"
        every = whole(fields, name, 1, MOST["num_hidden_layers"])
        return [(i + 1) % every != 0 for i in range(layers)]
    if family.startswith("qwen"):
        return [i >= whole(fields, "max_window_layers", 0, 1 << 20, 28) for i in range(layers)]
    return [True] * layers


def _ropes(family: str, fields: Mapping[str, Any], layers: int, head_dim: int) -> tuple[Rope | None, ...]:
    scaling = group(fields, "rope_parameters") or group(fields, "rope_scaling")
    if "full_attention" in scaling:  # transformers 5 keeps one set per kind of layer for Gemma 3
        if not scaling.get("sliding_attention"):
            raise BaseModelError("rope_parameters has full_attention without sliding_attention: copy the base again")
        local_scaling, scaling = group(scaling, "sliding_attention"), group(scaling, "full_attention")
    else:
        local_scaling = {"rope_theta": fields.get("rope_local_base_freq")}
    full = make_rope(scaling, fields, head_dim)
    if family == "gemma3":
        local = make_rope(local_scaling, fields, head_dim)
        return tuple(local if is_local else full for is_local in _local_layers(family, fields, layers))
    if family == "smollm3":
        every = whole(fields, "no_rope_layer_interval", 1, MOST["num_hidden_layers"])
        keeps = per_layer(fields, "no_rope_layers", layers, (0, 1)) or [(i + 1) % every != 0 for i in range(layers)]
        return tuple(full if keep else None for keep in keeps)
    return (full,) * layers


# GGUF names of the settings that `_build` knows by their Hugging Face names.
GGUF_FIELDS = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq", "context_length": "max_position_embeddings",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}  # fmt: skip
GGUF_FAMILIES = ("llama", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def spec_from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, is_tied: bool, divisors: Mapping[str, NDArray[np.float32]]
) -> DecoderSpec:
    """Read the description of a GGUF file: its metadata, and the rows of its embedding, which may be the head as well.

    `divisors` are rotary divisors, (dim / 2,), by tensor name (`rope_freqs.weight`, `rope_factors_long.weight` ...).
    """
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in GGUF_FAMILIES:
        raise BaseModelError(f"the GGUF holds architecture {shown(family)}: supported are {', '.join(GGUF_FAMILIES)}")
    given = {hf: metadata[f"{family}.{key}"] for key, hf in GGUF_FIELDS.items() if f"{family}.{key}" in metadata}
    fields = {**DEFAULTS.get(family, {}), "sliding_window": None, **given}
    fields |= {"vocab_size": vocab_size, "tie_word_embeddings": is_tied}
    check_sizes(fields)
    try:
        fields |= _gguf_quirks(family, metadata, fields, divisors)
        return _with_divisors(_build(family, fields), divisors)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = printable(f"{type(error).__name__}: {error}")
        raise BaseModelError(f"the GGUF metadata cannot be used ({what}): download the file again") from None


def _gguf_quirks(
    family: str, metadata: Mapping[str, Any], fields: Mapping[str, Any], divisors: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings that GGUF writes otherwise than config.json, and those that llama.cpp has in its code."""
    quirks: dict[str, Any] = {"use_sliding_window": False, "hidden_act": "silu"}
    kind, factor, length, attention = (
        metadata.get(f"{family}.rope.scaling.{key}")
        for key in ("type", "factor", "original_context_length", "attn_factor")
    )
    scaling = {"rope_type": kind if kind in ("linear", "yarn") else "default", "factor": factor}
    scaling["original_max_position_embeddings"] = length
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    rotary = whole(metadata, f"{family}.rope.dimension_count", 2, MOST["head_dim"], head_dim)
    quirks |= {"rope_scaling": scaling, "partial_rotary_factor": rotary / head_dim}
    if family.startswith("gemma"):
        quirks |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": _gemma_scalar(family, fields)}
    if "rope_factors_long.weight" in divisors:
        long, short = divisors["rope_factors_long.weight"], divisors.get("rope_factors_short.weight")
        scaling = {"rope_type": "longrope", "long_factor": long, "short_factor": short, "attention_factor": attention}
        quirks["rope_scaling"] = scaling
    return quirks


def _gemma_scalar(family: str, fields: Mapping[str, Any]) -> float:
    """llama.cpp scales by head_dim, but for the 27B models, which divide the width among the heads."""
    is_27b = fields["num_hidden_layers"] == (46 if family == "gemma2" else 62)
    return float(fields["hidden_size"] / fields["num_attention_heads"] if is_27b else fields["head_dim"])


def _with_divisors(spec: DecoderSpec, divisors: Mapping[str, NDArray[np.float32]]) -> DecoderSpec:
    """Apply `rope_freqs.weight`, in which the converter stores Llama 3.1's scaling."""
    if "rope_freqs.weight" not in divisors:
        return spec
    by = {id(rope): positives(divisors, "rope_freqs.weight", len(rope.inv_freq)) for rope in spec.ropes if rope}
    ropes = (rope and replace(rope, inv_freq=rope.inv_freq / by[id(rope)]) for rope in spec.ropes)
    return replace(spec, ropes=tuple(ropes))
