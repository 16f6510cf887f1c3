"""A base with updates added to its weights or taken off, row by row, and what rounding to the dtype of a file costs."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thimble.core.adapter import Adapter, cut
from thimble.core.lowrank import Factors, merge, svd_of_update
from thimble.errors import BaseModelError, RunError, as_word, listing, plural
from thimble.files.block_encoders import quantize
from thimble.files.blocks import dequantize
from thimble.files.peft import CONFIG_FILE, save_adapter
from thimble.files.peft_config import MAX_RANK
from thimble.files.tensors import open_tensors, rewrite_safetensors
from thimble.files.untrusted import is_inside
from thimble.models.adapter_base import FINGERPRINT
from thimble.models.base import Base, Weight
from thimble.models.weight_files import weight_files

ROUNDING_LIMIT = 0.1  # share of an update that rounding may change before a warning
WINDOW_VALUES = 1 << 18  # numbers of a weight that are merged at a time: the dozen passes over them stay in the cache
FLOAT_DTYPES = ("F32", "F16", "BF16")  # that a sum is rounded to number by number
# Files that describe a model; links to them are followed wherever they lead.
DESCRIPTIONS = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "model.safetensors.index.json", "preprocessor_config.json",
}  # fmt: skip
# Other copies of the weights that a folder may hold; taken along unmerged they would contradict the merged ones.
WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".tflite",
}  # fmt: skip


@dataclass(frozen=True)
class MergedLayer:
    """What became of the update of one layer.

    Attributes:
        name: Path of the layer.
        dtype: Dtype written.
        rank_before: Rank of the update, of several adapters the sum of their ranks.
        rank_after: Rank kept; 0 once merged into the base.
        parameters_before: Parameters the adapters hold for it.
        parameters_after: Parameters the new adapter holds for it; 0 once merged into the base.
        bytes_before: Their size in the files of the adapters.
        bytes_after: Their size in the file of the new one.
        norm: Length of the update before, the Frobenius norm of what is added to W.
        error: Length of what the update changed by, as a share of `norm`: what truncation cut off, or, merged into the
            base, what was lost by rounding to `dtype`.
    """

    name: str
    dtype: str
    rank_before: int
    rank_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    norm: float
    error: float


@dataclass(frozen=True)
class MergedKind:
    """The layers of one kind together.

    Attributes:
        kind: Last part of their paths, such as `q_proj`; `all` for all layers.
        layers: How many.
        rank_before: Lowest and highest rank before.
        rank_after: Lowest and highest rank after.
        parameters_before: Parameters before.
        parameters_after: Parameters after.
        bytes_before: Their size in files.
        bytes_after: Their size in the new file.
        error: Length of all that changed, as a share of the length of all updates.
        worst_error: Largest error of a layer.
        worst_layer: Which layer that is.
    """

    kind: str
    layers: int
    rank_before: list[int]
    rank_after: list[int]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    error: float
    worst_error: float
    worst_layer: str


OnLayer = Callable[[MergedLayer], None]
Rows = Callable[[], Iterator[memoryview]]  # the bytes of a weight, some rows at a time


def by_kind(layers: Sequence[MergedLayer]) -> list[MergedKind]:
    """Sums and errors by kind of layer, in the order the kinds come, and last over all layers."""
    kinds: dict[str, list[MergedLayer]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return [_summary(kind, group) for kind, group in {**kinds, "all": list(layers)}.items() if group]


def _summary(kind: str, layers: Sequence[MergedLayer]) -> MergedKind:
    squares = sum(layer.norm**2 for layer in layers)
    lost = sum((layer.norm * layer.error) ** 2 for layer in layers)
    worst = max(layers, key=lambda layer: layer.error)
    before, after = ([getattr(layer, name) for layer in layers] for name in ("rank_before", "rank_after"))
    names = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")
    sums = [sum(getattr(layer, name) for layer in layers) for name in names]
    error = math.sqrt(lost / squares) if squares else 0.0
    return MergedKind(
        kind, len(layers), [min(before), max(before)], [min(after), max(after)], *sums, error, worst.error, worst.name
    )


def worst_by_dtype(layers: Iterable[MergedLayer]) -> dict[str, float]:
    """The largest error of a layer of each dtype."""
    return {layer.dtype: layer.error for layer in sorted(layers, key=lambda layer: layer.error)}


def rounding_warning(layers: Iterable[MergedLayer]) -> str:
    """Which updates rounding changed by more than ROUNDING_LIMIT, and what to do about it."""
    bad = sorted((layer for layer in layers if layer.error > ROUNDING_LIMIT), key=lambda layer: -layer.error)
    return (
        f"rounding to {bad[0].dtype} changed the updates of {plural(len(bad), 'layer')} by more than "
        f"{ROUNDING_LIMIT:.0%}, most that of {bad[0].name} ({bad[0].error:.0%}): keep the adapter beside the base, as "
        "--adapter of chat and evaluate, or merge into a folder of F32 weights"
    )


def write_truncated(
    adapters: Sequence[Adapter],
    updates: Mapping[str, Factors],
    energy: float | None,
    most: int | None,
    folder: Path,
    on_layer: OnLayer,
) -> Adapter:
    """Truncate summed updates to a share of their energy (None: all) and a highest rank; write them as one adapter.

    What `on_layer` raises ends the work; it gets each layer as it is done, without its size in the files before.
    """
    kept = {}
    for path, factors in updates.items():
        small, norm, error = cut(factors, energy or 1.0, min(most or MAX_RANK, MAX_RANK))
        before, after = factors.num_parameters, small.num_parameters
        kept[path] = small
        on_layer(MergedLayer(path, "F32", factors.rank, small.rank, before, after, 0, 4 * after, norm, error))
    base, notes = adapters[0].base, adapters[0].notes
    if len({(adapter.base, adapter.notes.get(FINGERPRINT)) for adapter in adapters}) > 1:  # it is of none of them
        base, notes = "", {name: text for name, text in notes.items() if name != FINGERPRINT}
    written = replace(adapters[0], layers=kept, base=base, notes=notes, origin={})
    save_adapter(written, folder)
    return written


def check_mergeable(base: Base, layers: Sequence[str], adapter: str = "DIR") -> int:
    """Refuse a GGUF file, where an adapter may be used instead, and weights of no float dtype; return the bytes of all
    files that `write_merged` writes.
    """
    if base.metadata is not None:
        raise BaseModelError(
            f"base {base.path} is a GGUF file, whose blocks would have to be rounded again, which may cost more than a "
            f"small update is worth: keep the adapter beside it, as in `thimble chat --adapter {as_word(adapter)}`; or "
            "write a new file of a type that you name, and be told what rounding loses, with `thimble export "
            f"{as_word(adapter)} --merged --type Q8_0 --out merged.gguf`; or merge into a folder of float weights"
        )
    if other := [
        layer for layer in layers if layer in base.spec.linear_shapes() and f"{layer}.weight" not in base.weights
    ]:
        raise BaseModelError(
            f"base {base.path} cannot be merged into: transformers makes the weights of {listing(other, 2)} of tensors "
            "that the files hold in another form; keep the adapter beside it, as in `thimble chat --adapter "
            f"{as_word(adapter)}`"
        )
    weights = {layer: base.weights[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in base.weights}
    wrong = [f"{layer} is {weight.dtype}" for layer, weight in weights.items() if weight.dtype not in FLOAT_DTYPES]
    if wrong:
        expected = ", ".join(FLOAT_DTYPES)
        raise BaseModelError(f"base {base.path} cannot be merged into: {listing(wrong, 2)}; expected {expected}")
    return sum(path.stat().st_size for path in (*weight_files(base.path), *other_files(base.path)))


def write_merged(base: Base, updates: Mapping[str, Factors], folder: Path, on_layer: OnLayer) -> None:
    """Copy a Hugging Face folder with updates added to its weights; holds a few rows of one weight at a time.

    What `on_layer` raises ends the work; it gets each layer as it is done, without its sizes in files.
    """
    rows = {
        layer: partial(merged_rows, layer, base.weights[f"{layer}.weight"], factors, on_layer)
        for layer, factors in updates.items()
    }
    _write_changed(base, rows, folder)


def write_unmerged(
    base: Base, original: Base | None, updates: Mapping[str, Factors], folder: Path, on_layer: OnLayer
) -> None:
    """Copy a Hugging Face folder with updates taken off its weights; `on_layer` is told as by `write_merged`.

    Args:
        base: What the updates were merged into.
        original: What it was before, if that is known (`is_merge_of`): its weights are taken, bit for bit.
        updates: What was merged, without magnitudes unless the original is known.
        folder: Where to.
        on_layer: Told of each layer.
    """
    rows = {}
    for layer, factors in updates.items():
        name = f"{layer}.weight"
        negative = Factors(factors.A, -factors.B, factors.scale)
        rows[layer] = (
            partial(_original_rows, layer, original.weights[name], factors, on_layer)
            if original
            else partial(merged_rows, layer, base.weights[name], negative, on_layer)
        )
    _write_changed(base, rows, folder)


def is_merge_of(base: Base, original: Base, updates: Mapping[str, Factors]) -> bool:
    """Whether a base is, bit for bit, what merging updates into another one gives."""
    if base.weights.keys() != original.weights.keys():
        return False
    for name, weight in base.weights.items():
        before, factors = original.weights[name], updates.get(name.removesuffix(".weight"))
        if (before.dtype, before.shape) != (weight.dtype, weight.shape):
            return False
        pieces = (
            merged_rows(name, before, factors, lambda _: None) if factors else iter([before.raw().reshape(-1).data])
        )
        if not _is_same(weight.raw().reshape(-1), pieces):
            return False
    return True


def _is_same(numbers: NDArray[np.uint8], pieces: Iterable[memoryview]) -> bool:
    begin = 0
    for piece in pieces:
        part = np.frombuffer(piece, np.uint8)
        if not np.array_equal(numbers[begin : begin + len(part)], part):
            return False
        begin += len(part)
    return begin == len(numbers)


def _original_rows(layer: str, weight: Weight, factors: Factors, on_layer: OnLayer) -> Iterator[memoryview]:
    """The bytes of a weight as they are; nothing is lost."""
    yield weight.raw().reshape(-1).data
    norm = float(np.linalg.norm(svd_of_update(factors).values))
    on_layer(MergedLayer(layer, weight.dtype, factors.rank, 0, factors.num_parameters, 0, 0, 0, norm, 0.0))


def _write_changed(base: Base, rows: Mapping[str, Rows], folder: Path) -> None:
    """Copy a Hugging Face folder with other rows of some layers."""
    for path in other_files(base.path):
        place = folder / path.relative_to(base.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    for shard in weight_files(base.path):
        weights = {layer: base.weights[f"{layer}.weight"] for layer in rows}
        changed = {weights[layer].info.name: rows[layer] for layer in rows if weights[layer].file.path == shard}
        rewrite_safetensors(open_tensors(shard), folder / shard.name, changed)


def other_files(folder: Path) -> list[Path]:
    """What describes a model in a Hugging Face folder: no weights, no programs, and no adapter that lies beside it.

    Of the files that a link brings in from outside of it, only those are taken that have the name of a description.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_weight = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".bin.index.json")
        if is_weight or path.suffix == ".py" or path.name == CONFIG_FILE or any(part.startswith(".") for part in parts):
            continue
        if path.is_file() and (path.name in DESCRIPTIONS or is_inside(path, folder)):
            files.append(path)
    return files


def merged_rows(layer: str, weight: Weight, factors: Factors, on_layer: OnLayer) -> Iterator[memoryview]:
    """The bytes of a merged weight in its dtype, some rows at a time; then `on_layer` learns what rounding cost.

    A RunError if a sum does not fit the dtype, or W holds NaN or Inf.
    """
    num_rows, columns = weight.info.shape
    step = num_rows if weight.is_turned else max(1, WINDOW_VALUES // columns)
    # Wide enough that what is lost is lost by rounding to the dtype of the file, and rounding happens once.
    wide = np.float64 if weight.dtype == "F32" else np.float32
    lost = size = 0.0
    for first in range(0, num_rows, step):
        rows = slice(first, min(first + step, num_rows))
        old = dequantize(weight.raw()[rows], weight.dtype, (rows.stop - rows.start, columns)).astype(wide, copy=False)
        if weight.is_turned:
            exact = np.ascontiguousarray(merge(old.T, factors).T)
        else:
            magnitude = None if factors.magnitude is None else factors.magnitude[rows]
            exact = merge(old, Factors(factors.A, factors.B[rows], factors.scale, magnitude))
        size += float(np.linalg.norm(exact - old)) ** 2
        if not math.isfinite(size):
            raise RunError(f"{layer} of the base holds NaN or Inf: nothing is written")
        try:
            packed = quantize(exact.astype(np.float32, copy=False), weight.dtype)
        except BaseModelError as error:
            raise RunError(f"{layer}: {error}: nothing is written") from None
        lost += float(np.linalg.norm(dequantize(packed, weight.dtype, old.shape) - exact)) ** 2
        weight.release(rows)
        yield packed.data
    share = math.sqrt(lost / size) if size else 0.0
    on_layer(MergedLayer(layer, weight.dtype, factors.rank, 0, factors.num_parameters, 0, 0, 0, math.sqrt(size), share))
