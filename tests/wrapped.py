"""Tiny models of text and images, as transformers saves them, whose text models are of families that Thimble runs."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
_EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **_EYE}
_CLIP = {**_SIGLIP, "model_type": "clip_vision_model", "projection_dim": 16}
_PIXTRAL = {**_SIGLIP, "model_type": "pixtral", "head_dim": 8}
_BARE_EYE = {"image_size": 28, "patch_size": 14, **_EYE}
_AXES = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
_QWEN_EYE = {"depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {**_SMALL, "model_type": kind, **more}


_MISTRAL = _text("mistral", head_dim=8)
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": _text("gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=8),
               "vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    "mistral3": {"text_config": _MISTRAL, "vision_config": _PIXTRAL},
    "llava": {"text_config": _text("llama"), "vision_config": _CLIP, "vision_feature_layer": -1},
    "llava_next": {"text_config": _MISTRAL, "vision_config": _CLIP, "vision_feature_layer": -1},
    "llava_onevision": {"text_config": _text("qwen2"), "vision_config": _SIGLIP, "vision_feature_layer": -1},
    "vipllava": {"text_config": _text("llama"), "vision_config": _CLIP, "vision_feature_layers": [-1]},
    "video_llava": {"text_config": _text("llama"), "vision_config": _CLIP},
    "internvl": {"text_config": _text("qwen2"),
                 "vision_config": {**_EYE, "image_size": [28, 28], "patch_size": [14, 14]}},
    "lighton_ocr": {"text_config": _text("qwen3", head_dim=8), "vision_config": _PIXTRAL},
    "idefics2": {"text_config": _MISTRAL, "vision_config": _BARE_EYE},
    "idefics3": {"text_config": _text("llama"), "vision_config": _BARE_EYE},
    "smolvlm": {"text_config": _text("llama"), "vision_config": _BARE_EYE},
    "qwen2_vl": {"text_config": {**_SMALL, "rope_parameters": _AXES},
                 "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 1}},
    "qwen2_5_vl": {"text_config": {**_SMALL, "rope_parameters": _AXES},
                   "vision_config": {**_QWEN_EYE, "fullatt_block_indexes": [0]}},
    "qwen3_vl": {"text_config": {**_SMALL, "head_dim": 8, "rope_parameters": {**_AXES, "mrope_interleaved": True}},
                 "vision_config": {**_QWEN_EYE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
}  # fmt: skip


def make_wrapped(kind: str, folder: Path, **more: Any) -> PreTrainedModel:
    """Save a tiny random model of one kind; return it."""
    config = transformers.CONFIG_MAPPING[kind](**CONFIGS[kind], **more)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


def rename(folder: Path, change: Any) -> None:
    """Call the tensors of a folder's model.safetensors otherwise."""
    from thimble.files.tensors import open_tensors, write_safetensors

    path = folder / "model.safetensors"
    file = open_tensors(path)
    tensors = {change(name): file.read(name) for name in file.tensors}
    path.unlink()
    write_safetensors(path, tensors, {"format": "pt"})


def edit(path: Path, **values: Any) -> None:
    """Change settings of a JSON file; None takes one out."""
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
