"""The contract of `thimble.backends.session`: one file for every backend, with the numpy reference as the measure."""

import functools
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from thimble.backends import capabilities
from thimble.backends.reference import ReferenceSession
from thimble.backends.session import ForwardRow, Objective, Pass, StepKey, Work
from thimble.core.adapter import Adapter
from thimble.core.inits import LayerData, kaiming
from thimble.core.method import Method
from thimble.core.metrics import LossSum
from thimble.data.batches import pack, shares
from thimble.data.encode import IGNORED, Row
from thimble.errors import InputError
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf"
FAMILIES = ("smollm2", "llama_bias", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3_longrope")
EXECUTION = ExecutionPlan("dense", num_shares=2)
KEY = StepKey(seed=5, step=3)
RATE = 1e-3
PLAIN, LEARN = Method(), Objective()


def torch_session(base):
    from thimble.backends.torch.session import TorchSession

    return TorchSession(base, "fp32", store="dense")


def transformers_session(base):
    """A family of our own as if it were none of them: the same weights in a folder, which transformers opens."""
    from families import make_hf_folder
    from thimble.backends.torch.transformers_session import TransformersSession
    from thimble.models.transformers_spec import describe

    with tempfile.TemporaryDirectory() as place:
        folder = make_hf_folder(base.path.stem, Path(place))
        found = open_base(folder)
        config = json.loads((folder / "config.json").read_text())
        return TransformersSession(replace(found, spec=describe(folder, config)))


@dataclass(frozen=True)
class Backend:
    """How to make a session, and how near its results are to exact ones, relative to their length."""

    make: callable
    precision: float  # of a result summed in another order, or by the reference
    nudge: float  # for finite differences
    slope_precision: float


BACKENDS = {
    "reference": Backend(ReferenceSession, 1e-11, 1e-5, 1e-7),
    "torch": Backend(torch_session, 1e-5, 1e-2, 1e-2),
    "transformers": Backend(transformers_session, 1e-5, 1e-2, 1e-2),
}


OTHERS = [name for name in BACKENDS if name != "reference"]  # those that are measured against it


def pairs(families):
    """Backends and families to measure; of bases in GGUF files, transformers has those alone that fill a folder too."""
    return [
        (other, family)
        for other in OTHERS
        for family in families
        if other != "transformers" or (family in FAMILIES and family != "phi3_longrope") or family == "phi3"
    ]


@functools.cache
def base_of(family):
    return open_base(GGUF / f"{family}.gguf")


@functools.cache
def session_of(backend, family="smollm2"):
    return BACKENDS[backend].make(base_of(family))


@pytest.fixture(params=BACKENDS)
def backend(request):
    session_of(request.param)
    return request.param


@pytest.fixture
def session(backend):
    return session_of(backend)


# ---- what is trained, on what ---------------------------------------------------------------------------------------


def make_rows(count=5, seed=0):
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        ids = random.integers(3, 290, 4 + 3 * number).astype(np.int32)
        labels = np.append(ids[1:], IGNORED).astype(np.int32)
        labels[: 1 + number // 2] = IGNORED
        rows.append(Row(ids, labels, ""))
    return rows


def make_work(rows=None, count=1, max_tokens=1000):
    split = shares(rows or make_rows(), count, max_tokens)
    return Work(split, sum(batch.target_tokens for share in split for batch in share))


@functools.cache
def make_adapter(kind="plain", family="smollm2", b_size=0.05):
    """An adapter of every layer: `plain`, in `delta` form, or with magnitudes (`dora`)."""
    base, random, layers, origin = base_of(family), np.random.default_rng(2), {}, {}
    for path, shape in base.spec.linear_shapes().items():
        first = kaiming(LayerData(path, shape, 3, 2.0))
        moved = replace(first, B=(random.standard_normal(first.B.shape) * b_size).astype(np.float32))
        if kind == "delta":
            origin[path] = replace(moved, A=(moved.A * 1.1).astype(np.float32), B=(moved.B * 0.5).astype(np.float32))
        if kind == "dora":
            lengths = np.linalg.norm(base.weights[f"{path}.weight"].read(), axis=1)
            moved = replace(moved, magnitude=(lengths * random.uniform(0.9, 1.1, shape[0])).astype(np.float32))
        layers[path] = moved
    return Adapter(layers, base="a base", notes={"why": "a test"}, origin=origin)


def gradient_of(session, adapter, method=PLAIN, work=None, objective=LEARN, key=KEY):
    state = session.start(adapter, method)
    return session.gradient(state, work or make_work(), objective, EXECUTION, key)


def train(session, state, steps, first=0):
    for step in range(first, first + steps):
        work = make_work(make_rows(4, seed=step))
        gradient = session.gradient(state, work, LEARN, EXECUTION, StepKey(0, step))
        state = session.apply(state, gradient, RATE)
    return state


def parameters(session, state):
    return session.snapshot(state)["adapter"]


def logits_at(session, active, ids, places):
    """Logits after some tokens of a row, float64 (places, vocabulary)."""
    cache = session.new_cache()
    blocks = blocks_of(cache, tokens=len(ids))
    cache.reserve(max(blocks) + 1)
    row = ForwardRow(len(ids), blocks, 0, len(ids), active)
    return session.forward([Pass(ids, [row], np.flatnonzero(places).tolist())], cache, 1)[0][0].astype(np.float64)


def loss_of(session, active, rows=None):
    return next(session.losses(active, [pack(rows or make_rows())], EXECUTION))


def assert_near(found, expected, precision):
    """Nearer than a share of the length of what is expected."""
    length = np.linalg.norm(np.asarray(expected, np.float64))
    assert np.linalg.norm(np.asarray(found, np.float64) - expected) <= precision * length


@dataclass(frozen=True)
class SummedGradient:
    """What a collective makes of the gradients of several processes."""

    loss: LossSum
    flat: np.ndarray

    @property
    def norm(self):
        return float(np.linalg.norm(self.flat))


def zero_gradient(session, state):
    return SummedGradient(LossSum(1.0, 1), np.zeros(len(parameters(session, state)), np.float32))


# ---- adapters in and out --------------------------------------------------------------------------------------------


def test_layers_are_the_linear_layers_of_the_blocks_in_the_order_they_run(session):
    shapes = base_of("smollm2").spec.linear_shapes()
    assert [(layer.path, layer.shape) for layer in session.layers] == list(shapes.items())
    assert [layer.depth for layer in session.layers] == [0] * 7 + [1] * 7


def test_an_adapter_comes_out_as_it_went_in(session):
    for kind in ("plain", "delta", "dora"):
        adapter = make_adapter(kind)
        found = session.adapter(session.start(adapter, PLAIN))
        assert (found.base, found.notes, found.layers.keys()) == (adapter.base, adapter.notes, adapter.layers.keys())
        for path, factors in adapter.layers.items():
            again = found.layers[path]
            np.testing.assert_array_equal(again.A, factors.A)
            np.testing.assert_array_equal(again.B, factors.B)
            assert (again.scale, again.A.dtype) == (factors.scale, np.float32)
            if kind == "dora":
                np.testing.assert_array_equal(again.magnitude, factors.magnitude)
        for path, factors in adapter.origin.items():
            np.testing.assert_array_equal(found.origin[path].A, factors.A)


def test_an_empty_adapter_and_one_with_b_of_zero_are_the_bare_base_bit_for_bit(session):
    bare = loss_of(session, session.load(None))
    assert loss_of(session, session.load(Adapter({}))) == bare
    assert loss_of(session, session.load(make_adapter(b_size=0.0))) == bare
    assert loss_of(session, session.load(make_adapter())) != bare
    assert loss_of(session, session.load(None)) == bare


def test_an_adapter_in_delta_form_at_its_origin_is_the_bare_base(backend, session):
    adapter = make_adapter("delta")
    start = session.load(replace(adapter, layers=adapter.origin))
    bare = loss_of(session, session.load(None))
    assert loss_of(session, start).nats == pytest.approx(bare.nats, rel=BACKENDS[backend].precision)


def test_two_adapters_are_used_in_turn(session):
    one, other = session.load(make_adapter()), session.load(make_adapter("dora"))
    first, second = loss_of(session, one), loss_of(session, other)
    assert (loss_of(session, one), loss_of(session, other)) == (first, second)
    assert first != second


def test_what_is_trained_is_what_is_active(session):
    state = train(session, session.start(make_adapter("dora"), PLAIN), 2)
    active, loaded = loss_of(session, state.active), loss_of(session, session.load(session.adapter(state)))
    assert active.nats == pytest.approx(loaded.nats, rel=1e-5)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_losses_come_in_the_order_of_their_batches(session):
    batches = [pack([row]) for row in make_rows()]
    active = session.load(make_adapter())
    found = list(session.losses(active, batches, EXECUTION))
    assert [loss.tokens for loss in found] == [batch.target_tokens for batch in batches]
    assert found == [next(session.losses(active, [batch], EXECUTION)) for batch in batches]


def test_the_losses_of_the_rows_of_a_batch_are_those_of_the_rows_alone(session):
    rows = make_rows()
    rows.insert(1, Row(rows[0].ids, np.full_like(rows[0].labels, IGNORED), ""))
    active, batches = session.load(make_adapter()), [pack(rows[:3]), pack(rows[3:])]
    found = [loss for part in session.row_losses(active, batches, EXECUTION) for loss in part]
    alone = list(session.losses(active, [pack([row]) for row in rows], EXECUTION))
    assert [loss.tokens for loss in found] == [row.target_tokens for row in rows]
    assert [loss.nats for loss in found] == pytest.approx([loss.nats for loss in alone], rel=1e-5)
    sums = [loss.nats for loss in session.losses(active, batches, EXECUTION)]
    assert sums == pytest.approx([sum(loss.nats for loss in found[:3]), sum(loss.nats for loss in found[3:])])


def test_the_divergence_of_a_model_from_its_base_is_that_of_their_probabilities(session):
    rows, active = make_rows(), session.load(make_adapter())
    batches = [pack(rows[:3]), pack(rows[3:])]
    found = [each for part in session.divergences(active, batches, EXECUTION) for each in part]
    for row, each in zip(rows, found, strict=True):
        places = row.labels != IGNORED
        base, moved = (logits_at(session, model, row.ids, places) for model in (session.load(None), active))
        wanted, has = (table - np.logaddexp.reduce(table, 1)[:, None] for table in (base, moved))
        assert each.nats == pytest.approx((np.exp(wanted) * (wanted - has)).sum(), rel=2e-3, abs=1e-6)
        assert each.same == (base.argmax(1) == moved.argmax(1)).sum()
        assert each.places == places.sum()
    assert sum(each.nats for each in found) > 0.01
    bare = list(session.divergences(session.load(None), batches, EXECUTION))
    assert all((each.nats, each.same) == (0.0, each.places) for part in bare for each in part)


def test_a_batch_without_target_tokens_has_no_loss(session):
    row = make_rows(1)[0]
    nothing = pack([Row(row.ids, np.full_like(row.labels, IGNORED), "")])
    assert next(session.losses(session.load(None), [nothing], EXECUTION)) == LossSum(0.0, 0)


def test_a_loss_does_not_depend_on_what_is_packed_beside_it(backend, session):
    active = session.load(make_adapter())
    alone = sum((loss_of(session, active, [row]) for row in make_rows()), LossSum())
    assert loss_of(session, active).tokens == alone.tokens
    assert loss_of(session, active).nats == pytest.approx(alone.nats, rel=BACKENDS[backend].precision)


@pytest.mark.parametrize(("other", "family"), pairs(sorted(path.stem for path in GGUF.glob("*.gguf"))))
def test_losses_are_those_of_the_reference(other, family):
    kinds = ("plain", "delta", "dora") if family in FAMILIES else ()
    for adapter in (None, *(make_adapter(kind, family) for kind in kinds)):
        found, expected = (
            loss_of(session, session.load(adapter))
            for session in (session_of(other, family), session_of("reference", family))
        )
        assert found.tokens == expected.tokens
        assert found.nats == pytest.approx(expected.nats, rel=BACKENDS[other].precision)


# ---- gradients ------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": ("plain", PLAIN),
    "delta form": ("delta", PLAIN),
    "dora": ("dora", PLAIN),
    "dropout": ("plain", Method(dropout=0.3)),
    "delta form, dropout": ("delta", Method(dropout=0.3)),
    "dora, dropout": ("dora", Method(dropout=0.3)),
    "freeze_a": ("plain", Method(freezes_a=True)),
}


def test_a_gradient_is_a_value(session):
    """Neither another gradient nor a step changes it, and the same question has the same answer, to the bit."""
    state = session.start(make_adapter(), Method(dropout=0.3))
    first = session.gradient(state, make_work(), LEARN, EXECUTION, KEY)
    flat, loss = first.flat.copy(), first.loss
    other = session.gradient(state, make_work(make_rows(seed=9)), LEARN, EXECUTION, KEY)
    again = session.gradient(state, make_work(), LEARN, EXECUTION, KEY)
    np.testing.assert_array_equal(again.flat, flat)
    assert (again.loss, again.norm) == (loss, first.norm)
    session.apply(state, other, RATE)
    np.testing.assert_array_equal(first.flat, flat)
    assert first.norm == pytest.approx(np.linalg.norm(flat.astype(np.float64)))
    assert (other.flat != flat).any()


def test_the_loss_of_a_gradient_is_that_of_its_rows(session):
    found = gradient_of(session, make_adapter()).loss
    expected = loss_of(session, session.load(make_adapter()))
    assert found.tokens == expected.tokens
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)


@pytest.mark.parametrize("variant", ["plain", "delta form, dropout", "dora, dropout"])
def test_a_gradient_does_not_depend_on_shares_and_micro_batches(backend, session, variant):
    kind, method = VARIANTS[variant]
    together = gradient_of(session, make_adapter(kind), method)
    split = gradient_of(session, make_adapter(kind), method, make_work(count=2, max_tokens=16))
    assert_near(split.flat, together.flat, BACKENDS[backend].precision)
    assert split.loss.nats == pytest.approx(together.loss.nats, rel=1e-6)
    assert split.loss.tokens == together.loss.tokens


def test_gradients_of_the_processes_of_a_step_add_up(backend, session):
    method, work = Method(dropout=0.3), make_work(count=2)
    parts = [gradient_of(session, make_adapter(), method, Work([share], work.target_tokens)) for share in work.shares]
    together = gradient_of(session, make_adapter(), method, work)
    assert_near(parts[0].flat + parts[1].flat, together.flat, BACKENDS[backend].precision)
    summed = SummedGradient(parts[0].loss + parts[1].loss, parts[0].flat + parts[1].flat)
    states = [session.apply(session.start(make_adapter(), method), g, RATE) for g in (summed, together)]
    assert_near(parameters(session, states[0]), parameters(session, states[1]), 1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "freeze_a" not in name])
def test_a_gradient_is_the_slope_of_the_loss(backend, session, variant):
    """Along its own direction; with magnitudes along those alone, since row lengths count as constants."""
    kind, method = VARIANTS[variant]
    state = session.start(make_adapter(kind), method)
    flat, work = parameters(session, state), make_work()
    gradient = session.gradient(state, work, LEARN, EXECUTION, KEY).flat.astype(np.float64)
    direction = gradient.copy()
    if kind == "dora":
        direction[: -sum(len(factors.B) for factors in make_adapter(kind).layers.values())] = 0
    direction *= BACKENDS[backend].nudge / np.linalg.norm(direction)
    losses = []
    for sign in (1, -1):
        state = session.restore(state, {"adapter": (flat + sign * direction).astype(flat.dtype)})
        losses.append(session.gradient(state, work, LEARN, EXECUTION, KEY).loss.mean)
    assert (losses[0] - losses[1]) / 2 == pytest.approx(gradient @ direction, rel=BACKENDS[backend].slope_precision)


@pytest.mark.parametrize(
    ("family", "variant"),
    [("smollm2", variant) for variant in VARIANTS] + [(family, "dora, dropout") for family in FAMILIES[1:]],
)
@pytest.mark.parametrize("other", OTHERS)
def test_a_gradient_is_that_of_the_reference(other, family, variant):
    kind, method = VARIANTS[variant]
    work = make_work(count=2, max_tokens=20)
    found, expected = (
        gradient_of(session_of(name, family), make_adapter(kind, family), method, work) for name in (other, "reference")
    )
    assert_near(found.flat, expected.flat, BACKENDS[other].precision)
    assert found.loss.nats == pytest.approx(expected.loss.nats, rel=BACKENDS[other].precision)
    assert found.norm == pytest.approx(expected.norm, rel=BACKENDS[other].precision)


def test_a_frozen_a_has_no_gradient(session):
    size = sum(factors.A.size for factors in make_adapter().layers.values())
    frozen, free = (gradient_of(session, make_adapter(), Method(freezes_a=value)).flat for value in (True, False))
    assert not frozen[:size].any()
    assert free[:size].any()
    np.testing.assert_array_equal(frozen[size:], free[size:])


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_is_drawn_from_seed_and_step_and_rests_where_nothing_is_trained(session):
    method = Method(dropout=0.3)
    losses = {key: gradient_of(session, make_adapter(), method, key=key).loss for key in [KEY, (5, 4), (6, 3)]}
    plain = gradient_of(session, make_adapter()).loss
    assert len({*losses.values(), plain}) == 4
    assert gradient_of(session, make_adapter(), method, key=KEY).loss == losses[KEY]
    active = session.start(make_adapter(), method).active
    assert loss_of(session, active) == loss_of(session, session.load(make_adapter()))


# ---- answers of the base that are kept ------------------------------------------------------------------------------


def kl_objective(session, weight):
    return Objective(weight, session.kl_reference(pack(make_rows(seed=8))))


def test_where_nothing_has_moved_keeping_answers_has_no_gradient(backend, session):
    plain = gradient_of(session, make_adapter(b_size=0.0))
    kept = gradient_of(session, make_adapter(b_size=0.0), objective=kl_objective(session, 0.25))
    assert_near(kept.flat, 0.75 * plain.flat, BACKENDS[backend].precision)
    assert kept.loss == plain.loss


def test_answers_are_kept_where_there_are_labels(backend, session):
    """What a row without a label says, and what stands before the first label of another, is free to change."""
    rows = make_rows(seed=8)
    blind = Row(rows[0].ids, np.full_like(rows[0].labels, IGNORED), "")
    with_blind, alone, everywhere = (
        gradient_of(session, make_adapter(), objective=Objective(0.9, session.kl_reference(pack(kept)))).flat
        for kept in ([blind, rows[4]], [rows[4]], [replace(rows[4], labels=np.zeros_like(rows[4].labels))])
    )
    assert_near(with_blind, alone, BACKENDS[backend].precision)
    assert np.linalg.norm(everywhere - alone) > 0.01 * np.linalg.norm(alone)


def test_a_step_of_keeping_answers_brings_the_model_back_to_the_base(session):
    """Under a weight near 1 the gradient is that of the divergence, whatever the rows."""
    kept = gradient_of(session, make_adapter(), objective=kl_objective(session, 1 - 1e-6))
    plain = gradient_of(session, make_adapter())
    assert kept.flat @ parameters(session, session.start(make_adapter(), PLAIN)) > 0
    assert np.linalg.norm(kept.flat - 0.5 * plain.flat) > 0.1 * plain.norm


def test_dropout_does_not_touch_the_kl_term(backend, session):
    objective, methods = kl_objective(session, 0.5), (Method(), Method(dropout=0.3))
    terms = [
        gradient_of(session, make_adapter(), method, objective=objective).flat
        - 0.5 * gradient_of(session, make_adapter(), method).flat
        for method in methods
    ]
    assert_near(terms[1], terms[0], 10 * BACKENDS[backend].precision)


@pytest.mark.parametrize("family", ["smollm2", "gemma2", "phi3_longrope"])
@pytest.mark.parametrize("other", OTHERS)
def test_the_gradient_of_keeping_answers_is_that_of_the_reference(other, family):
    found, expected = (
        gradient_of(session, make_adapter("dora", family), objective=kl_objective(session, 0.9))
        for session in (session_of(name, family) for name in (other, "reference"))
    )
    assert_near(found.flat, expected.flat, BACKENDS[other].precision)


# ---- steps ----------------------------------------------------------------------------------------------------------


def step_sizes(session, method):
    """How far A, B and magnitudes move in the first step."""
    adapter = make_adapter("dora")
    state = session.start(adapter, method)
    before = parameters(session, state)
    gradient = session.gradient(state, make_work(), LEARN, EXECUTION, KEY)
    moved = parameters(session, session.apply(state, gradient, RATE)) - before
    ends = np.cumsum([sum(f.A.size for f in adapter.layers.values()), sum(f.B.size for f in adapter.layers.values())])
    return np.split(moved, ends)


def test_lora_plus_and_a_frozen_a_move_what_they_should(session):
    plain = step_sizes(session, PLAIN)
    plus, frozen = step_sizes(session, Method(lora_plus=4.0)), step_sizes(session, Method(freezes_a=True))
    np.testing.assert_allclose(plus[1], 4 * plain[1], atol=1e-6)
    np.testing.assert_allclose(plus[0], plain[0], atol=1e-7)
    np.testing.assert_allclose(plus[2], plain[2], atol=1e-6)
    assert not frozen[0].any()
    np.testing.assert_allclose(frozen[1], plain[1], atol=1e-7)


def test_the_first_step_is_as_long_as_the_rate(session):
    for moved in step_sizes(session, PLAIN):
        assert np.median(np.abs(moved)) == pytest.approx(RATE, rel=0.01)


def test_weight_decay_pulls_to_where_training_began(session):
    adapter, method = make_adapter("delta"), Method(weight_decay=50.0)
    state = session.start(adapter, method)
    begin = parameters(session, state)
    state = session.restore(state, {"adapter": begin + np.ones_like(begin)})
    state = session.apply(state, zero_gradient(session, state), RATE)
    np.testing.assert_allclose(parameters(session, state), begin + 0.95, atol=1e-6)


def test_a_gradient_is_scaled_down_to_the_largest_norm(session):
    for most in (1e-3, 1e3):
        state = session.start(make_adapter(), Method(max_grad_norm=most))
        gradient = session.gradient(state, make_work(), LEARN, EXECUTION, KEY)
        mean = session.snapshot(session.apply(state, gradient, RATE))["exp_avg"]
        assert_near(mean, 0.1 * gradient.flat * min(1, most / gradient.norm), 1e-5)


def test_squared_gradients_are_forgotten_as_fast_as_the_method_says(session):
    for beta2 in (0.95, 0.999):
        state = session.start(make_adapter(), Method(max_grad_norm=1e9, beta2=beta2))
        gradient = session.gradient(state, make_work(), LEARN, EXECUTION, KEY)
        squares = session.snapshot(session.apply(state, gradient, RATE))["exp_avg_sq"]
        assert_near(squares, (1 - beta2) * gradient.flat**2, 1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("plain", PLAIN),
        ("dora", Method(lora_plus=4.0, weight_decay=1.0)),
        ("delta", Method(dropout=0.3, max_grad_norm=0.5)),
        ("plain", Method(freezes_a=True, dropout=0.1)),
    ],
    ids=["plain", "dora, lora_plus, weight_decay", "delta form, dropout, max_grad_norm", "freeze_a, dropout"],
)
@pytest.mark.parametrize("other", OTHERS)
def test_twenty_steps_are_those_of_the_reference(other, kind, method):
    found, expected = (
        parameters(session, train(session, session.start(make_adapter(kind), method), 20))
        for session in (session_of(other), session_of("reference"))
    )
    assert_near(found, expected, BACKENDS[other].precision)


def test_layers_that_never_had_a_gradient_are_named(session):
    adapter = make_adapter("dora")
    state = session.start(adapter, PLAIN)
    assert set(session.unmoved_layers(state)) == set(adapter.layers)
    path, place, ones = "model.layers.1.mlp.up_proj", 0, np.ones(len(parameters(session, state)), np.float32)
    for kind in ("A", "B", "magnitude"):  # the order of the flat vector
        for name, factors in adapter.layers.items():
            size = getattr(factors, kind).size
            ones[place : place + size] *= name != path
            place += size
    assert place == len(ones)
    state = session.apply(state, SummedGradient(LossSum(1.0, 1), ones), RATE)
    assert session.unmoved_layers(state) == [path]
    fresh = session.start(make_adapter(b_size=0.0), Method(freezes_a=True))  # a gradient of B is enough
    gradient = session.gradient(fresh, make_work(), LEARN, EXECUTION, KEY)
    assert session.unmoved_layers(session.apply(fresh, gradient, RATE)) == []


# ---- snapshots ------------------------------------------------------------------------------------------------------


def test_training_continues_from_a_snapshot_bit_for_bit(session):
    method = Method(dropout=0.2, weight_decay=0.1, lora_plus=2.0)
    state = train(session, session.start(make_adapter("delta"), method), 3)
    kept = session.snapshot(state)
    assert set(kept) == {"adapter", "exp_avg", "exp_avg_sq", "step"}
    copies = {name: array.copy() for name, array in kept.items()}
    state = train(session, state, 3, first=3)
    expected = session.snapshot(state)
    for name, array in copies.items():  # a snapshot is a copy
        np.testing.assert_array_equal(kept[name], array)
    again = session.restore(session.start(make_adapter("delta"), method), kept)
    again = session.snapshot(train(session, again, 3, first=3))
    back = session.snapshot(train(session, session.restore(state, kept), 3, first=3))
    for name, array in expected.items():
        np.testing.assert_array_equal(again[name], array)
        np.testing.assert_array_equal(back[name], array)


def test_a_snapshot_can_be_filled_again(session):
    state = session.start(make_adapter(), PLAIN)
    kept = session.snapshot(state)
    state = train(session, state, 2)
    filled = session.snapshot(state, into=kept)
    for name, array in session.snapshot(state).items():
        assert filled[name] is kept[name]
        np.testing.assert_array_equal(filled[name], array)
    for array in session.snapshot(state).values():
        array[:] = np.nan
    assert session.is_finite(state)


def test_what_is_not_restored_stays(session):
    state = train(session, session.start(make_adapter(), PLAIN), 2)
    before = session.snapshot(state)
    after = session.snapshot(session.restore(state, {"adapter": before["adapter"] * 2}))
    np.testing.assert_array_equal(after["adapter"], before["adapter"] * 2)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        np.testing.assert_array_equal(after[name], before[name])


def test_nan_and_inf_are_seen(session):
    state = session.start(make_adapter(), PLAIN)
    assert session.is_finite(state)
    spoilt = session.apply(state, gradient_of(session, make_adapter()), float("nan"))
    assert not session.is_finite(spoilt)
    assert np.isnan(loss_of(session, spoilt.active).nats)
    state = session.start(make_adapter(), PLAIN)
    moment = session.snapshot(state)["exp_avg_sq"]
    moment[3] = np.inf
    assert not session.is_finite(session.restore(state, {"exp_avg_sq": moment}))


def test_releasing_memory_changes_no_result(session):
    state = session.start(make_adapter(), PLAIN)
    gradient = session.gradient(state, make_work(), LEARN, EXECUTION, KEY)
    flat, loss = gradient.flat.copy(), loss_of(session, state.active)
    session.release()
    np.testing.assert_array_equal(gradient.flat, flat)
    again = session.gradient(state, make_work(), LEARN, EXECUTION, KEY)
    np.testing.assert_array_equal(again.flat, flat)
    assert loss_of(session, state.active) == loss


# ---- capabilities ---------------------------------------------------------------------------------------------------

USES = {
    "DoRA": ("dora", Method(), 0.0, "--use-dora"),
    "delta form": ("delta", Method(), 0.0, "--init"),
    "LoRA+": ("plain", Method(lora_plus=2.0), 0.0, "--lora-plus"),
    "frozen A": ("plain", Method(freezes_a=True), 0.0, "--freeze-a"),
    "dropout": ("plain", Method(dropout=0.1), 0.0, "--dropout"),
    "KL reference": ("plain", Method(), 0.5, "--keep-general"),
}


@pytest.mark.parametrize("name", USES)
def test_an_option_is_honoured_or_refused_by_its_name(session, name):
    kind, method, weight, option = USES[name]
    objective = kl_objective(session, weight) if weight else LEARN
    if name in session.capabilities:
        assert np.isfinite(gradient_of(session, make_adapter(kind), method, objective=objective).norm)
    else:
        with pytest.raises(InputError, match=option):
            gradient_of(session, make_adapter(kind), method, objective=objective)


def test_capabilities_have_known_names(session):
    assert session.capabilities <= capabilities.OPTIONS.keys()


# ---- inference ------------------------------------------------------------------------------------------------------

TEXT = np.random.default_rng(4).integers(3, 290, 96).astype(np.int32)


def blocks_of(cache, number=0, tokens=100):
    """The blocks of a request among several, none of which lie side by side."""
    return [4 * place + number for place in range(-(-tokens // cache.block_tokens))]


def read(session, cache, ids, number=0, position=0, adapter=None, labels=None, blocks=None):
    """Logits after the last token of a prompt or of a part of one, and its loss."""
    row = ForwardRow(len(ids), blocks or blocks_of(cache, number), position, 110, adapter or session.load(None))
    ((logits, loss),) = session.forward([Pass(ids, [row], [len(ids) - 1], labels)], cache, 1)
    return logits[0], loss


def new_cache(session):
    cache = session.new_cache()
    cache.reserve(4 * len(blocks_of(cache)))
    return cache


def test_a_prompt_in_parts_and_token_by_token_has_the_logits_of_one_read_at_once(backend, session):
    active, precision = session.load(make_adapter()), 10 * BACKENDS[backend].precision
    expected, _ = read(session, new_cache(session), TEXT, adapter=active)
    cache = new_cache(session)
    for start, stop in [(0, 9), (9, 10), (10, 60), (60, 63), (63, 92), *((n, n + 1) for n in range(92, 96))]:
        logits, _ = read(session, cache, TEXT[start:stop], 0, start, active)
    assert_near(logits, expected, max(precision, 1e-6))  # logits are float32


@pytest.mark.parametrize("kind", ["plain", "delta", "dora"])
def test_an_adapter_that_only_answers_answers_as_one_that_can_be_trained(backend, session, kind):
    loaded, prepared = session.load(make_adapter(kind)), session.prepare(make_adapter(kind))
    assert prepared.identity == loaded.identity
    assert prepared.resident_bytes <= loaded.resident_bytes
    bare, _ = read(session, new_cache(session), TEXT)
    (one, other) = (new_cache(session), new_cache(session))
    for start, stop in [(0, 90), (90, 95), (95, 96)]:  # by large products, by loops for few tokens
        expected, _ = read(session, one, TEXT[start:stop], 0, start, loaded)
        found, _ = read(session, other, TEXT[start:stop], 0, start, prepared)
        assert_near(found, expected, max(10 * BACKENDS[backend].precision, 1e-6))
    assert np.abs(found - bare).max() > 1e-3


@pytest.mark.parametrize(("other", "family"), pairs(["smollm2", "gemma2", "gemma3", "qwen3", "phi3_longrope"]))
def test_rows_of_all_kinds_share_a_pass(other, family):
    """A prompt that begins, two that go on, short ones, and next tokens; each with an adapter of its own or none."""
    session, reference = session_of(other, family), session_of("reference", family)
    kinds = (None, "plain", "delta", "dora", None, "plain")
    rows = [(0, 40), (33, 80), (0, 3), (64, 65), (50, 54), (31, 32)]  # read before, and read now
    actives = [session.load(kind and make_adapter(kind, family)) for kind in kinds]
    cache = session.new_cache()
    cache.reserve(8 * len(blocks_of(cache)))
    blocks = [[8 * place + number for place in range(len(blocks_of(cache)))] for number in range(len(rows))]
    for (start, _), active, own in zip(rows, actives, blocks, strict=True):
        if start:
            read(session, cache, TEXT[:start], adapter=active, blocks=own)
    whole = Pass(
        np.concatenate([TEXT[start:stop] for start, stop in rows]),
        [
            ForwardRow(stop - start, own, start, 110, active)
            for (start, stop), own, active in zip(rows, blocks, actives, strict=True)
        ],
        (np.cumsum([stop - start for start, stop in rows]) - 1).tolist(),
    )
    ((found, _),) = session.forward([whole], cache, 1)
    for logits, (_, stop), kind in zip(found, rows, kinds, strict=True):
        active = reference.load(kind and make_adapter(kind, family))
        assert_near(logits, read(reference, new_cache(reference), TEXT[:stop], adapter=active)[0], 1e-4)


def test_a_block_that_is_copied_is_continued_in_the_copy_alone(backend, session):
    cache = new_cache(session)
    own, other = blocks_of(cache, 0), blocks_of(cache, 1)
    size = cache.block_tokens
    read(session, cache, TEXT[: size + size // 2], blocks=own)
    cache.copy(own[1], other[1])
    expected, _ = read(session, new_cache(session), TEXT)
    read(session, cache, TEXT[::-1][: size // 2].copy(), position=size + size // 2, blocks=own)
    rest = TEXT[size + size // 2 :]
    found, _ = read(session, cache, rest, position=size + size // 2, blocks=[own[0], *other[1:]])
    assert_near(found, expected, max(10 * BACKENDS[backend].precision, 1e-6))


def test_blocks_that_are_given_back_can_be_used_again_and_others_keep_what_they_hold(backend, session):
    cache, precision = new_cache(session), max(10 * BACKENDS[backend].precision, 1e-6)
    expected, _ = read(session, new_cache(session), TEXT)
    for number in range(3):
        read(session, cache, TEXT[:50], number)
    cache.discard([block for number in (0, 2) for block in blocks_of(cache, number)])
    assert_near(read(session, cache, TEXT[50:], 1, 50)[0], expected, precision)
    assert_near(read(session, cache, TEXT, 0)[0], expected, precision)


def test_room_for_more_blocks_keeps_what_is_there(backend, session):
    cache = session.new_cache()
    cache.reserve(25)
    read(session, cache, TEXT[:50], blocks=list(range(25)))
    cache.reserve(200)
    found, _ = read(session, cache, TEXT[50:], position=50, blocks=[*range(25), *range(100, 130)])
    expected, _ = read(session, new_cache(session), TEXT)
    assert_near(found, expected, max(10 * BACKENDS[backend].precision, 1e-6))


def test_equal_contents_have_one_identity_and_any_difference_another(session):
    factors = make_adapter().layers
    path, first = next(iter(factors.items()))
    others = [
        make_adapter("dora"), make_adapter("delta"), Adapter({}), Adapter({path: first}),
        Adapter({**factors, path: replace(first, scale=first.scale * 2)}),
        Adapter({**factors, path: replace(first, A=np.nextafter(first.A, np.float32(9)))}),
    ]  # fmt: skip
    found = [session.load(adapter).identity for adapter in (make_adapter(), *others)]
    assert len(set(found)) == len(found)
    copied = Adapter(
        {path: replace(f, A=f.A.copy()) for path, f in reversed(factors.items())}, base="x", notes={"a": "b"}
    )
    assert session.load(copied).identity == found[0]
    assert session.load(None).identity == session.load(Adapter({})).identity


def test_long_rotary_embeddings_are_another_kind_of_positions(backend):
    if backend == "transformers":
        pytest.skip("transformers turns tokens by the length that there is, and Thimble reads such rows anew each time")
    session = session_of(backend, "phi3_longrope")
    kinds = [session.position_kind(end) for end in range(1, session.max_positions)]
    assert sorted(set(kinds)) == [0, 1]
    assert session_of(backend).position_kind(1) == session_of(backend).position_kind(100) == 0


def test_a_prompt_that_is_read_has_the_loss_of_its_row(backend, session):
    row, active = make_rows()[4], session.load(make_adapter())
    _, loss = read(session, new_cache(session), row.ids, adapter=active, labels=row.labels)
    expected = loss_of(session, active, [row])
    assert loss.tokens == expected.tokens
    assert loss.nats == pytest.approx(expected.nats, rel=BACKENDS[backend].precision)


@pytest.mark.parametrize("family", ["smollm2", "gemma2", "phi3_longrope"])
@pytest.mark.parametrize("other", OTHERS)
def test_logits_are_those_of_the_reference(other, family):
    found, expected = (
        read(session, new_cache(session), TEXT, adapter=session.load(make_adapter("dora", family)))[0]
        for session in (session_of(other, family), session_of("reference", family))
    )
    assert_near(found, expected, BACKENDS[other].precision)
