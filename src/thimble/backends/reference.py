"""The reference session: the protocols of `thimble.backends.session` in numpy and float64, to be read and trusted.

The forward pass is the page `thimble.models.forward`, gradients are what `thimble.backends.tape` makes of it, and a
state is a value that no call changes. Fast backends are measured against it, and what trains a model is tested on it in
milliseconds. Snapshots are float64, so that a run that is resumed from one continues to the bit. NaN and Inf raise no
warnings: they are for `is_finite` and for the guard of a run to find.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from thimble.backends import capabilities as options
from thimble.backends.known_answers import KnownAnswers
from thimble.backends.session import ForwardRow, Gradient, LayerInfo, Objective, Pass, StepKey, Work
from thimble.backends.tape import OPS, Var, gradients
from thimble.core.adapter import Adapter
from thimble.core.dropout import keep_factor, keep_mask
from thimble.core.lowrank import Factors
from thimble.core.method import Method
from thimble.core.metrics import Divergence, LossSum
from thimble.data.batches import Batch, pack
from thimble.data.encode import IGNORED, Row
from thimble.models import forward
from thimble.models.base import Base
from thimble.models.execution import ExecutionPlan
from thimble.models.forward import Drop, Update

Array = NDArray[np.float64]
CAPABILITIES = frozenset(options.OPTIONS) - {"weights", "calibration"}
BETA1, EPSILON = 0.9, 1e-8  # of AdamW
KINDS = ("A", "B", "magnitude")


class Updates(dict[str, Update]):
    """An adapter in float64, by layer path; without any layer it is the bare base."""

    @property
    def resident_bytes(self) -> int:
        """See thimble.backends.session.ActiveAdapter."""
        return sum(8 * (update.A.size + update.B.size) for update in self.values())

    @functools.cached_property
    def identity(self) -> str:
        """See thimble.backends.session.ActiveAdapter."""
        layers = {path: Factors(u.A, u.B, u.scale, u.magnitude) for path, u in self.items()}
        origin = {path: Factors(*u.origin, u.scale) for path, u in self.items() if u.origin is not None}
        return Adapter(layers, origin=origin).identity()


@dataclass(frozen=True)
class ReferenceGradient:
    """The gradient of one step."""

    loss: LossSum
    flat: Array  # float64 (n,), in the order of `ReferenceState.flat`

    @property
    def norm(self) -> float:
        """Length of `flat`."""
        return float(np.linalg.norm(self.flat))


@dataclass(frozen=True)
class KlReference:
    """Text and what the bare base makes of it."""

    batch: Batch
    logits: Array  # float64 (labels, vocabulary)


@dataclass(frozen=True)
class ReferenceState:
    """Trained parameters and optimiser moments; a value."""

    first: Adapter  # the adapter that training began with: shapes, scales, origin, base and notes
    method: Method  # how it is trained
    goal: Array  # `flat` of `first`, to which weight decay pulls
    flat: Array  # trained parameters, float64 (n,): all A, all B, all magnitudes
    exp_avg: Array  # running mean of the gradient, float64 (n,)
    exp_avg_sq: Array  # the same of its square
    step: int = 0  # steps taken

    @property
    def active(self) -> Updates:
        """The adapter as it is now."""
        return _updates(self.first, self.flat)


class TokenCache:
    """What was read into each block: the tokens themselves, since the reference reads them all again."""

    block_tokens = 4

    def __init__(self) -> None:
        self.ids = np.zeros((0, self.block_tokens), np.int32)

    def reserve(self, blocks: int) -> None:
        missing = max(0, blocks - len(self.ids))
        self.ids = np.concatenate([self.ids, np.zeros((missing, self.block_tokens), np.int32)])

    def copy(self, source: int, target: int) -> None:
        self.ids[target] = self.ids[source]

    def discard(self, blocks: Sequence[int]) -> None:
        """Do nothing: numbers of tokens take little."""


def _rows(batch: Batch) -> list[Batch]:
    """Each row of a batch as one of its own."""
    parts = (slice(*ends) for ends in itertools.pairwise(batch.starts))
    return [pack([Row(batch.ids[part], batch.labels[part], "")]) for part in parts]


class ReferenceSession:
    """A small frozen base in float64; see Session. It honours all it can, or less, to see how a lack is dealt with."""

    def __init__(self, base: Base, capabilities: frozenset[str] = CAPABILITIES) -> None:
        self.capabilities = capabilities
        self._spec = base.decoder
        self._weights = {name: weight.read().astype(np.float64) for name, weight in base.weights.items()}

    @property
    def layers(self) -> Sequence[LayerInfo]:
        shapes = self._spec.linear_shapes()
        return [LayerInfo(path, shape, int(path.split(".")[2])) for path, shape in shapes.items()]

    @property
    def max_positions(self) -> int:
        return self._spec.max_positions

    @property
    def shares_prefixes(self) -> bool:
        return False

    # ---- adapters -------------------------------------------------------------------------------------------------

    def load(self, adapter: Adapter | None) -> Updates:
        return _updates(adapter, _flattened(adapter)) if adapter else Updates()

    def start(self, adapter: Adapter, method: Method) -> ReferenceState:
        options.refuse_missing("reference", self.capabilities, options.required(adapter, method))
        flat = _flattened(adapter)
        return ReferenceState(adapter, method, flat, flat, np.zeros_like(flat), np.zeros_like(flat))

    def adapter(self, state: ReferenceState) -> Adapter:
        views = _views(state.first, state.flat.astype(np.float32))
        layers = {path: Factors(a, b, state.first.layers[path].scale, m) for path, (a, b, m) in views.items()}
        return replace(state.first, layers=layers)

    # ---- training -------------------------------------------------------------------------------------------------

    @np.errstate(all="ignore")
    def gradient(
        self, state: ReferenceState, work: Work, objective: Objective, execution: ExecutionPlan, key: StepKey
    ) -> ReferenceGradient:
        """See Session; shares are run one after the other."""
        used = options.required(state.first, state.method, objective)
        options.refuse_missing("reference", self.capabilities, used)
        loss, flat = LossSum(), np.zeros_like(state.flat)
        for batch in (batch for share in work.shares for batch in share):
            drop = _dropping(batch, key, state.method.dropout) if state.method.dropout else None
            nats, slope = _differentiated(state, functools.partial(self._summed_loss, batch=batch, drop=drop))
            loss, flat = loss + LossSum(nats, batch.target_tokens), flat + slope
        flat *= (1 - objective.kl_weight) / work.target_tokens
        if objective.kl_weight:
            reference: KlReference = objective.kl_reference
            _, slope = _differentiated(state, functools.partial(self._summed_divergence, reference=reference))
            flat += slope * (objective.kl_weight / len(reference.logits))
        return ReferenceGradient(loss, flat)

    def lowest_block(self, state: ReferenceState) -> int:
        return 0  # nothing is kept

    def new_features(self, state: ReferenceState, file: BinaryIO, tokens: int) -> None:
        """Keep nothing."""

    def add_features(self, features: None, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[int]:
        return iter(())

    @np.errstate(all="ignore")
    def apply(self, state: ReferenceState, gradient: Gradient, rate: float) -> ReferenceState:
        """See Session: AdamW (arXiv:1711.05101), decaying to where the run began; the state it is given stays valid."""
        slope, step = gradient.flat.astype(np.float64), state.step + 1
        first, second = BETA1, state.method.beta2
        if gradient.norm > state.method.max_grad_norm:
            slope *= state.method.max_grad_norm / gradient.norm
        rates = rate * _rate_factors(state)  # (n,)
        exp_avg = state.exp_avg + (1 - first) * (slope - state.exp_avg)
        exp_avg_sq = second * state.exp_avg_sq + (1 - second) * slope * slope
        spread = np.sqrt(exp_avg_sq / (1 - second**step)) + EPSILON
        flat = state.flat + rates * state.method.weight_decay * (state.goal - state.flat)
        flat = flat - rates / (1 - first**step) * exp_avg / spread
        return replace(state, flat=flat, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step)

    def _hidden(self, updates: Updates, batch: Batch, drop: Drop | None = None) -> Any:
        """(T, hidden) of a batch, before the final norm."""
        rows = forward.layout(self._spec, batch.starts)
        return forward.hidden(OPS, self._spec, self._weights, batch.ids, rows, updates, drop)

    @np.errstate(all="ignore")
    def _summed_loss(self, updates: Updates, batch: Batch, drop: Drop | None = None) -> Any:
        """Summed cross-entropy over the target tokens of a batch."""
        return self._cross_entropy(self._hidden(updates, batch, drop), batch.labels)

    def _cross_entropy(self, x: Any, labels: NDArray[np.int32]) -> Any:
        """Summed over the places that carry a label: of hidden states (T, hidden)."""
        places = np.flatnonzero(labels != IGNORED)
        scores = forward.logits(OPS, self._spec, self._weights, x[places])
        return forward.cross_entropy(OPS, scores, labels[places])

    def _summed_divergence(self, updates: Updates, reference: KlReference) -> Any:
        """Σ KL(base ‖ model) over the places of the reference, without dropout."""
        return forward.divergence(OPS, self._scores(updates, reference.batch), reference.logits)

    def _scores(self, updates: Updates, batch: Batch) -> Any:
        """Logits (labels, vocabulary) at the places that carry a label."""
        places = np.flatnonzero(batch.labels != IGNORED)
        return forward.logits(OPS, self._spec, self._weights, self._hidden(updates, batch)[places])

    def unmoved_layers(self, state: ReferenceState) -> list[str]:
        squares = _views(state.first, state.exp_avg_sq)
        return [path for path, (a, b, _) in squares.items() if not (a.any() or b.any())]

    # ---- measuring ------------------------------------------------------------------------------------------------

    def losses(self, adapter: Updates, batches: Sequence[Batch], execution: ExecutionPlan) -> Iterator[LossSum]:
        for batch in batches:
            yield LossSum(float(self._summed_loss(adapter, batch)), batch.target_tokens)

    def row_losses(
        self, adapter: Updates, batches: Sequence[Batch], execution: ExecutionPlan
    ) -> Iterator[list[LossSum]]:
        """See Session: row by row, each as a batch of its own."""
        for batch in batches:
            yield list(self.losses(adapter, _rows(batch), execution))

    def divergences(
        self, adapter: Updates, batches: Sequence[Batch], execution: ExecutionPlan,
        known: KnownAnswers | None = None,
    ) -> Iterator[list[Divergence]]:  # fmt: skip
        """See Session; nothing is condensed."""
        for batch in batches:
            yield [self._divergence(adapter, row) for row in _rows(batch)]

    def _divergence(self, adapter: Updates, row: Batch) -> Divergence:
        base, moved = (self._scores(updates, row) for updates in (Updates(), adapter))
        same = int((base.argmax(1) == moved.argmax(1)).sum())
        return Divergence(float(forward.divergence(OPS, moved, base)), same, len(base))

    def kl_reference(self, batch: Batch) -> KlReference:
        return KlReference(batch, self._scores(Updates(), batch))

    def release(self) -> None:
        """See Session; nothing is kept."""

    # ---- inference ------------------------------------------------------------------------------------------------

    independent_tokens = 0  # numpy sums many rows otherwise than few

    def prepare(self, adapter: Adapter) -> Updates:
        active = self.load(adapter)
        _ = active.identity
        return active

    def new_cache(self) -> TokenCache:
        return TokenCache()

    def position_kind(self, end: int) -> int:
        ropes = {id(rope): rope for rope in self._spec.ropes if rope is not None}.values()
        return sum(rope.long_inv_freq is not None and end > rope.long_from for rope in ropes)

    def forward(
        self, passes: Sequence[Pass], cache: TokenCache, num_workers: int
    ) -> list[tuple[NDArray[np.float32], LossSum]]:
        return [self._forward(one, cache) for one in passes]

    def _forward(self, one: Pass, cache: TokenCache) -> tuple[NDArray[np.float32], LossSum]:
        parts = np.split(one.ids, np.cumsum([row.tokens for row in one.rows])[:-1])
        x = np.concatenate([self._continued(ids, row, cache) for ids, row in zip(parts, one.rows, strict=True)])
        scores = forward.logits(OPS, self._spec, self._weights, x[list(one.ends)]).astype(np.float32)
        if one.labels is None:
            return scores, LossSum()
        tokens = int(np.count_nonzero(one.labels != IGNORED))
        return scores, LossSum(float(self._cross_entropy(x, one.labels)), tokens)

    def _continued(self, ids: NDArray[np.int32], row: ForwardRow, cache: TokenCache) -> Array:
        """(row.tokens, hidden) of further tokens of a request; all that stands before them is read again."""
        held = cache.ids[list(row.blocks)].ravel()
        held[row.position : row.position + row.tokens] = ids
        cache.ids[list(row.blocks)] = held.reshape(-1, cache.block_tokens)
        whole = held[: row.position + row.tokens]
        rows = forward.layout(self._spec, np.array([0, len(whole)]), np.array([row.end]))
        x: Array = forward.hidden(OPS, self._spec, self._weights, whole, rows, row.adapter)
        return x[row.position :]

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def snapshot(self, state: ReferenceState, into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """See Session; float64."""
        arrays = {
            "adapter": state.flat, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq,
            "step": np.array([state.step], np.float64),
        }  # fmt: skip
        if into is None:
            return {name: array.copy() for name, array in arrays.items()}
        for name, array in arrays.items():
            into[name][:] = array
        return dict(into)

    def restore(self, state: ReferenceState, arrays: Mapping[str, NDArray[np.floating[Any]]]) -> ReferenceState:
        arrays = {**self.snapshot(state), **arrays}
        flat, exp_avg, exp_avg_sq = (arrays[name].astype(np.float64) for name in ("adapter", "exp_avg", "exp_avg_sq"))
        return replace(state, flat=flat, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=int(arrays["step"][0]))

    def is_finite(self, state: ReferenceState) -> bool:
        return all(bool(np.isfinite(array).all()) for array in self.snapshot(state).values())


# ---- the flat vector ------------------------------------------------------------------------------------------------


def _flattened(adapter: Adapter) -> Array:
    """All A, then all B, then all magnitudes, layer by layer: float64 (n,)."""
    arrays = [getattr(factors, kind) for kind in KINDS for factors in adapter.layers.values()]
    parts = [np.asarray(array, np.float64).ravel() for array in arrays if array is not None]
    return np.concatenate([np.zeros(0), *parts])


def _views(adapter: Adapter, flat: Any) -> dict[str, list[Any]]:
    """A flat vector, or one on the tape, by layer: A (rank, in), B (out, rank) and magnitude (out,) or None."""
    views: dict[str, list[Any]] = {path: [] for path in adapter.layers}
    place = 0
    for kind in KINDS:
        for path, factors in adapter.layers.items():
            array = getattr(factors, kind)
            size = 0 if array is None else array.size
            views[path].append(None if array is None else flat[place : place + size].reshape(*array.shape))
            place += size
    return views


def _updates(adapter: Adapter, flat: Any) -> dict[str, Update]:
    """What the forward pass reads: the values of a flat vector with the scales and the origin of an adapter."""
    found = Updates()
    for path, (a, b, magnitude) in _views(adapter, flat).items():
        start = adapter.origin.get(path)
        origin = None if start is None else (start.A.astype(np.float64), start.B.astype(np.float64))
        found[path] = Update(a, b, adapter.layers[path].scale, magnitude, origin)
    return found


def _rate_factors(state: ReferenceState) -> Array:
    """What the learning rate of each parameter is multiplied by, (n,): 0 for a frozen one."""
    factors = np.ones_like(state.flat)
    for a, b, _ in _views(state.first, factors).values():
        a[:], b[:] = 0.0 if state.method.freezes_a else 1.0, state.method.lora_plus
    return factors


def _differentiated(state: ReferenceState, loss: Callable[[Updates], Any]) -> tuple[float, Array]:
    """A scalar function of a state's updates: its value, and its gradient in the order of `flat`, 0 where frozen."""
    flat = Var(state.flat)
    result = loss(_updates(state.first, flat))
    (slope,) = gradients(result, [flat])
    return float(result.value), np.where(_rate_factors(state), slope, 0.0)


def _dropping(batch: Batch, key: StepKey, rate: float) -> Drop:
    """Dropout of a batch in a step."""
    rows, tokens, factor = np.repeat(batch.numbers, np.diff(batch.starts)), batch.positions, float(keep_factor(rate))

    def drop(x: Any, group: int) -> Any:
        return x * (keep_mask(key, group, rows, tokens, x.shape[1], rate) * factor)

    return drop
