"""A whole model as a GGUF file, adapters merged into it: some rows of one tensor in memory at a time.

Names, order of rows and metadata are those of llama.cpp's converter (`models/gguf_names`, `models/gguf_header`), types
those of its quantiser (`models/gguf_types`). A tensor that keeps its type and has no update keeps its blocks.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, merge
from thimble.data.batches import micro_batches
from thimble.data.encode import Row
from thimble.errors import BaseModelError, RunError
from thimble.files.gguf_write import NewTensor, write_gguf
from thimble.models.base import Base, Weight
from thimble.models.gguf_header import rope_tensors
from thimble.models.gguf_names import gguf_name
from thimble.models.gguf_types import FILE_TYPES, tensor_type

BATCH_TOKENS, MOST_TOKENS = 2048, 1 << 15  # that inputs are measured on, at a time and in all
WINDOW_VALUES = 1 << 20  # numbers that are decoded, merged and encoded at a time, on each core
Floats = NDArray[np.float32]
OnTensor = Callable[[int, int], None]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the new file: where its numbers come from, and what becomes of them."""

    name: str  # of the new file
    weight: Weight
    order: NDArray[np.int64] | None  # row i of the file is row order[i] of the weight, by transformers
    update: Factors | None
    dtype: str  # of the new file
    importance: Floats | None

    @property
    def rows(self) -> NDArray[np.int64] | None:
        """Row i of the new file is this row of the old one; None if they agree."""
        return self.order if self.weight.order is None else None


def plan_tensors(
    base: Base,
    updates: Mapping[str, Factors],
    file_type: str,
    importance: Mapping[str, Floats] | None = None,
) -> list[NewTensor]:
    """The tensors of the new file, whose bytes are made when they are asked for.

    Args:
        base: A GGUF file or a folder.
        updates: By path of the layer; none leaves the base as it is.
        file_type: One of FILE_TYPES.
        importance: Mean squares of what comes in at each column of a layer, float32 (in,), by path of the layer.

    Returns:
        One for each tensor, with its name, type and shape; a RunError comes out of those that hold NaN or Inf, or
        do not fit their type.
    """
    made = [_tensor(base, name, updates, file_type, importance) for name in base.weights]
    found = [NewTensor(one.name, one.dtype, one.weight.shape, partial(_parts, one)) for one in made]
    return [*extra_tensors(base), *found]


def write_gguf_model(
    path: Path,
    tensors: Sequence[NewTensor],
    file_type: str,
    header: Mapping[str, Any],
    on_tensor: OnTensor = lambda done, total: None,
) -> None:
    """Write planned tensors and the metadata of a model; the file appears only when it is complete.

    Args:
        path: The file to write.
        tensors: Of `plan_tensors`.
        file_type: The type they were planned for.
        header: Metadata, but for what says the type.
        on_tensor: Told how many tensors are done, of how many; what it raises ends the work.
    """
    said = {
        "general.quantization_version": np.uint32(2),
        "general.file_type": np.uint32(FILE_TYPES[file_type].number),
    }
    counted = [
        replace(tensor, parts=partial(_counted, tensor.parts, number, len(tensors), on_tensor))
        for number, tensor in enumerate(tensors, 1)
    ]
    write_gguf(path, {**header, **said}, counted)


def importance_of(session: Any, adapter: Adapter | None, rows: Sequence[Row]) -> dict[str, Floats]:
    """Mean squares of what comes in at each column of every layer, float32 (in,), on rows of text.

    Args:
        session: With the base.
        adapter: What is merged into it: the inputs that the merged model will see count. None for a bare base.
        rows: The first are taken, at most MOST_TOKENS of them.

    Returns:
        By path of the layer.
    """
    total = list(accumulate(len(row.ids) for row in rows))
    batches = micro_batches(rows[: max(1, bisect_right(total, MOST_TOKENS))], BATCH_TOKENS)
    return {path: squares for paths, squares in session.input_squares(batches, adapter) for path in paths}


def extra_tensors(base: Base) -> list[NewTensor]:
    """Tensors beside the weights: rotary divisors, and whatever else a GGUF base holds, as they are."""
    if base.metadata is None:
        return [_vector(name, values) for name, values in rope_tensors(base).items()]
    known = {weight.info.name for weight in base.weights.values()}
    files = dict.fromkeys(weight.file for weight in base.weights.values())
    return [
        NewTensor(info.name, info.dtype, info.shape, partial(lambda file, name: [file.raw(name).data], file, info.name))
        for file in files
        for info in file.tensors.values()
        if info.name not in known
    ]


def _tensor(
    base: Base,
    weight_name: str,
    updates: Mapping[str, Factors],
    file_type: str,
    importance: Mapping[str, Floats] | None,
) -> _Tensor:
    weight, layer = base.weights[weight_name], weight_name.removesuffix(".weight")
    name, order = gguf_name(base, weight_name)
    dtype = tensor_type(name, weight.shape, file_type, base.decoder, importance is not None)
    return _Tensor(name, weight, order, updates.get(layer), dtype, importance.get(layer) if importance else None)


def _counted(parts: Callable[[], Any], number: int, total: int, on_tensor: OnTensor) -> Iterator[bytes | memoryview]:
    yield from parts()
    on_tensor(number, total)


def _vector(name: str, values: Floats) -> NewTensor:
    return NewTensor(name, "F32", values.shape, lambda: [np.ascontiguousarray(values, "<f4").data])


# ---- the bytes of one tensor ----------------------------------------------------------------------------------------


def _parts(tensor: _Tensor) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor in its new type, some rows at a time, on every core."""
    from thimble.backends.torch.threads import map_parallel, num_cores

    weight = tensor.weight
    if len(weight.shape) == 1:
        values = weight.read()
        yield np.ascontiguousarray(values if tensor.order is None else values[tensor.order], "<f4").data
        return
    step = max(1, WINDOW_VALUES // weight.shape[1])
    windows = [slice(first, min(first + step, weight.shape[0])) for first in range(0, weight.shape[0], step)]
    encode = _copied if _is_kept(tensor) else _encoded
    most = 2 * num_cores()  # more results would wait in memory
    for first in range(0, len(windows), most):
        yield from map_parallel([partial(encode, tensor, window) for window in windows[first : first + most]], most)
    weight.release(slice(0, weight.shape[0]))


def _is_kept(tensor: _Tensor) -> bool:
    """Whether the blocks of the base are those of the new file."""
    is_same = tensor.update is None and tensor.dtype == tensor.weight.dtype
    return is_same and not tensor.weight.offset


def _copied(tensor: _Tensor, window: slice) -> memoryview:
    raw = tensor.weight.raw()
    kept = np.array(raw[window] if tensor.rows is None else raw[tensor.rows[window]])
    _release(tensor, window)
    return kept.data


def _encoded(tensor: _Tensor, window: slice) -> memoryview:
    from thimble.backends.torch.encode import encode

    values = _decoded(tensor, window)
    _release(tensor, window)
    if tensor.update is not None:
        # Sums that stay float32 are rounded once.
        wide = values.astype(np.float64) if tensor.dtype == "F32" else values
        values = merge(wide, _rows_of(tensor.update, tensor.order, window)).astype(np.float32)
    if not np.isfinite(values).all():
        raise RunError(f"{tensor.name} holds NaN or Inf: nothing is written; is the base whole?")
    try:
        return encode(values, tensor.dtype, tensor.importance).data
    except BaseModelError as error:
        raise RunError(f"{tensor.name}: {error}: nothing is written") from None


def _decoded(tensor: _Tensor, window: slice) -> Floats:
    """Rows of the new file as float32 (rows, columns)."""
    from thimble.backends.torch.kernels import decode_rows

    weight, rows = (
        tensor.weight,
        np.arange(tensor.weight.shape[0])[window] if tensor.rows is None else tensor.rows[window],
    )
    if weight.dtype == "F64":
        return weight.raw()[rows].view("<f8").astype(np.float32)
    values = np.empty((len(rows), weight.shape[1]), np.float32)
    decode_rows(weight.raw(), weight.dtype, values, rows)
    return values


def _release(tensor: _Tensor, window: slice) -> None:
    if tensor.rows is None:
        tensor.weight.release(window)


def _rows_of(update: Factors, order: NDArray[np.int64] | None, window: slice) -> Factors:
    """The part of an update that falls on some rows of the new file."""
    rows = window if order is None else order[window]
    return Factors(update.A, update.B[rows], update.scale, None if update.magnitude is None else update.magnitude[rows])
