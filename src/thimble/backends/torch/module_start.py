"""What a session of a module offers before the first step: how weights are kept, and what A and B may be made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thimble.backends.module_session import ModuleBatch
from thimble.backends.torch.attach import Attachment
from thimble.backends.torch.attached_layers import as_matrix
from thimble.backends.torch.calibrate import Visit, sketches
from thimble.backends.torch.kept_int8 import decoded, keep_as_int8, kept_weights, rounded
from thimble.backends.torch.memory import out_of_memory
from thimble.backends.torch.module_calibrate import init_problems, input_moments, watch_gradients
from thimble.backends.torch.module_losses import ModuleLoss, as_tensors
from thimble.core.adapter import Adapter
from thimble.core.inits import LayerData, Moments, Sketch, loftq
from thimble.core.method import Init
from thimble.files.peft import named_for_peft


class ModuleStart:
    """A part of `ModuleTorchSession`; see thimble.backends.module_session for what methods promise."""

    module: nn.Module
    _loss: ModuleLoss

    @property
    def attachment(self) -> Attachment:
        """What `attach` put on the module."""
        raise NotImplementedError

    def run_back(self, batches: Sequence[ModuleBatch]) -> None:
        """Run batches forward and back, each layer being called as it is; nothing is learned."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """Of the base, what is trained whole among them."""
        beside = {id(parameter) for layer in self.attachment.lora.values() for parameter in layer.parameters()}
        plain = sum(parameter.numel() for parameter in self.module.parameters() if id(parameter) not in beside)
        return plain + kept_weights(self.module)

    @property
    def weight_bytes(self) -> int:
        beside = {id(tensor) for layer in self.attachment.lora.values() for tensor in _tensors_of(layer)}
        return sum(tensor.nbytes for tensor in _tensors_of(self.module) if id(tensor) not in beside)

    def keep_as_int8(self, is_new: bool) -> tuple[int, int]:
        """Keep frozen Linear layers as int8; see thimble.backends.torch.kept_int8.keep_as_int8."""
        return keep_as_int8(self.module, self.attachment.whole, is_new)

    def init_problems(self, init: Init) -> list[str]:
        """Why layers cannot have an init that is found on data, or on what rounding loses, a line each."""
        ranks = {path: len(low_rank.A) for path, low_rank in self.attachment.lora.items()}
        return init_problems(self.attachment.places, ranks, init)

    def kept_weight(self, path: str) -> NDArray[np.float32]:
        [place] = [place for place in self.attachment.places if place.path == path]
        weight = as_matrix(place.layer, getattr(place.layer, place.weight).detach())
        found: NDArray[np.float32] = weight.float().numpy()
        return found

    file_weight = kept_weight  # what the file has is there as long as nothing is rounded

    def input_moments(self, batches: Sequence[ModuleBatch]) -> Iterator[tuple[list[str], Moments]]:
        def run_all() -> None:
            for inputs, targets in map(as_tensors, batches):
                self._loss.forward(self.module, inputs, targets)

        return input_moments(self.module, self.attachment.places, run_all)

    @out_of_memory
    def gradient_sketches(
        self, batches: Sequence[ModuleBatch], ranks: Mapping[str, int], is_weighted: bool, seed: int,
        checkpointed_blocks: int,
    ) -> dict[str, Sketch]:  # fmt: skip
        places = self.attachment.places

        def show(visit: Visit) -> None:
            watch_gradients(self.module, places, lambda: self.run_back(batches), visit)

        return sketches({place.path: place.shape for place in places}, ranks, show, is_weighted, seed)

    def restart(self, adapter: Adapter) -> None:
        layers, origin = named_for_peft(adapter), named_for_peft(replace(adapter, layers=adapter.origin))
        for path, low_rank in self.attachment.lora.items():
            low_rank.restart(layers[path], origin.get(path))

    def restart_from_rounding(self, seed: int) -> None:
        """Begin with the best A and B for what int8 would lose of each adapted weight (LoftQ, arXiv:2310.08659)."""
        layers = {}
        for place in self.attachment.places:
            low_rank, weight = self.attachment.lora[place.path], self.kept_weight(place.path)
            kept = decoded(*rounded(torch.from_numpy(weight))).numpy()
            rank = len(low_rank.A)
            layers[place.path] = loftq(
                LayerData(place.path, place.shape, rank, low_rank.scale, seed, weight=weight, kept=kept)
            )
        self.restart(Adapter(layers))


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
