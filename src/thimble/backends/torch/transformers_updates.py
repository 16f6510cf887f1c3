"""An adapter for the layers of a model of transformers: modules whose parameters are views of one flat vector."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thimble.backends.session import StepKey
from thimble.backends.torch.adapters import TrainableAdapter
from thimble.backends.torch.attached_layers import LowRank
from thimble.backends.torch.lora import Dropout
from thimble.core.adapter import Adapter
from thimble.core.targets import block_of
from thimble.errors import ConfigError

# Layers by their usual names, and which of the four inputs of a block they read; numbers of all others come behind.
_INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), 0), "o_proj": 1,
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), 2), "down_proj": 3,
}  # fmt: skip
_OTHERS = 1 << 20


class Updates(TrainableAdapter):
    """An adapter as layers of a model take it; an empty one, of None, is the bare base."""

    def __init__(self, adapter: Adapter | None) -> None:
        super().__init__(adapter, torch.float32)
        adapter = adapter or Adapter({})
        self.low_ranks = {path: LowRank(f, adapter.origin.get(path)) for path, f in adapter.layers.items()}
        for path, trained in self.views(self.flat).items():
            for name, view in _sides(trained):
                getattr(self.low_ranks[path], name).data = view

    @contextlib.contextmanager
    def collecting(self, flat: Tensor) -> Iterator[None]:
        """Within this, backward passes add to a vector of the same order."""
        views = self.views(flat)
        for path, low_rank in self.low_ranks.items():
            for name, view in _sides(views[path]):
                side = getattr(low_rank, name)
                side.grad = view if side.requires_grad else None
        try:
            yield
        finally:
            for low_rank in self.low_ranks.values():
                for side in low_rank.parameters():
                    side.grad = None

    def freeze_a(self) -> None:
        """Have no gradient taken of any A."""
        for low_rank in self.low_ranks.values():
            low_rank.A.requires_grad_(False)

    def drop(self, dropouts: "RowDropouts") -> None:
        """Have dropout of the inputs of A."""
        for number, path in enumerate(self.low_ranks):
            self.low_ranks[path].dropout = dropouts.layer(_number(path, number), path)


def _sides(trained: Any) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, view) for name in ("A", "B", "magnitude") if (view := getattr(trained, name)) is not None)


def _number(path: str, place: int) -> int:
    """The number by which dropout knows a layer: those that read the same input have one, as in core.dropout."""
    group = _INPUTS.get(path.rpartition(".")[2])
    return _OTHERS + place if group is None else 4 * block_of(path) + group


class RowDropouts:
    """Dropout drawn from step, row, token and layer alone (thimble.core.dropout), of rows padded on the right."""

    def __init__(self, rate: float) -> None:
        self._rate, self._now = rate, None

    def layer(self, number: int, path: str) -> nn.Module:
        """What drops inputs of one layer."""
        return _LayerDropout(self, number, path)

    @contextlib.contextmanager
    def of(self, key: StepKey, numbers: Sequence[int], tokens: int) -> Iterator[None]:
        """Within this, what runs are rows with these numbers, each padded to so many tokens."""
        rows = np.repeat(np.asarray(numbers, np.int64), tokens)
        self._now = Dropout(self._rate, key, rows, np.tile(np.arange(tokens, dtype=np.int64), len(numbers)))
        try:
            yield
        finally:
            self._now = None

    def apply(self, x: Tensor, layer: int, path: str) -> Tensor:
        """What is left of the inputs of a layer, (rows, tokens, in) or (rows · tokens, in)."""
        if self._now is None:
            return x
        if x.numel() != len(self._now.rows) * x.shape[-1]:
            raise ConfigError(
                f"--dropout is set and {path} computes with some tokens alone, in an order of its own: leave it out"
            )
        ones = torch.ones(len(self._now.rows), x.shape[-1])
        return x * self._now.apply(ones, layer, torch.empty_like(ones)).view(x.shape)


class _LayerDropout(nn.Module):
    def __init__(self, dropouts: RowDropouts, number: int, path: str) -> None:
        super().__init__()
        self._dropouts, self._number, self._path = dropouts, number, path

    def forward(self, x: Tensor) -> Tensor:
        return self._dropouts.apply(x, self._number, self._path)
