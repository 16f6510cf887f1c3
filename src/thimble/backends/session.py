"""What a backend offers: a frozen base in memory that adapters are trained on and run with. Values in, values out.

Nothing is attached to a session. The adapter, the execution plan, the objective and the key of dropout are arguments;
gradients and train states are returned. `thimble.backends.reference` is these protocols in numpy, `backends.torch` the
fast one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from thimble.backends.known_answers import KnownAnswers
from thimble.core.adapter import Adapter
from thimble.core.method import Method
from thimble.core.metrics import Divergence, LossSum
from thimble.data.batches import Batch
from thimble.models.execution import ExecutionPlan


class LayerInfo(NamedTuple):
    """A linear layer that can be adapted.

    Attributes:
        path: Such as `model.layers.0.self_attn.q_proj`.
        shape: (out, in).
        depth: Number of its block.
    """

    path: str
    shape: tuple[int, int]
    depth: int


class StepKey(NamedTuple):
    """What dropout of one optimiser step is drawn from, together with row and layer.

    Attributes:
        seed: Of the run.
        step: Number of the step, from 0.
    """

    seed: int
    step: int


class Work(NamedTuple):
    """The rows of one optimiser step, or this process's part of them.

    Attributes:
        shares: For each worker its micro-batches; workers run in parallel.
        target_tokens: Target tokens of the whole step, over all processes: the gradient is that of their mean loss.
        features: From `Session.new_features`, or None.
    """

    shares: Sequence[Sequence[Batch]]
    target_tokens: int
    features: Any = None


@dataclass(frozen=True)
class Objective:
    """What a step minimises: (1 - kl_weight) · cross-entropy + kl_weight · KL(base ‖ model) on reference text, the mean
    over its places that carry a label.

    Attributes:
        kl_weight: From 0 up to 1.
        kl_reference: From `Session.kl_reference`; None without the KL term.
    """

    kl_weight: float = 0.0
    kl_reference: Any = None


class ForwardRow(NamedTuple):
    """A row of a forward pass: some tokens of one request.

    Attributes:
        tokens: How many.
        blocks: Of the key-value cache, in the order of the request's tokens; the row adds its own to them.
        position: Of the first of them in the request; what the blocks hold before it is seen by all of them.
        end: Tokens that the request may come to in all: some rotary embeddings depend on it.
        adapter: That these tokens have.
        is_written: Whether they are of an answer. A backend may read such tokens in another way than prompts; what they
            come to then depends on none that is read beside them.
    """

    tokens: int
    blocks: Sequence[int]
    position: int
    end: int
    adapter: "ActiveAdapter"
    is_written: bool = False


class Pass(NamedTuple):
    """A forward pass over rows that stand in a key-value cache, and what is wanted of them.

    Attributes:
        ids: int32 (T,), the tokens of all rows.
        rows: Of any kinds, in any order: prompts, parts of prompts, next tokens of answers.
        ends: Places in `ids`, ascending, after which next-token logits are wanted.
        labels: int32 (T,), as in a Batch, if their loss is wanted too.
    """

    ids: NDArray[np.int32]
    rows: Sequence[ForwardRow]
    ends: Sequence[int]
    labels: NDArray[np.int32] | None = None

    def part(self, chosen: NDArray[np.bool_]) -> "Pass":
        """The pass over some of its rows alone; `chosen` is bool (T,), alike for all tokens of a row."""
        starts = np.cumsum([0, *(row.tokens for row in self.rows)])[:-1]
        ends = np.array(self.ends, np.int64)
        places = (np.cumsum(chosen) - 1)[ends[chosen[ends]]].tolist()
        rows = [row for row, start in zip(self.rows, starts, strict=True) if chosen[start]]
        return Pass(self.ids[chosen], rows, places, None if self.labels is None else self.labels[chosen])


class KeyValueCache(Protocol):
    """Keys and values of the tokens that requests have read, in blocks that have numbers from 0."""

    @property
    def block_tokens(self) -> int:
        """Tokens that a block holds."""

    def reserve(self, blocks: int) -> None:
        """Make room for so many blocks; what is there stays."""

    def copy(self, source: int, target: int) -> None:
        """Copy a block over another."""

    def discard(self, blocks: Sequence[int]) -> None:
        """Give back the memory of blocks, as far as that can be: what they hold is lost, and they stay usable."""


class ActiveAdapter(Protocol):
    """An adapter in a backend's own memory and compute type; an empty one is the bare base, bit for bit."""

    @property
    def identity(self) -> str:
        """Hash of its contents, scales among them: adapters of one identity give the same keys and values."""

    @property
    def resident_bytes(self) -> int:
        """Memory it takes."""


class Gradient(Protocol):
    """The gradient of one step, a value; gradients of the processes of a step add up."""

    @property
    def loss(self) -> LossSum:
        """Summed loss and target tokens of this process's part of the step."""

    @property
    def flat(self) -> NDArray[np.float32]:
        """Gradient of the step's objective for all trained parameters, float32 (n,): all A, all B, all magnitudes."""

    @property
    def norm(self) -> float:
        """Length of `flat`, summed in float64."""


class TrainState(Protocol):
    """Trained parameters and optimiser moments; `apply` may reuse the buffers of the state it is given."""

    @property
    def active(self) -> ActiveAdapter:
        """The adapter as it is now, for `losses` and `forward`."""


class TrainingSession(Protocol):
    """A frozen base in memory, on which the training loop trains an adapter."""

    @property
    def layers(self) -> Sequence[LayerInfo]:
        """The layers that can be adapted, in the order they run."""

    @property
    def capabilities(self) -> frozenset[str]:
        """Options this backend honours beyond plain LoRA; any other is refused by name."""

    def load(self, adapter: Adapter | None) -> ActiveAdapter:
        """Bring an adapter into the backend's memory; None gives the bare base."""

    def start(self, adapter: Adapter, method: Method) -> TrainState:
        """Begin to train an adapter, from the values it has."""

    def gradient(
        self, state: TrainState, work: Work, objective: Objective, execution: ExecutionPlan, key: StepKey
    ) -> Gradient:
        """The gradient of the objective over the rows of a step; raises MemoryError if they do not fit."""

    def apply(self, state: TrainState, gradient: Gradient, rate: float) -> TrainState:
        """Take one AdamW step; the gradient is scaled down to `Method.max_grad_norm` first."""

    def snapshot(
        self, state: TrainState, into: Mapping[str, NDArray[np.float32]] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Copies of all that training changes: `adapter` (flat), `exp_avg`, `exp_avg_sq` and `step`.

        They are put into the arrays of an earlier snapshot, if one is given.
        """

    def restore(self, state: TrainState, arrays: Mapping[str, NDArray[np.float32]]) -> TrainState:
        """The state with the arrays of a `snapshot`; what is not among them stays as it is."""

    def adapter(self, state: TrainState) -> Adapter:
        """The adapter as it is now, float32."""

    def is_finite(self, state: TrainState) -> bool:
        """Whether no trained parameter and no moment is NaN or Inf."""

    def unmoved_layers(self, state: TrainState) -> list[str]:
        """Layers that never had a gradient."""

    def release(self) -> None:
        """Give back the memory of activations and temporaries."""


class Session(TrainingSession, Protocol):
    """A frozen decoder in memory, which reads and writes text too."""

    @property
    def max_positions(self) -> int:
        """The context of the base: most tokens of a prompt and its answer together."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether what rows of a batch have in common at their beginning is computed once."""

    def lowest_block(self, state: TrainState) -> int:
        """Number of the first block whose input can be kept, as `new_features` does: 0 if none or the first."""

    def new_features(self, state: TrainState, file: BinaryIO, tokens: int) -> Any:
        """Room in a file for what comes to the lowest adapted block from rows of so many tokens; OSError if none."""

    def add_features(self, features: Any, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[int]:
        """Compute the features of the rows of each batch and keep them: their tokens; raises OSError on a full disk."""

    def losses(self, adapter: ActiveAdapter, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[LossSum]:
        """Summed loss over the target tokens of each batch, in order, as they are ready."""

    def row_losses(
        self, adapter: ActiveAdapter, batches: Sequence[Batch], execution: ExecutionPlan
    ) -> Iterator[list[LossSum]]:
        """The same, for each row of each batch."""

    def divergences(
        self, adapter: ActiveAdapter, batches: Sequence[Batch], execution: ExecutionPlan,
        known: KnownAnswers | None = None,
    ) -> Iterator[list[Divergence]]:  # fmt: skip
        """How far each row of each batch is from the bare base, at the places that carry a label.

        What is known of the base is not computed; an engine that can condense its answers adds the others.
        """

    def kl_reference(self, batch: Batch) -> Any:
        """What the bare base makes of some text at the places that carry a label, for `Objective`."""

    @property
    def independent_tokens(self) -> int:
        """Most written tokens of a pass in which each comes to the same, to the bit, whatever is read beside it."""

    def prepare(self, adapter: Adapter) -> ActiveAdapter:
        """Bring a finished adapter into memory, hashed and laid out as answers read it; any thread may."""

    def new_cache(self) -> KeyValueCache:
        """An empty key-value cache."""

    def position_kind(self, end: int) -> int:
        """Which rotary embeddings a request has that may come to `end` tokens; keys of two kinds are not the same."""

    def forward(
        self, passes: Sequence[Pass], cache: KeyValueCache, num_workers: int
    ) -> list[tuple[NDArray[np.float32], LossSum]]:
        """Read rows into their blocks, passes in parallel: logits float32 (ends, vocabulary) and loss of each pass."""
