"""A base that runs through transformers; see thimble.backends.session for what each method promises.

The slow path: the model runs as transformers runs it, in float32 or bfloat16, with rows of about one length side by
side. What is trained, and how, is Thimble's: one flat vector, AdamW, dropout by row, the delta form.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from thimble.backends.capabilities import THROUGH_TRANSFORMERS
from thimble.backends.known_answers import KnownAnswers
from thimble.backends.session import LayerInfo, Objective, Pass, StepKey, Work
from thimble.backends.torch.compute import FLOATS
from thimble.backends.torch.flat_training import FlatTraining, TrainState, begin
from thimble.backends.torch.gradient import Gradient
from thimble.backends.torch.memory import out_of_memory
from thimble.backends.torch.transformers_cache import BlockCache, CachedRow, TokenCache, try_cache
from thimble.backends.torch.transformers_model import AdaptedModel, groups_of
from thimble.backends.torch.transformers_updates import RowDropouts, Updates
from thimble.core.adapter import Adapter
from thimble.core.method import Method
from thimble.core.metrics import Divergence, LossSum
from thimble.core.sizes import logit_chunk
from thimble.core.targets import block_of
from thimble.data.batches import Batch
from thimble.data.encode import IGNORED
from thimble.errors import ConfigError, listing
from thimble.models.base import Base
from thimble.models.execution import ExecutionPlan
from thimble.models.model_spec import adapted_shapes

BARE = Updates(None)


class Labelled(NamedTuple):
    """Some rows of a batch that run together.

    Attributes:
        ids: Their tokens, int32 (tokens,) each.
        places: Where in each row there is a label, int64.
        targets: The labels, int64 (all of them,).
        rows: For each label the number of its row in the batch, int64.
        numbers: Place of each row in its optimiser step.
    """

    ids: list[NDArray[np.int32]]
    places: list[NDArray[np.int64]]
    targets: Tensor
    rows: NDArray[np.int64]
    numbers: list[int]


@dataclass(frozen=True)
class TransformersState(TrainState):
    """An adapter in training."""

    dropouts: RowDropouts | None = None


class TransformersSession(FlatTraining):
    """A frozen model of transformers, ready to run, in compute type `fp32` or `bf16`."""

    capabilities = THROUGH_TRANSFORMERS
    shares_prefixes = False
    independent_tokens = 0  # a product of many rows is summed otherwise than one of few

    @out_of_memory
    def __init__(self, base: Base, compute: str = "fp32") -> None:
        self.model = AdaptedModel(base, FLOATS[compute])
        self._base = base
        self.cache_shapes = try_cache(self.model)

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        shapes = adapted_shapes(self._base.spec)
        return tuple(LayerInfo(path, shape, block_of(path)) for path, shape in shapes.items())

    @property
    def max_positions(self) -> int:
        return self._base.spec.max_positions

    # ---- adapters -------------------------------------------------------------------------------------------------

    def load(self, adapter: Adapter | None) -> Updates:
        return Updates(adapter)

    def start(self, adapter: Adapter, method: Method) -> TransformersState:
        active = Updates(replace(adapter, settings={**adapter.settings, **self._base.spec.adapter_settings}))
        if method.freezes_a:
            active.freeze_a()
        dropouts = None
        if method.dropout:
            if inner := [path for path in active.low_ranks if not self.model.places[path].is_beside]:
                raise ConfigError(
                    f"--dropout is set and {listing(inner, 2)} computes with its weight in a way of its own, where "
                    "there is no input of A to drop: leave it out"
                )
            dropouts = RowDropouts(method.dropout)
            active.drop(dropouts)
        state = begin(active, method)
        return TransformersState(active, method, state.optimiser, dropouts)

    def with_magnitudes(self, adapter: Adapter) -> Adapter:
        """Give layers without magnitudes those that change nothing: the row lengths of W + scale · B A (DoRA)."""
        layers = dict(adapter.layers)
        for path, factors in adapter.layers.items():
            if factors.magnitude is None:
                whole = self.file_weight(path) + np.float32(factors.scale) * (factors.B @ factors.A)
                start = adapter.origin.get(path)
                whole -= 0 if start is None else np.float32(start.scale) * (start.B @ start.A)
                layers[path] = replace(factors, magnitude=np.linalg.norm(whole, axis=1).astype(np.float32))
        return replace(adapter, layers=layers)

    def file_weight(self, path: str) -> NDArray[np.float32]:
        """The weight of a layer, float32 (out, in)."""
        from thimble.backends.torch.attached_layers import as_matrix

        place = self.model.places[path]
        found: NDArray[np.float32] = as_matrix(place.layer, getattr(place.layer, place.weight)).float().numpy()
        return found

    # ---- training -------------------------------------------------------------------------------------------------

    @out_of_memory
    def gradient(
        self, state: TransformersState, work: Work, objective: Objective, execution: ExecutionPlan, key: StepKey
    ) -> Gradient:
        """See Session; shares run one after the other, each on all cores."""
        flat, loss, active = torch.zeros_like(state.active.flat), LossSum(), state.active
        with active.collecting(flat), self.model.using(active.low_ranks, execution.checkpointed_blocks):
            for batch in (batch for share in work.shares for batch in share):
                for group in _labelled(batch):
                    loss += self._add_gradient(state, group, key)
            flat.mul_((1 - objective.kl_weight) / work.target_tokens)
        if objective.kl_reference is not None:
            self._add_divergence(active, objective, flat, execution)
        return Gradient(loss, flat.numpy())

    def _add_gradient(self, state: TransformersState, group: Labelled, key: StepKey) -> LossSum:
        """Add the gradient of the summed loss of some rows."""
        if not len(group.targets):
            return LossSum()
        if state.dropouts is None:
            loss = self._losses_of(group).sum()
            loss.backward()
        else:
            with state.dropouts.of(key, group.numbers, max(map(len, group.ids))):
                loss = self._losses_of(group).sum()
                loss.backward()
        return LossSum(float(loss.detach()), len(group.targets))

    def _losses_of(self, group: Labelled) -> Tensor:
        """Cross-entropy at each label, float32 (labels,)."""
        return functional.cross_entropy(self.model.logits(group.ids, group.places), group.targets, reduction="none")

    def _add_divergence(self, active: Updates, objective: Objective, flat: Tensor, execution: ExecutionPlan) -> None:
        """Add the gradient of the KL term, on text that the base reads again each time."""
        batch: Batch = objective.kl_reference
        for group in _labelled(batch):
            if not len(group.targets):
                continue
            with torch.no_grad():
                wanted = self._bare_logits(group)
            with active.collecting(flat), self.model.using(active.low_ranks, execution.checkpointed_blocks):
                nats = _divergences(wanted, self.model.logits(group.ids, group.places)).sum()
                (nats * (objective.kl_weight / batch.target_tokens)).backward()

    def kl_reference(self, batch: Batch) -> Batch:
        return batch

    # ---- features: nothing is kept between steps --------------------------------------------------------------------

    def lowest_block(self, state: TrainState) -> int:
        return 0

    def new_features(self, state: TrainState, file: BinaryIO, tokens: int) -> None:
        """Keep nothing."""

    def add_features(self, features: None, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[int]:
        return iter(())

    def release(self) -> None:
        """Nothing is kept between calls."""

    # ---- measuring ------------------------------------------------------------------------------------------------

    def losses(self, adapter: Updates, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[LossSum]:
        return (sum(rows, LossSum()) for rows in self.row_losses(adapter, batches, execution))

    def row_losses(
        self, adapter: Updates, batches: Sequence[Batch], execution: ExecutionPlan
    ) -> Iterator[list[LossSum]]:
        return (self._row_losses(adapter, batch) for batch in batches)

    @out_of_memory
    @torch.no_grad()
    def _row_losses(self, adapter: Updates, batch: Batch) -> list[LossSum]:
        nats, counts = np.zeros(len(batch.numbers)), np.zeros(len(batch.numbers), np.int64)
        with self.model.using(adapter.low_ranks):
            for group in _labelled(batch):
                if len(group.targets):
                    np.add.at(nats, group.rows, self._losses_of(group).numpy())
                    np.add.at(counts, group.rows, 1)
        return list(map(LossSum, nats.tolist(), counts.tolist()))

    def divergences(
        self, adapter: Updates, batches: Sequence[Batch], execution: ExecutionPlan,
        known: KnownAnswers | None = None,
    ) -> Iterator[list[Divergence]]:  # fmt: skip
        return (self._divergences(adapter, batch) for batch in batches)

    @out_of_memory
    @torch.no_grad()
    def _divergences(self, adapter: Updates, batch: Batch) -> list[Divergence]:
        sums = np.zeros((3, len(batch.numbers)))  # nats, places with the same likeliest token, places
        for group in _labelled(batch):
            if not len(group.targets):
                continue
            wanted = self._bare_logits(group)
            with self.model.using(adapter.low_ranks):
                found = self.model.logits(group.ids, group.places)
            same = wanted.argmax(1) == found.argmax(1)
            for row, values in zip(sums, (_divergences(wanted, found), same, torch.ones(len(found))), strict=True):
                np.add.at(row, group.rows, values.numpy())
        return [Divergence(nats, int(same), int(places)) for nats, same, places in sums.T.tolist()]

    def _bare_logits(self, group: Labelled) -> Tensor:
        with self.model.using(BARE.low_ranks):
            return self.model.logits(group.ids, group.places)

    # ---- inference ------------------------------------------------------------------------------------------------

    def prepare(self, adapter: Adapter) -> Updates:
        active = self.load(adapter)
        _ = active.identity
        return active

    def new_cache(self) -> BlockCache | TokenCache:
        return BlockCache(self.cache_shapes, self.model.compute) if self.cache_shapes else TokenCache()

    def position_kind(self, end: int) -> int:
        return 0

    @out_of_memory
    def forward(
        self, passes: Sequence[Pass], cache: BlockCache | TokenCache, num_workers: int
    ) -> list[tuple[NDArray[np.float32], LossSum]]:
        return [self._forward(one, cache) for one in passes]

    @torch.no_grad()
    def _forward(self, one: Pass, cache: BlockCache | TokenCache) -> tuple[NDArray[np.float32], LossSum]:
        """Rows of one adapter and about one length run together; logits are made where asked for, and at labels."""
        starts = np.cumsum([0, *(row.tokens for row in one.rows)])
        labelled = np.zeros(0, np.int64) if one.labels is None else np.flatnonzero(one.labels != IGNORED)
        places = np.union1d(np.asarray(one.ends, np.int64), labelled)
        table = np.zeros((len(places), self._base.spec.vocab_size), np.float32)
        for numbers in _alike(one):
            rows, wanted = [], []
            for number in numbers:
                row, begin, end = one.rows[number], starts[number], starts[number + 1]
                own = np.flatnonzero((places >= begin) & (places < end))
                rows.append(CachedRow(one.ids[begin:end], row.blocks, row.position, places[own] - begin))
                wanted.append(own)
            with self.model.using(one.rows[numbers[0]].adapter.low_ranks):
                table[np.concatenate(wanted)] = cache.read(self.model, rows).numpy()
        loss = LossSum()
        if one.labels is not None:
            found = torch.from_numpy(table[np.searchsorted(places, labelled)])
            targets = torch.from_numpy(one.labels[labelled].astype(np.int64))
            loss = LossSum(float(functional.cross_entropy(found, targets, reduction="sum")), len(labelled))
        return table[np.searchsorted(places, np.asarray(one.ends, np.int64))], loss


def _alike(one: Pass) -> Iterator[list[int]]:
    """Numbers of rows of a pass that run together: of one adapter, next tokens or prompts, of about one length."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    for number, row in enumerate(one.rows):
        kinds.setdefault((id(row.adapter), row.tokens == 1), []).append(number)
    for numbers in kinds.values():
        for group in groups_of([one.rows[number].position + one.rows[number].tokens for number in numbers]):
            yield [numbers[place] for place in group]


def _labelled(batch: Batch) -> Iterator[Labelled]:
    """The rows of a batch, those of about one length together."""
    spans = [slice(*span) for span in zip(batch.starts, batch.starts[1:], strict=False)]
    for group in groups_of([span.stop - span.start for span in spans]):
        places = [np.flatnonzero(batch.labels[spans[row]] != IGNORED) for row in group]
        targets = np.concatenate([batch.labels[spans[row]][own] for row, own in zip(group, places, strict=True)])
        rows = np.repeat(group, [len(own) for own in places])
        ids = [batch.ids[spans[row]] for row in group]
        numbers = [int(batch.numbers[row]) for row in group]
        yield Labelled(ids, places, torch.from_numpy(targets.astype(np.int64)), rows, numbers)


def _divergences(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(base ‖ model) in nats at each place, of logits float32 (places, vocabulary), some places at a time."""
    parts = []
    size = logit_chunk(len(found), 3 * 4 * found.shape[1])
    for start in range(0, len(found), size):
        base, moved = (logits[start : start + size].log_softmax(1) for logits in (wanted, found))
        parts.append((base.exp() * (base - moved)).sum(1))
    return torch.cat(parts)
