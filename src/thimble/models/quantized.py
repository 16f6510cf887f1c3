"""Folders of quantised weights, recognised by their config or their tensors, and refused with what to take instead.

Each method packs weights in a layout of its own, which only its own kernels (mostly for GPUs) compute with.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thimble.errors import BaseModelError
from thimble.files.tensor_info import TensorInfo
from thimble.files.untrusted import printable

# Names of methods as configs have them, and what people call them.
METHODS = {
    "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes, 4 bits", "bitsandbytes_8bit":
    "bitsandbytes, 8 bits", "gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)", "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4", "hqq": "HQQ",
    "eetq": "EETQ", "torchao": "torchao", "quanto": "quanto", "exl2": "EXL2", "exl3": "EXL3", "aqlm": "AQLM",
    "spqr": "SpQR", "bitnet": "BitNet", "modelopt": "NVIDIA ModelOpt", "nvfp4": "NVFP4", "quark": "Quark",
    "vptq": "VPTQ", "higgs": "HIGGS", "quip": "QuIP#", "mlx": "MLX", "fp_quant": "FP-Quant", "sinq": "SINQ",
    "metal": "Metal",
}  # fmt: skip
# Ends of names of tensors that only one layout has, the most telling first.
_MARKS = (
    (re.compile(r"\.quant_state\.bitsandbytes__\w+$|\.(nested_)?absmax$"), "bitsandbytes, 4 bits"),
    (re.compile(r"\.SCB$"), "bitsandbytes, 8 bits"),
    (re.compile(r"\.q_(weight|scale|groups|invperm|perm)$"), "EXL2"),
    (re.compile(r"\.(trellis|suh|svh)$"), "EXL3"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.qweight$|\.qzeros$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_scale_inv$"), "FP8"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_2$"), "NVFP4"),
    (re.compile(r"(_proj|\.weight)_blocks$"), "MXFP4"),
    (re.compile(r"\.codebooks$"), "AQLM"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.weight_scales$"), "EETQ"),
    (re.compile(r"\.weight\._(data|scale|shift)$|\.weight_qtype$"), "quanto"),
    (re.compile(r"\.(dense_weights|row_offsets)$"), "SpQR"),
    (re.compile(r"\.scales$"), "MLX"),
)
_PACKED = ("U8", "I8", "U32", "I32", "I16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")
_SUFFIX = re.compile(
    r"[-_.](unsloth|bnb|bitsandbytes|gptq|awq|autoround|auto-round|fp8|fp4|int[48]|uint4|[2-8]-?bits?|[48]bit|dynamic|"
    r"w\d+a\d+|g\d+|nvfp4|mxfp4|hqq|eetq|exl[23]|aqlm|spqr|mlx|quanto|torchao|quantized|quantised|quant|nf4|gs?\d+|"
    r"\d+(\.\d+)?bpw|marlin|gemm|static|block|kv)$",
    re.IGNORECASE,
)


def check_not_quantized(
    folder: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """Refuse quantised weights by the name of the method; return a warning if only the config speaks of one."""
    method, found = _method_of(folder, config), _layout_of(tensors)
    if not found:
        if not method:
            return ()
        return (
            f"config.json of {name} says that its weights are quantised ({method}), but they are floats: they are used "
            "as they are; transformers would quantise them while it loads them",
        )
    what = f"{method}, {found}" if method == METHODS["modelopt"] else method or found
    bits = _bits_of(config)
    what += f", {bits} bits" if bits and "bits" not in what else ""
    raise BaseModelError(
        f"base {folder} holds quantised weights ({what}), which Thimble does not compute with: take "
        f"{_instead(name, config)}, or a GGUF file of the model, which Thimble trains on as it is"
    )


def _method_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The method that a config names, as people call it; empty if it names none."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            given = place.get(key)
            if isinstance(given, dict) and given:
                return _called(given, key)
    for name, key in (
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("hf_quant_config.json", "modelopt"),
    ):
        if os.path.lexists(folder / name):
            return METHODS[key]
    return ""


def _called(given: Mapping[str, Any], key: str) -> str:
    method = given.get("quant_method") or given.get("quant_algo") or given.get("quant_type")
    if not isinstance(method, str):
        loads = [bits for bits in ("4", "8") if given.get(f"load_in_{bits}bit")]
        method = (
            "bitsandbytes"
            if loads
            else "mlx"
            if "group_size" in given and key == "quantization"
            else "compressed-tensors"
        )
    kind = METHODS.get(method.lower(), printable(method, 40))
    if kind == "bitsandbytes":
        return f"{kind}, {4 if given.get('load_in_4bit') else 8} bits"
    return kind


def _bits_of(config: Mapping[str, Any]) -> int | None:
    for key in ("quantization_config", "quantization"):
        given = config.get(key)
        for name in ("bits", "w_bit", "nbits"):
            if isinstance(given, dict) and type(given.get(name)) is int:
                return int(given[name])
    return None


def _layout_of(tensors: Mapping[str, TensorInfo]) -> str:
    """The layout that the tensors of a folder are packed in, empty if they are floats."""
    for pattern, method in _MARKS:
        if any(pattern.search(name) for name in tensors):
            return method
    matrices = [info for name, info in tensors.items() if name.endswith("_proj.weight")]
    if any(info.dtype.startswith("F8") for info in matrices):
        return "FP8"
    if any(info.dtype == "F4" for info in matrices):
        return "FP4"
    has_scales = any(name.endswith(("_proj.weight_scale", "_proj.scale", "_proj.weight.scale")) for name in tensors)
    return "packed numbers" if has_scales and any(info.dtype in _PACKED for info in matrices) else ""


def _instead(name: str, config: Mapping[str, Any]) -> str:
    """What to take instead, guessed from the name of the folder or from what the config was made of."""
    plain = name
    while (shorter := _SUFFIX.sub("", plain)) != plain and shorter:
        plain = shorter
    if plain != name:
        return f"the folder of float weights that it was made from, probably called {plain}"
    origin = config.get("_name_or_path")
    if isinstance(origin, str) and origin and len(origin) <= 200 and not _SUFFIX.search(origin):
        return f"the folder of float weights that it was made from, perhaps {printable(origin)}"
    return "the folder of float weights that it was made from"
