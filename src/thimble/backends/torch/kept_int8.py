"""Linear layers of any module whose frozen weight is kept as int8, one scale a row: a quarter of float32.

The weight is decoded for each product and let go of, in the backward pass again, so that no float copy of it waits
there. Layer, hooks and adapter stay the objects they were: the class of the layer alone changes, as PyTorch's own
parametrizations do it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thimble.backends.torch.attached_layers import CHILD, LowRank
from thimble.backends.torch.attached_places import Survey

MOST = 127  # of an int8, both ways alike


class KeptInt8(nn.Linear):
    """A Linear whose weight lies as `weight_int8` int8 (out, in) and `weight_scale` float32 (out, 1)."""

    weight_int8: Tensor
    weight_scale: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as it is computed with, float32 (out, in); decoded anew each time."""
        return decoded(self.weight_int8, self.weight_scale)

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = _Product.apply(input, self.weight_int8, self.weight_scale)
        return made if self.bias is None else made + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ, with a gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return functional.linear(x, decoded(q, scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad @ decoded(*ctx.saved_tensors), None, None


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8 (out, in) and the scale of each row, float32 (out, 1); a row of zeros has scale 1."""
    largest = weight.abs().amax(1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / MOST, torch.ones_like(largest))
    return (weight / scale).round_().clamp_(-MOST, MOST).to(torch.int8), scale


def decoded(q: Tensor, scale: Tensor) -> Tensor:
    """The other way round: float32 (out, in)."""
    return q.float().mul_(scale)


def weight_to_keep(survey: Survey, path: str) -> Tensor | None:
    """The weight of a plain Linear, which is called itself and shares it with no other; None of any other layer."""
    layer = survey.modules[path]
    weight = layer._parameters.get("weight")
    if type(layer) is not nn.Linear or path in survey.packed or weight is None or len(survey.sharers(weight)) > 1:
        return None
    return weight.detach()


@torch.no_grad()
def keep_as_int8(module: nn.Module, whole: Sequence[str], is_new: bool) -> tuple[int, int]:
    """Keep the frozen Linear layers of a module as int8.

    Args:
        module: With or without an adapter attached; it is changed in place.
        whole: Names of the tensors that are trained themselves, whose layers stay as they are.
        is_new: Whether the adapter is before its first step, so that DoRA's magnitudes are those of the rounded rows.

    Returns:
        Weights that are kept so, and all weights of the module.
    """
    survey, kept = Survey(module), 0
    total = sum(parameter.numel() for parameter in module.parameters())
    for path, layer in survey.modules.items():
        weight = None if f"{path}.weight" in whole else weight_to_keep(survey, path)
        if weight is None:
            continue
        layer._parameters.pop("weight")
        q, scale = rounded(weight)
        kept += weight.numel()
        layer.register_buffer("weight_int8", q)
        layer.register_buffer("weight_scale", scale)
        layer.__class__ = KeptInt8
        low_rank = getattr(layer, CHILD, None)
        if is_new and isinstance(low_rank, LowRank) and low_rank.magnitude is not None:
            low_rank.magnitude.copy_(decoded(q, scale).norm(dim=1))
    return kept, total


def kept_weights(module: nn.Module) -> int:
    """How many weights of a module are kept as int8, which are no parameters of it."""
    return sum(layer.weight_int8.numel() for layer in module.modules() if isinstance(layer, KeptInt8))
