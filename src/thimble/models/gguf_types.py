"""Which block type each tensor of a GGUF file gets, by the rules of llama.cpp's own quantiser.

Source: src/llama-quant.cpp (tensor_allows_quantization, llama_tensor_get_type_impl, tensor_type_fallback). The types
with `_M` give more bits to layers that suffer most from few: the first and last eighth, and every third between.
"""

from typing import NamedTuple

from thimble.errors import BaseModelError, listing
from thimble.files.blocks import BLOCKS
from thimble.models.spec import DecoderSpec


class FileType(NamedTuple):
    """What a user may ask for."""

    number: int  # of llama.cpp's enum llama_ftype
    dtype: str  # of most tensors


FILE_TYPES = {
    "F32": FileType(0, "F32"), "F16": FileType(1, "F16"), "BF16": FileType(32, "BF16"), "Q8_0": FileType(7, "Q8_0"),
    "Q6_K": FileType(18, "Q6_K"), "Q5_K_M": FileType(17, "Q5_K"), "Q5_1": FileType(9, "Q5_1"),
    "Q5_0": FileType(8, "Q5_0"), "Q4_K_M": FileType(15, "Q4_K"), "Q4_1": FileType(3, "Q4_1"),
    "Q4_0": FileType(2, "Q4_0"),
}  # fmt: skip
PLAIN = ("F32", "F16", "BF16")  # numbers without blocks
_MIXED = ("Q4_K_M", "Q5_K_M")
# What a type gives way to where a row is not whole blocks of it.
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def check_file_type(wanted: str) -> FileType:
    """Look up a type by its name; a BaseModelError if there is none."""
    if wanted not in FILE_TYPES:
        raise BaseModelError(f"type {wanted} is not known: expected one of {listing(FILE_TYPES, 20)}")
    return FILE_TYPES[wanted]


def tensor_type(name: str, shape: tuple[int, ...], wanted: str, spec: DecoderSpec, has_importance: bool) -> str:
    """The type of one tensor.

    Args:
        name: As GGUF calls it, such as `blk.0.ffn_down.weight`.
        shape: (rows, columns) of a matrix; vectors stay F32.
        wanted: One of FILE_TYPES.
        spec: Of the base.
        has_importance: Whether columns are weighed by an importance matrix.

    Returns:
        A key of BLOCKS.
    """
    if len(shape) < 2 or not name.endswith("weight") or "_norm.weight" in name:
        return "F32"
    default = FILE_TYPES[wanted].dtype
    if default in PLAIN:
        return default
    columns = shape[1]
    dtype = _by_part(name, wanted, default, columns, spec, has_importance)
    if columns % BLOCKS[dtype][0]:
        dtype = _FALLBACKS.get(dtype, dtype)
    return "F16" if columns % BLOCKS[dtype][0] else dtype


def _by_part(name: str, wanted: str, default: str, columns: int, spec: DecoderSpec, has_importance: bool) -> str:
    if name == "output.weight" or (spec.is_tied and name == "token_embd.weight"):
        return "Q8_0" if columns % BLOCKS[default][0] or default == "Q8_0" else "Q6_K"
    if not name.startswith("blk."):
        return default
    _, number, part, _ = name.split(".")
    layer, layers = int(number), spec.num_layers
    if part in ("attn_v", "attn_qkv"):
        if wanted in _MIXED and _gets_more_bits(layer, layers):
            return "Q6_K"
        return "Q5_K" if default == "Q4_K" and _is_70b(spec) else default
    if part == "ffn_down":
        if wanted in _MIXED and _gets_more_bits(layer, layers):
            return "Q6_K"
        if has_importance and layer < layers // 8:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}.get(wanted, default)
    return default


def _gets_more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_70b(spec: DecoderSpec) -> bool:
    """Whether llama.cpp takes a base for a 70B model, whose eight heads to a value matrix make more bits cheap."""
    is_grouped = spec.family == "qwen2" or spec.num_heads != spec.num_kv_heads
    return spec.num_layers == 80 and spec.family in ("llama", "qwen2", "mistral") and is_grouped
