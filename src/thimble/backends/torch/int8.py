"""Frozen products in int8: about twice the rate of bfloat16 on processors with VNNI, for a little accuracy.

Of gradients alone, `Int8Gradient`, or all of a layer's, `Int8Linear`. A row of the input and a row of the weight have
one scale each, so x Wᵀ is a product of whole numbers, scaled at its borders (Dettmers et al., arXiv:2208.07339).
Activations have columns far larger than the others, which would leave few steps for the rest: each column is divided by
a factor that the weight is multiplied by (SmoothQuant, Xiao et al., arXiv:2211.10438), chosen once from how large the
columns are on a sample of text. For g W the row scales are folded into g first.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch import kernels
from thimble.backends.torch.frozen import FrozenLinear, Int8Matrix, as_numpy
from thimble.core.sizes import windows
from thimble.files.blocks import TINY

SMOOTHING = 0.5  # how much of a column's size moves to the weight: 0 none, 1 all


class Watched(FrozenLinear):
    """A layer that remembers how large the columns of its input were."""

    def __init__(self, source: FrozenLinear) -> None:
        super().__init__(source.matrices, source.bias, source.memory)
        self.largest = np.zeros(self.cols, np.float32)

    def matmul(self, x: Tensor, out: Tensor) -> Tensor:
        np.maximum(self.largest, x.abs().amax(0).float().numpy(), out=self.largest)
        return super().matmul(x, out)


class Int8Gradient(FrozenLinear):
    """A frozen layer whose gradient of the input is a product of whole numbers; its forward product stays as it was.

    The weight in int8 is a second copy of it, but for matrices that are kept so.
    """

    def __init__(self, source: FrozenLinear, factor: NDArray[np.float32] | None = None) -> None:
        super().__init__(source.matrices, source.bias, source.memory)
        self.neighbours = source.neighbours
        self.divisor = np.ones(self.cols, np.float32) if factor is None else 1 / factor
        self.q = torch.empty(self.rows, self.cols, dtype=torch.int8)
        self.scale = np.empty(self.rows, np.float32)
        kept = [matrix for matrix in self.matrices if isinstance(matrix, Int8Matrix)]
        self._is_only_copy = factor is None and len(kept) == len(self.matrices)
        if self._is_only_copy:
            self._move(kept)
            return
        for rows in windows(self.rows, self.cols):
            values = as_numpy(source.decoded(rows))
            kernels.quantize_rows_into(values, self.q[rows].numpy(), self.scale[rows], factor)
        self.release(slice(0, self.rows))

    def _move(self, matrices: Sequence[Int8Matrix]) -> None:
        """Have the matrices keep their rows here."""
        start = 0
        for matrix in matrices:
            own = slice(start, start + matrix.rows)
            matrix.move_to(self.q[own].numpy(), self.scale[own])
            start = own.stop

    def input_grad(self, grad: Tensor, out: Tensor) -> Tensor:
        q, scale = self._quantized(grad, self.scale)
        sums = self.memory.scratch("sums", len(grad), self.cols, torch.int32)
        torch._int_mm(q, self.q, out=sums)
        kernels.rescale_into(sums.numpy(), scale, self.divisor, as_numpy(out))
        return out

    def _quantized(self, x: Tensor, factor: NDArray[np.float32]) -> tuple[Tensor, NDArray[np.float32]]:
        """Rows of x · factor as int8 in scratch, and their scales."""
        q = self.memory.scratch("whole", *x.shape, torch.int8)
        scale = np.empty(len(x), np.float32)
        kernels.quantize_rows_into(as_numpy(x.contiguous()), q.numpy(), scale, factor)
        return q, scale

    @property
    def resident_bytes(self) -> int:
        copy = 0 if self._is_only_copy else self.q.nbytes + self.scale.nbytes
        return super().resident_bytes + copy


class Int8Linear(Int8Gradient):
    """A frozen layer whose products are made of whole numbers, from one that has seen a sample of text."""

    def __init__(self, source: Watched) -> None:
        super().__init__(source, _smoothing(source))
        self.matrices = []

    def matmul(self, x: Tensor, out: Tensor) -> Tensor:
        q, scale = self._quantized(x, self.divisor)
        for rows in windows(self.rows, len(x)):  # so that the sums are scaled while they are in the cache
            sums = self.memory.scratch("sums", len(x), rows.stop - rows.start, torch.int32)
            torch._int_mm(q, self.q[rows].t(), out=sums)
            kernels.rescale_into(sums.numpy(), scale, self.scale[rows], as_numpy(out), rows.start)
        return out

    def decoded(self, rows: slice) -> Tensor:
        wide = self.q[rows].float() * torch.from_numpy(self.scale[rows])[:, None] * torch.from_numpy(self.divisor)
        return wide.to(self.memory.compute)


def _smoothing(source: Watched) -> NDArray[np.float32]:
    """Factors of the weight's columns, float32 (in,), about 1 on average."""
    largest = source.largest
    of_weight = np.zeros(source.cols, np.float32)
    for rows in windows(source.rows, source.cols):
        values = source.decoded(rows).float()
        np.maximum(of_weight, values.abs().amax(0).numpy(), out=of_weight)
    factor = np.maximum(largest, TINY) ** SMOOTHING / np.maximum(of_weight, TINY) ** (1 - SMOOTHING)
    is_seen = (largest > TINY) & (of_weight > TINY)
    mean = np.exp(np.log(factor[is_seen]).mean()) if is_seen.any() else 1.0
    return np.where(is_seen, factor / mean, 1).astype(np.float32)
