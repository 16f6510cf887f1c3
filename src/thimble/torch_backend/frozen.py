"""Frozen weights: how they are kept, and how a layer gets them for one product.

A matrix is kept dense, as int8 rows, or as the very blocks of the base file, memory-mapped. Whatever is not dense is
decoded into one scratch buffer just before a product and not kept: the memory of a frozen layer is the file's page
cache, which the system may drop. Knows nothing of adapters.
"""

import warnings
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.core.base import Weight
from thimble.torch_backend import kernels
from thimble.torch_backend.memory import Scratch

STORES = ("dense", "int8", "file")
TORCH_OF = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}


def as_numpy(tensor: Tensor) -> NDArray[np.generic]:
    """View a float32, bfloat16 (as uint16) or int8 tensor as an array for the kernels; nothing is copied."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Matrix(Protocol):
    """A frozen matrix (rows, cols), however it is kept."""

    rows: int
    cols: int

    def decode_into(self, out: Tensor) -> None:
        """Write the numbers to `out`, (rows, cols), contiguous, in the compute type."""

    def decode_rows(self, index: NDArray[np.int64], out: Tensor) -> None:
        """Write some rows to `out`, (len(index), cols), contiguous, in the compute type."""

    @property
    def dense(self) -> Tensor | None:
        """The numbers themselves, (rows, cols), if they are kept in the compute type."""

    @property
    def resident_bytes(self) -> int:
        """Bytes held in memory of our own (memory-mapped files do not count)."""


class DenseMatrix:
    """Kept as numbers in the compute type: fastest, largest."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.rows, self.cols = values.shape

    def decode_into(self, out: Tensor) -> None:
        """See Matrix."""
        out.copy_(self.values)

    def decode_rows(self, index: NDArray[np.int64], out: Tensor) -> None:
        """See Matrix."""
        torch.index_select(self.values, 0, torch.from_numpy(index), out=out)

    @property
    def dense(self) -> Tensor | None:
        """See Matrix."""
        return self.values

    @property
    def resident_bytes(self) -> int:
        """See Matrix."""
        return self.values.nbytes


class Int8Matrix:
    """Kept as int8 with one scale a row: half of bfloat16, about 0.4 % error of the largest number in the row."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.rows, self.cols = values.shape
        self.q = np.empty(values.shape, np.int8)
        self.scale = np.empty(self.rows, np.float32)
        kernels.quantize_rows_into(values, self.q, self.scale)

    def decode_into(self, out: Tensor) -> None:
        """See Matrix."""
        kernels.dequantize_rows_into(self.q, self.scale, as_numpy(out))

    def decode_rows(self, index: NDArray[np.int64], out: Tensor) -> None:
        """See Matrix."""
        kernels.dequantize_rows_into(self.q[index], self.scale[index], as_numpy(out))

    @property
    def dense(self) -> Tensor | None:
        """See Matrix."""
        return None

    @property
    def resident_bytes(self) -> int:
        """See Matrix."""
        return self.q.nbytes + self.scale.nbytes


class FileMatrix:
    """Kept as the file's own blocks, memory-mapped and never quantised again."""

    def __init__(self, weight: Weight, compute: torch.dtype) -> None:
        self.rows, self.cols = weight.shape
        self.weight = weight
        self.raw = weight.raw()
        self.inverse = None if weight.order is None else np.argsort(weight.order)
        self._dense = self._view() if TORCH_OF.get(weight.dtype) == compute and weight.order is None else None

    def _view(self) -> Tensor:
        with warnings.catch_warnings():  # torch warns that the map is read-only; it is never written
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.raw).view(TORCH_OF[self.weight.dtype])

    def decode_into(self, out: Tensor) -> None:
        """See Matrix."""
        kernels.decode_rows(self.raw, self.weight.dtype, as_numpy(out), self.weight.order)

    def decode_rows(self, index: NDArray[np.int64], out: Tensor) -> None:
        """See Matrix."""
        index = index if self.inverse is None else self.inverse[index]
        kernels.decode_rows(self.raw[index], self.weight.dtype, as_numpy(out), None)

    @property
    def dense(self) -> Tensor | None:
        """See Matrix."""
        return self._dense

    @property
    def resident_bytes(self) -> int:
        """See Matrix."""
        return 0


def load_matrix(weight: Weight, store: str, compute: torch.dtype) -> Matrix:
    """Take a weight of the base into one of the stores.

    Args:
        weight: Matrix (rows, cols) of the base.
        store: `dense`, `int8` or `file`.
        compute: Type of the products, float32 or bfloat16.

    Returns:
        The frozen matrix.
    """
    kept = FileMatrix(weight, compute)
    if store == "file":
        return kept
    if store == "int8":
        return Int8Matrix(weight.read())
    values = torch.empty(kept.rows, kept.cols, dtype=compute)
    kept.decode_into(values)
    return DenseMatrix(values)


class FrozenLinear:
    """One or several frozen matrices that read the same input, stacked: (out, in) with out the sum of their rows.

    Dense matrices are stacked once. Others are decoded side by side into the scratch buffer, so that q, k and v (or
    gate and up) cost one product without a copy of mapped weights.
    """

    def __init__(self, matrices: list[Matrix], bias: Tensor | None, scratch: Scratch) -> None:
        self.bias = bias
        self.scratch = scratch
        if len(matrices) > 1 and all(isinstance(matrix, DenseMatrix) for matrix in matrices):
            matrices = [DenseMatrix(torch.cat([matrix.dense for matrix in matrices]))]  # type: ignore[misc]
        self.matrices = matrices
        self.rows, self.cols = sum(matrix.rows for matrix in matrices), matrices[0].cols

    def weight(self) -> Tensor:
        """All numbers, (out, in), in the compute type; valid until the next weight is asked for."""
        if len(self.matrices) == 1 and self.matrices[0].dense is not None:
            return self.matrices[0].dense
        out = self.scratch.take("weight", self.rows, self.cols)
        row = 0
        for matrix in self.matrices:
            matrix.decode_into(out[row : row + matrix.rows])
            row += matrix.rows
        return out

    def gather(self, index: NDArray[np.int64]) -> Tensor:
        """Some rows of a single matrix, (len(index), in): a look-up in an embedding."""
        out = torch.empty(len(index), self.cols, dtype=self.scratch.compute)
        self.matrices[0].decode_rows(index, out)
        return out

    @property
    def resident_bytes(self) -> int:
        """Bytes held in memory of our own."""
        return sum(matrix.resident_bytes for matrix in self.matrices)
