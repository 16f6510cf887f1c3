"""A base in memory for the torch engine; see thimble.backends.session for what each method promises.

Adapters, gradients and train states are values: the session itself holds frozen weights and buffers, nothing else.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from thimble.backends.known_answers import KnownAnswers
from thimble.backends.session import ForwardRow, LayerInfo, Objective, Pass, StepKey, Work
from thimble.backends.torch import calibrate, labelled_rows
from thimble.backends.torch.adapters import ActiveAdapter, FinishedAdapter, TrainableAdapter
from thimble.backends.torch.compute import FLOATS
from thimble.backends.torch.decode_step import CODES, DecodeStep
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.features import Features
from thimble.backends.torch.flat_training import FlatTraining, TrainState, begin
from thimble.backends.torch.frozen import load_matrix
from thimble.backends.torch.gradient import Gradient
from thimble.backends.torch.kv_cache import KvCache
from thimble.backends.torch.labelled_rows import labelled
from thimble.backends.torch.lora import BARE, Dropout, Lora
from thimble.backends.torch.lora_rows import MOST_TOKENS, AdapterSpan, RowUpdates
from thimble.backends.torch.loss import divergence, label_loss
from thimble.backends.torch.memory import out_of_memory
from thimble.backends.torch.threads import map_parallel
from thimble.core.adapter import Adapter
from thimble.core.inits import Moments, Sketch
from thimble.core.method import Method
from thimble.core.metrics import Divergence, LossSum
from thimble.core.sizes import padded
from thimble.core.targets import block_of
from thimble.data.batches import Batch, lay_out
from thimble.data.encode import IGNORED
from thimble.data.prefixes import Segment
from thimble.models.base import Base
from thimble.models.cost import lowest_block
from thimble.models.execution import ExecutionPlan, activation_dtype, multiplies_blocks

CAPABILITIES = frozenset(
    {
        "delta form",
        "DoRA",
        "rsLoRA",
        "LoRA+",
        "frozen A",
        "dropout",
        "KL reference",
        "weights",
        "calibration",
        "inference",
    }
)


@dataclass(frozen=True)
class KlReference:
    """Text and what the base makes of it."""

    batch: Batch
    hidden: torch.Tensor  # (labels, hidden), the last hidden states of the base there, compute type


class TorchSession(FlatTraining):
    """A frozen base, ready to run, in compute type `fp32`, `bf16`, `bf16-int8` or `int8`.

    Weights are kept as the store says, `dense`, `int8` or `file`. Compute int8 multiplies the blocks of a file, or with
    any other store int8 rows, for which a sample of any text, int32 (tokens,), of a few hundred tokens chooses the
    scales. If streamed, weights are read from the file for each product and not kept. With `int8` as `decode`, answers
    are written in whole numbers over weights in blocks; with `int8` as `cache_type`, keys and values are kept rounded.
    """

    capabilities = CAPABILITIES

    @out_of_memory
    def __init__(
        self, base: Base, compute: str = "fp32", store: str = "dense", is_streamed: bool = False,
        sample: NDArray[np.int32] | None = None, decode: str = "float", cache_type: str = "float",
    ) -> None:  # fmt: skip
        makes_rows = compute == "int8" and not multiplies_blocks(compute, store)
        self.decoder = Decoder(base, "file" if makes_rows else store, FLOATS[activation_dtype(compute, store)])
        if makes_rows:
            if sample is None:
                raise ValueError("compute int8 needs a sample of text")
            self.decoder.quantize(sample)
        elif multiplies_blocks(compute, store):
            self.decoder.multiply_blocks()
        self._base, self._decode, self._compute = base, decode, compute
        self._cache_kind = "I8" if cache_type == "int8" else CODES[self.decoder.compute]
        self._updates = RowUpdates([])
        if is_streamed:
            self.decoder.stream()
        self.release()

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        shapes = self._base.spec.linear_shapes()
        return tuple(LayerInfo(path, shape, block_of(path)) for path, shape in shapes.items())

    @property
    def max_positions(self) -> int:
        return self._base.spec.max_positions

    @property
    def shares_prefixes(self) -> bool:
        return self._base.spec.shares_prefixes

    # ---- adapters -------------------------------------------------------------------------------------------------

    @out_of_memory
    def load(self, adapter: Adapter | None) -> TrainableAdapter:
        active = TrainableAdapter(adapter, self.decoder.compute)
        self.decoder.measure(active.layers)
        return active

    @out_of_memory
    def start(self, adapter: Adapter, method: Method) -> TrainState:
        if self._compute == "bf16-int8":  # only now: nothing but training needs the weights in int8
            self.decoder.round_gradients()
        return begin(self.load(adapter), method)

    @out_of_memory
    @torch.no_grad()
    def with_magnitudes(self, adapter: Adapter) -> Adapter:
        """Give layers without magnitudes those that change nothing: the row lengths of W + scale · B A (DoRA)."""
        bare = {path: f for path, f in adapter.layers.items() if f.magnitude is None}
        ones = {path: replace(f, magnitude=np.ones(len(f.B), np.float32)) for path, f in bare.items()}
        measured = self.load(replace(adapter, layers=ones)).layers
        lengths = {path: f.row_lengths for path, f in measured.items() if f.row_lengths is not None}
        found = {path: replace(f, magnitude=lengths[path].numpy()) for path, f in bare.items()}
        return replace(adapter, layers={path: found.get(path, f) for path, f in adapter.layers.items()})

    def file_weight(self, path: str) -> NDArray[np.float32]:
        """A weight as it is in the file, decoded by the engine's kernels: float32 (out, in)."""
        return load_matrix(self._base.weights[f"{path}.weight"], "dense", torch.float32).dense.numpy()

    def kept_weight(self, path: str) -> NDArray[np.float32]:
        """A weight as it is kept, which may be coarser than in the file: float32 (out, in)."""
        projection = next(group for group in self.decoder.projections if path in group.columns)
        return projection.frozen.decoded(projection.columns[path]).float().numpy()

    # ---- training -------------------------------------------------------------------------------------------------

    @out_of_memory
    def gradient(
        self, state: TrainState, work: Work, objective: Objective, execution: ExecutionPlan, key: StepKey
    ) -> Gradient:
        """See Session; the micro-batches of a share run one by one: the result depends on no core's speed."""
        sums = [torch.zeros_like(state.active.flat) for _ in work.shares]
        shares = zip(work.shares, sums, strict=True)
        add = functools.partial(self._add_gradients, state, execution=execution, key=key, features=work.features)
        tasks = [functools.partial(add, *share) for share in shares]
        loss = sum(map_parallel(tasks, execution.num_shares), LossSum())
        flat = sums[0]
        for other in sums[1:]:
            flat.add_(other)
        flat.mul_((1 - objective.kl_weight) / work.target_tokens)
        if objective.kl_reference is not None:
            self._add_divergence(state, objective, flat, execution)
        return Gradient(loss, flat.numpy())

    def _add_gradients(
        self, state: TrainState, share: Sequence[Batch], flat: torch.Tensor, execution: ExecutionPlan, key: StepKey,
        features: Features | None,
    ) -> LossSum:  # fmt: skip
        """Add the gradients of some micro-batches to a flat sum."""
        total, grads = LossSum(), state.active.views(flat)
        for batch in share:
            dropout = Dropout(state.method.dropout, key, *_places(batch)) if state.method.dropout else None
            lora = Lora(ranges=_one(state.active), grads=grads, freezes_a=state.method.freezes_a, dropout=dropout)
            loss = self._label_loss(batch, lora, execution, features)
            loss.backward()
            total += LossSum(float(loss.detach()), batch.target_tokens)
        return total

    def _add_divergence(
        self, state: TrainState, objective: Objective, flat: torch.Tensor, execution: ExecutionPlan
    ) -> None:
        """Add the gradient of the KL term."""
        reference: KlReference = objective.kl_reference
        lora = Lora(ranges=_one(state.active), grads=state.active.views(flat), freezes_a=state.method.freezes_a)
        hidden = self._labelled_hidden(reference.batch, lora, execution.checkpointed_blocks)
        divergence(self.decoder, hidden, reference.hidden, objective.kl_weight / len(reference.hidden)).backward()

    @out_of_memory
    @torch.no_grad()
    def kl_reference(self, batch: Batch) -> KlReference:
        return KlReference(batch, self._labelled_hidden(batch, BARE))

    def _refreshed(self, state: TrainState) -> TrainState:
        for factors in state.active.layers.values():
            factors.refresh()
        state.active.tables.clear()
        self._updates = RowUpdates([])
        self.decoder.measure(state.active.layers)
        return state

    def _labelled_hidden(self, batch: Batch, lora: Lora, checkpointed_blocks: int = 0) -> torch.Tensor:
        """Last hidden states at the labels of a batch, (labels, hidden): a copy, in the order they are computed."""
        found = labelled(self.decoder, batch, lora, self.shares_prefixes, checkpointed_blocks)
        return found.hidden[torch.from_numpy(np.flatnonzero(found.labels != IGNORED))]

    def _label_loss(
        self, batch: Batch, lora: Lora, execution: ExecutionPlan, features: Features | None = None
    ) -> torch.Tensor:
        """Summed loss of a batch."""
        found = labelled(self.decoder, batch, lora, self.shares_prefixes, execution.checkpointed_blocks, features)
        return label_loss(self.decoder, found.hidden, found.labels)

    # ---- features -------------------------------------------------------------------------------------------------

    def lowest_block(self, state: TrainState) -> int:
        return lowest_block(state.active.layers)

    def new_features(self, state: TrainState, file: BinaryIO, tokens: int) -> Features:
        width, compute = self._base.spec.hidden_size, self.decoder.compute
        return Features(file, self.lowest_block(state), width, compute, tokens)

    def add_features(self, features: Features, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[int]:
        tasks = [functools.partial(self._add_features, features, batch) for batch in batches]
        return map_parallel(tasks, execution.num_shares)

    @out_of_memory
    @torch.no_grad()
    def _add_features(self, features: Features, batch: Batch) -> int:
        layout, decoder = lay_out(batch, self.shares_prefixes), self.decoder
        forward = decoder.pack(layout.segments)
        x = decoder.embed(batch.ids[layout.places], forward.size)
        x = decoder.through(decoder.blocks[: features.lowest], x, forward)
        features.put(batch, x[torch.from_numpy(layout.copies)])
        return batch.tokens

    # ---- measuring ------------------------------------------------------------------------------------------------

    def losses(self, adapter: ActiveAdapter, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[LossSum]:
        return (sum(rows, LossSum()) for rows in self.row_losses(adapter, batches, execution))

    def row_losses(
        self, adapter: ActiveAdapter, batches: Sequence[Batch], execution: ExecutionPlan
    ) -> Iterator[list[LossSum]]:
        return self.of_batches(labelled_rows.row_losses, adapter, batches, execution)

    def divergences(
        self, adapter: ActiveAdapter, batches: Sequence[Batch], execution: ExecutionPlan,
        known: KnownAnswers | None = None,
    ) -> Iterator[list[Divergence]]:  # fmt: skip
        measure = labelled_rows.divergences
        if known is not None and not self.decoder.spec.final_softcap:
            measure = functools.partial(labelled_rows.divergences_from_known, known=known)
        return self.of_batches(measure, adapter, batches, execution)

    def of_batches(
        self, measure: Callable[..., Any], adapter: ActiveAdapter, batches: Sequence[Batch], execution: ExecutionPlan
    ) -> Iterator[Any]:
        """What a function like those of `labelled_rows` finds of each batch, in order, as it is ready."""
        lora = Lora(ranges=_one(adapter))
        tasks = [functools.partial(measure, self.decoder, batch, lora, self.shares_prefixes) for batch in batches]
        return map_parallel(tasks, execution.num_shares)

    @torch.no_grad()
    def logits(self, ids: NDArray[np.int32], adapter: ActiveAdapter | None = None) -> NDArray[np.float32]:
        """Logits after every token of one row: int32 (tokens,) to float32 (tokens, vocabulary)."""
        lora = Lora(ranges=_one(adapter)) if adapter else BARE
        hidden = self.decoder.hidden(ids, self.decoder.pack([Segment(0, len(ids))], lora))
        return self.decoder.logits(hidden[: len(ids)]).numpy()

    def release(self) -> None:
        self.decoder.memory.release()

    # ---- inference ------------------------------------------------------------------------------------------------

    @out_of_memory
    def prepare(self, adapter: Adapter) -> FinishedAdapter:
        active = FinishedAdapter(adapter, self.decoder.compute)
        self.decoder.measure(active.layers)
        if self._step:
            self._step.gathered(active)
        return active

    def new_cache(self) -> KvCache:
        return KvCache(len(self.decoder.blocks), self.decoder.blocks[0].attention, self._cache_kind)

    def position_kind(self, end: int) -> int:
        return sum(rope.long_inv_freq is not None and end > rope.long_from for rope in self.decoder.ropes)

    @out_of_memory
    def forward(
        self, passes: Sequence[Pass], cache: KvCache, num_workers: int
    ) -> list[tuple[NDArray[np.float32], LossSum]]:
        tasks = [functools.partial(self._forward, one, cache) for one in passes]
        return list(map_parallel(tasks, 1 if self._reads_by_steps else num_workers))  # a step takes all cores

    @torch.no_grad()
    def _forward(self, one: Pass, cache: KvCache) -> tuple[NDArray[np.float32], LossSum]:
        step = self._step if self._reads_by_steps or any(row.is_written for row in one.rows) else None
        return step.forward(one, cache, self._read) if step else self._read(one, cache)

    @property
    def _reads_by_steps(self) -> bool:
        return self._decode == "int8" and self._step is not None and self._step.reads_prompts

    independent_tokens = property(lambda self: self._step.most_tokens if self._step else 0)

    @functools.cached_property
    def _step(self) -> DecodeStep | None:
        return DecodeStep(self.decoder, self._decode == "int8") if DecodeStep.can_run(self.decoder) else None

    def _read(self, one: Pass, cache: KvCache) -> tuple[NDArray[np.float32], LossSum]:
        hidden = self.decoder.hidden(one.ids, self.decoder.pack_rows(one.rows, cache, self._adapters(one.rows)))
        loss = LossSum()
        if one.labels is not None:
            tokens = int(np.count_nonzero(one.labels != IGNORED))
            loss = LossSum(float(label_loss(self.decoder, hidden, one.labels)), tokens)
        return self.decoder.logits(hidden[list(one.ends)]).numpy(), loss

    def _adapters(self, rows: Sequence[ForwardRow]) -> Lora:
        """The adapters of the rows of a pass; those of few tokens in compiled loops, all at once."""
        spans = [span for span in _spans(rows) if span.adapter.layers]
        short = [span for span in spans if span.stop - span.start <= MOST_TOKENS]
        updates = self._updates.moved(short)
        if updates is None:
            updates = self._updates = RowUpdates(short)
        long = [(slice(span.start, span.stop), span.adapter.layers) for span in spans if span not in short]
        return Lora(ranges=long, rows=updates if short else None)

    # ---- calibration ----------------------------------------------------------------------------------------------

    def input_moments(self, batches: Sequence[Batch]) -> Iterator[tuple[list[str], Moments]]:
        """See thimble.backends.torch.calibrate.input_moments."""
        return calibrate.input_moments(self.decoder, batches)

    def input_squares(self, batches: Sequence[Batch], adapter: Adapter | None) -> Iterator[calibrate.Squares]:
        """See thimble.backends.torch.calibrate.input_squares."""
        return calibrate.input_squares(self.decoder, batches, _one(self.load(adapter)) if adapter else ())

    def gradient_sketches(
        self, batches: Sequence[Batch], ranks: Mapping[str, int], **options: Any
    ) -> dict[str, Sketch]:
        """See thimble.backends.torch.calibrate.sketch_gradients."""
        return calibrate.sketch_gradients(self.decoder, batches, ranks, **options)

    def captured_energy(
        self, batches: Sequence[Batch], candidates: Mapping[str, Mapping[str, NDArray[np.float32]]], **options: Any
    ) -> dict[str, dict[str, tuple[NDArray[np.float64], float]]]:
        """See thimble.backends.torch.calibrate.captured_energy."""
        return calibrate.captured_energy(self.decoder, batches, candidates, **options)


def _one(adapter: ActiveAdapter) -> list[tuple[slice, Mapping]]:
    """One adapter for all tokens, padding included."""
    return [(slice(None), adapter.layers)] if adapter.layers else []


def _spans(rows: Sequence[ForwardRow]) -> list[AdapterSpan]:
    """Tokens whose rows follow one another and have the same adapter."""
    spans, start = [], 0
    for _, alike in itertools.groupby(rows, lambda row: id(row.adapter)):
        first, *others = alike
        end = start + first.tokens + sum(row.tokens for row in others)
        spans.append(AdapterSpan(start, end, first.adapter))
        start = end
    return spans


def _places(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each token of a batch, with padding, the place of its row in the step and its own place in the row."""
    rows, padding = np.repeat(batch.numbers, np.diff(batch.starts)), padded(batch.tokens) - batch.tokens
    return np.pad(rows, (0, padding)), np.pad(batch.positions.astype(np.int64), (0, padding))
