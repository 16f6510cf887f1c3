"""Frozen weights: how they are kept, and how a layer gets them for one product.

A matrix is kept dense, as int8 rows, or as the very blocks of the base file, memory-mapped. Whatever is not dense is
decoded just before a product and not kept: the memory of a frozen layer is the file's page cache, which the system may
drop. Knows nothing of adapters.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch import kernels
from thimble.backends.torch.memory import Memory
from thimble.core.sizes import windows
from thimble.models.base import Weight

Rows = slice | NDArray[np.int64]  # which rows of a matrix
TORCH_OF = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def as_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """View a float32, bfloat16 (as uint16) or int8 tensor as an array for the kernels; nothing is copied."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Matrix:
    """A frozen matrix (rows, cols), however it is kept."""

    rows: int
    cols: int
    dense: Tensor | None = None  # the numbers themselves, (rows, cols), if they are kept in the compute type
    resident_bytes = 0  # held in memory of our own; memory-mapped files do not count

    def decode(self, rows: Rows, out: Tensor) -> None:
        """Write some rows to `out`, (so many, cols), contiguous, in the compute type."""
        raise NotImplementedError

    def will_need(self) -> None:
        """Read ahead what is soon going to be used, where it is in a file."""

    def release(self, rows: slice) -> None:
        """Let go of whatever memory of some rows can be filled from the file again."""


class DenseMatrix(Matrix):
    """Kept as numbers in the compute type: fastest, largest."""

    def __init__(self, values: Tensor) -> None:
        self.dense = self._values = values
        self.rows, self.cols = values.shape
        self.resident_bytes = values.nbytes

    def decode(self, rows: Rows, out: Tensor) -> None:
        out.copy_(self._values[rows if isinstance(rows, slice) else torch.from_numpy(rows)])


class Int8Matrix(Matrix):
    """Kept as int8 with one scale a row: half of bfloat16, about 0.4 % error of the largest number in the row."""

    def __init__(self, weight: Weight) -> None:
        self.rows, self.cols = weight.shape
        self.q = np.empty(weight.shape, np.int8)
        self.scale = np.empty(self.rows, np.float32)
        self.resident_bytes = self.q.nbytes + self.scale.nbytes
        source = FileMatrix(weight, torch.float32)
        for rows in windows(self.rows, self.cols):  # so that the float32 numbers never exist all at once
            values = torch.empty(rows.stop - rows.start, self.cols)
            source.decode(rows, values)
            kernels.quantize_rows_into(values.numpy(), self.q[rows], self.scale[rows])
            source.release(rows)

    def move_to(self, q: NDArray[np.int8], scale: NDArray[np.float32]) -> None:
        """Keep the numbers in other arrays of the same shapes."""
        q[:], scale[:] = self.q, self.scale
        self.q, self.scale = q, scale

    def decode(self, rows: Rows, out: Tensor) -> None:
        kernels.dequantize_rows_into(self.q[rows], self.scale[rows], as_numpy(out))


class FileMatrix(Matrix):
    """Kept as the file's own blocks, memory-mapped and never quantised again."""

    def __init__(self, weight: Weight, compute: torch.dtype) -> None:
        self.rows, self.cols = weight.shape
        self.weight = weight
        self.raw = weight.raw()
        # Row i of the weight is row index[i] of the file.
        self.index = np.arange(self.rows) if weight.order is None else np.argsort(weight.order)
        if TORCH_OF.get(weight.dtype) == compute and weight.order is None:
            with warnings.catch_warnings():  # torch warns that the map is read-only; it is never written
                warnings.simplefilter("ignore", UserWarning)
                self.dense = torch.from_numpy(self.raw).view(compute)

    def decode(self, rows: Rows, out: Tensor) -> None:
        kernels.decode_rows(self.raw, self.weight.dtype, as_numpy(out), self.index[rows])

    def will_need(self) -> None:
        self.weight.will_need()

    def release(self, rows: slice) -> None:
        # Rows that lie scattered in the file go all at once.
        self.weight.release(slice(0, self.rows) if self.weight.order is not None else rows)


def load_matrix(weight: Weight, store: str, compute: torch.dtype) -> Matrix:
    """Take a weight of the base into a store: `dense`, `int8` or `file`."""
    if store == "int8":
        return Int8Matrix(weight)
    kept = FileMatrix(weight, compute)
    if store == "file":
        return kept
    values = torch.empty(kept.rows, kept.cols, dtype=compute)
    kept.decode(slice(0, kept.rows), values)
    kept.release(slice(0, kept.rows))
    return DenseMatrix(values)


class Neighbours(NamedTuple):
    """The layers that run before and after a streamed one in the forward pass; None at the ends."""

    earlier: "FrozenLinear | None"
    later: "FrozenLinear | None"


class FrozenLinear:
    """One or several frozen matrices that read the same input, stacked: (out, in) with out the sum of their rows.

    Dense matrices are stacked once. Others are decoded just before a product, a window of rows at a time, so that the
    decoded numbers are still in the cache.
    """

    def __init__(self, matrices: Sequence[Matrix], bias: Tensor | None, memory: Memory) -> None:
        self.bias = bias
        self.memory = memory
        self.neighbours: Neighbours | None = None
        self._row_squares: Tensor | None = None
        if len(matrices) > 1 and all(isinstance(matrix, DenseMatrix) for matrix in matrices):
            matrices = [DenseMatrix(torch.cat([matrix.dense for matrix in matrices]))]  # type: ignore[misc]
        self.matrices = list(matrices)
        self.rows, self.cols = sum(matrix.rows for matrix in matrices), matrices[0].cols

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Write x Wᵀ + bias to `out`: (tokens, in) to (tokens, out)."""
        self.matmul(x, out)
        return out if self.bias is None else out.add_(self.bias)

    def matmul(self, x: Tensor, out: Tensor) -> Tensor:
        """Write x Wᵀ to `out`: (tokens, in) to (tokens, out), both of the compute type or of a wider one."""
        is_whole = self.dense is not None and not self.neighbours and x.dtype == self.memory.compute
        for rows in [slice(0, self.rows)] if is_whole else self._windows(self.neighbours and self.neighbours.later):
            torch.mm(x, self.decoded(rows).to(x.dtype).t(), out=out[:, rows])
        return out

    def row_squares(self) -> Tensor:
        """Squared lengths of the rows of W, float32 (out,); measured once."""
        if self._row_squares is None:
            squares = [self.decoded(rows).float().square().sum(1) for rows in self._windows(None)]
            self._row_squares = torch.cat(squares)
        return self._row_squares

    def input_grad(self, grad: Tensor, out: Tensor) -> Tensor:
        """Write grad W to `out`: (tokens, out) to (tokens, in)."""
        pieces = self._windows(self.neighbours and self.neighbours.earlier)
        if len(windows(self.rows, self.cols)) == 1:
            for rows in pieces:
                torch.mm(grad, self.decoded(rows), out=out)
            return out
        total = self.memory.scratch("total", *out.shape, torch.float32).zero_()
        part = self.memory.scratch("part", *out.shape)
        for rows in pieces:
            total.add_(torch.mm(grad[:, rows], self.decoded(rows), out=part))
        return out.copy_(total)

    def _windows(self, following: "FrozenLinear | None") -> Iterator[slice]:
        """Windows of rows; of streamed weights, those of the next layer are read ahead and these let go of behind."""
        if following:
            following.will_need()
        for rows in windows(self.rows, self.cols):
            yield rows
            if self.neighbours:
                self.release(rows)

    @property
    def dense(self) -> Tensor | None:
        """All numbers, (out, in), if nothing has to be decoded."""
        return self.matrices[0].dense if len(self.matrices) == 1 else None

    def decoded(self, rows: slice) -> Tensor:
        """Some rows of the weight, valid until others are asked for on this thread."""
        if self.dense is not None:
            return self.dense[rows]
        out = self.memory.scratch("weight", rows.stop - rows.start, self.cols)
        for matrix, part, start in self._parts(rows):
            matrix.decode(part, out[start : start + part.stop - part.start])
        return out

    def _parts(self, rows: slice) -> Iterator[tuple[Matrix, slice, int]]:
        """The matrices that some rows lie in, which of their rows, and where these begin among the rows."""
        start = 0
        for matrix in self.matrices:
            low, high = max(rows.start, start), min(rows.stop, start + matrix.rows)
            if low < high:
                yield matrix, slice(low - start, high - start), low - rows.start
            start += matrix.rows

    def will_need(self) -> None:
        """Have the weights read ahead, where they are in a file."""
        for matrix in self.matrices:
            matrix.will_need()

    def release(self, rows: slice) -> None:
        """Let go of rows that the file can give again."""
        for matrix, part, _ in self._parts(rows):
            matrix.release(part)

    def gather(self, index: NDArray[np.int64]) -> Tensor:
        """Some rows of a single matrix, (len(index), in): a look-up in an embedding."""
        out = torch.empty(len(index), self.cols, dtype=self.memory.compute)
        self.matrices[0].decode(index, out)
        return out

    @property
    def resident_bytes(self) -> int:
        """Bytes held in memory of our own."""
        return sum(matrix.resident_bytes for matrix in self.matrices)
