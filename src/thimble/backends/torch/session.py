"""A base in memory with an adapter on it: gradients, updates, losses and answers.

The only object a training loop needs; hides that this backend changes tensors in place.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from thimble.backends.torch import calibrate
from thimble.backends.torch.adamw import AdamW, norm
from thimble.backends.torch.adapter_state import AdapterState
from thimble.backends.torch.compute import DTYPES
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.frozen import FileMatrix
from thimble.backends.torch.generate import Sampler, read, write
from thimble.backends.torch.lora import Noise
from thimble.backends.torch.loss import divergence, label_loss
from thimble.backends.torch.memory import out_of_memory
from thimble.backends.torch.threads import map_parallel, worker
from thimble.core.adapter import Adapter
from thimble.core.inits import Moments, Sketch
from thimble.core.method import Method
from thimble.core.metrics import LossSum
from thimble.models.base import Base
from thimble.models.execution import ExecutionPlan

PLAIN = Method()


class LabelledRow(Protocol):
    """What a session needs to know of a row; see thimble.data.encode.Row."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]


class PackedRows(Protocol):
    """What a session needs to know of a batch; see thimble.data.batches.Batch."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class KlReference:
    """Text and what the base makes of it.

    Attributes:
        batch: The text.
        hidden: (tokens, hidden), the last hidden states of the base, compute type.
    """

    batch: PackedRows
    hidden: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """What one step's micro-batches gave.

    Attributes:
        loss: Summed loss and label tokens of the step.
        norm: Global norm of the mean gradient, before it is scaled down.
    """

    loss: LossSum
    norm: float


class TorchSession:
    """A frozen base, ready to run.

    Args:
        base: The opened base.
        compute: `fp32`, `bf16` or `int8`.
        execution: How weights are kept and batches are run; compute int8 has a store of its own.
        sample: For compute int8: int32 (tokens,), any text; a few hundred tokens are enough.
    """

    @out_of_memory
    def __init__(
        self, base: Base, compute: str, execution: ExecutionPlan, sample: NDArray[np.int32] | None = None
    ) -> None:
        self.decoder = Decoder(base, "file" if compute == "int8" else execution.store, DTYPES[compute])
        if compute == "int8":
            assert sample is not None, "compute int8 needs a sample of text"
            self.decoder.quantize(sample)
        self._base, self._execution = base, execution
        self.decoder.checkpointed_blocks = min(execution.checkpointed_blocks, len(self.decoder.blocks))
        if execution.is_streamed:
            self.decoder.stream()
        self.release()
        self._like: Adapter | None = None  # base and notes of the adapter that hangs on
        self._state: AdapterState | None = None
        self._noise: Noise | None = None
        self._seed = 0
        self._optimiser: AdamW | None = None

    # ---- adapters -------------------------------------------------------------------------------------------------

    @out_of_memory
    def attach(self, adapter: Adapter | None) -> None:
        """Use an adapter, or none: then every result is the bare base's, bit for bit."""
        self._like, self._optimiser = _without_numbers(adapter) if adapter else None, None
        self._state, self._noise = AdapterState(adapter, self.decoder.compute) if adapter else None, None
        self.decoder.attach(self._state.pairs if self._state else {})

    @out_of_memory
    def train(self, adapter: Adapter, method: Method = PLAIN) -> None:
        """Start to train an adapter, from the values it has.

        Args:
            adapter: The start.
            method: How its numbers are trained.
        """
        self._like = _without_numbers(adapter)
        self._state = AdapterState(adapter, self.decoder.compute, self._execution.num_shares, method.freezes_a)
        spans, master = self._state.spans, self._state.master
        rates = [(spans.A, 0.0 if method.freezes_a else 1.0), (spans.B, method.lora_plus), (spans.magnitude, 1.0)]
        self._optimiser = AdamW(master, method.weight_decay, master.clone() if method.weight_decay else None, rates)
        self._noise = Noise(method.dropout) if method.dropout else None
        self._seed = method.seed
        self.decoder.attach(self._state.pairs, self._noise)

    def switch(self, is_on: bool) -> None:
        """Take the adapter off, which gives the bare base bit for bit, or put it back on."""
        self.decoder.attach(self._state.pairs if self._state and is_on else {}, self._noise)

    @out_of_memory
    @torch.no_grad()
    def with_magnitudes(self, adapter: Adapter) -> Adapter:
        """Give layers without magnitudes those that change nothing: the row lengths of W + scale · B A (DoRA)."""
        bare = {path: f for path, f in adapter.layers.items() if f.magnitude is None}
        ones = {path: replace(f, magnitude=np.ones(len(f.B), np.float32)) for path, f in bare.items()}
        state = AdapterState(replace(adapter, layers=ones), self.decoder.compute)
        self.decoder.attach(state.pairs)
        self.decoder.attach({})
        lengths = {path: pair.row_lengths for path, pair in state.pairs.items() if pair.row_lengths is not None}
        found = {path: replace(f, magnitude=lengths[path].numpy()) for path, f in bare.items()}
        return replace(adapter, layers={path: found.get(path, f) for path, f in adapter.layers.items()})

    def file_weight(self, path: str) -> NDArray[np.float32]:
        """A weight as it is in the file, decoded by the engine's kernels: float32 (out, in)."""
        matrix = FileMatrix(self._base.weights[f"{path}.weight"], torch.float32)
        values = torch.empty(matrix.rows, matrix.cols)
        matrix.decode(slice(0, matrix.rows), values)
        matrix.release(slice(0, matrix.rows))
        return values.numpy()

    def kept_weight(self, path: str) -> NDArray[np.float32]:
        """A weight as it is kept, which may be coarser than in the file: float32 (out, in)."""
        projection = next(group for group in self.decoder.projections if path in group.columns)
        return projection.frozen.decoded(projection.columns[path]).float().numpy()

    def adapter(self) -> Adapter:
        """The adapter as it is now, float32."""
        assert self._state is not None, "no adapter is attached"
        assert self._like is not None, "no adapter is attached"
        return self._state.export(self._like)

    # ---- training -------------------------------------------------------------------------------------------------

    @out_of_memory
    def gradients(
        self,
        shares: Sequence[Sequence[PackedRows]],
        target_tokens: int,
        reference: KlReference | None = None,
        weight: float = 0,
    ) -> Gradients:
        """Gradients of the mean loss over all label tokens of a step.

        Args:
            shares: Together they are the step. Shares run side by side, the micro-batches of a share one by one, so
                that the result does not depend on which core is faster.
            target_tokens: Labelled tokens in all of them.
            reference: Text on which the answers of the base are to be kept, from `remember`.
            weight: Of keeping them, from 0 to 1; the rest is that of the loss.

        Returns:
            The step's loss and the norm of its gradient; the gradient itself stays here for `apply`.
        """
        assert self._state is not None, "nothing is being trained"
        assert self._state.grads, "nothing is being trained"
        self._state.clear_gradients()
        losses = map_parallel([functools.partial(self._add_gradients, share) for share in shares], len(shares))
        total = sum(losses, LossSum())
        gradient = self._state.gradient().mul_((1 - weight) / target_tokens)
        if reference is not None:
            hidden = self.decoder.hidden(reference.batch.ids, self.decoder.pack(reference.batch.starts))
            divergence(self.decoder, hidden, reference.hidden, weight / len(reference.hidden)).backward()
        return Gradients(total, norm(gradient))

    @out_of_memory
    @torch.no_grad()
    def kl_reference(self, batch: PackedRows) -> KlReference:
        """What the bare base makes of some text, for `gradients` to keep; takes the adapter off and puts it back."""
        self.switch(False)
        hidden = self.decoder.hidden(batch.ids, self.decoder.pack(batch.starts))[: len(batch.ids)].clone()
        self.switch(True)
        return KlReference(batch, hidden)

    def _add_gradients(self, share: Sequence[PackedRows]) -> LossSum:
        """Add the gradients of some micro-batches to the sum of this share."""
        total = LossSum()
        for number, batch in enumerate(share):
            with self._dropping(number):
                loss = self._label_loss(batch)
                loss.backward()
            total += LossSum(float(loss.detach()), _count(batch.labels))
        return total

    @contextlib.contextmanager
    def _dropping(self, number: int) -> Iterator[None]:
        """Within, dropout leaves out what it does in this micro-batch of this step and share."""
        if not self._noise:
            yield
            return
        assert self._optimiser is not None, "nothing is being trained"
        self._noise.here.batch = hash((self._seed, self._optimiser.steps, worker(), number))
        try:
            yield
        finally:
            self._noise.here.batch = None

    def apply(self, gradients: Gradients, learning_rate: float, max_norm: float) -> None:
        """Take one AdamW step on the adapter.

        Args:
            gradients: From `gradients`, of the same step.
            learning_rate: Size of the step.
            max_norm: The gradient is scaled down to this norm.
        """
        assert self._state is not None, "nothing is being trained"
        assert self._optimiser is not None, "nothing is being trained"
        grad = self._state.grads[0]
        if gradients.norm > max_norm:
            grad.mul_(max_norm / gradients.norm)
        self._optimiser.step(grad, learning_rate)
        self._refresh()

    def backward(self, batch: PackedRows) -> None:
        """Run one batch forward and back, for those who watch the gradients; see thimble.backends.torch.calibrate."""
        self._label_loss(batch).backward()

    def _refresh(self) -> None:
        """Have the numbers of the adapter reach the layers."""
        assert self._state is not None, "nothing is being trained"
        self._state.refresh()
        self.decoder.measure()

    def _label_loss(self, batch: PackedRows) -> torch.Tensor:
        hidden = self.decoder.hidden(batch.ids, self.decoder.pack(batch.starts))
        return label_loss(self.decoder, hidden, batch.labels)

    # ---- measuring ------------------------------------------------------------------------------------------------

    def losses(self, batches: Sequence[PackedRows]) -> Iterator[LossSum]:
        """Summed loss over the labelled tokens of each batch, in order, as they are ready."""
        return map_parallel([functools.partial(self._loss, batch) for batch in batches], self._execution.num_shares)

    @out_of_memory
    @torch.no_grad()
    def _loss(self, batch: PackedRows) -> LossSum:
        return LossSum(float(self._label_loss(batch)), _count(batch.labels))

    @torch.no_grad()
    def logits(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits after every token of one row: int32 (tokens,) to float32 (tokens, vocabulary)."""
        packed = self.decoder.pack(np.array([0, len(ids)], np.int64))
        return self.decoder.logits(self.decoder.hidden(ids, packed)[: len(ids)]).numpy()

    @out_of_memory
    def generate(
        self,
        prompts: Sequence[NDArray[np.int32]],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        on_token: Callable[[int, int], bool | None] | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Continue prompts.

        Args:
            prompts: int32 (length,) each.
            max_new_tokens: Most tokens written per prompt.
            stop_ids: Tokens that end an answer.
            on_token: Called with (prompt number, token); returning True ends everything.
            **sampling: `temperature`, `top_p` and `seed`; greedy without them.

        Returns:
            The new tokens of each prompt.
        """
        lengths = [len(prompt) for prompt in prompts]
        cache, hidden, _ = read(
            self.decoder, prompts, lengths, max_new_tokens, tasks_at_once=self._execution.num_shares
        )
        return write(self.decoder, cache, hidden, max_new_tokens, stop_ids, Sampler(**sampling), on_token)

    @out_of_memory
    def answer(
        self,
        rows: Sequence[LabelledRow],
        prompt_tokens: Sequence[int],
        pass_tokens: int,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        on_token: Callable[[int, int], bool | None] | None = None,
    ) -> tuple[LossSum, list[list[int]]]:
        """Measure rows and write answers to their prompts greedily, reading them once for both.

        Args:
            rows: Rows that begin with their prompts.
            prompt_tokens: How many tokens of each row are its prompt.
            pass_tokens: Most tokens read at a time.
            max_new_tokens: Most tokens written per prompt.
            stop_ids: Tokens that end an answer.
            on_token: Called with (row number, token); returning True ends everything.

        Returns:
            The summed loss over the labelled tokens of all rows, and the new tokens of each.
        """

        def measured(hidden: torch.Tensor, numbers: range) -> LossSum:
            labels = np.concatenate([rows[number].labels for number in numbers])
            return LossSum(float(label_loss(self.decoder, hidden, labels)), _count(labels))

        self.release()  # the cache takes the place of activations
        ids = [row.ids for row in rows]
        sizes = (max_new_tokens, pass_tokens, self._execution.num_shares)
        cache, hidden, losses = read(self.decoder, ids, prompt_tokens, *sizes, measured)
        answers = write(self.decoder, cache, hidden, max_new_tokens, stop_ids, on_token=on_token)
        return sum(losses, LossSum()), answers

    def release(self) -> None:
        """Give back the memory of activations and temporaries."""
        self.decoder.memory.release()

    def is_finite(self) -> bool:
        """Whether every number of the adapter and of its optimiser is finite."""
        return all(np.isfinite(values).all() for values in self.state().values())

    def still_layers(self) -> list[str]:
        """Layers of the adapter that never had a gradient, so that nothing in them moved."""
        assert self._state is not None, "nothing is being trained"
        assert self._optimiser is not None, "nothing is being trained"
        moved = self._state.views(self._optimiser.squares)
        return [path for path, n in moved.items() if not (bool(n.A.any()) or bool(n.B.any()))]

    # ---- calibration ----------------------------------------------------------------------------------------------

    def input_moments(self, batches: Sequence[PackedRows]) -> Iterator[tuple[list[str], Moments]]:
        """See thimble.backends.torch.calibrate.input_moments."""
        return calibrate.input_moments(self, batches)

    def gradient_sketches(
        self, batches: Sequence[PackedRows], ranks: Mapping[str, int], is_weighted: bool = False, seed: int = 0
    ) -> dict[str, Sketch]:
        """See thimble.backends.torch.calibrate.sketch_gradients."""
        return calibrate.sketch_gradients(self, batches, ranks, is_weighted, seed)

    def captured_energy(
        self, batches: Sequence[PackedRows], candidates: Mapping[str, Mapping[str, NDArray[np.float32]]]
    ) -> dict[str, dict[str, tuple[NDArray[np.float64], float]]]:
        """See thimble.backends.torch.calibrate.captured_energy."""
        return calibrate.captured_energy(self, batches, candidates)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, NDArray[np.float32]]:
        """All that training changes: the flat adapter and AdamW's moments and step count; copy what you keep."""
        assert self._state is not None, "nothing is being trained"
        assert self._optimiser is not None, "nothing is being trained"
        return {"adapter": self._state.master.numpy(), **self._optimiser.state()}

    def take(self, numbers: NDArray[np.float32]) -> None:
        """Set the adapter to the numbers of an earlier `state`, and leave the optimiser as it is."""
        assert self._state is not None, "nothing is being trained"
        self._state.master.copy_(torch.from_numpy(numbers))
        self._refresh()

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Go back to what `state` returned."""
        assert self._state is not None, "nothing is being trained"
        assert self._optimiser is not None, "nothing is being trained"
        self.take(state["adapter"])
        self._optimiser.restore(state)


def _without_numbers(adapter: Adapter) -> Adapter:
    return replace(adapter, layers={}, origin={})


def _count(labels: NDArray[np.int32]) -> int:
    return int(np.count_nonzero(labels >= 0))
