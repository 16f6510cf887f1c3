"""LoRA in a layer of any model: what it adds to the layer's output, or what takes the place of its weight in a call.

A layer whose forward pass is the known one keeps its weight and gets scale · B A x added to its output. One that is
computed otherwise (packed attention, which never calls its out_proj; an embedding that makes its own positions) has its
weight replaced by W + scale · B A while it is called: more memory, and right whatever it does with the weight. So have
parameters that are no layer's weight, such as those of experts, each expert's matrix with an update of its own.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from thimble.core.lowrank import Factors, difference, merge
from thimble.errors import RunError

CHILD = "lora"  # the name of a `LowRank` inside of its layer
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def is_turned(layer: nn.Module) -> bool:
    """Whether the weight of a layer lies as (in, out): of embeddings, and of the `Conv1D` of GPT-2."""
    return isinstance(layer, nn.Embedding) or is_conv1d_of_transformers(layer)


def is_conv1d_of_transformers(layer: nn.Module) -> bool:
    """Whether a layer is transformers' `Conv1D`: linear, though called a convolution."""
    kinds = type(layer).__mro__
    return any((kind.__name__, kind.__module__) == ("Conv1D", "transformers.pytorch_utils") for kind in kinds)


def is_stack(layer: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is that of experts: (experts, out, in), or (experts, in, out) if the module `is_transposed`."""
    return weight.dim() == 3 and not isinstance(layer, nn.Conv1d)


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as (out, in): a view of it; that of experts as (experts · out, in)."""
    if is_stack(layer, weight):
        return (weight.transpose(1, 2) if has_turned_experts(layer) else weight).flatten(0, 1)
    return weight.t() if is_turned(layer) else weight.flatten(1)


def as_weight(layer: nn.Module, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The other way round: (out, in) in the shape of the weight."""
    if len(shape) == 3 and has_turned_experts(layer) and not isinstance(layer, nn.Conv1d):
        return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
    return (matrix.t() if is_turned(layer) else matrix).reshape(shape)


def has_turned_experts(module: nn.Module) -> bool:
    """Whether weights of experts lie as (experts, in, out), as PEFT knows it: by an attribute of transformers."""
    return bool(getattr(module, "is_transposed", False))


class LowRank(nn.Module):
    """A and B of one layer, trained in float32; a child of the layer, so that optimisers and state dicts find them.

    A is (rank, in), of a convolution (rank, in, *kernel); B is (out, rank), of a convolution (out, rank / groups,
    *ones). With DoRA there is a `magnitude` (out,); with an init in delta form, which trains scale · (B A − B₀ A₀),
    there are `origin_A` and `origin_B`. The state is `on`, `off`, or `merged` into the weight.
    """

    def __init__(self, factors: Factors, origin: Factors | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.layout, self.scale = factors.layout, factors.scale
        self.A, self.B = (nn.Parameter(side) for side in self._shaped(factors))
        magnitude = None if factors.magnitude is None else nn.Parameter(torch.from_numpy(factors.magnitude.copy()))
        self.register_parameter("magnitude", magnitude)
        for name, side in zip(("origin_A", "origin_B"), self._shaped(origin) if origin else (None, None), strict=True):
            self.register_buffer(name, side)
        self.dropout = nn.Dropout(dropout)
        self.state, self.is_called = "on", False

    @staticmethod
    def _shaped(factors: Factors) -> tuple[Tensor, Tensor]:
        """A and B as the layer takes them, copied."""
        kernel = factors.layout.kernel
        a, b = (torch.from_numpy(np.array(side, np.float32)) for side in (factors.A, factors.B))
        return a.reshape(len(a), -1, *kernel), b.reshape(*b.shape, *(1,) * len(kernel))

    @torch.no_grad()
    def restart(self, factors: Factors, origin: Factors | None) -> None:
        """Begin with other values of the same shapes, before the first step."""
        for side, values in zip((self.A, self.B), (factors.A, factors.B), strict=True):
            side.copy_(torch.from_numpy(np.asarray(values, np.float32)).reshape(side.shape))
        if origin is not None:
            self.origin_A, self.origin_B = self.A.detach().clone(), self.B.detach().clone()

    def factors(self) -> tuple[Factors, Factors | None]:
        """The parameters as they are now, and the origin of the delta form: float32, copied."""
        magnitude = None if self.magnitude is None else _numpy(self.magnitude)
        now = Factors(_numpy(self.A), _numpy(self.B), self.scale, magnitude, self.layout)
        if self.origin_A is None:
            return now, None
        return now, Factors(_numpy(self.origin_A), _numpy(self.origin_B), self.scale, None, self.layout)

    def sides(self) -> tuple[Tensor, Tensor]:
        """What stands for A and B in products; of the delta form twice the rank, as in `thimble.core.lowrank`."""
        if self.origin_A is None:
            return self.A, self.B
        a = torch.cat([self.A, self.A - self.origin_A])
        return a, torch.cat([self.B - self.origin_B, self.origin_B], 1)

    # ---- beside the layer ----

    def add(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """A forward hook of the layer: its output with the update added."""
        if not self._takes_part(layer):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        update = self.scale * self._product(layer, x)
        if self.magnitude is None:
            return (output + update).to(output.dtype)
        bias = getattr(layer, "bias", None)
        ones = (1,) * len(self.layout.kernel)
        rates = self._rates(as_matrix(layer, layer.weight)).reshape(-1, *ones)
        if bias is None:
            return ((output + update) * rates).to(output.dtype)
        bias = bias.reshape(-1, *ones)
        return ((output - bias + update) * rates + bias).to(output.dtype)

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """B A x, in float32."""
        a, b = self.sides()
        if self.layout.is_embedding:
            low = functional.embedding(x, a.t(), layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
            return functional.linear(low, b) * getattr(layer, "embed_scale", 1.0)
        x = self.dropout(x.to(a.dtype))
        if not self.layout.kernel:
            return functional.linear(functional.linear(x, a), b)
        convolve, padding = _CONVOLUTIONS[len(self.layout.kernel)], layer.padding
        if layer.padding_mode != "zeros":
            x, padding = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        low = convolve(x, a, None, layer.stride, padding, layer.dilation)
        return convolve(low, b, groups=self.layout.groups)

    def _rates(self, weight: Tensor) -> Tensor:
        """Magnitude over the length of each row of W + scale · B A, (out,); lengths pass no gradient on (DoRA, 4.3)."""
        a, b = (side.detach().flatten(1) for side in self.sides())
        lengths = (weight.detach() + self.scale * b @ a).norm(dim=1)
        return self.magnitude / torch.where(lengths > 0, lengths, torch.ones_like(lengths))

    # ---- in the place of its weight ----

    def put_in(self, layer: nn.Module, name: str) -> None:
        """Let the updated weight stand before the layer's own until `take_out`."""
        if not self._takes_part(layer):
            return
        weight = getattr(layer, name)
        if self.layout.experts:
            layer.__dict__[name] = self._with_experts(layer, weight)
            return
        a, b = (side.flatten(1) for side in self.sides())
        total = as_matrix(layer, weight) + self.scale * b @ a
        if self.magnitude is not None:
            total = total * self._rates(as_matrix(layer, weight))[:, None]
        layer.__dict__[name] = as_weight(layer, total, weight.shape).to(weight.dtype)

    def _with_experts(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weights of experts with their updates, in the shape of `weight`; each product is added as it is made."""
        count = self.layout.experts
        a = self.A.unflatten(0, (count, -1)).to(weight.dtype)  # (experts, rank, in)
        b = self.B.unflatten(1, (-1, count)).permute(2, 0, 1).to(weight.dtype)  # (experts, out, rank)
        is_turned = is_stack(layer, weight) and has_turned_experts(layer)
        left, right = (a.transpose(1, 2), b.transpose(1, 2)) if is_turned else (b, a)
        stack = weight if is_stack(layer, weight) else weight[None]
        return torch.baddbmm(stack, left, right, alpha=self.scale).view(weight.shape)

    def _takes_part(self, layer: nn.Module) -> bool:
        self.is_called = True
        if self.state == "merged" and layer.training and torch.is_grad_enabled():
            raise RunError(
                "the adapter is merged into the weights, where it cannot be trained: call thimble.unmerge(model) "
                "first, or model.eval() if this is no training"
            )
        return self.state == "on"

    # ---- into its weight ----

    def merged_into(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """The weight with the update added, in the shape and dtype of `weight`."""
        factors, origin = self.factors()
        dtype = torch.promote_types(weight.dtype, torch.float32)  # a weight in double precision keeps its digits
        matrix = as_matrix(layer, weight.detach()).to(dtype).cpu().numpy()
        total = torch.from_numpy(merge(matrix, difference(factors, origin) if origin else factors))
        return as_weight(layer, total, weight.shape).to(weight.device, weight.dtype)


def hook_beside(layer: nn.Module) -> list[RemovableHandle]:
    """Add the update to what the layer gives."""
    return [layer.register_forward_hook(getattr(layer, CHILD).add, with_kwargs=True)]


def hook_within(called: nn.Module, inside: str, name: str, child: str) -> list[RemovableHandle]:
    """Replace a weight, of the module called or of one inside of it, while it is called.

    `child` is the name of its `LowRank` there.
    """
    before, after = partial(_put_in, inside, name, child), partial(_take_out, inside, name)
    return [called.register_forward_pre_hook(before), called.register_forward_hook(after, always_call=True)]


def _put_in(inside: str, name: str, child: str, called: nn.Module, args: Any) -> None:
    layer = called.get_submodule(inside)
    getattr(layer, child).put_in(layer, name)


def _take_out(inside: str, name: str, called: nn.Module, args: Any, output: Any) -> None:
    called.get_submodule(inside).__dict__.pop(name, None)


def _numpy(tensor: Tensor) -> Any:
    """Float32, as a matrix or a vector, copied."""
    tensor = tensor.detach().float().cpu()
    return (tensor.flatten(1) if tensor.dim() > 1 else tensor).numpy().copy()
