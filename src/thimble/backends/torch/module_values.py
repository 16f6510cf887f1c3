"""What is trained of a module, A and B and what is trained whole, as one vector: its parameters are views of that.

So the optimiser, checkpoints and rollbacks of a module are those of every session.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from thimble.backends.torch.attach import Attachment, adapter_off
from thimble.core.adapter import Adapter
from thimble.files.peft import named_for_peft
from thimble.files.torch_names import plainly


@dataclass(frozen=True)
class ActiveValues:
    """All trained values of a module, and the scales of its layers; without values the bare base."""

    flat: Tensor | None  # float32 (n,)
    scales: tuple[float, ...] = ()
    identity: str = ""

    @property
    def resident_bytes(self) -> int:
        """Memory it takes."""
        return 0 if self.flat is None else self.flat.nbytes


class ModuleValues:
    """The trained parameters of a module in a vector: all A, all B, all magnitudes, then what is trained whole."""

    def __init__(self, module: nn.Module, attachment: Attachment) -> None:
        self._module, self._attachment = module, attachment
        lora, tensors = attachment.lora.values(), plainly(module.named_parameters(remove_duplicate=True))
        kinds: dict[str, list[nn.Parameter]] = {
            "A": [layer.A for layer in lora], "B": [layer.B for layer in lora],
            "magnitude": [layer.magnitude for layer in lora if layer.magnitude is not None],
            "whole": [tensors[name] for name in attachment.whole if name in tensors],
        }  # fmt: skip
        parameters = [parameter for part in kinds.values() for parameter in part]
        self.flat = torch.cat([parameter.detach().reshape(-1).float() for parameter in parameters])
        self.spans: dict[str, list[slice]] = {}  # in the vector, by kind
        self._views: list[tuple[nn.Parameter, slice]] = []
        start = 0
        for name, part in kinds.items():
            for parameter in part:
                span = slice(start, start + parameter.numel())
                parameter.data = self.flat[span].view(parameter.shape)
                self._views.append((parameter, span))
                self.spans.setdefault(name, []).append(span)
                start = span.stop
        self.here = ActiveValues(self.flat, self._scales(), "here")  # what the parameters hold

    def _scales(self) -> tuple[float, ...]:
        return tuple(layer.scale for layer in self._attachment.lora.values())

    def read(self, adapter: Adapter | None) -> ActiveValues:
        """The values of an adapter that fits, or none for the base; the module is not touched."""
        if adapter is None:
            return ActiveValues(None, identity="base")
        paths, flat = named_for_peft(adapter), torch.empty_like(self.flat)
        names = {id(parameter): name for name, parameter in plainly(self._module.named_parameters()).items()}
        found = {id(side): values for path, layer in self._attachment.lora.items() for side, values in (
            (layer.A, paths[path].A), (layer.B, paths[path].B), (layer.magnitude, paths[path].magnitude),
        )}  # fmt: skip
        for parameter, span in self._views:
            values = found[id(parameter)] if id(parameter) in found else adapter.replaced[names[id(parameter)]]
            flat[span] = torch.from_numpy(np.asarray(values, np.float32).reshape(-1))
        scales = tuple(paths[path].scale for path in self._attachment.lora)
        return ActiveValues(flat, scales, adapter.identity())

    def put(self, active: ActiveValues) -> None:
        """Write values into the module."""
        if active.flat is not None and active.flat is not self.flat:
            self.flat.copy_(active.flat)
        for layer, scale in zip(self._attachment.lora.values(), active.scales, strict=True):
            layer.scale = scale

    @contextlib.contextmanager
    def using(self, active: ActiveValues) -> Iterator[None]:
        """Within this, the module has other values, or is its base."""
        if active.flat is self.flat:
            yield
        elif active.flat is None:
            with adapter_off(self._module):
                yield
        else:
            kept = ActiveValues(self.flat.clone(), self._scales())
            self.put(active)
            try:
                yield
            finally:
                self.put(kept)

    @contextlib.contextmanager
    def collecting(self, flat: Tensor) -> Iterator[None]:
        """Within this, backward passes add to a vector, and dropout of adapters is on."""
        for parameter, span in self._views:
            parameter.grad = flat[span].view(parameter.shape)
        drops = [layer.dropout.train() for layer in self._attachment.lora.values() if layer.dropout.p]
        try:
            yield
        finally:
            for parameter, _ in self._views:
                parameter.grad = None
            for dropout in drops:
                dropout.eval()

    def unmoved(self, squares: Tensor) -> list[str]:
        """The adapted layers whose gradients were all zero, by the optimiser's mean squares, (n,)."""
        moved = {id(parameter): bool(squares[span].any()) for parameter, span in self._views}
        return [path for path, layer in self._attachment.lora.items() if not (moved[id(layer.A)] or moved[id(layer.B)])]
