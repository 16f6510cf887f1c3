"""Every field of config.json that is known, and what becomes of it: honoured, of no effect, or refused by name.

Source: the config classes of transformers and what their models read. A test holds these tables against those classes.
"""

from collections.abc import Mapping
from typing import Any

from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import shown

ALL = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
GEMMAS, QWENS = ("gemma2", "gemma3"), ("qwen2", "qwen3")

# Fields that `spec` reads, and of which families.
HONOURED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
         "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
        ALL,
    ),
    "original_max_position_embeddings": tuple(family for family in ALL if family != "gemma3"),
    "hidden_act": tuple(family for family in ALL if family not in GEMMAS),
    "hidden_activation": GEMMAS,
    "attention_bias": ("llama", "smollm3", "qwen3", *GEMMAS),
    "mlp_bias": ("llama", "smollm3"),
    "sliding_window": tuple(family for family in ALL if family != "llama"),
    "use_sliding_window": ("smollm3", *QWENS),
    "max_window_layers": QWENS,
    "layer_types": ("smollm3", *QWENS, *GEMMAS),
    "no_rope_layers": ("smollm3",),
    "no_rope_layer_interval": ("smollm3",),
    "query_pre_attn_scalar": GEMMAS,
    "attn_logit_softcapping": ("gemma2",),
    "final_logit_softcapping": GEMMAS,
    "sliding_window_pattern": ("gemma3",),
    "rope_local_base_freq": ("gemma3",),
    "partial_rotary_factor": ("phi3",),
}  # fmt: skip

# Fields without effect on what a base computes, and why; some are honoured in other families.
_TOKEN, _CACHE = "the tokenizer and generation_config.json say which tokens these are", "results are the same"
_TASK, _TOOL = "for classifiers, which are refused by their architecture", "left by the program that wrote the file"
_ANSWERS, _IMAGES = "options of answers, not of the model", "of images, which are not read"
NO_EFFECT: dict[str, str] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"), _TOKEN),
    **dict.fromkeys(("use_cache", "cache_implementation", "pretraining_tp", "chunk_size_feed_forward"), _CACHE),
    **dict.fromkeys(("attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
                     "_experts_implementation", "attn_impl", "gradient_checkpointing"), _CACHE),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript",
                     "output_router_logits", "tie_last_hidden_states"), "of what a call returns"),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "classifier_dropout",
                     "task_specific_params", "score_bias"), _TASK),
    **dict.fromkeys(("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "unsloth_fixed",
                     "unsloth_version", "is_llama_config", "transformers.js_config", "tokenizer_class", "license",
                     "model_name", "use_bfloat16", "tf_legacy_loss", "keys_to_ignore_at_inference",
                     "base_model_tp_plan", "base_model_pp_plan", "base_model_prefix", "processor_class",
                     "base_config_key", "neftune_noise_alpha"), _TOOL),
    **dict.fromkeys(("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
                     "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
                     "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
                     "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
                     "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
                     "suppress_tokens", "begin_suppress_tokens", "prefix", "decoder_start_token_id",
                     "encoder_repetition_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
                     "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "eta_cutoff",
                     "epsilon_cutoff", "experts_implementation"), _ANSWERS),
    **dict.fromkeys(("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
                     "image_token_id", "boi_token_id", "eoi_token_id", "projector_hidden_act", "vision_feature_layer",
                     "multimodal_projector_bias", "spatial_merge_size", "vision_feature_select_strategy"), _IMAGES),
    "text_config": "its fields are read as those of the file",
    "is_decoder": "read by encoders only",
    "initializer_range": "for weights that are drawn anew",
    "torch_dtype": "each tensor has a type of its own",
    "dtype": "each tensor has a type of its own",
    "auto_map": "code of the folder is not run; the base is read as transformers reads this model_type",
    "quantization_config": "what it means is decided where tensors are read",
    "hidden_act": "Gemma reads hidden_activation alone",
    "max_window_layers": "this family has no such layers",
    "full_attn_mod": "read by other programs for Phi 4 alone",
    "interpolate_factor": "read by other programs for Phi 4 alone",
    "dual_chunk_attention_config": "transformers does not read it",
}  # fmt: skip

# Dropout of the base acts in training only. A rate other than zero is told.
DROPOUTS = (
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "residual_dropout",
    "hidden_dropout_prob",
)

# Fields that change what a base computes, where a family does not honour them: refused unless the value is empty, zero
# or one of these, which mean the same as no field.
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "hidden_activation", "sliding_window", "use_sliding_window", "no_rope_layers",
         "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq",
         "original_max_position_embeddings",
         "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size",
         "tie_encoder_decoder", "pruned_heads", "per_layer_config", "block_configs",
         "attention_multiplier", "attention_scale", "attn_scale", "attn_temperature_tuning", "floor_scale",
         "attention_chunk_size", "attention_sinks", "use_attention_sinks", "sink_size", "clip_qkv", "qk_norm",
         "use_qk_norm", "qk_layernorm", "qk_layernorms", "qk_layer_norms", "logits_soft_cap", "use_logn_attn",
         "use_dynamic_ntk",
         "qkv_bias", "use_qkv_bias", "add_qkv_bias", "add_bias_linear", "attention_out_bias", "bias", "use_bias",
         "lm_head_bias", "norm_bias", "enable_bias", "use_parallel_residual", "parallel_residual", "parallel_attn",
         "new_decoder_architecture", "multi_query", "alibi", "use_alibi", "learned_pos_emb", "rotary_dim",
         "rope_interleave", "rope_interleaved", "use_mrope", "mrope_section", "layer_rope_theta", "swa_rope_theta",
         "use_post_norm", "use_sandwich_norm", "use_mup", "mup_enabled", "scale_attn_by_inverse_layer_idx",
         "scale_depth", "dim_model_base", "global_attn_every_n_layers", "num_attention_heads_per_layer",
         "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok",
         "moe_intermediate_size", "n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size",
         "first_k_dense_replace", "enable_moe_block", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim",
         "num_kv_shared_layers", "hidden_size_per_layer_input", "laurel_rank", "altup_num_inputs",
         "activation_sparsity_pattern", "attention_k_eq_v", "use_double_wide_mlp", "num_nextn_predict_layers",
         "num_mtp_layers", "layers_block_type", "attn_layer_period", "mamba_d_state", "mamba_expand", "ssm_state_size",
         "linear_num_key_heads", "linear_num_value_heads", "index_topk", "hc_mult", "swiglu_limit", "swiglu_alpha",
         "gated_attention", "use_attention_gate", "cla_share_factor", "use_cla", "prefix_lm", "key_multiplier",
         "mlp_multipliers", "ssm_multipliers", "value_residual", "adapter_rank"),
        (),
    ),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "logits_scale", "scale_emb",
         "embedding_scale", "residual_scale", "lm_head_multiplier", "attention_in_multiplier",
         "attention_out_multiplier", "attention_value_scale", "partial_rotary_factor", "rotary_pct", "rope_pct",
         "rope_ratio", "interleave_moe_layer_step"),
        (1,),
    ),
    "is_causal": (True,),
    "causal": (True,),
    "position_embedding_type": ("rope", "rotary"),
    "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "layer_types": (),
    "mlp_layer_types": (),
    "sliding_window_pattern": (),
    "_sliding_window_pattern": (),
    "no_rope_layer_interval": (),
}  # fmt: skip

# Ends of the names of architectures that have a language head.
HEADS = ("forcausallm", "forconditionalgeneration", "forimagetexttotext")

# Settings of the rotary embedding, by its type; each may also have the common ones.
ROPE_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
ROPE_SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", *_YARN),
    "longrope": ("short_factor", "long_factor", "factor", "original_max_position_embeddings", "attention_factor"),
}
# Settings that change the angles where they are read, and are not honoured; and the value that means the same as none.
ROPE_REFUSED = {
    **dict.fromkeys(("llama_4_scaling_beta", "mrope_section", "mrope_interleaved", "short_mscale", "long_mscale",
                     "alpha", "xdrope_section", "apply_yarn_scaling")),
    **dict.fromkeys(("attn_factor", "extrapolation_factor"), 1),
}  # fmt: skip


def check_fields(family: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse every field that changes what a base computes and is not honoured, all at once.

    Args:
        family: One of `ALL`.
        fields: config.json, the fields of a text_config over those around it.

    Returns:
        What is worth telling: fields that are not known, and those that say what is not done.

    Raises:
        BaseModelError: Naming each such field and its value.
    """
    problems = _check_architectures(fields.get("architectures"))
    unknown = []
    for name, value in fields.items():
        if family in HONOURED.get(name, ()) or name in DROPOUTS:
            continue
        if name in REFUSED:
            problems += [] if _is_neutral(family, name, value, fields) else [_refusal(family, name, value)]
        elif name not in NO_EFFECT and value is not None:
            unknown.append(name)
    unknown += _unknown_rope_settings(fields)
    if problems:
        raise BaseModelError(*problems)
    notes = [f"config.json gives {name} {shown(fields[name])}: it is not applied while an adapter is trained"
             for name in DROPOUTS if fields.get(name)]  # fmt: skip
    if fields.get("auto_map"):
        notes.append(f"config.json names code of its own (auto_map): it is not run, the base is read as any {family}")
    if unknown:
        notes.append(f"config.json has fields that no {family} reads: {listing(map(shown, unknown))}")
    return tuple(notes)


def check_rope_settings(place: str, settings: Mapping[str, Any], kind: str, is_nested: bool) -> list[str]:
    """What is wrong with settings of a rotary embedding of a type that is known; `place` names them in messages."""
    problems = [
        f"{place} has {name} {shown(settings[name])}, which is not supported: use a base that was made without it"
        for name, neutral in ROPE_REFUSED.items()
        if settings.get(name) and settings[name] != neutral
    ]
    unused = [name for name in {n for names in ROPE_SETTINGS.values() for n in names} - {*ROPE_SETTINGS[kind]}
              if settings.get(name) is not None]  # fmt: skip
    problems += [
        f"{place} has {name} {shown(settings[name])}, which rope_type {shown(kind)} does not use: write the rope_type "
        "that the base was made with, or remove it"
        for name in sorted(unused)
        if not (name == "factor" and settings[name] == 1)
    ]
    problems += [f"{place} has {name}, settings of one kind of layer: only a gemma3 has them"
                 for name, value in settings.items() if isinstance(value, dict)]  # fmt: skip
    if is_nested and settings.get("truncate", True) is not True:
        problems.append(f"{place} has truncate {shown(settings['truncate'])}, which transformers does not read there")
    return problems


def _unknown_rope_settings(fields: Mapping[str, Any]) -> list[str]:
    known = {*ROPE_COMMON, *ROPE_REFUSED, *(name for names in ROPE_SETTINGS.values() for name in names)}
    groups = {name: fields.get(name) for name in ("rope_scaling", "rope_parameters")}
    nested = [(name, kind) for name, found in groups.items() if isinstance(found, dict) for kind in found.items()]
    groups |= {f"{name}.{kind}": found for name, (kind, found) in nested if isinstance(found, dict)}
    return [
        f"{place}.{name}"
        for place, found in groups.items()
        for name, value in (found.items() if isinstance(found, dict) else ())
        if name not in known and value is not None and not isinstance(value, dict)
    ]


def _check_architectures(names: Any) -> list[str]:
    """What is wrong with the names of the classes that a file was written for; any with a language head will do."""
    if names is None or names == []:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [f"architectures is {shown(names)}: expected a list of names"]
    if any(name.lower().endswith(HEADS) for name in names):
        return []
    return [
        f"config.json names the architecture {listing(map(shown, names), 3)}, which has no language head: expected a "
        "name that ends in ForCausalLM. Use the language model that it was made from"
    ]


def _is_neutral(family: str, name: str, value: Any, fields: Mapping[str, Any]) -> bool:
    """Whether a value means the same as no field."""
    has_window = bool(fields.get("sliding_window")) and family != "llama"
    if name == "layer_types":  # of a family whose layers are all alike
        kind = "sliding_attention" if has_window else "full_attention"
        return value is None or (isinstance(value, list) and all(item == kind for item in value))
    if name == "use_sliding_window":  # of a family that has a window whenever one is given
        return value is None or value is has_window
    if name == "no_rope_layers" and isinstance(value, list):
        return all(item == 1 for item in value)
    if name == "sliding_window_pattern":
        return not value or (family == "gemma2" and value == 2)
    if name == "_sliding_window_pattern":
        return bool(fields.get("layer_types")) or value in (None, fields.get("sliding_window_pattern", 6))
    if name in ("is_causal", "causal"):
        return value is None or value is True
    if name == "attention_bias" and family == "qwen2":  # which always has them
        return True
    return not value or value in REFUSED[name]


def _refusal(family: str, name: str, value: Any) -> str:
    return (
        f"config.json has {name} {shown(value)}, which changes what a model computes and is not supported for "
        f"{family}: use a base that was made without it, or take the field out if it is left over from another model"
    )
