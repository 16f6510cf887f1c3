"""A look at what reaches each layer before training begins: its inputs, and the gradient of its weight.

Inputs are seen in a forward pass that goes block by block, so that one block's second moments are held at a time. The
gradient of a weight is as large as the weight and is never kept: two backward passes over the same batches give its
main directions. The first multiplies it from the left with random numbers, Ωᵀ G, whose rows span what it does to its
inputs; the second measures it there, G V (Halko et al., arXiv:0909.4061, sections 4.1 and 5.1). That needs the memory
of an adapter, and no float weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.lora import Lora, Projection, Ranges
from thimble.backends.torch.loss import label_loss
from thimble.core.inits import Moments, Sketch
from thimble.core.lowrank import thin_svd
from thimble.data.batches import Batch
from thimble.data.prefixes import whole_rows

Visit = Callable[[str, Tensor, Tensor], None]  # a layer's inputs (n, in), and the gradients of its outputs (n, out)
Squares = tuple[list[str], NDArray[np.float32]]  # layers that share their inputs, and of these the mean squares

SPARE = 8  # directions a sketch carries beside those wanted


# ---- inputs ---------------------------------------------------------------------------------------------------------


class Sums:
    """Of the inputs of one group of layers, each of so many columns."""

    def __init__(self, columns: int) -> None:
        self.square, self.total, self.count = torch.zeros(columns, columns), torch.zeros(columns), 0

    def add(self, h: Tensor) -> None:
        wide = h.float()
        self.square.addmm_(wide.t(), wide)
        self.total.add_(wide.sum(0))
        self.count += len(h)


class _Squares:
    """Of the inputs of one group of layers, each of so many columns: their squares alone."""

    def __init__(self, columns: int) -> None:
        self.total, self.count = torch.zeros(columns, dtype=torch.float64), 0

    def add(self, h: Tensor) -> None:
        self.total.add_(h.float().square().sum(0))
        self.count += len(h)


def input_moments(decoder: Decoder, batches: Sequence[Batch]) -> Iterator[tuple[list[str], Moments]]:
    """Second moments of the inputs of every layer, a block at a time, with the paths of the layers that share each."""
    for paths, of in _over_inputs(decoder, batches, Sums):
        yield paths, Moments(of.square.numpy(), of.total.numpy(), of.count)


def input_squares(decoder: Decoder, batches: Sequence[Batch], adapter: Ranges = ()) -> Iterator[Squares]:
    """Mean square of each column of the inputs of every layer, float32 (in,), with the paths that share it.

    With an adapter, what the layers get as it works.
    """
    for paths, of in _over_inputs(decoder, batches, _Squares, adapter):
        yield paths, (of.total / of.count).float().numpy()


@torch.no_grad()
def _over_inputs(
    decoder: Decoder, batches: Sequence[Batch], gather: Callable[[int], Any], adapter: Ranges = ()
) -> Iterator[tuple[list[str], Any]]:
    """Show the inputs of every group of layers to a value that `gather` makes for its columns, a block at a time."""
    passes = [decoder.pack(whole_rows(batch.starts)) for batch in batches]
    streams = [decoder.embed(batch.ids, one.size) for batch, one in zip(batches, passes, strict=True)]
    for block in decoder.blocks:
        sums = {projection.number: gather(projection.frozen.cols) for projection in block.projections}
        for number, one in enumerate(passes):
            real = one.segments[-1].end

            def add(projection: Projection, h: Tensor, sums: dict[int, Any] = sums, real: int = real) -> None:
                sums[projection.number].add(h[:real])

            decoder.memory.begin()
            streams[number] = decoder.block(block, streams[number], replace(one, lora=Lora(adapter, on_input=add)))
        for projection in block.projections:
            yield list(projection.columns), sums.pop(projection.number)


# ---- gradients ------------------------------------------------------------------------------------------------------


@dataclass
class _Watched:
    """One layer's sketch in the making."""

    probe: Tensor  # Ω: (out, k) for the gradient; (in, k) where inputs are weighted by the square of their gradient
    rows: Tensor  # first Ωᵀ G, (k, in), then an orthonormal basis V of its rows
    image: Tensor  # G Vᵀ, (out, k); with weights V Σ w xᵀ x Vᵀ, (k, k)
    answer: Tensor = field(default_factory=lambda: torch.empty(0))  # Σ (V x)(V x)ᵀ, (k, k)
    input_square: float = 0.0  # Σ ‖x‖²
    count: int = 0  # inputs seen


def sketch_gradients(
    decoder: Decoder,
    batches: Sequence[Batch],
    ranks: Mapping[str, int],
    is_weighted: bool = False,
    seed: int = 0,
    checkpointed_blocks: int = 0,
) -> dict[str, Sketch]:
    """Main directions of the gradient of each weight over some batches, which run twice; see `sketches`."""
    shapes = {
        path: (columns.stop - columns.start, projection.frozen.cols)
        for projection in decoder.projections
        for path, columns in projection.columns.items()
        if path in ranks
    }

    def run(visit: Visit) -> None:
        def visit_group(projection: Projection, h: Tensor, grad: Tensor) -> None:
            wide = h.float()
            for path, columns in projection.columns.items():
                if path in shapes:
                    visit(path, wide, grad[:, columns].float())

        watch_gradients(decoder, batches, visit_group, checkpointed_blocks)

    return sketches(shapes, ranks, run, is_weighted, seed)


def sketches(
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    run: Callable[[Visit], None],
    is_weighted: bool,
    seed: int,
) -> dict[str, Sketch]:
    """Main directions of the gradient of each weight, at least `ranks` of each.

    Args:
        shapes: (out, in) of each layer by path, in the order in which they draw random numbers.
        ranks: How many directions are wanted of each.
        run: Runs the batches forward and back, twice in all, and shows each layer's inputs (n, in) and the gradients
            of its outputs (n, out) to the function that it is given.
        is_weighted: Whether those of Σ ‖δ‖² xᵀ x are taken instead, δ being the gradient of an output: the same right
            singular vectors if the δ of different inputs point in unrelated directions.
        seed: Of the random numbers.

    Returns:
        The sketches by path.
    """
    found: dict[str, _Watched] = {}
    random = torch.Generator().manual_seed(seed)
    for path, (fan_out, fan_in) in shapes.items():
        width = min(ranks[path] + SPARE, fan_in, fan_out)
        probe = torch.randn(fan_in if is_weighted else fan_out, width, generator=random)
        found[path] = _Watched(probe, torch.zeros(width, fan_in), torch.zeros(width if is_weighted else fan_out, width))
    spread, measure = (_spread_weighted, _measure_weighted) if is_weighted else (_spread, _measure)
    run(lambda path, x, grad: spread(found[path], x, grad))
    for layer in found.values():
        layer.rows = torch.linalg.qr(layer.rows.t()).Q.t().contiguous()
        layer.probe, width = torch.empty(0), len(layer.rows)
        layer.answer = torch.zeros(width, width)
    run(lambda path, x, grad: measure(found[path], x, grad))
    return {path: _finished(layer) for path, layer in found.items()}


def watch_gradients(
    decoder: Decoder,
    batches: Sequence[Batch],
    visit: Callable[[Projection, Tensor, Tensor], None],
    checkpointed_blocks: int = 0,
) -> None:
    """Run batches forward and back on the bare base, and let every group of layers be visited.

    `visit` gets the inputs (tokens, in) and the gradient of the outputs (tokens, sum of outs), padding left out.
    """
    for batch in batches:
        real = int(batch.starts[-1])

        def watch(projection: Projection, h: Tensor, grad: Tensor, real: int = real) -> None:
            visit(projection, h[:real], grad[:real])

        forward = decoder.pack(whole_rows(batch.starts), Lora(on_gradient=watch), checkpointed_blocks)
        label_loss(decoder, decoder.hidden(batch.ids, forward), batch.labels).backward()


def _spread(layer: _Watched, x: Tensor, grad: Tensor) -> None:
    layer.rows.addmm_((grad @ layer.probe).t(), x)


def _measure(layer: _Watched, x: Tensor, grad: Tensor) -> None:
    layer.image.addmm_(grad.t(), _answers(layer, x))


def _spread_weighted(layer: _Watched, x: Tensor, grad: Tensor) -> None:
    weights = grad.square().sum(1, keepdim=True)
    layer.rows.addmm_((weights * (x @ layer.probe)).t(), x)


def _measure_weighted(layer: _Watched, x: Tensor, grad: Tensor) -> None:
    low = _answers(layer, x)
    layer.image.addmm_((grad.square().sum(1, keepdim=True) * low).t(), low)


def _answers(layer: _Watched, x: Tensor) -> Tensor:
    """V x of each input, (tokens, k), which is counted."""
    low = x @ layer.rows.t()
    layer.answer.addmm_(low.t(), low)
    layer.input_square += float(x.square().sum())
    layer.count += len(x)
    return low


def _finished(layer: _Watched) -> Sketch:
    left, values, turn = thin_svd(layer.image.numpy())
    answer = turn @ (layer.answer.double().numpy() / layer.count) @ turn.T
    right = (turn @ layer.rows.double().numpy()).astype(np.float32)
    return Sketch(left, values, right, layer.input_square / layer.count, answer)


# ---- how good a start is --------------------------------------------------------------------------------------------


def captured_energy(
    decoder: Decoder,
    batches: Sequence[Batch],
    candidates: Mapping[str, Mapping[str, NDArray[np.float32]]],
    checkpointed_blocks: int = 0,
) -> dict[str, dict[str, tuple[NDArray[np.float64], float]]]:
    """How much of the gradient of W, on rows not seen before, lies in the span of each candidate for A.

    With B at zero, that is the part of the gradient that the first steps can follow. Candidates are A by layer path,
    float32 (rank, in), by name. Returned is, by candidate and path, what each row of A adds to ‖G P‖², float64 (rank,),
    P projecting on the rows so far, and ‖G‖²; both summed over batches.
    """
    bases = {
        name: {path: torch.linalg.qr(torch.from_numpy(a).t()).Q for path, a in layers.items()}
        for name, layers in candidates.items()
    }
    found: dict[str, dict[str, tuple[NDArray[np.float64], float]]] = {name: {} for name in candidates}

    def visit(projection: Projection, h: Tensor, grad: Tensor) -> None:
        for path, columns in projection.columns.items():
            own = [name for name in bases if path in bases[name]]
            if not own:
                continue
            gradient = grad[:, columns].float().t() @ h.float()  # as large as the weight, for a moment
            whole = float(gradient.square().sum())
            for name in own:
                parts = (gradient @ bases[name][path]).square().sum(0).double().numpy()
                before = found[name].get(path, (np.zeros_like(parts), 0.0))
                found[name][path] = (before[0] + parts, before[1] + whole)

    watch_gradients(decoder, batches, visit, checkpointed_blocks)
    return found
