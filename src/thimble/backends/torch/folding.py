"""Which convolutions of a network can be folded with what follows them: nothing is taken for granted.

Each module that calls a convolution and what follows it is traced, all inside of it being taken as a whole. What cannot
be traced stays as it is, and so does whatever is called more than once, is trained, or has a hook of the user's.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn

from thimble.backends.torch.attach import Attachment
from thimble.backends.torch.attached_layers import CHILD
from thimble.backends.torch.folded_convolutions import LIMITS, FoldedConvolution

MOST_APART = 1e-3  # two gradients that are the same, of their length


class Folding:
    """The convolutions of a module that are computed otherwise while a gradient is: `folded`."""

    def __init__(self, attachment: Attachment) -> None:
        self._found = self.folded = _find(attachment)
        self._is_checked = False

    def described(self) -> Sequence[str]:
        """What is done, for people: a line, or none."""
        if not self._found:
            return ()
        if not self.folded:
            return ("convolutions: as they are, since folded with what follows them the gradient is another",)
        norms = sum(one.norm is not None for one in self.folded)
        how = "train channels last" if self.folded[0].layout == torch.channels_last else "train in the module's layout"
        folded = f", {norms} of them with the frozen norm behind folded in" if norms else ""
        return (f"convolutions: {len(self.folded)} {how}{folded}",)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this, convolutions do the work of what follows them."""
        with contextlib.ExitStack() as held:
            for one in self.folded:
                held.enter_context(one.in_place())
            yield

    def check(self, gradient: Callable[[], Tensor]) -> None:
        """Keep what leaves a gradient, computed on some batch, as it is: all, all but the layout, or nothing.

        A module that calls `view` on what a convolution makes fails with channels last. The gradient is another where
        a convolution is called from without the module that was traced.
        """
        if self._is_checked or not self.folded:
            return
        self.folded, self._is_checked = (), True
        expected = gradient()
        self.folded = self._found
        for layout in (torch.channels_last, torch.contiguous_format):
            for one in self.folded:
                one.lay_out(layout)
            with contextlib.suppress(RuntimeError):
                if (gradient() - expected).norm() <= MOST_APART * expected.norm():
                    return
        self.folded = ()


def _find(attachment: Attachment) -> tuple[FoldedConvolution, ...]:
    """Those that have an update or are followed by a frozen norm or a nonlinearity, in the order of the module."""
    frozen = _Frozen(attachment)
    followed = {id(found.layer): found for owner in attachment.model.modules() for found in frozen.followed(owner)}
    adapted = {id(place.layer): getattr(place.layer, CHILD) for place in attachment.places}
    folded = []
    for layer in attachment.model.modules():
        if frozen.is_convolution(layer):
            low_rank, found = adapted.get(id(layer)), followed.get(id(layer), _Followed(layer))
            is_known = low_rank is None or (layer.groups == 1 and low_rank.magnitude is None)
            if is_known and (low_rank or found.norm or found.nonlinearity):
                folded.append(FoldedConvolution(found.layer, found.norm, found.nonlinearity, low_rank))
    return tuple(folded)


@dataclass(frozen=True)
class _Followed:
    """A convolution, the norm that alone reads what it makes, and the nonlinearity that alone reads that."""

    layer: nn.Conv2d
    norm: nn.BatchNorm2d | None = None
    nonlinearity: nn.Module | None = None


class _Frozen:
    """The modules of a network, and which of them do nothing but what their class does."""

    def __init__(self, attachment: Attachment) -> None:
        self._own_hooks = {handle.id for handle in attachment.hooks}
        self._paths = Counter(id(layer) for _, layer in attachment.model.named_modules(remove_duplicate=False))

    def is_convolution(self, layer: nn.Module | None) -> TypeGuard[nn.Conv2d]:
        """Whether a module is a frozen convolution that pads with zeros, by so many on either side."""
        return (
            type(layer) is nn.Conv2d
            and self._is_plain(layer)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )

    def _is_norm(self, layer: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
        is_one = type(layer) is nn.BatchNorm2d and self._is_plain(layer)
        return is_one and not layer.training and layer.running_mean is not None

    def _is_nonlinearity(self, layer: nn.Module | None) -> bool:
        return layer is not None and type(layer) in LIMITS and self._is_plain(layer)

    def _is_plain(self, layer: nn.Module) -> bool:
        """Whether a module is frozen, stands in one place, and has no forward pass or hook but those of its class."""
        hooks = {*layer._forward_hooks, *layer._forward_pre_hooks, *layer._backward_hooks, *layer._backward_pre_hooks}
        is_frozen = not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        return is_frozen and self._paths[id(layer)] == 1 and "forward" not in vars(layer) and hooks <= self._own_hooks

    def followed(self, owner: nn.Module) -> Iterator[_Followed]:
        """The convolutions that a module calls once, and what follows each."""
        calls = _calls_in(owner) if any(self.is_convolution(layer) for layer in owner.children()) else None
        if calls is None:
            return
        for node, layer in calls.layers.items():
            if not self.is_convolution(layer):
                continue
            found, reader = _Followed(layer), calls.reader(node)
            if self._is_norm(norm := calls.layers.get(reader)):
                found, reader = replace(found, norm=norm), calls.reader(reader)
            if self._is_nonlinearity(last := calls.layers.get(reader)):
                found = replace(found, nonlinearity=last)
            yield found


class _Leaves(fx.Tracer):
    """Traces one module alone: those inside of it are called as a whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass(frozen=True)
class _Calls:
    """The modules that a forward pass calls once, by the node of its graph."""

    layers: Mapping[fx.Node | None, nn.Module]

    @classmethod
    def of(cls, owner: nn.Module, graph: fx.Graph) -> "_Calls":
        """Those of the pass of a module."""
        nodes = [node for node in graph.nodes if node.op == "call_module"]
        counts = Counter(node.target for node in nodes)
        return cls({node: owner.get_submodule(str(node.target)) for node in nodes if counts[node.target] == 1})

    def reader(self, node: fx.Node | None) -> fx.Node | None:
        """The call of a module whose only input is what another makes, if that is read nowhere else."""
        readers = list(node.users) if node else []
        is_alone = len(readers) == 1 and readers[0].args == (node,) and not readers[0].kwargs
        return readers[0] if is_alone else None


def _calls_in(owner: nn.Module) -> _Calls | None:
    """The calls of a module; None if it cannot be traced: where its way depends on numbers, say."""
    if "forward" in vars(owner):
        return None
    # Functions beside its class that compute with sizes, as some that pad do, cannot be traced: taken as a whole.
    beside = sys.modules.get(type(owner).__module__)
    for taken_whole in ((), (beside,)) if beside else ((),):
        with contextlib.suppress(Exception):  # whatever a pass of the user's makes of what is no tensor
            return _Calls.of(owner, _Leaves(taken_whole).trace(owner))
    return None
