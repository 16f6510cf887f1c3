"""Convolutions in training, folded with what follows them: a frozen norm, a nonlinearity, and their own update.

A frozen batch norm multiplies each channel by one number and adds another (Ioffe and Szegedy, arXiv:1502.03167,
section 3.1), so the convolution before it can have both in its weight and bias:

    norm(conv(x)) = conv(x; g W) + b,  g = weight / √(variance + eps),  b = g (bias of the convolution - mean) + bias

With LoRA on the convolution, g (W + scale · B A) stands for g W: one convolution takes the place of three, and the
gradients of A and B are those of the same product. Where the weight is large and pixels are few, that sum would take
longer than g scale · B (A x), which is added to the output then. Tensors lie channels last, where the module bears
that. Kept for the backward pass are the input, where there is an update, and the output, where there is a nonlinearity.
This is exact up to rounding, and nothing of it is in the module: other forward passes stand before its own while a
gradient is computed.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from thimble.backends.torch.attached_layers import LowRank
from thimble.backends.torch.forward_passes import running, unchanged

# What a nonlinearity cuts its input to; its slope is one within, and zero from either end on.
LIMITS: dict[type[nn.Module], tuple[float, float]] = {nn.ReLU: (0.0, torch.inf), nn.ReLU6: (0.0, 6.0)}
_FOLDED = "folded"  # the state of an update that is in the weight: its hook adds nothing
# What a number of the updated weight takes to be made, forth and back, in multiplications: most of it is memory.
MERGE_COST = 48
_POINTWISE = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
_convolve, _convolve_back = torch.ops.aten.convolution, torch.ops.aten.convolution_backward


class FoldedConvolution:
    """A frozen convolution with what follows it, as it is computed in training."""

    def __init__(
        self, layer: nn.Conv2d, norm: nn.BatchNorm2d | None, nonlinearity: nn.Module | None, low_rank: LowRank | None
    ) -> None:
        self.layer, self.norm, self.nonlinearity, self.low_rank = layer, norm, nonlinearity, low_rank
        self.limits = LIMITS[type(nonlinearity)] if nonlinearity else None
        self.geometry = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
        gain, self.bias = _gain_and_bias(layer, norm)
        self.gain = gain[:, None, None, None]  # (out, 1, 1, 1)
        self.weight = self.gain * layer.weight.detach()
        self.lay_out(torch.channels_last)

    def lay_out(self, layout: torch.memory_format) -> None:
        """Have inputs, outputs and the weight lie in memory in some order."""
        self.layout, self.weight = layout, self.weight.contiguous(memory_format=layout)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this, the convolution does the work of those that follow it; one with dropout stays as it is."""
        low_rank = self.low_rank
        if low_rank is None or low_rank.state == "off":
            with self._running(self._without_update):
                yield
        elif low_rank.dropout.p:  # of the input of the update alone
            yield
        else:
            before, low_rank.state = low_rank.state, _FOLDED
            try:
                with self._running(functools.partial(self._with_update, low_rank)):
                    yield
            finally:
                low_rank.state = before

    def _running(self, forward: Any) -> contextlib.AbstractContextManager[None]:
        others = [part for part in (self.norm, self.nonlinearity) if part is not None]
        return running([(self.layer, forward), *((part, unchanged) for part in others)])

    def _without_update(self, x: Tensor) -> Tensor:
        return _Folded.apply(x.contiguous(memory_format=self.layout), None, None, self)

    def _with_update(self, low_rank: LowRank, x: Tensor) -> Tensor:
        return _Folded.apply(x.contiguous(memory_format=self.layout), *low_rank.sides(), self)

    def is_merged(self, x: Tensor, a: Tensor) -> bool:
        """Whether adding the update to the weight takes less than adding what it makes of x to the output."""
        (down, across), out, width = self.layer.stride, len(self.weight), self.weight[0].numel()
        pixels = len(x) * (x.shape[2] // down) * (x.shape[3] // across)
        return pixels * len(a) * (out + width) > MERGE_COST * out * width

    def updated(self, a: Tensor, b: Tensor) -> Tensor:
        """g (W + scale · B A), in the shape and layout of the weight."""
        made, a = torch.empty_like(self.weight), a.contiguous(memory_format=self.layout)
        torch.addmm(self._rows(self.weight), self.side(b).flatten(1), self._rows(a), out=self._rows(made))
        return made

    def _rows(self, weight: Tensor) -> Tensor:
        """A view of a weight as (out, all the rest), in the order in which it lies."""
        is_last = self.layout == torch.channels_last
        return (weight.permute(0, 2, 3, 1) if is_last else weight).flatten(1)

    def side(self, b: Tensor) -> Tensor:
        """What is multiplied with A x, or with A, for all that the update adds: g · scale · B, (out, rank, 1, 1)."""
        return self.gain * (self.low_rank.scale if self.low_rank else 0.0) * b


def _gain_and_bias(layer: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """g and b above, float32 (out,), reckoned in float64."""
    bias = None if layer.bias is None else layer.bias.detach()
    if norm is None:
        return torch.ones(layer.out_channels), bias
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)  # a norm without is not folded
    gain = (variance.double() + norm.eps).rsqrt()
    shift = -mean.double() + (0.0 if bias is None else bias.double())
    if norm.affine:
        gain = gain * norm.weight.detach().double()
        return gain.float(), (gain * shift + norm.bias.detach().double()).float()
    return gain.float(), (gain * shift).float()


class _Folded(torch.autograd.Function):
    """The convolution and its gradients: of x, and of A and B if there is an update."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, folded: FoldedConvolution) -> Tensor:
        if a is None or b is None:
            made: Tensor = _convolve(x, folded.weight, folded.bias, *folded.geometry)
        elif folded.is_merged(x, a):
            made = _convolve(x, folded.updated(a, b), folded.bias, *folded.geometry)
        else:
            made = _convolve(x, folded.weight, folded.bias, *folded.geometry)
            made += _convolve(_convolve(x, a, None, *folded.geometry), folded.side(b), None, *_POINTWISE)
        if folded.limits:
            made.clamp_(*folded.limits)
        ctx.folded, ctx.shape = folded, x.shape
        ctx.save_for_backward(None if a is None else x, a, b, made if folded.limits else None)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        folded: FoldedConvolution = ctx.folded
        x, a, b, made = ctx.saved_tensors
        if made is not None:
            grad = torch.ops.aten.hardtanh_backward(grad, made, *folded.limits)
        grad = grad.contiguous(memory_format=folded.layout)
        wants_x = ctx.needs_input_grad[0]
        if a is None:
            # Of x the shape alone is read here: it need not have been kept.
            like = torch.empty(ctx.shape, memory_format=folded.layout)
            return _back(folded, grad, like, folded.weight, wants_x, False)[0], None, None, None
        return *_back_with_update(folded, grad, x, a, b, wants_x), None


def _back(
    folded: FoldedConvolution, grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Any, Any]:
    """The gradients of x and of a weight; None for one that is not wanted."""
    of_x, of_weight, _ = _convolve_back(grad, x, weight, None, *folded.geometry, (wants_x, wants_weight, False))
    return of_x, of_weight


def _back_with_update(
    folded: FoldedConvolution, grad: Tensor, x: Tensor, a: Tensor, b: Tensor, wants_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of x, A and B: by way of that of the whole weight where it is small, else by way of A x."""
    is_merged, side = folded.is_merged(x, a), folded.side(b)
    # The updated weight is made again: kept for all layers, it would be a second model.
    weight = folded.updated(a, b) if is_merged else folded.weight
    out, width = len(weight), weight[0].numel()
    if is_merged and out * width <= 2 * len(a) * (out + width):  # multiplications for each pixel, one way and the other
        of_x, of_weight = _back(folded, grad, x, weight, wants_x, True)
        flat = of_weight.flatten(1)
        of_side = flat @ a.flatten(1).t()
        return of_x, (side.flatten(1).t() @ flat).view(a.shape), folded.side(of_side.view(b.shape))
    of_x, _ = _back(folded, grad, x, weight, True, False) if wants_x else (None, None)
    low = _convolve(x, a, None, *folded.geometry)
    of_low, of_side, _ = _convolve_back(grad, low, side, None, *_POINTWISE, (True, True, False))
    of_x_beside, of_a = _back(folded, of_low, x, a, wants_x and not is_merged, True)
    return of_x if of_x_beside is None else of_x.add_(of_x_beside), of_a, folded.side(of_side)
