"""Gradients on the tape against finite differences; the whole forward pass is held against torch in test_forward."""

import numpy as np
import pytest

from thimble.backends.tape import OPS, Var, gradients

RANDOM = np.random.default_rng(0)
A, B, ROW = (RANDOM.standard_normal(shape) for shape in ((3, 4), (3, 4), (4,)))
STACK = RANDOM.standard_normal((2, 3, 4))
CASES = {
    "arithmetic": lambda x, y: (x + 2.0) * y - 3.0 * x + (1.0 - y) - x,
    "quotient": lambda x, y: x / (y * y + 1.0) + 0.5 * x / 3.0,
    "array on the left": lambda x, y: ROW + B * x - (B - y),
    "product": lambda x, y: x @ y.T,
    "product with an array": lambda x, y: (B @ x.T) @ (y @ B.T),
    "batched product": lambda x, y: STACK @ (y.reshape(1, 3, 4) * x * STACK).swapaxes(1, 2),
    "parts": lambda x, y: x[1:, :2] * y[:2, 2:] + x[np.array([2, 0]), np.array([1, 3])],
    "concatenate": lambda x, y: OPS.concatenate([x[:, 1:], y, B]) * np.arange(11.0),
    "where": lambda x, y: OPS.where(B > 0, x, y * 2.0) + OPS.where(B > 0, x, -1.0),
    "activations": lambda x, y: OPS.exp(x) * OPS.tanh(y) + OPS.sqrt(x * x + 1.0),
    "mean": lambda x, y: x / OPS.mean(x * x + y),
    "softmax": lambda x, y: OPS.exp(OPS.log_softmax(x)) * y,
    "broadcasting": lambda x, y: (x[:1] * y + x[0] + y[:, :1]) * OPS.sum(x),
}


def scalar(function, x, y):
    result = function(x, y)
    return OPS.sum(result * result * np.cos(np.arange(result.shape[-1])))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_slopes_of_a_scalar(name):
    x, y = Var(A), Var(RANDOM.standard_normal((3, 4)))
    found = gradients(scalar(CASES[name], x, y), [x, y])
    for leaf, gradient in zip((x, y), found, strict=True):
        assert gradient.shape == leaf.shape
        for index in np.ndindex(leaf.shape):
            step = np.zeros(leaf.shape)
            step[index] = 1e-6
            values = [
                scalar(CASES[name], *(part.value + sign * step * (part is leaf) for part in (x, y))) for sign in (1, -1)
            ]
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[index], rel=1e-5, abs=1e-6)


def test_what_is_made_of_plain_arrays_stays_a_plain_array():
    for function in CASES.values():
        assert isinstance(function(A, B), np.ndarray)


def test_a_stopped_gradient_and_an_unused_leaf_give_zero():
    x, y, z = Var(A), Var(B), Var(ROW)
    found = gradients(OPS.sum(OPS.stop_gradient(x * y) * y), [x, y, z])
    np.testing.assert_array_equal(found[0], np.zeros_like(A))
    np.testing.assert_array_equal(found[1], A * B)
    np.testing.assert_array_equal(found[2], np.zeros_like(ROW))


def test_a_result_that_depends_on_nothing_has_gradients_of_zero():
    np.testing.assert_array_equal(gradients(3.0, [Var(A)])[0], np.zeros_like(A))


def test_a_masked_score_takes_no_part():
    """-inf in a softmax: neither its value nor its gradient is NaN."""
    x = Var(A)
    shares = OPS.exp(OPS.log_softmax(OPS.where(np.tri(3, 4, dtype=bool), x, -np.inf)))
    (found,) = gradients(OPS.sum(shares * B), [x])
    assert np.isfinite(found).all()
    assert not found[~np.tri(3, 4, dtype=bool)].any()
