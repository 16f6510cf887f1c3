"""Tiny random models of every supported family, each with all the quirks of its kind.

The weights do not come from torch's random numbers, which may change between versions, but from the raw Philox stream,
keyed by seed and parameter name. So `hf_model("qwen3")` holds on every machine exactly the weights of
`fixtures/gguf/qwen3.gguf`, which llama.cpp's own converter made from it (see `fixtures/make_fixtures.py`), and
`fixtures/checksums.json` notices the day this is no longer so.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from fixtures.tiny_tokenizers import write_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
GGUF_FOLDER = FIXTURES / "gguf"
VOCAB_SIZE = 320

# What the small models share unless they say otherwise: grouped queries, a visible epsilon, a window shorter than T.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
WINDOW = 8
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE_CONTEXT = 32  # up to here the short factors hold, beyond it the long ones


def _rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def _llama(**changes: Any) -> PretrainedConfig:
    return transformers.LlamaConfig(**{**_SMALL, "rope_parameters": _rope(10_000.0), **changes})


def _smollm3() -> PretrainedConfig:
    sizes = {"num_hidden_layers": 5, "tie_word_embeddings": True}
    special = {"bos_token_id": 312, "eos_token_id": 314, "pad_token_id": 312}
    return transformers.SmolLM3Config(**{**_SMALL, **sizes, **special, "rope_parameters": _rope(2_000_000.0)})


def _mistral(**changes: Any) -> PretrainedConfig:
    own = {"head_dim": 16, "sliding_window": None, "rope_parameters": _rope(1_000_000.0)}
    return transformers.MistralConfig(**{**_SMALL, **own, **changes})


def _qwen2(**changes: Any) -> PretrainedConfig:
    own = {"tie_word_embeddings": True, "bos_token_id": 312, "eos_token_id": 314, "rope_parameters": _rope(1_000_000.0)}
    return transformers.Qwen2Config(**{**_SMALL, **own, **changes})


def _qwen3(**changes: Any) -> PretrainedConfig:
    own = {"head_dim": 16, "bos_token_id": 312, "eos_token_id": 314, "rope_parameters": _rope(1_000_000.0)}
    return transformers.Qwen3Config(**{**_SMALL, **own, **changes})


_GEMMA: dict[str, Any] = {
    **_SMALL,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Gemma's 27B models scale queries by hidden_size / heads; llama.cpp knows them by their number of layers alone.
_GEMMA_27B: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 4,
}


def _gemma2(**changes: Any) -> PretrainedConfig:
    own = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "rope_parameters": _rope(10_000.0)}
    return transformers.Gemma2Config(**{**_GEMMA, **own, **changes})


def _gemma3(
    global_scaling: dict[str, Any] | None = None, local_theta: float = 10_000.0, **changes: Any
) -> PretrainedConfig:
    rope = {
        "full_attention": _rope(1_000_000.0, **(global_scaling or {})),
        "sliding_attention": _rope(local_theta),
    }
    own = {"rope_parameters": rope, "num_hidden_layers": 7, "num_key_value_heads": 1}
    return transformers.Gemma3TextConfig(**{**_GEMMA, "head_dim": 8, "query_pre_attn_scalar": 8, **own, **changes})


def _phi3(rope: dict[str, Any] | None = None, **changes: Any) -> PretrainedConfig:
    own: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 312, "pad_token_id": 312, "sliding_window": None}
    own["original_max_position_embeddings"] = _LONGROPE_CONTEXT if rope else 128
    own["rope_parameters"] = rope or _rope(10_000.0)
    return transformers.Phi3Config(**{**_SMALL, **own, **changes})


def _longrope(pairs: int, **more: Any) -> dict[str, Any]:
    short = [1.0 + 0.125 * i for i in range(pairs)]
    long = [1.5 + 1.25 * i for i in range(pairs)]
    return {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": short, "long_factor": long, **more}


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _llama(intermediate_size=64),
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "llama3_rope": lambda: _llama(
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=dict(ROPE_LLAMA3),
        bos_token_id=312, eos_token_id=314,
    ),
    "llama_linear_rope": lambda: _llama(
        tie_word_embeddings=True, rope_parameters=_rope(10_000.0, rope_type="linear", factor=4.0)
    ),
    "llama_bias": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama_wide": lambda: _llama(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4),
    "smollm2": lambda: _llama(
        hidden_size=48, num_attention_heads=6, tie_word_embeddings=True, rope_parameters=_rope(100_000.0),
        bos_token_id=313, eos_token_id=314, pad_token_id=314,
    ),
    "smollm3": _smollm3,
    "mistral": _mistral,
    "mistral_window": lambda: _mistral(sliding_window=WINDOW),
    "qwen2": _qwen2,
    "qwen2_window": lambda: _qwen2(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1,
        tie_word_embeddings=False,
    ),
    "qwen3": _qwen3,
    "qwen3_tied": lambda: _qwen3(tie_word_embeddings=True, head_dim=8, num_key_value_heads=1),
    "qwen3_yarn": lambda: _qwen3(
        tie_word_embeddings=True, num_key_value_heads=1, max_position_embeddings=256,
        rope_parameters=_rope(10_000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "gemma2": _gemma2,
    "gemma2_scale": lambda: _gemma2(query_pre_attn_scalar=4),
    "gemma2_27b": lambda: _gemma2(**{**_GEMMA_27B, "num_hidden_layers": 46}),
    "gemma3": _gemma3,
    "gemma3_linear_rope": lambda: _gemma3(
        {"rope_type": "linear", "factor": 8.0}, 3000.0, num_hidden_layers=6, final_logit_softcapping=5.0
    ),
    "gemma3_pattern": lambda: _gemma3(
        num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=2, head_dim=16,
    ),
    "gemma3_27b": lambda: _gemma3(
        {"rope_type": "linear", "factor": 8.0}, **{**_GEMMA_27B, "num_hidden_layers": 62, "intermediate_size": 4}
    ),
    "phi3": _phi3,
    "phi3_longrope": lambda: _phi3(_longrope(pairs=4), tie_word_embeddings=True),
    "phi3_partial_rope": lambda: _phi3(
        _longrope(pairs=3, partial_rotary_factor=0.75), tie_word_embeddings=True, bos_token_id=312, eos_token_id=312
    ),
    "phi3_window": lambda: _phi3(sliding_window=WINDOW),
}  # fmt: skip

# What GGUF or llama.cpp loses: these are tested from Hugging Face folders only.
HF_ONLY = {
    "mistral_window": "the converter drops sliding_window for the llama architecture; llama.cpp attends to everything",
    "qwen2_window": "the converter drops sliding_window and max_window_layers; llama.cpp attends to everything",
    "gemma2_scale": "query_pre_attn_scalar is not in GGUF: llama.cpp takes head_dim (46 layers: hidden / heads)",
    "gemma3_pattern": "layer_types and query_pre_attn_scalar are not in GGUF: for llama.cpp every 6th layer is global",
    "phi3_window": "the converter writes phi3.attention.sliding_window, but llama.cpp warns and attends to everything",
}

# file in fixtures/gguf -> (family, how its tensors are stored)
GGUF_FILES: dict[str, tuple[str, str]] = {
    **{name: (name, "f32") for name in FAMILIES if name not in HF_ONLY and name != "llama_wide"},
    "llama_q8_0": ("llama", "q8_0"),
    "qwen3_f16": ("qwen3", "f16"),
    "qwen2_bf16": ("qwen2", "bf16"),
    "llama_wide_mixed": ("llama_wide", "mixed"),
}

TOKENIZERS = {
    "llama3": "llama-bpe",
    "smollm2": "smollm",
    "smollm3": "llama-bpe",
    "qwen": "qwen2",
    "gemma": "gemma",
    "phi3_partial": "gpt-4o",
    "phi3": "phi3",
}


def tokenizer_kind(name: str) -> str:
    """Which tiny tokenizer a family gets; for the byte-level ones it is the name llama.cpp gives the pre-tokenizer."""
    return next((kind for prefix, kind in TOKENIZERS.items() if name.startswith(prefix)), "llama")


def random_weight(name: str, shape: tuple[int, ...], seed: int, config: PretrainedConfig) -> np.ndarray:
    """Uniform numbers from the raw Philox stream of (seed, parameter name): the same on every machine and version."""
    gemma = config.model_type.startswith("gemma")
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    count = math.prod(shape)
    bits = np.random.Philox(key=key).random_raw(count) >> np.uint64(40)
    unit = (bits.astype(np.float64) / 2**23 - 1.0).reshape(shape) * math.sqrt(3.0)  # mean 0, deviation 1
    if "norm" in name:
        values = 1.0 + 0.3 * unit
        if gemma and "post" in name and config.num_hidden_layers > 10:
            values *= 0.05  # else so many layers in a row magnify rounding beyond any tolerance
        if gemma:
            values -= 1.0  # Gemma stores what is added to one
    elif name.endswith("bias") or "embed_tokens" in name or "lm_head" in name:
        values = 0.3 * unit
    else:
        values = unit * 1.5 / math.sqrt(shape[-1])
    return values.astype(np.float32)


def hf_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The family as transformers runs it: float32, eager attention (the one with soft-caps), ready to evaluate."""
    return hf_model_of(FAMILIES[name](), seed)


def hf_model_of(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A transformers model of any configuration, with the weights that its parameter names stand for."""
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            weight = random_weight(parameter_name, tuple(parameter.shape), seed, config)
            parameter.copy_(torch.from_numpy(weight))
    return model.eval()


def make_hf_folder(name: str, folder: Path, seed: int = 0, legacy_config: bool = False) -> Path:
    """Save the model with a tiny tokenizer; `legacy_config` writes config.json in the form of transformers 4."""
    model = hf_model(name, seed)
    model.save_pretrained(folder)
    if legacy_config:
        (folder / "config.json").write_text(json.dumps(legacy_form(json.loads((folder / "config.json").read_text()))))
    write_tokenizer(tokenizer_kind(name), folder)
    return folder


def legacy_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 in the words of transformers 4, which most folders in the world still use."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types", "dtype")}
    old["torch_dtype"] = config.get("dtype", "float32")
    rope = config["rope_parameters"]
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 6
        rope = rope["full_attention"]
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    outside = {"rope_theta", "partial_rotary_factor"}
    if config["model_type"] == "phi3":
        outside.add("original_max_position_embeddings")
    scaling = {key: value for key, value in rope.items() if key not in outside}
    old["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    layer_types = config.get("layer_types")
    if layer_types and config["model_type"].startswith("gemma"):
        period = 2 if config["model_type"] == "gemma2" else 6
        expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(layer_types))]
        if layer_types != expected:
            old["layer_types"] = layer_types
    return old


def sample_tokens(length: int = 24, rows: int = 2) -> torch.Tensor:
    """Token ids that are the same everywhere; longer than the window of every family that has one."""
    raw = np.random.Philox(key=7).random_raw(rows * length) % np.uint64(VOCAB_SIZE - 20)
    return torch.from_numpy(raw.astype(np.int64).reshape(rows, length) + 4)


def checksum(model: PreTrainedModel) -> str:
    """A hash of all parameters, names and float32 bytes; tied ones count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


# Below: what the official converter does to names and values, written down once more to check its files.

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(parameter_name: str, config: PretrainedConfig) -> str:
    """The GGUF name of a transformers parameter."""
    stem, _, ending = parameter_name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{ending}"
    _, _, layer, kind = stem.split(".", 3)
    names = {**_LAYER_NAMES, **(_GEMMA_NAMES if config.model_type.startswith("gemma") else {})}
    return f"blk.{layer}.{names[kind]}.{ending}"


def _rotated_rows(parameter_name: str, config: PretrainedConfig) -> np.ndarray | None:
    """Row order of q and k in llama-like GGUFs: llama.cpp rotates neighbours there, transformers rotates halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = parameter_name.split(".")[-2]
    if config.model_type not in ("llama", "mistral", "smollm3") or kind not in heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = np.arange(heads[kind] * head_dim)
    return rows.reshape(heads[kind], 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def gguf_pairs(model: PreTrainedModel) -> Iterator[tuple[str, str, np.ndarray]]:
    """For every parameter: its transformers name, its GGUF name, and the values an exact GGUF file must hold."""
    config = model.config
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        order = _rotated_rows(name, config)
        if order is not None:
            values = values[order]
        if config.model_type.startswith("gemma") and "norm" in name:
            values = values + np.float32(1.0)
        yield name, gguf_name(name, config), values


def load_gguf_weights(model: PreTrainedModel, tensors: dict[str, np.ndarray]) -> PreTrainedModel:
    """Put (dequantised) GGUF tensors back into a transformers model: the oracle for quantised files."""
    config = model.config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = tensors[gguf_name(name, config)].astype(np.float32).reshape(parameter.shape)
            order = _rotated_rows(name, config)
            if order is not None:
                restored = np.empty_like(values)
                restored[order] = values
                values = restored
            if config.model_type.startswith("gemma") and "norm" in name:
                values = values - np.float32(1.0)
            parameter.copy_(torch.from_numpy(values.copy()))
    return model


def gguf_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF file as float32, read and dequantised by the `gguf` package."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return tensors


def hf_model_of_gguf(file: str) -> PreTrainedModel:
    """The transformers model with exactly the (dequantised) weights of `fixtures/gguf/<file>.gguf`."""
    family, _ = GGUF_FILES[file]
    return load_gguf_weights(hf_model(family), gguf_tensors(GGUF_FOLDER / f"{file}.gguf"))
