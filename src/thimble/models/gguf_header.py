"""The metadata of a GGUF file: carried along from one, or made of config.json as llama.cpp's converter makes it.

Source: conversion/base.py, llama.py, gemma.py and phi.py of llama.cpp, and what it reads (`llama_model::load_hparams`).
The vocabulary is a matter of `thimble.data.vocab_to_gguf`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError
from thimble.files.gguf import Metadata
from thimble.files.untrusted import read_json_object
from thimble.models.base import Base
from thimble.models.gguf_names import architecture
from thimble.models.rope import rope_type
from thimble.models.spec import DecoderSpec
from thimble.models.weight_files import MOST_CONFIG_BYTES
from thimble.models.wrappers import unwrap

# Of a file: its parts, its type, how it was quantised. A new file says these of itself.
_OWN = ("split.", "general.file_type", "general.quantization_version", "general.alignment", "quantize.")
_GEMMAS = ("gemma2", "gemma3")
U32, F32 = np.uint32, np.float32


def carried_header(base: Base) -> dict[str, Any]:
    """The metadata of a GGUF base, vocabulary and template included, but for what is true of that file alone."""
    metadata = base.metadata
    if not isinstance(metadata, Metadata):
        raise TypeError(f"{base.path} is no GGUF file")
    return {key: metadata.packed(key) for key in metadata if not key.startswith(_OWN)}


def made_header(base: Base) -> dict[str, Any]:
    """The metadata of a folder without its vocabulary; a BaseModelError if GGUF has no place for a setting."""
    spec, arch = base.decoder, architecture(base)
    check_convertible(base)
    general = {"general.architecture": arch, "general.type": "model", "general.name": base.path.name}
    sizes = {
        "block_count": U32(spec.num_layers), "context_length": U32(spec.max_positions),
        "embedding_length": U32(spec.hidden_size), "feed_forward_length": U32(spec.intermediate_size),
        "attention.head_count": U32(spec.num_heads), "attention.head_count_kv": U32(spec.num_kv_heads),
        "attention.layer_norm_rms_epsilon": F32(spec.norm_eps), "attention.key_length": U32(spec.head_dim),
        "attention.value_length": U32(spec.head_dim), "vocab_size": U32(spec.vocab_size),
        **_rope(spec, _rope_settings(base)), **_windows(spec),
    }  # fmt: skip
    for key, cap in (("attn", spec.attention_softcap), ("final", spec.final_softcap)):
        if cap is not None:
            sizes[f"{key}_logit_softcapping"] = F32(cap)
    return general | {f"{arch}.{key}": value for key, value in sizes.items()}


def rope_tensors(base: Base) -> dict[str, NDArray[np.float32]]:
    """Rotary divisors, float32 (dim / 2,), that a file of a folder holds as tensors, by name."""
    settings = _rope_settings(base)
    kind, rope = rope_type(settings), next((rope for rope in base.decoder.ropes if rope), None)
    if rope is None:
        return {}
    plain = _theta(settings) ** -(np.arange(len(rope.inv_freq)) / len(rope.inv_freq))
    if kind == "longrope" and rope.long_inv_freq is not None:
        divisors = {"rope_factors_long": rope.long_inv_freq, "rope_factors_short": rope.inv_freq}
    else:
        divisors = {"rope_freqs": rope.inv_freq} if kind == "llama3" else {}
    return {f"{name}.weight": (plain / angles).astype(np.float32) for name, angles in divisors.items()}


def check_convertible(base: Base) -> None:
    """Refuse what a folder says and llama.cpp would compute otherwise, for GGUF has no key for it."""
    spec = base.decoder
    found = []
    if spec.family not in _GEMMAS and any(spec.windows):
        found.append(f"a sliding window of {max(filter(None, spec.windows)):,} tokens, and llama.cpp has none in it")
    if spec.family in _GEMMAS:
        every = 2 if spec.family == "gemma2" else 6
        if any((window is None) != ((i + 1) % every == 0) for i, window in enumerate(spec.windows)):
            found.append(f"a pattern of windows other than every {every}th layer without one, which llama.cpp takes")
        is_27b = spec.num_layers == (46 if spec.family == "gemma2" else 62)
        scalar = spec.hidden_size // spec.num_heads if is_27b else spec.head_dim
        if not math.isclose(spec.attention_scale, scalar**-0.5, rel_tol=1e-6):
            found.append(f"query_pre_attn_scalar {spec.attention_scale**-2:g}, and llama.cpp takes {scalar}")
    if spec.family == "smollm3" and any((rope is None) != ((i + 1) % 4 == 0) for i, rope in enumerate(spec.ropes)):
        found.append("layers without positions other than every 4th, which llama.cpp takes")
    if found:
        raise BaseModelError(
            f"{base.name} ({spec.family}) has {' and '.join(found)}: GGUF has no place for it; keep the folder, or "
            "merge into a folder with thimble merge --base"
        )


def _windows(spec: DecoderSpec) -> dict[str, Any]:
    window = max((window for window in spec.windows if window), default=0)
    if spec.family == "phi3":  # there zero says that there is none, as in Phi-4
        return {"attention.sliding_window": U32(window)}
    return {"attention.sliding_window": U32(window)} if spec.family in _GEMMAS else {}


def _rope_settings(base: Base) -> dict[str, Any]:
    """Settings of layers that see everything, with `rope_theta` and the length before any stretching among them."""
    config, _ = unwrap(read_json_object(base.path / "config.json", MOST_CONFIG_BYTES, BaseModelError))
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    given = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    local = given.get("sliding_attention") or {}
    given |= given.get("full_attention") or {}
    default = 1e6 if base.decoder.family == "gemma3" else 2e6 if base.decoder.family == "smollm3" else 1e4
    given["rope_theta"] = given.get("rope_theta") or config.get("rope_theta") or default
    given["local_theta"] = local.get("rope_theta") or config.get("rope_local_base_freq") or 1e4
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    given["original"] = original or base.decoder.max_positions
    return given


def _theta(settings: Mapping[str, Any]) -> float:
    return float(settings["rope_theta"])


def _rope(spec: DecoderSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
    kind, rope = rope_type(settings), next((rope for rope in spec.ropes if rope), None)
    dim = 2 * len(rope.inv_freq) if rope else spec.head_dim
    keys: dict[str, Any] = {"rope.dimension_count": U32(dim), "rope.freq_base": F32(_theta(settings))}
    if spec.family == "gemma3":
        keys["rope.freq_base_swa"] = F32(settings["local_theta"])
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": F32(settings["factor"])}
    if kind in ("yarn", "longrope") or spec.family == "phi3":
        keys["rope.scaling.original_context_length"] = U32(settings["original"])
    if kind == "longrope" and rope:
        keys["rope.scaling.attn_factor"] = F32(rope.scale)
    return keys
