"""What a backend offers for models of any kind: pictures, sound, text encoders, a module of the user's own.

The model runs as its framework runs it; adapter, head and optimiser are Thimble's. A task says how rows become the
arguments of the module, and the session what comes of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, TrainingSession
from thimble.core.metrics import LossSum
from thimble.models.execution import ExecutionPlan


@dataclass(frozen=True)
class ModuleBatch:
    """Some rows as a module takes them.

    Attributes:
        inputs: Arguments of the module by name, each (rows, ...), such as `pixel_values` float32 (rows, 3, h, w) or
            `input_ids` and `attention_mask` int64 (rows, tokens). Of pairs, all first halves stand before all second
            ones.
        targets: What the loss compares with, by name: `labels` int64, (rows,) for classes and (rows, tokens) for
            texts, where -100 is not compared.
        numbers: Numbers of the rows in their part of the data, which augmentation is drawn from.
    """

    inputs: Mapping[str, NDArray[Any]]
    targets: Mapping[str, NDArray[Any]]
    numbers: Sequence[int]


class ModuleSession(TrainingSession, Protocol):
    """A frozen module in memory. Its bare base, `load(None)`, has the head that was fitted to the frozen module."""

    def losses(
        self, adapter: ActiveAdapter, batches: Iterator[ModuleBatch], execution: ExecutionPlan
    ) -> Iterator[list[LossSum]]:
        """The loss of each row of each batch, in order, as they are ready."""

    def outputs(
        self, adapter: ActiveAdapter, batches: Iterator[ModuleBatch], execution: ExecutionPlan
    ) -> Iterator[NDArray[Any]]:
        """What the module makes of each batch: logits float32 (rows, classes), embeddings float32 (rows, width) of
        length 1, or the tokens that it writes, int64 (rows, tokens), ended by the end token.
        """

    def head_inputs(self, batches: Iterator[ModuleBatch], execution: ExecutionPlan) -> Iterator[NDArray[Any]]:
        """What comes to the head of the frozen module, float32 (rows, width), for each batch."""
