"""What a backend offers for models of any kind: pictures, sound, text encoders, a module of the user's own.

The model runs as its framework runs it; adapter, head and optimiser are Thimble's. A task says how rows become the
arguments of the module, and the session what comes of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter, TrainingSession
from thimble.core.adapter import Adapter
from thimble.core.inits import Moments, Sketch
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
            texts, where -100 is not compared; `weights` float32 (rows,), what each row counts, if not all the same.
        numbers: Numbers of the rows in their part of the data, which augmentation is drawn from.
    """

    inputs: Mapping[str, NDArray[Any]]
    targets: Mapping[str, NDArray[Any]]
    numbers: Sequence[int]


@dataclass(frozen=True)
class Measured:
    """What the forward and backward pass of a micro-batch took.

    Attributes:
        kept_bytes: What the forward pass keeps for the backward pass.
        largest_bytes: The largest of these, of which a few copies come and go.
        seconds: Time.
    """

    kept_bytes: int
    largest_bytes: int
    seconds: float


class ModuleSession(TrainingSession, Protocol):
    """A frozen module in memory. Its bare base, `load(None)`, has the head that was fitted to the frozen module."""

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained."""

    @property
    def rate_layers(self) -> Sequence[tuple[int, int]]:
        """(rank, in) of each adapted layer: what default learning rates depend on."""

    @property
    def head(self) -> str:
        """The path of the last Linear, which makes the logits; empty if there is none."""

    @property
    def convolutions(self) -> Sequence[str]:
        """How convolutions are computed in training, for people: a line or none, certain once `measure` has run."""

    @property
    def weight_bytes(self) -> int:
        """What the weights of the base take in memory, the head among them."""

    def kept_weight(self, path: str) -> NDArray[np.float32]:
        """The frozen weight of a layer as it is computed with, float32 (out, in), or (out, in · kernel)."""

    def file_weight(self, path: str) -> NDArray[np.float32]:
        """The same, as near to the file as it is known."""

    def input_moments(self, batches: Sequence[ModuleBatch]) -> Iterator[tuple[list[str], Moments]]:
        """Second moments of the inputs of each adapted layer, with its path."""

    def gradient_sketches(
        self, batches: Sequence[ModuleBatch], ranks: Mapping[str, int], is_weighted: bool, seed: int,
        checkpointed_blocks: int,
    ) -> dict[str, Sketch]:  # fmt: skip
        """Main directions of the gradient of each adapted weight, at least `ranks` of each, with B at zero."""

    def restart(self, adapter: Adapter) -> None:
        """Begin with other A and B, of the same shapes; layers in its `origin` are trained as a difference to that."""

    def save_merged(self, folder: Path) -> dict[str, float]:
        """Write the module with the adapter in its weights into a folder, as safetensors; the session ends with that.

        Given is the length of the update of each layer. An InputError names layers that cannot hold theirs.
        """

    def new_features(self, batch: ModuleBatch, open_file: Callable[[], BinaryIO], rows: int) -> Any:
        """Room in a file for what the frozen beginning of the module makes of so many rows like those of a batch.

        None where there is no such beginning without which the module says the same; OSError if there is no room.
        """

    def add_features(self, features: Any, batches: Iterator[ModuleBatch]) -> Iterator[int]:
        """Compute what is to be kept of the rows of each batch, and tell how many are done; OSError on a full disk."""

    def measure(self, batch: ModuleBatch) -> Measured:
        """Run a micro-batch forward and back, for what it takes; nothing is learned."""

    def fresh_adapter(self) -> Adapter:
        """The adapter as it is now, with what is trained whole."""

    def set_head(self, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> None:
        """Give the head other values: float32 (classes, width) and (classes,)."""

    def set_whole(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Give what is trained whole other values, in the base too: a head that was fitted."""

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
