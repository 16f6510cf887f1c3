"""What a micro-batch of a module takes, measured by running one: memory that autograd keeps, and time."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thimble.backends.module_session import Measured


def measure(module: nn.Module, run: Callable[[], Any]) -> Measured:
    """Run a forward and backward pass.

    Counted is each storage that autograd keeps, once, and none of the module's own: the same on every machine.

    Args:
        module: Its parameters and buffers are not counted.
        run: The pass.

    Returns:
        What it took.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    run()  # what is made on the first call, such as the libraries' own plans, is no part of it
    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return Measured(sum(kept.values()), max(kept.values(), default=0), time.perf_counter() - began)
