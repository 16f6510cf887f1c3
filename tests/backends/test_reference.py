"""What the reference session alone promises: float64, states that are values, refusals, milliseconds."""

import time
from pathlib import Path

import numpy as np
import pytest

from thimble.backends.reference import CAPABILITIES, ReferenceSession
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.tape import OPS
from thimble.core.adapter import Adapter, fresh_adapter
from thimble.core.lowrank import Factors
from thimble.core.method import Method
from thimble.core.targets import Size
from thimble.data.batches import pack
from thimble.data.encode import Row
from thimble.errors import InputError
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan
from thimble.models.forward import hidden, layout, logits

BASE = open_base(Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf")
SHAPES = BASE.spec.linear_shapes()
DENSE, KEY = ExecutionPlan("dense"), StepKey(0, 0)
RANDOM = np.random.default_rng(0)


def make_batch(rows=4, tokens=12):
    ids = [RANDOM.integers(3, 290, tokens).astype(np.int32) for _ in range(rows)]
    return pack([Row(row, np.roll(row, -1), "") for row in ids])


BATCH, TEXT = make_batch(), make_batch()
WORK = Work([[BATCH]], BATCH.target_tokens)


def make_adapter(b_size=0.05):
    drawn = fresh_adapter(SHAPES, "kaiming", dict.fromkeys(SHAPES, Size(4, 2.0)), 0)
    layers = {
        path: Factors(f.A, (RANDOM.standard_normal(f.B.shape) * b_size).astype(np.float32), f.scale)
        for path, f in drawn.layers.items()
    }
    return Adapter(layers)


@pytest.fixture(scope="module")
def session():
    return ReferenceSession(BASE)


def test_no_call_changes_a_state(session):
    state = session.start(make_adapter(), Method(weight_decay=0.1))
    before = session.snapshot(state)
    gradient = session.gradient(state, WORK, Objective(), DENSE, KEY)
    moved = session.apply(state, gradient, 1e-3)
    session.restore(state, session.snapshot(moved))
    for name, array in session.snapshot(state).items():
        np.testing.assert_array_equal(array, before[name])


def test_everything_is_float64(session):
    state = session.start(make_adapter(), Method())
    gradient = session.gradient(state, WORK, Objective(), DENSE, KEY)
    arrays = session.snapshot(session.apply(state, gradient, 1e-3))
    assert {array.dtype for array in (gradient.flat, *arrays.values())} == {np.dtype(np.float64)}


def mean_divergence(active):
    """Σ p (log p - log q), p of the bare base, per token of the text."""
    weights = {name: weight.read().astype(np.float64) for name, weight in BASE.weights.items()}
    logs = []
    for updates in ({}, active):
        x = hidden(OPS, BASE.spec, weights, TEXT.ids, layout(BASE.spec, TEXT.starts), updates)
        scores = logits(OPS, BASE.spec, weights, x)
        logs.append(scores - np.log(np.exp(scores).sum(1, keepdims=True)))
    return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()


def test_the_gradient_of_an_objective_is_the_slope_of_both_its_terms(session):
    """The protocol gives no value of the KL term, so it is computed here from its definition."""
    weight, objective = 0.3, Objective(0.3, session.kl_reference(TEXT))
    state = session.start(make_adapter(), Method())
    flat = session.snapshot(state)["adapter"]
    slope = session.gradient(state, WORK, objective, DENSE, KEY).flat
    direction = RANDOM.standard_normal(len(flat))

    def value(moved):
        active = session.restore(state, {"adapter": moved}).active
        return (1 - weight) * next(session.losses(active, [BATCH], DENSE)).mean + weight * mean_divergence(active)

    step = 1e-6 * direction
    assert (value(flat + step) - value(flat - step)) / 2e-6 == pytest.approx(slope @ direction, rel=1e-6)


def test_it_learns(session):
    state, losses = session.start(make_adapter(b_size=0.0), Method()), []
    for step in range(30):
        gradient = session.gradient(state, WORK, Objective(), DENSE, StepKey(0, step))
        losses.append(gradient.loss.mean)
        state = session.apply(state, gradient, 1e-2)
    assert losses[-1] < 0.2 * losses[0]


def test_a_session_with_fewer_capabilities_refuses_the_others_all_at_once_and_by_name():
    session = ReferenceSession(BASE, CAPABILITIES - {"dropout", "LoRA+", "KL reference"})
    with pytest.raises(InputError, match="--dropout") as refused:
        session.start(make_adapter(), Method(dropout=0.1, lora_plus=2.0, weight_decay=0.1))
    assert [problem.split()[0] for problem in refused.value.problems] == ["--lora-plus", "--dropout"]
    state = session.start(make_adapter(), Method(weight_decay=0.1))
    with pytest.raises(InputError, match="--keep-general"):
        session.gradient(state, WORK, Objective(0.5, session.kl_reference(TEXT)), DENSE, KEY)


def test_a_diverged_state_raises_no_warnings(session, recwarn):
    state = session.start(make_adapter(), Method())
    flat = session.snapshot(state)["adapter"]
    for value in (np.nan, np.inf, 1e200):
        spoilt = session.restore(state, {"adapter": np.full_like(flat, value)})
        gradient = session.gradient(spoilt, WORK, Objective(), DENSE, KEY)
        session.apply(spoilt, gradient, 1.0)
        assert not np.isfinite(next(session.losses(spoilt.active, [BATCH], DENSE)).nats)
    assert not recwarn.list


def test_a_step_takes_milliseconds(session):
    """The tests of the training loop run on it."""
    state, seconds = session.start(make_adapter(), Method(dropout=0.1)), []
    for step in range(10):
        begin = time.process_time()
        state = session.apply(state, session.gradient(state, WORK, Objective(), DENSE, StepKey(0, step)), 1e-3)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05
