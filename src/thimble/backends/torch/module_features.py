"""What the frozen beginning of a module makes of rows, computed once and kept in a file.

The beginning is found among the lists of blocks that a module is made of (Sequential, ModuleList): blocks in front of
the first one with anything that is trained. Whether the rest needs nothing but what comes out of them is not guessed:
the module is run without them, on blank inputs, and has to say the same.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from thimble.backends.module_session import ModuleBatch
from thimble.backends.torch.forward_passes import running, unchanged
from thimble.backends.torch.memory import out_of_memory
from thimble.backends.torch.module_losses import ModuleLoss, as_tensors

MOST_TRIED = 4  # lists of blocks, those whose frozen beginning ends last first


@dataclass(frozen=True)
class Prefix:
    """The frozen blocks at the beginning of a list of blocks.

    Attributes:
        path: Of the list.
        blocks: In the order they run.
        before: Frozen blocks that run before these.
    """

    path: str
    blocks: Sequence[nn.Module]
    before: Sequence[nn.Module] = ()

    @contextlib.contextmanager
    def replaced(self, made: Tensor) -> Iterator[None]:
        """Within this, the blocks are not run: what they would make is given, float32 (rows, ...)."""
        first, *others = self.blocks
        passed = [(block, unchanged) for block in (*self.before, *others)]
        with running([*passed, (first, lambda *args, **kwargs: made)]):
            yield

    @contextlib.contextmanager
    def noted(self) -> Iterator[list[Any]]:
        """Within this, what comes out of the last block is kept in a list."""
        found: list[Any] = []
        handle = self.blocks[-1].register_forward_hook(lambda block, args, output: found.append(output))
        try:
            yield found
        finally:
            handle.remove()


def find_prefix(module: nn.Module, loss: ModuleLoss, batch: ModuleBatch) -> Prefix | None:
    """The frozen beginning that ends last and without which the module says the same of a batch; None if none does."""
    inputs, targets = as_tensors(batch)
    blank = {name: torch.zeros_like(values) for name, values in inputs.items()}
    with torch.no_grad():
        candidates = _in_order([*_candidates(module)], lambda: loss.forward(module, inputs, targets))
        for place in reversed(range(max(0, len(candidates) - MOST_TRIED), len(candidates))):
            before = [block for prefix in candidates[:place] for block in prefix.blocks]
            for prefix in (replace(candidates[place], before=before), candidates[place]):
                if _is_enough(prefix, lambda given: loss.forward(module, given, targets), inputs, blank):
                    return prefix
    return None


def _in_order(candidates: list[Prefix], run: Callable[[], Tensor]) -> list[Prefix]:
    """The candidates in the order in which they end; those that are not called are left out."""
    ended: list[Prefix] = []
    with contextlib.ExitStack() as held:
        for prefix in candidates:
            note = lambda block, args, output, prefix=prefix: ended.append(prefix)  # noqa: E731
            held.callback(prefix.blocks[-1].register_forward_hook(note).remove)
        run()
    return ended


def _is_enough(
    prefix: Prefix, run: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], blank: dict[str, Tensor]
) -> bool:
    """Whether a module says the same of blank inputs, if it is given what its beginning makes of the right ones."""
    with prefix.noted() as found:
        expected = run(inputs)
    rows = len(next(iter(inputs.values())))
    if len(found) != 1 or not isinstance(found[0], Tensor) or len(found[0]) != rows:
        return False
    # What the blocks' neighbours expect of their inputs is not known: that some fail is an answer.
    with (
        contextlib.suppress(RuntimeError, ValueError, TypeError, IndexError, AttributeError),
        prefix.replaced(found[0]),
    ):
        return torch.allclose(run(blank), expected, rtol=1e-4, atol=1e-5)
    return False


def _candidates(module: nn.Module) -> Iterator[Prefix]:
    """The frozen blocks at the beginning of each list of blocks."""
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Sequential | nn.ModuleList):
            blocks = list(itertools.takewhile(_is_frozen, layer))
            if any(True for block in blocks for _ in block.parameters()):
                yield Prefix(path, blocks)


def _is_frozen(block: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in block.parameters())


class KeptRows:
    """What a frozen beginning made of each row, memory-mapped float32 (rows, ...), and what the rows are to be."""

    def __init__(self, prefix: Prefix, file: BinaryIO, rows: int, first: ModuleBatch, shape: Sequence[int]) -> None:
        self.prefix = prefix
        self._made = np.memmap(file, np.float32, "w+", shape=(rows, *shape))
        self._targets = {name: np.zeros((rows, *of.shape[1:]), of.dtype) for name, of in first.targets.items()}
        self._inputs = {name: (of.shape[1:], of.dtype) for name, of in first.inputs.items()}

    def put(self, batch: ModuleBatch, made: Tensor) -> None:
        """Keep what was made of some rows; raises OSError on a full disk."""
        self._made[batch.numbers] = made.float().numpy()
        for name, values in batch.targets.items():
            self._targets[name][batch.numbers] = values

    def batch(self, rows: Sequence[int]) -> ModuleBatch:
        """Some rows with blank inputs, which nothing is read of."""
        inputs = {name: np.zeros((len(rows), *shape), dtype) for name, (shape, dtype) in self._inputs.items()}
        return ModuleBatch(inputs, {name: values[rows] for name, values in self._targets.items()}, rows)

    @property
    def path(self) -> str:
        """What was run, for people."""
        count, path = len(self.prefix.blocks), self.prefix.path
        blocks = "block" if count == 1 else f"{count} blocks"
        return f"the first {blocks}" + (f" of module {path}" if path else "")

    @contextlib.contextmanager
    def in_place(self, rows: Sequence[int]) -> Iterator[None]:
        """Within this, the module takes what is kept of some rows for what its beginning makes."""
        with self.prefix.replaced(self.of(rows)):
            yield

    def of(self, rows: Sequence[int]) -> Tensor:
        """What was made of some rows, float32 (rows, ...)."""
        return torch.from_numpy(np.asarray(self._made[rows]))


@out_of_memory
def new_features(
    module: nn.Module, loss: ModuleLoss, batch: ModuleBatch, open_file: Callable[[], BinaryIO], rows: int
) -> KeptRows | None:
    """See ModuleSession.new_features."""
    prefix = find_prefix(module, loss, batch)
    if prefix is None:
        return None
    (made,) = _run(module, loss, prefix, batch)
    return KeptRows(prefix, open_file(), rows, batch, made.shape[1:])


def add_features(module: nn.Module, loss: ModuleLoss, features: KeptRows, batch: ModuleBatch) -> None:
    """Keep what is made of the rows of a batch; OSError on a full disk."""
    features.put(batch, *_run(module, loss, features.prefix, batch))


@out_of_memory
@torch.no_grad()
def _run(module: nn.Module, loss: ModuleLoss, prefix: Prefix, batch: ModuleBatch) -> list[Tensor]:
    with prefix.noted() as found:
        loss.forward(module, *as_tensors(batch))
    return found
