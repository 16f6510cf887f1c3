"""The weights of an opened base by one set of names, and the check that none is missing.

Weights are named as transformers names them (`model.layers.0.self_attn.q_proj.weight`), whatever the file calls them.
Nothing is read here but headers: a weight is a view of the memory-mapped file.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.errors import BaseModelError, listing, plural
from thimble.files.blocks import BLOCKS, dequantize
from thimble.files.tensor_info import TensorInfo
from thimble.files.tensors import TensorFile
from thimble.files.untrusted import printable
from thimble.models.frozen_base import quick_hash, whole_hash
from thimble.models.model_spec import ModelSpec
from thimble.models.spec import DecoderSpec

FLOATS = (*BLOCKS, "F64")  # types of weights; how each may be used is for those to say who use them
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Weight:
    """One tensor of a base."""

    file: TensorFile  # the file that holds it
    info: TensorInfo  # its name, type, shape and place there
    # row i of the file is row order[i] of the weight, int64 (rows,); None if they agree
    order: NDArray[np.int64] | None = None
    offset: float = 0.0  # added to what the file holds (1 for Gemma's norms in a folder)
    is_turned: bool = False  # whether the file holds a matrix as (in, out), as those of GPT-2

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a matrix, (size,) of a vector."""
        return self.info.shape[::-1] if self.is_turned else self.info.shape

    @property
    def dtype(self) -> str:
        """Type of the file's numbers, such as `BF16` or `Q4_0`."""
        return self.info.dtype

    def raw(self) -> NDArray[np.uint8]:
        """The file's own bytes, uint8 (rows, bytes per row) of a matrix; a view, nothing is copied."""
        return self.file.raw(self.info.name).reshape(self.info.shape[0], -1)

    def will_need(self) -> None:
        """Have the file read ahead."""
        self.file.will_need(self.info.name)

    def release(self, rows: slice) -> None:
        """Let go of the memory of some rows of the file, which the file can fill again."""
        size = self.info.nbytes // self.info.shape[0]
        self.file.release(self.info.name, rows.start * size, rows.stop * size)

    def raw_rows(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The bytes of some rows of a matrix, uint8 (rows, bytes per row), by their numbers in transformers: a copy."""
        found = self.raw()[rows if self.order is None else np.argsort(self.order)[rows]]
        self.release(slice(0, self.shape[0]))  # around each row the system has mapped many others
        return found

    def read_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows of a matrix, float32 (rows, in), by their numbers in transformers."""
        raw, shape = self.raw_rows(rows), (len(rows), self.shape[1])
        values = dequantize(raw, self.dtype, shape) if self.dtype in BLOCKS else raw.view("<f8").astype(np.float32)
        return values + np.float32(self.offset) if self.offset else values

    def read(self) -> NDArray[np.float32]:
        """The numbers, float32, in the order of transformers."""
        values = self.file.read(self.info.name)
        if self.is_turned:
            values = np.ascontiguousarray(values.T)
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
    spec: ModelSpec  # its description
    weights: Mapping[str, Weight]  # tensors by their transformers name
    metadata: Mapping[str, Any] | None  # GGUF key-value pairs, or None for a folder
    # what PEFT puts in front of `layers.0...` in the names of its modules; another for text models inside of a wrapper
    prefix: str = "model."
    loader: str = "AutoModelForCausalLM"  # the class of transformers that opens it with these names
    notes: tuple[str, ...] = ()  # which of several files were read, and the like
    warnings: tuple[str, ...] = ()  # what may not be as its owner thinks

    @property
    def is_own(self) -> bool:
        """Whether Thimble's own engine runs it; any other runs through transformers."""
        return isinstance(self.spec, DecoderSpec)

    @property
    def decoder(self) -> DecoderSpec:
        """The description that Thimble's own engine runs by; a BaseModelError where the base is of no such family."""
        if not isinstance(self.spec, DecoderSpec):
            raise BaseModelError(f"base {self.name} is a {self.spec.about}; expected a family of Thimble's own engine")
        return self.spec

    def check_own(self, what: str, instead: str) -> None:
        """Refuse what only Thimble's own engine can do, and say what to do instead."""
        if not self.is_own:
            raise BaseModelError(f"{what}: base {self.name} is a {self.spec.about}; {instead}")

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
        return quick_hash(self.files)

    def fingerprint(self) -> str:
        """SHA-256 of all weight files, hexadecimal; takes about a second per gigabyte."""
        return whole_hash(self.files)


def check_complete(path: Path, spec: DecoderSpec, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Refuse a base that lacks a tensor or has one of another shape; drop what the decoder does not use."""
    expected = expected_shapes(spec)
    optional = {f"{name}.bias": (shape[0],) for name, shape in spec.linear_shapes().items()}
    missing = [name for name in expected if name not in weights]
    found = [(name, weights[name], shape) for name, shape in {**expected, **optional}.items() if name in weights]
    odd = [(name, tuple(has.shape), shape) for name, has, shape in found if tuple(has.shape) != shape]
    wrong = [f"{name} is {has}, expected {shape}" for name, has, shape in odd]
    if odd and path.is_dir() and all(name in (EMBEDDING, HEAD) and has[1:] == shape[1:] for name, has, shape in odd):
        wrong = [
            f"{odd[0][0]} has {odd[0][1][0]:,} rows, and config.json says {spec.vocab_size:,} (vocab_size): the "
            "vocabulary was made larger or smaller, and one of the two files is of before; copy both from one place"
        ]
    unread = [f"{name} is {has.dtype}" for name, has, _ in found if has.dtype not in FLOATS]
    if unread:
        wrong.append(
            f"{unread[0]}, expected one of {listing(FLOATS, 20)}: take the same model in one of these types "
            f"({plural(len(unread), 'tensor')} of this one cannot be read)"
        )
    problems = [f"base {path} lacks {listing(missing, 3)}: {_why_missing(missing, weights)}"] if missing else []
    if missing == [HEAD]:
        problems[0] += ", or config.json should say that the head is the embedding (tie_word_embeddings is not true)"
    problems += [f"base {path}: {what}" for what in wrong[:5]]
    problems += [f"base {path} {what}" for what in spec.bias_problems(weights)]
    if problems:
        raise BaseModelError(*problems)
    return {name: weight for name, weight in weights.items() if name in expected or name in optional}


def _why_missing(missing: Sequence[str], given: Collection[str]) -> str:
    """Why tensors are missing: names have something of PEFT in or around them, or they are not there."""
    inside = [name for name in given if any(part in name for part in (".base_layer.", ".original_module."))]
    if inside:
        return (
            f"it was saved with an adapter in it that is not merged, as {printable(inside[0])} shows: save it again "
            "from where it was trained, with PEFT's model.merge_and_unload().save_pretrained(folder); or save the "
            "adapter alone, with model.save_pretrained(folder), and name the base that it was trained on"
        )
    for name in given:
        prefix = name.removesuffix(missing[0])
        if name != prefix and all(f"{prefix}{other}" in given for other in missing):
            return (
                f"they are called {printable(name)} and so on: save the model again without what is around it "
                "(a wrapper, such as that of PEFT)"
            )
    return "it is not complete"


def unread_layers(name: str, spec: DecoderSpec, given: Collection[str]) -> tuple[str, ...]:
    """A warning of tensors in the layers of a base that its decoder does not read: it may be another model."""
    expected = expected_shapes(spec)
    known = {*expected, *(f"{path}.bias" for path in spec.linear_shapes())}
    unread = [tensor for tensor in given if tensor.startswith("model.layers.") and tensor not in known]
    unread = [printable(tensor) for tensor in unread if not tensor.endswith(".rotary_emb.inv_freq")]
    if not unread:
        return ()
    return (
        f"{name} holds {listing(unread, 3)}, which a {spec.family} of this config.json does not read: they are left "
        "out, as transformers leaves them out; if they belong to the model, its config.json is that of another",
    )


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """All tensors that a decoder needs, and their shapes."""
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
