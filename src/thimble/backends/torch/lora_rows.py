"""Updates of many adapters in one pass of few tokens each: y += scale · (h Aᵀ) Bᵀ, every row with its own A and B.

Two compiled loops go through a group of projections for all adapters at once, whatever their ranks, and read each A and
B once, where it lies: nothing is stacked or padded, so the set of adapters may change with every step. (Punica,
arXiv:2310.18547, and S-LoRA, arXiv:2311.03285, do the same on GPUs.)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch.adapters import ActiveAdapter, LoraFactors
from thimble.backends.torch.compiled import compiled
from thimble.backends.torch.frozen import as_numpy
from thimble.backends.torch.fused import LOOP
from thimble.backends.torch.threads import parallel_for
from thimble.backends.torch.vectors import loaded, stored

MOST_TOKENS = 16  # of an adapter in a pass: with more, products of matrices are faster


class AdapterSpan(NamedTuple):
    """Consecutive tokens of a pass that have one adapter."""

    start: int
    stop: int
    adapter: ActiveAdapter


class _Table(NamedTuple):
    """The layers of one group of projections, of several adapters one after the other."""

    a_rows: NDArray[np.int64]  # (sum of ranks, 2): address of a row of A, and number of the span
    layers: NDArray[np.int64]  # (layers, 7): span, address of Bᵀ, of rates (or 0), rank, first rank, columns
    scales: NDArray[np.float32]  # (layers,)
    held: Sequence[Tensor] = ()  # what the addresses lie in

    @property
    def low(self) -> int:
        """Sum of all ranks."""
        return len(self.a_rows)


class RowUpdates:
    """What the adapters of some short spans add to the products of a pass."""

    def __init__(self, spans: Sequence[AdapterSpan]) -> None:
        self._adapters = tuple(span.adapter for span in spans)
        self._spans = np.array([(span.start, span.stop) for span in spans], np.int64)
        self._tables: dict[int, _Table] = {}

    def moved(self, spans: Sequence[AdapterSpan]) -> "RowUpdates | None":
        """The same for other tokens of the same adapters; None if they are others."""
        if tuple(span.adapter for span in spans) != self._adapters:
            return None
        new = RowUpdates(spans)
        new._tables = self._tables
        return new

    def add(self, number: int, columns: Mapping[str, slice], h: Tensor, y: Tensor) -> None:
        """Add to y (tokens, sum of outs) what group `number` of projections makes of h (tokens, in)."""
        table = self._tables.get(number)
        if table is None:
            table = self._tables[number] = _joined([look_up(adapter, number, columns) for adapter in self._adapters])
        if not table.low:
            return
        low = np.empty((len(h), table.low), np.float32)
        tokens = int((self._spans[:, 1] - self._spans[:, 0]).max())
        parallel_for(table.low, h.shape[1] * tokens // 4, shrink, as_numpy(h), table.a_rows, self._spans, low)
        work = table.low * tokens // 4
        what = (low, table.layers, table.scales, self._spans, as_numpy(y))
        parallel_for(y.shape[1], work, expand, *what)


def look_up(adapter: ActiveAdapter, number: int, columns: Mapping[str, slice]) -> _Table:
    """The layers that an adapter changes in a group of projections, as its first span."""
    table: _Table | None = adapter.tables.get(number)
    if table is None:
        found = [(adapter.layers[path], place) for path, place in columns.items() if path in adapter.layers]
        table = adapter.tables[number] = _of_one_span(found)
    return table


def _of_one_span(adapted: Sequence[tuple[LoraFactors, slice]]) -> _Table:
    """A table of some layers, which holds the tensors that its addresses lie in."""
    a_rows: list[tuple[int, int]] = []
    layers, held = [], list[Tensor]()
    for factors, columns in adapted:
        a, b, rates = factors.A.contiguous(), factors.B.t().contiguous(), factors.row_rates
        first, start = len(a_rows), a.data_ptr()
        a_rows += [(row, 0) for row in range(start, start + a.nbytes, a.shape[1] * a.element_size())]
        rank, rates_at = len(a_rows) - first, 0 if rates is None else rates.data_ptr()
        layers.append((0, b.data_ptr(), rates_at, rank, first, columns.start, columns.stop))
        held += [a, b] if rates is None else [a, b, rates]
    scales = np.array([factors.scale for factors, _ in adapted], np.float32)
    return _Table(np.array(a_rows, np.int64).reshape(-1, 2), np.array(layers, np.int64).reshape(-1, 7), scales, held)


def _joined(tables: Sequence[_Table]) -> _Table:
    """Tables of a span each behind one another."""
    a_rows, layers = (np.concatenate(parts) for parts in ([t.a_rows for t in tables], [t.layers for t in tables]))
    ranks, counts = [table.low for table in tables], [len(table.layers) for table in tables]
    layers[:, 4] += np.repeat(np.cumsum([0, *ranks[:-1]]), counts)
    a_rows[:, 1], layers[:, 0] = (np.repeat(np.arange(len(tables)), sizes) for sizes in (ranks, counts))
    held = [tensor for table in tables for tensor in table.held]
    return _Table(a_rows, layers, np.concatenate([table.scales for table in tables]), held)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), write


@compiled(**LOOP)
def shrink(begin, end, h, a_rows, spans, low):
    """Products of the tokens of each span with rows of its A: h (tokens, in), low float32 (tokens, sum of ranks)."""
    for i in range(begin, end):
        row = carray(_pointer(a_rows[i, 0]), (h.shape[1],), h.dtype)
        span = a_rows[i, 1]
        for t in range(spans[span, 0], spans[span, 1]):
            source, total = h[t], np.float32(0)
            for j in range(row.shape[0]):
                total += loaded(row[j]) * loaded(source[j])
            low[t, i] = total


@register_jitable
def _sum_rows(weights, rows, start, scale, total):
    """Set total (n,) to the sum of columns start to start + n of rows (rank, columns), each times weight and scale."""
    stop = start + total.shape[0]  # slices of single rows: those of a matrix have strides that are not known to be 1
    for column in range(total.shape[0]):
        total[column] = np.float32(0)
    whole = weights.shape[0] - weights.shape[0] % 4
    for j in range(0, whole, 4):
        a, b, c, d = scale * weights[j], scale * weights[j + 1], scale * weights[j + 2], scale * weights[j + 3]
        first, second, third, fourth = (
            rows[j][start:stop], rows[j + 1][start:stop], rows[j + 2][start:stop], rows[j + 3][start:stop]
        )  # fmt: skip
        for column in range(total.shape[0]):
            total[column] += (
                a * loaded(first[column]) + b * loaded(second[column]) + c * loaded(third[column])
                + d * loaded(fourth[column])
            )  # fmt: skip
    for j in range(whole, weights.shape[0]):
        a, first = scale * weights[j], rows[j][start:stop]
        for column in range(total.shape[0]):
            total[column] += a * loaded(first[column])


@compiled(**LOOP)
def expand(begin, end, low, layers, scales, spans, y):
    """Add scale · low Bᵀ to columns begin to end of y (tokens, sum of outs), and multiply rows by their rates."""
    total = np.empty(end - begin, np.float32)
    for i in range(layers.shape[0]):
        span, b_at, rates_at, rank, first, start, stop = layers[i]
        left, right = max(begin, start), min(end, stop)
        if left >= right:
            continue
        b = carray(_pointer(b_at), (rank, stop - start), y.dtype)
        for t in range(spans[span, 0], spans[span, 1]):
            to, added = y[t][left:right], total[: right - left]
            _sum_rows(low[t][first : first + rank], b, left - start, scales[i], added)
            for column in range(right - left):
                to[column] = stored(loaded(to[column]) + added[column], y)
            if rates_at:
                rates = carray(_pointer(rates_at), (stop - start,), np.float32)[left - start : right - start]
                for column in range(right - left):
                    to[column] = stored(loaded(to[column]) * rates[column], y)
