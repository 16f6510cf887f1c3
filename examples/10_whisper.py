"""Convert a Whisper of CTranslate2 (float16, float32) to a Hugging Face folder: 10_whisper.py CT2_FOLDER FOLDER."""

import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

PARTS = {  # of CTranslate2, and what lies in each in transformers, stacked where it is more than one
    "self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm",
    "self_attention/linear_0": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "ffn/linear_0": "fc1",
    "self_attention/linear_1": "self_attn.out_proj", "attention/linear_0": "encoder_attn.q_proj", "ffn/linear_1": "fc2",
    "attention/linear_1": "encoder_attn.k_proj encoder_attn.v_proj", "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm", "embeddings": "embed_tokens", "position_encodings": "embed_positions",
    "gamma": "weight", "beta": "bias", "encodings": "weight",
}  # fmt: skip


def read(file):
    """Names and tensors: a name ends in a zero byte; a tensor begins with its shape, its dtype and its bytes."""

    def take(form):
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]

    take("I"), take(f"{take('H')}s"), take("I")
    for _ in range(take("I")):
        name, shape = take(f"{take('H')}s")[:-1].decode(), [take("I") for _ in range(take("B"))]
        kind, content = take("B"), file.read(take("I"))
        if kind in (0, 4):  # float32 and float16; others are settings
            yield name, np.frombuffer(content, "<f2" if kind else "<f4").reshape(shape).astype(np.float32)


source, folder, weights = Path(sys.argv[1]), Path(sys.argv[2]), {}
for name, tensor in read((source / "model.bin").open("rb")):
    side, block, part, leaf = re.fullmatch(r"(\w+)/(?:layer_(\d+)/)?(.+)/(\w+)", name).groups()
    paths = [f"layers.{block}.{path}" if block else path for path in PARTS.get(part, part).split()]
    for path, piece in zip(paths, np.split(tensor, len(paths)), strict=True):
        if not (path.endswith("k_proj") and leaf == "bias"):  # zeros: Whisper's keys have none
            weights[f"model.{side}.{path}.{PARTS.get(leaf, leaf)}"] = np.ascontiguousarray(piece)
texts, settings = (json.loads((source / f"{name}.json").read_text()) for name in ("tokenizer", "config"))
ids = {f"{token['content'].strip('<|>')}": token["id"] for token in texts["added_tokens"]}
special = {f"{name}_token_id": ids["endoftext"] for name in ("bos", "eos", "pad")}
special["decoder_start_token_id"] = ids["startoftranscript"]
words, width = weights["model.decoder.embed_tokens.weight"].shape
sizes = {"vocab_size": words, "d_model": width, "num_mel_bins": weights["model.encoder.conv1.weight"].shape[1]}
for side in ("encoder", "decoder"):
    inner = [len(array) for name, array in weights.items() if f"{side}.layers" in name and "fc1.bias" in name]
    sizes |= {f"{side}_layers": len(inner), f"{side}_ffn_dim": inner[0], f"{side}_attention_heads": width // 64}
folder.mkdir(parents=True, exist_ok=True)
save_file(weights, folder / "model.safetensors", {"format": "pt"})
WhisperConfig(**sizes, **special, architectures=["WhisperForConditionalGeneration"]).save_pretrained(folder)
silent = {"suppress_tokens": settings["suppress_ids"], "begin_suppress_tokens": settings["suppress_ids_begin"]}
GenerationConfig(**special, **silent, is_multilingual=words > 51864, max_length=448).save_pretrained(folder)
WhisperFeatureExtractor(sizes["num_mel_bins"]).save_pretrained(folder)
(folder / "tokenizer.json").write_text(json.dumps(texts))
