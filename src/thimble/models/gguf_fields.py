"""Metadata of a GGUF as fields by the names of config.json; every key is honoured, of no effect, or refused by name.

Source: what llama.cpp reads for these architectures (`llama_model::load_hparams`, `llama_context`), with its defaults.
"""

import math
from collections.abc import Mapping
from typing import Any

from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import shown
from thimble.models.fields import MOST, number, whole
from thimble.models.rope import yarn_scale

FAMILIES = ("llama", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
PARTIAL_ROPE = ("gemma2", "gemma3", "phi3")  # the others turn whole heads, or llama.cpp does not load them

# Keys behind the name of the architecture, and the field of config.json that says the same.
FIELDS = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window", "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta", "rope.freq_base_swa": "rope_local_base_freq",
    "context_length": "max_position_embeddings",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}  # fmt: skip
HONOURED = (
    *FIELDS, "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.attn_factor", "attention.value_length", "attention.scale",
)  # fmt: skip
REQUIRED = ("context_length", "attention.layer_norm_rms_epsilon")  # beside sizes, without which nothing can be read
# What llama.cpp takes where a file says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layer_interval": 4},
    "gemma2": {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
        "sliding_window_pattern": 2,
    },
    "gemma3": {"sliding_window_pattern": 6, "rope_local_base_freq": 1e4},
}  # fmt: skip

_SIZE = "the tensors say it"
NO_EFFECT = {
    "vocab_size": _SIZE,
    "tensor_data_layout": "of files before GGUF had an order of rows of its own",
    "rope.scaling.finetuned": "llama.cpp keeps it and computes nothing by it",
    "pooling_type": "for embeddings of whole texts",
    "attention.layer_norm_epsilon": "of norms that these architectures do not have",
    "decoder_start_token_id": "read for encoder-decoder models only",
}
# Keys that change what is computed: refused unless the value is empty, zero or one of these.
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("attention.max_alibi_bias", "attention.clamp_kqv", "attention.group_norm_epsilon",
         "attention.group_norm_groups", "attention.q_lora_rank", "attention.kv_lora_rank", "attention.decay_lora_rank",
         "attention.iclr_lora_rank", "attention.value_residual_mix_lora_rank", "attention.gate_lora_rank",
         "attention.relative_buckets_count", "attention.key_length_mla", "attention.value_length_mla",
         "attention.shared_kv_layers", "attention.recurrent_layers", "attention.temperature_length",
         "attention.temperature_scale", "attention.indexer.head_count", "attention.indexer.key_length",
         "attention.indexer.top_k", "attention.output_group_count", "attention.output_lora_rank",
         "attention.compress_rope_freq_base", "attention.compress_ratios", "embedding_length_per_layer_input",
         "features_length", "leading_dense_block_count", "expert_feed_forward_length",
         "expert_shared_feed_forward_length", "expert_chunk_feed_forward_length", "expert_count", "expert_used_count",
         "expert_shared_count", "expert_group_count", "expert_group_used_count", "expert_weights_norm",
         "expert_gating_func", "experts_per_group", "moe_every_n_layers", "moe_latent_size", "nextn_predict_layers",
         "n_deepstack_layers", "deepstack_mapping", "use_parallel_residual", "router_logit_softcapping", "swin_norm",
         "rescale_every_n_layers", "time_mix_extra_dim", "time_decay_extra_dim", "token_shift_count",
         "full_attention_interval", "activation_sparsity_scale", "altup.active_idx", "altup.num_inputs",
         "swiglu_clamp_exp", "swiglu_clamp_shexp", "decoder_block_count", "rope.dimension_sections",
         "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier", "ssm.conv_kernel", "ssm.inner_size",
         "ssm.state_size", "ssm.time_step_rank", "ssm.group_count", "ssm.dt_b_c_rms", "kda.head_dim", "wkv.head_size",
         "posnet.embedding_length", "posnet.block_count", "convnext.embedding_length", "convnext.block_count",
         "shortconv.l_cache", "classifier.output_labels", "dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in",
         "dense_3_feat_out", "hyper_connection.count", "hash_layer_count", "target_layers", "target_hidden_size",
         "norm_before_residual"),
        (),
    ),
    **dict.fromkeys(
        ("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale", "attention.value_scale",
         "expert_weights_scale", "expert_group_scale", "interleave_moe_layer_step",
         "rope.scaling.yarn_attn_factor"),
        (1,),
    ),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "attention.causal": (True,),
}  # fmt: skip
# Sizes that may stand there a second time: of values, and of layers with a window.
SAME_AS_HEAD = ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa")
SAME_AS_ROPE = "rope.dimension_count_swa"
SAME_AS_WIDTH = "embedding_length_out"
HIDDEN_ACT = "hidden_activation"
_GELU = ("gemma2", "gemma3")
_WINDOWED = ("gemma2", "gemma3")  # in the others llama.cpp attends to everything, whatever the file says


def fields_of(family: str, metadata: Mapping[str, Any], has_long: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read the metadata as llama.cpp reads it.

    Args:
        family: One of `FAMILIES`.
        metadata: Key-value pairs of the file.
        has_long: Whether the file holds the divisors of LongRoPE.

    Returns:
        Fields by the names of config.json, and what is worth telling.

    Raises:
        BaseModelError: Naming each key that changes what is computed and is not honoured.
    """
    own = _own(family, metadata)
    given = {field: _uniform(family, own, key) for key, field in FIELDS.items() if key in own}
    fields = {**DEFAULTS.get(family, {}), **given, "use_sliding_window": False, "hidden_act": "silu"}
    notes = []
    if family not in _WINDOWED:
        if fields.pop("sliding_window", None):
            notes.append(
                f"the GGUF gives a sliding window of {own['attention.sliding_window']:,} tokens; llama.cpp attends to "
                f"all of them in this architecture, and so does Thimble"
            )
        fields.pop("sliding_window_pattern", None)
    if isinstance(fields.get("sliding_window_pattern"), list):
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[bool(is_local)] for is_local in fields.pop("sliding_window_pattern")]
    heads = whole(fields, "num_attention_heads", 1, MOST["num_attention_heads"])
    head_dim = whole(
        fields, "head_dim", 1, MOST["head_dim"], whole(fields, "hidden_size", 1, MOST["hidden_size"]) // heads
    )
    fields |= _gemma_fields(family, fields, heads, head_dim)
    rotary = whole(own, "rope.dimension_count", 2, MOST["head_dim"], head_dim)
    fields |= {"rope_scaling": _rope_scaling(own, has_long), "rotary_dim": rotary}
    problems = _problems(family, own, fields, head_dim, rotary)
    if problems:
        raise BaseModelError(*problems)
    unknown = [key for key in own if key not in (*HONOURED, *NO_EFFECT, *REFUSED, *SAME_AS_HEAD, SAME_AS_ROPE,
                                                 SAME_AS_WIDTH, HIDDEN_ACT)]  # fmt: skip
    if unknown:
        notes.append(f"the GGUF has metadata that no {family} reads: {listing(map(shown, unknown))}")
    return fields, tuple(notes)


def _own(family: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an architecture, without its name in front."""
    names = [key for key in metadata if key.startswith(f"{family}.")]  # to ask for the others would decode a vocabulary
    own = {key.removeprefix(f"{family}."): metadata[key] for key in names}
    if lacking := [f"{family}.{key}" for key in REQUIRED if key not in own]:
        raise BaseModelError(f"the GGUF lacks {listing(lacking)}, as llama.cpp needs too: convert it again")
    return own


def _uniform(family: str, own: Mapping[str, Any], key: str) -> Any:
    """A value; of one number for each layer the number, if they are all the same."""
    value = own[key]
    if not isinstance(value, list) or key == "attention.sliding_window_pattern":
        return value
    if not value or any(item != value[0] for item in value):
        raise BaseModelError(
            f"{family}.{key} is {shown(value)}: expected the same in all layers, others are not supported"
        )
    return value[0]


def _gemma_fields(family: str, fields: Mapping[str, Any], heads: int, head_dim: int) -> dict[str, Any]:
    """llama.cpp scales by head_dim, but for the 27B models, which divide the width among the heads."""
    if family not in _GELU:
        return {}
    is_27b = fields.get("num_hidden_layers") == (46 if family == "gemma2" else 62)
    scalar = float(fields["hidden_size"] // heads if is_27b else head_dim)
    return {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}


def _rope_scaling(own: Mapping[str, Any], has_long: bool) -> dict[str, Any]:
    """The scaling by the names of config.json; without a type it is linear, and a factor of zero is none."""
    kind = own.get("rope.scaling.type", "linear")
    factor = number(own, "rope.scaling.factor", 1e-3, 1e6, number(own, "rope.scale_linear", 1e-3, 1e6, 1.0))
    attention = number(own, "rope.scaling.attn_factor", 1e-3, 1e3, 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise BaseModelError(f"rope.scaling.type is {shown(kind)}: supported are none, linear, yarn and longrope")
    if kind == "longrope" and not has_long:
        raise BaseModelError("rope.scaling.type is longrope, but the file has no rope_factors_long: convert it again")
    if has_long and kind != "yarn" and factor == 1:
        return {"rope_type": "longrope", "attention_factor": attention}
    if has_long:
        raise BaseModelError(
            f"the file has rope_factors_long and {shown(kind)} scaling by {factor:g}: expected one of them"
        )
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "attention_factor": yarn_scale(factor) * attention}
    if attention != 1:
        raise BaseModelError(f"rope.scaling.attn_factor is {attention:g}: expected 1 without yarn or longrope scaling")
    return {"rope_type": "linear", "factor": factor if kind == "linear" else 1.0}


def _problems(family: str, own: Mapping[str, Any], fields: Mapping[str, Any], head_dim: int, rotary: int) -> list[str]:
    """Keys that change what is computed and are not honoured, or that contradict one another."""
    same = dict.fromkeys(SAME_AS_HEAD, head_dim) | {SAME_AS_ROPE: rotary, SAME_AS_WIDTH: fields["hidden_size"]}
    same[HIDDEN_ACT] = "gelu" if family in _GELU else "silu"
    if family not in PARTIAL_ROPE:
        same["rope.dimension_count"] = head_dim
    if family != "gemma3":
        same["rope.freq_base_swa"] = fields.get("rope_theta", 1e4)
    wrong = [(key, f"expected {value}") for key, value in same.items() if own.get(key, value) != value]
    scale = fields.get("query_pre_attn_scalar", head_dim) ** -0.5
    if own.get("attention.scale") and not _is_near(own["attention.scale"], scale):
        wrong.append(("attention.scale", f"expected {scale:g}"))
    for key, families in (("attn_logit_softcapping", ("gemma2",)), ("final_logit_softcapping", _GELU)):
        if own.get(key) and family not in families:
            wrong.append((key, f"{family} has none"))
    wrong += [(key, "which is not supported") for key in own if key in REFUSED and not _is_neutral(key, own[key])]
    return [f"{family}.{key} is {shown(own[key])}, {why}: take a GGUF of a model without it" for key, why in wrong]


def _is_near(value: Any, wanted: float) -> bool:
    return type(value) in (int, float) and math.isclose(value, wanted, rel_tol=1e-5)


def _is_neutral(key: str, value: Any) -> bool:
    """Whether a value means the same as no key."""
    if key == "attention.causal":
        return value is True
    return not value or value in REFUSED[key] or (isinstance(value, list) and not any(value))
