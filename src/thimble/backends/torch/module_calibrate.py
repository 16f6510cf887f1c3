"""What reaches each adapted layer of a module before training begins: its inputs, and the gradient of its weight.

Seen by hooks on the layers, whatever the module does between them. Inputs of a convolution are its patches, so that its
weight, (out, in · kernel), is a matrix like any other. Tokens that fill up short texts are left out. The adapter is on
and its B is zero: the module is its base, and gradients come to every layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thimble.backends.torch.attached_places import Place
from thimble.backends.torch.calibrate import Sums, Visit
from thimble.core.inits import Moments
from thimble.core.method import Init
from thimble.core.sizes import MOMENT_BYTES

MASK = "attention_mask"  # the argument that says which tokens of padded texts are there

Run = Callable[[], None]  # runs all batches through the module
Look = Callable[[Place, Tensor, Tensor, Tensor | None], None]  # place, input, output, which rows of the input are there


def init_problems(places: Sequence[Place], ranks: Mapping[str, int], init: Init) -> list[str]:
    """Why an init that is found on data, or on what rounding loses, cannot be had for some layers, a line each."""
    problems = [f"--init {init}: {place.path} {why}" for place in places if (why := _unfit(place, init))]
    problems += [
        f"--rank {ranks[place.path]}: expected at most {init.most_rank(place.shape)} for {place.path}, which is (out, "
        f"in) {place.shape}, with init {init}"
        for place in places
        if ranks[place.path] > init.most_rank(place.shape)
    ]
    return problems


def _unfit(place: Place, init: Init) -> str:
    """Why nothing can be found for a layer, as the end of a sentence; empty if it can."""
    if init.needs == "quantised":
        return "" if type(place.layer) is nn.Linear else "is no Linear layer, which alone --store int8 rounds"
    if place.layout.is_embedding:
        return "is an embedding, whose inputs are numbers of words: take kaiming, or leave it out"
    if not place.is_beside:
        return "computes with its weight in a way of its own, which shows no inputs: take kaiming, or leave it out"
    if place.layout.groups > 1 or len(place.layout.kernel) > 2:
        return "is a convolution in groups or of three dimensions: take kaiming, or leave it out"
    return ""


def input_moments(module: nn.Module, places: Sequence[Place], run: Run) -> Iterator[tuple[list[str], Moments]]:
    """Second moments of the inputs of each layer; the batches run once for as many layers as fit MOMENT_BYTES."""
    for part in _parts(places):
        sums = {place.path: Sums(place.shape[1]) for place in part}

        def add(place: Place, x: Tensor, output: Tensor, there: Tensor | None, sums: Any = sums) -> None:
            sums[place.path].add(_there(_inputs(place, x), there))

        with torch.no_grad(), _watching(module, part, add):
            run()
        for path, of in sums.items():
            yield [path], Moments(of.square.numpy(), of.total.numpy(), max(1, of.count))


def _parts(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Layers in order, as many at a time as have second moments of MOMENT_BYTES."""
    part: list[Place] = []
    for place in places:
        if part and 4 * sum(one.shape[1] ** 2 for one in (*part, place)) > MOMENT_BYTES:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def watch_gradients(module: nn.Module, places: Sequence[Place], run: Run, visit: Visit) -> None:
    """Run batches forward and back, and show the inputs of each layer with the gradient of its outputs to `visit`."""

    def wait(place: Place, x: Tensor, output: Tensor, there: Tensor | None) -> None:
        def arrive(grad: Tensor) -> None:
            visit(place.path, _there(_inputs(place, x), there), _there(_outputs(place, grad), there))

        output.register_hook(arrive)

    with _watching(module, places, wait):
        run()


@contextlib.contextmanager
def _watching(module: nn.Module, places: Sequence[Place], look: Look) -> Iterator[None]:
    """Within this, each call of a layer is looked at, behind what its adapter adds."""
    masks: list[Tensor | None] = [None]

    def note(called: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        masks[0] = kwargs.get(MASK)

    def seen(place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        mask = masks[0]
        there = None
        if not place.layout.kernel and mask is not None and x.dim() > 2 and x.shape[:-1] == mask.shape:
            there = mask.reshape(-1).bool()
        look(place, x, output, there)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True)]
    for place in places:

        def hook(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, place: Place = place
        ) -> None:
            seen(place, args, kwargs, output)

        handles.append(place.layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _there(rows: Tensor, there: Tensor | None) -> Tensor:
    return rows if there is None else rows[there]


def _outputs(place: Place, grad: Tensor) -> Tensor:
    """Gradients of a layer's outputs as float32 (n, out): of a convolution one row a place."""
    if place.layout.kernel:
        grad = _batched(place, grad).movedim(1, -1)
    return grad.reshape(-1, grad.shape[-1]).float()


def _inputs(place: Place, x: Tensor) -> Tensor:
    """Inputs of a layer as float32 (n, in): of a convolution the patch under the kernel at each place."""
    kernel = place.layout.kernel
    if not kernel:
        return x.reshape(-1, x.shape[-1]).float()
    layer: Any = place.layer
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(_batched(place, x).float(), layer._reversed_padding_repeated_twice, mode=mode)
    sizes = [tuple(size) for size in (kernel, layer.dilation, layer.stride)]
    if len(kernel) == 1:
        x, sizes = x.unsqueeze(2), [(1, *size) for size in sizes]
    patches = functional.unfold(x, sizes[0], dilation=sizes[1], stride=sizes[2])
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _batched(place: Place, x: Tensor) -> Tensor:
    """What a convolution takes or gives with its axis of rows, which one row alone may lack."""
    return x[None] if x.dim() == len(place.layout.kernel) + 1 else x
