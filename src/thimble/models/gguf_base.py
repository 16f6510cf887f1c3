"""A GGUF file as a base: its tensors by the names of transformers, read from one file or from all parts of a split."""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError, listing
from thimble.files.tensor_info import TensorInfo
from thimble.files.tensors import TensorFile, open_tensors
from thimble.files.untrusted import printable
from thimble.models.spec import DecoderSpec, spec_from_gguf
from thimble.models.weights import Base, Weight, check_complete

# GGUF tensor names of one block ("blk.0." in front) and what transformers calls them.
GGUF_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
# Families with four norms per block, and Phi-3 with its fused MLP, use some of those names for other things.
GEMMA_BLOCK = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}  # fmt: skip
PHI3_BLOCK = {"ffn_up": "mlp.gate_up_proj"}
GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_DIVISORS, MOST_DIVISORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"), 4096
# llama.cpp turns pairs (2i, 2i + 1) in these architectures, so their files hold q and k rows in that order.
INTERLEAVED = ("llama", "smollm3")
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 1000
INPUT_FACTOR = ".input_scale"  # end of what llama.cpp reads and multiplies nothing by, if inputs stay floats
# GGUF files that hold no language model, by `general.type` or `general.architecture`.
OTHERS = {
    "adapter": "an adapter, not a base: name the model file that it was trained on",
    "mmproj": "the vision or audio part of a model (mmproj), not a language model: name the model file beside it",
    "clip": "the vision or audio part of a model (mmproj), not a language model: name the model file beside it",
    "imatrix": "an importance matrix, which is made to quantise a model, not a base: name the model file",
    "vocab": "a vocabulary without weights, not a base: name the model file",
}

Placed = dict[str, tuple[TensorFile, TensorInfo]]


def open_gguf(path: Path, file: TensorFile) -> Base:
    """Open a GGUF file, or all parts of the split that it belongs to; raises a BaseModelError as `open_base` does."""
    for key in ("general.type", "general.architecture"):
        kind = file.metadata.get(key)
        if isinstance(kind, str) and kind in OTHERS:
            raise BaseModelError(f"{path} is {OTHERS[kind]}")
    parts = _parts_of(path, file)
    first, placed = parts[0], _placed(path, parts)
    if "token_embd.weight" not in placed or len(placed["token_embd.weight"][1].shape) != 2:
        raise BaseModelError(f"{path} has no matrix token_embd.weight: expected a language model")
    rows = placed["token_embd.weight"][1].shape[0]
    spec = spec_from_gguf(first.metadata, rows, "output.weight" not in placed, _read_divisors(path, placed))
    arch = str(first.metadata["general.architecture"])
    weights = {}
    for name, (holder, info) in placed.items():
        ours = from_gguf_name(name, spec)
        if ours:
            weights[ours] = Weight(holder, info, row_order(ours, info.shape, arch, spec))
    notes = (f"the base is read from all {len(parts)} parts of {first.path.name}",) if len(parts) > 1 else ()
    used = check_complete(path, spec, weights)
    told = _check_unread(path, [name for name in placed if from_gguf_name(name, spec) not in used], arch)
    return Base(first.path.name, first.path, spec, used, first.metadata, notes=notes, warnings=told)


def _check_unread(path: Path, names: list[str], arch: str) -> tuple[str, ...]:
    """Refuse factors of matrices among tensors that the decoder does not read; a warning of others that matter."""
    factors = [printable(name) for name in names if name.endswith(".scale")]
    if factors:
        raise BaseModelError(
            f"{path} holds {listing(factors, 3)}, by which llama.cpp multiplies what a matrix makes: that is not "
            "supported; take the same model in one of the other types, such as Q8_0"
        )
    others = [printable(name) for name in names if name not in ROPE_DIVISORS and not name.endswith(INPUT_FACTOR)]
    if not others:
        return ()
    return (
        f"{path.name} holds {listing(others, 3)}, which a {arch} does not read: they are left out, and llama.cpp "
        "refuses such a file; if they belong to the model, it is another one: convert it again, or take another file",
    )


def _parts_of(path: Path, file: TensorFile) -> list[TensorFile]:
    """All files of the split that a file is a part of, in order; the file alone if it is whole."""
    count, number = (file.metadata.get(f"split.{key}", default) for key, default in (("count", 1), ("no", 0)))
    if not all(type(value) is int for value in (count, number)) or not 0 <= number < max(count, 1) <= MOST_PARTS:
        raise BaseModelError(
            f"{path} says that it is part {number} of {count}: expected whole numbers, at most {MOST_PARTS:,} parts; "
            "download it again"
        )
    if count <= 1:
        return [file]
    match = PART.fullmatch(path.name)
    if not match or (int(match["number"]), int(match["count"])) != (number + 1, count):
        name = f"NAME-{number + 1:05}-of-{count:05}.gguf"
        raise BaseModelError(
            f"{path} is part {number + 1} of {count} of a split GGUF, but is not called {name}: give all parts their "
            f"names back, or join them: llama-gguf-split --merge NAME-00001-of-{count:05}.gguf whole.gguf"
        )
    paths = [path.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise BaseModelError(
            f"{path.name} is one of the {count} parts of a split GGUF, and of the others {listing(missing, 3)} "
            f"{'is' if len(missing) == 1 else 'are'} missing in {path.parent}: download all parts into one folder"
        )
    parts = [file if part == path else open_tensors(part) for part in paths]
    for place, part in enumerate(parts):
        found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if part.format != "gguf" or found != (place, count):
            raise BaseModelError(
                f"{part.path} does not belong to the same split as {path.name}: expected part {place + 1} of {count}; "
                "download it again"
            )
    return parts


def _placed(path: Path, parts: list[TensorFile]) -> Placed:
    """All tensors with the files that hold them; refuses a tensor in two parts, and a number that does not add up."""
    placed: Placed = {}
    for part in parts:
        twice = [name for name in part.tensors if name in placed]
        if twice:
            raise BaseModelError(f"{part.path} holds {listing(twice, 3)} like a part before it: download it again")
        placed |= {name: (part, info) for name, info in part.tensors.items()}
    expected = parts[0].metadata.get("split.tensors.count")
    if len(parts) > 1 and expected is not None and expected != len(placed):
        raise BaseModelError(
            f"the parts of {path.name} hold {len(placed):,} tensors, expected {expected}: download all of them again"
        )
    return placed


def _read_divisors(path: Path, placed: Placed) -> dict[str, NDArray[np.float32]]:
    """The rotary divisors of a GGUF, which are few."""
    found = {name: placed[name] for name in ROPE_DIVISORS if name in placed}
    for name, (_, info) in found.items():
        if info.dtype != "F32" or len(info.shape) != 1 or info.shape[0] > MOST_DIVISORS:
            raise BaseModelError(
                f"{path} has {name} as {info.dtype} {info.shape}: expected at most {MOST_DIVISORS:,} F32 numbers"
            )
    return {name: holder.read(name) for name, (holder, _) in found.items()}


def from_gguf_name(name: str, spec: DecoderSpec) -> str | None:
    """What transformers calls a tensor of a GGUF; None if the decoder has no such tensor."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{GGUF_TOP[stem]}.{kind}" if stem in GGUF_TOP else None
    parts = stem.split(".", 2)
    if len(parts) != 3:
        return None
    _, number, part = parts
    known = block_names(spec)
    return f"model.layers.{number}.{known[part]}.{kind}" if part in known else None


def block_names(spec: DecoderSpec) -> dict[str, str]:
    """GGUF names of the tensors of one block of a family, and what transformers calls them."""
    return {**GGUF_BLOCK, **(GEMMA_BLOCK if spec.has_post_norms else PHI3_BLOCK if spec.is_fused else {})}


def row_order(name: str, shape: tuple[int, ...], arch: str, spec: DecoderSpec) -> NDArray[np.int64] | None:
    """Where each row of a GGUF's q or k matrix belongs: file row (head, j, half) is row (head, half, j)."""
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
    if arch not in INTERLEAVED or heads is None or shape[0] != heads * spec.head_dim:
        return None  # of another shape: refused later
    rows = np.arange(heads * spec.head_dim).reshape(heads, 2, spec.head_dim // 2)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(-1)).astype(np.int64)
