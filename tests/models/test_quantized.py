"""Folders of quantised weights, as each method writes them: refused by its name, with what to take instead."""

import json

import numpy as np
import pytest

from stress.foreign_files import CONFIGS, write_base
from thimble.errors import BaseModelError
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models.base import open_base

LAYER = "model.layers.0.self_attn.q_proj"
U8, I8, I32, U32, F16, F32 = (np.zeros((4, 4), kind) for kind in ("u1", "i1", "i4", "u4", "f2", "f4"))
# What a config says, what one layer looks like, and what the refusal calls it. Shapes do not matter here.
CASES = {
    "bnb-4bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True},
        {".weight": U8, ".weight.absmax": U8, ".weight.quant_state.bitsandbytes__nf4": U8}, "bitsandbytes, 4 bits"),
    "bnb-8bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True},
        {".weight": I8, ".SCB": F32}, "bitsandbytes, 8 bits"),
    "bnb-silent": (None, {".weight": U8, ".weight.absmax": U8}, "bitsandbytes, 4 bits"),
    "bnb8-silent": (None, {".weight": I8, ".SCB": F32}, "bitsandbytes, 8 bits"),
    "gptq": ({"quant_method": "gptq", "bits": 4},
        {".qweight": I32, ".qzeros": I32, ".scales": F16, ".g_idx": I32}, "GPTQ, 4 bits"),
    "awq": ({"quant_method": "awq", "bits": 4}, {".qweight": I32, ".qzeros": I32, ".scales": F16}, "AWQ, 4 bits"),
    "auto-round": ({"quant_method": "auto-round", "bits": 2},
        {".qweight": I32, ".qzeros": I32, ".scales": F16}, "AutoRound, 2 bits"),
    "gptq-silent": (None, {".qweight": I32, ".qzeros": I32, ".scales": F16, ".g_idx": I32}, "GPTQ"),
    "fp8": ({"quant_method": "fp8"}, {".weight": "F8_E4M3", ".weight_scale_inv": F32}, "FP8"),
    "fp8-silent": (None, {".weight": "F8_E4M3"}, "FP8"),
    "compressed": ({"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {".weight_packed": I32, ".weight_scale": F16, ".weight_shape": I32}, "compressed-tensors"),
    "w8a8": ({"quant_method": "compressed-tensors"}, {".weight": I8, ".weight_scale": F16}, "compressed-tensors"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {".weight": U8, ".weight_scale": "F8_E4M3", ".weight_scale_2": F32}, "NVIDIA ModelOpt, NVFP4"),
    "mxfp4": ({"quant_method": "mxfp4"}, {"_blocks": U8, "_scales": U8}, "MXFP4"),
    "hqq": ({"quant_method": "hqq"}, {".W_q": U8, ".scale": F16, ".zero": F16}, "HQQ"),
    "eetq": ({"quant_method": "eetq"}, {".weight": I8, ".weight_scales": F16}, "EETQ"),
    "torchao": ({"quant_method": "torchao"}, {".weight": I8, ".weight_scale": F16}, "torchao"),
    "quanto": ({"quant_method": "quanto"}, {".weight._data": I8, ".weight._scale": F16}, "quanto"),
    "exl2": ({"quant_method": "exl2", "bits": 5},
        {".q_weight": I32, ".q_scale": I32, ".q_groups": I32}, "EXL2, 5 bits"),
    "exl3": ({"quant_method": "exl3"}, {".trellis": I32, ".suh": F16, ".svh": F16}, "EXL3"),
    "aqlm": ({"quant_method": "aqlm"}, {".codebooks": F16, ".codes": I8, ".scales": F16}, "AQLM"),
    "spqr": ({"quant_method": "spqr"}, {".dense_weights": I32, ".row_offsets": I32}, "SpQR"),
    "bitnet": ({"quant_method": "bitnet"}, {".weight": U8, ".weight_scale": F16}, "BitNet"),
    "mlx": (None, {".weight": U32, ".scales": F16, ".biases": F16}, "MLX"),
    "unknown": ({"quant_method": "brandnew"}, {".weight": U8, ".weight_scale": F16}, "brandnew"),
}  # fmt: skip


def with_fp8(path, names):
    """Call the type of some U8 tensors of a file otherwise, which takes as many bytes."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name in names:
        header[name]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def quantised(folder, settings, layer):
    write_base(folder, CONFIGS[0])
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: open_tensors(path).read(name) for path in shards for name in open_tensors(path).tensors}
    del tensors[f"{LAYER}.weight"]
    tensors |= {LAYER + end: U8 if isinstance(value, str) else value for end, value in layer.items()}
    for path in (*shards, folder / "model.safetensors.index.json"):
        path.unlink()
    write_safetensors(folder / "model.safetensors", tensors)
    with_fp8(folder / "model.safetensors", [LAYER + end for end, value in layer.items() if isinstance(value, str)])
    if settings:
        (folder / "config.json").write_text(json.dumps({**CONFIGS[0], "quantization_config": settings}))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_quantised_weights_are_refused_by_the_name_of_the_method(name, tmp_path):
    settings, layer, called = CASES[name]
    with pytest.raises(BaseModelError) as caught:
        open_base(quantised(tmp_path / "base", settings, layer))
    assert f"holds quantised weights ({called}), which Thimble does not compute with: take" in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "plain"),
    [("Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "Llama-3.2-1B-Instruct"), ("Qwen2.5-7B-GPTQ-Int4", "Qwen2.5-7B"),
     ("Mistral-7B-v0.1-AWQ", "Mistral-7B-v0.1"), ("Qwen3-8B-FP8", "Qwen3-8B"), ("phi-4-quantized.w4a16", "phi-4"),
     ("Meta-Llama-3-8B-FP8-dynamic", "Meta-Llama-3-8B"), ("gemma-3-1b-it-4bit", "gemma-3-1b-it"),
     ("Qwen3-4B-4.0bpw-exl2", "Qwen3-4B")],
)  # fmt: skip
def test_the_folder_of_floats_is_guessed_from_the_name(name, plain, tmp_path):
    with pytest.raises(BaseModelError, match=f"probably called {plain}, or a GGUF file of the model"):
        open_base(quantised(tmp_path / name, *CASES["bnb-4bit"][:2]))


def test_or_from_what_the_config_was_made_of(tmp_path):
    folder = quantised(tmp_path / "base", *CASES["gptq"][:2])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "owner/Model"}))
    with pytest.raises(BaseModelError, match="made from, perhaps owner/Model, or a GGUF"):
        open_base(folder)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_older_folders_say_it_in_a_file_of_its_own(file, tmp_path):
    folder = quantised(tmp_path / "base", None, {".qweight": I32, ".qzeros": I32, ".scales": F16})
    (folder / file).write_text("{}")
    with pytest.raises(BaseModelError, match="holds quantised weights"):
        open_base(folder)


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_floats_under_a_config_that_says_otherwise_are_used_and_told(key, tmp_path):
    folder = write_base(tmp_path / "base", CONFIGS[0])
    settings = {"load_in_4bit": True, "group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps({**CONFIGS[0], key: settings}))
    base = open_base(folder)
    assert "says that its weights are quantised" in base.warnings[0]
    assert "but they are floats" in base.warnings[0]


@pytest.mark.parametrize("value", [None, {}, [], 7])
def test_a_config_that_says_nothing_of_the_kind_is_no_reason(value, tmp_path):
    folder = write_base(tmp_path / "base", CONFIGS[0])
    (folder / "config.json").write_text(json.dumps({**CONFIGS[0], "quantization_config": value}))
    assert not open_base(folder).warnings
