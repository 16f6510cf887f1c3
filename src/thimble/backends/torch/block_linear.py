"""Frozen layers whose forward product is made of whole numbers over the blocks of the file, which nothing rounds again.

Activations are rounded to int8 in runs of 32, each with a scale of its own, and the sums of products are exact: see
`block_products`, whose kernels write answers too. Gradients of inputs stay float products with decoded weights, since
g W adds up rows of W, and the scales of blocks lie along the columns.
"""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch.block_products import (
    ROWS,
    RUN,
    is_multiplied_in_blocks,
    product_kernel,
    quantize_run,
    whole_number_form,
)
from thimble.backends.torch.compiled import compiled
from thimble.backends.torch.dot_products import call_product
from thimble.backends.torch.frozen import FileMatrix, FrozenLinear, as_numpy
from thimble.backends.torch.threads import parallel_for


class BlockLinear(FrozenLinear):
    """A frozen layer, kept as blocks of a file, that multiplies these by activations in int8; results are float32."""

    @staticmethod
    def fits(source: FrozenLinear) -> bool:
        """Whether all matrices of a layer are blocks that this processor multiplies."""
        matrices = source.matrices
        return all(isinstance(it, FileMatrix) and is_multiplied_in_blocks(it.weight.dtype) for it in matrices)

    def __init__(self, source: FrozenLinear) -> None:
        super().__init__(source.matrices, source.bias, source.memory)

    def matmul(self, x: Tensor, out: Tensor) -> Tensor:
        inputs = self._quantized(x)
        for rows in self._windows(self.neighbours and self.neighbours.later):
            for matrix, part, start in self._parts(rows):
                to = as_numpy(out[:, rows.start + start :])
                self._multiply(cast(FileMatrix, matrix), part, len(x), inputs, to)
        return out

    def _multiply(
        self, matrix: FileMatrix, rows: slice, tokens: int, inputs: tuple[int, int, int], out: NDArray[np.generic]
    ) -> None:
        """Write what some rows of a matrix make of the inputs to the first columns of `out`, (tokens, so many)."""
        kernel = product_kernel(matrix.weight.dtype, whole_number_form())
        index = 0 if matrix.weight.order is None else matrix.index.ctypes.data
        weights = (matrix.raw.ctypes.data, matrix.raw.strides[0], index, matrix.cols)
        to = (out.ctypes.data - rows.start * out.itemsize, out.strides[0])  # where row 0 would go
        groups, work = -(-(rows.stop - rows.start) // ROWS), ROWS * matrix.cols * tokens // RUN
        parallel_for(groups, work, _multiply, kernel, weights, (rows.start, rows.stop), tokens, inputs, to)

    def _quantized(self, x: Tensor) -> tuple[int, int, int]:
        """Addresses, in scratch, of what `block_products` calls activations: whole numbers, scales and sums."""
        tokens, runs, scratch = len(x), self.cols // RUN, self.memory.scratch
        whole = scratch("runs", tokens * runs, RUN, torch.int8)
        scales, sums = (scratch(f"{name} of runs", tokens, runs, torch.float32) for name in ("scales", "sums"))
        of_runs = [each.view(runs, tokens).numpy() for each in (scales, sums)]
        to = whole.view(runs, tokens, RUN).numpy()
        parallel_for(tokens, self.cols, _quantize, as_numpy(x.contiguous()), to, *of_runs)
        return whole.data_ptr(), scales.data_ptr(), sums.data_ptr()


@compiled(nogil=True, error_model="numpy")
def _quantize(begin, end, x, q, scales, sums):
    for t in range(begin, end):
        for run in range(q.shape[0]):
            scales[run, t], sums[run, t] = quantize_run(x[t, run * RUN : run * RUN + RUN], q[run, t])


@compiled(nogil=True, error_model="numpy")
def _multiply(begin, end, kernel, weights, rows, tokens, inputs, to):
    first, last = rows[0] + begin * ROWS, min(rows[0] + end * ROWS, rows[1])
    call_product(kernel, (*weights, first, last, tokens, 0, *inputs, *to))
