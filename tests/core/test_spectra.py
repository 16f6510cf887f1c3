"""Spectra and subspaces against dense float64 arithmetic on small matrices."""

import numpy as np
import pytest

from thimble.core import spectra
from thimble.core.lowrank import Factors, delta


@pytest.fixture
def random():
    return np.random.default_rng(0)


def basis(random, rows, columns):
    return np.linalg.qr(random.standard_normal((rows, columns)))[0]


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_singular_values_are_those_of_an_svd(random, shape):
    matrix = random.standard_normal(shape).astype(np.float32)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(spectra.singular_values(matrix), expected, rtol=1e-9)


def test_singular_values_of_a_matrix_without_full_rank_end_in_zeros(random):
    matrix = np.outer(random.standard_normal(5), random.standard_normal(8))
    values = spectra.singular_values(matrix)
    assert values[0] == pytest.approx(np.linalg.norm(matrix))
    assert (values[1:] < 1e-7 * values[0]).all()


def test_the_stable_rank_is_the_energy_over_the_largest_square(random):
    matrix = random.standard_normal((6, 9))
    values = spectra.singular_values(matrix)
    expected = np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2
    assert spectra.stable_rank(values) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [spectra.stable_rank, spectra.effective_rank])
def test_ranks_count_equal_values_and_do_not_see_their_size(measure):
    assert measure(np.full(5, 3e-9)) == pytest.approx(5)
    assert measure(np.array([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert measure(np.zeros(4)) == 0


def test_the_effective_rank_is_the_exponential_of_the_entropy():
    shares = np.array([0.5, 0.25, 0.25])
    assert spectra.effective_rank(8 * shares) == pytest.approx(np.exp(0.5 * np.log(2) + 0.5 * np.log(4)))


def test_energy_counts_squares():
    values = np.array([3.0, 2.0, 1.0])
    assert spectra.energy_within(values, 1) == pytest.approx(9 / 14)
    assert spectra.energy_within(values, 16) == 1
    assert spectra.energy_within(np.zeros(3), 1) == 1


def test_the_curve_of_energy_rises_from_nothing_to_all():
    curve = spectra.energy_curve(np.array([3.0, 1.0]), 5)
    np.testing.assert_allclose(curve, [0, 0.45, 0.9, 0.95, 1])
    assert not spectra.energy_curve(np.zeros(3), 4).any()


def test_rounding_reaches_just_up_to_the_noise_edge(random):
    matrix = random.standard_normal((300, 500))
    step = 0.37
    error = np.round(matrix / step) * step - matrix
    edge = spectra.noise_edge((300, 500), np.full(40, step, np.float32))
    assert spectra.singular_values(error)[0] == pytest.approx(edge, rel=0.05)  # exact in the limit


def test_steps_of_unequal_blocks_are_averaged_as_squares():
    assert spectra.noise_edge((1, 1), np.array([1.0, 3.0])) == pytest.approx(2 * np.sqrt(5 / 12))


def test_a_column_space_is_orthonormal_and_spans_the_columns(random):
    matrix = random.standard_normal((9, 3)) @ np.diag([1, 1e-3, 1e-3])
    space = spectra.column_space(matrix)
    np.testing.assert_allclose(space.T @ space, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(space @ (space.T @ matrix), matrix, atol=1e-12)


def test_a_column_space_has_no_direction_for_what_is_zero(random):
    column = random.standard_normal((9, 1))
    assert spectra.column_space(np.hstack([column, 2 * column])).shape == (9, 1)
    assert spectra.column_space(np.zeros((9, 2))).shape == (9, 0)


def test_directions_within_a_space_have_cosine_one_and_across_it_zero(random):
    whole = basis(random, 8, 8)
    space, turned = whole[:, :3], whole[:, :3] @ basis(random, 3, 2)
    assert spectra.mean_squared_cosine(space, turned) == pytest.approx(1)
    assert spectra.mean_squared_cosine(space, whole[:, 3:5]) == pytest.approx(0)
    assert spectra.mean_squared_cosine(space, whole[:, 2:4]) == pytest.approx(0.5)
    assert np.isnan(spectra.mean_squared_cosine(space, np.zeros((8, 0))))


def test_random_directions_have_the_cosine_of_chance(random):
    space = basis(random, 40, 10)
    found = [spectra.mean_squared_cosine(space, basis(random, 40, 5)) for _ in range(200)]
    assert np.mean(found) == pytest.approx(10 / 40, rel=0.05)


def test_overlap_is_relative_to_the_smaller_space_and_symmetric(random):
    whole = basis(random, 8, 8)
    assert spectra.overlap(whole[:, :2], whole[:, :5]) == pytest.approx(1)
    assert spectra.overlap(whole[:, :5], whole[:, :2]) == pytest.approx(1)
    assert spectra.overlap(whole[:, :4], whole[:, 2:6]) == pytest.approx(0.5)
    assert np.isnan(spectra.overlap(whole[:, :4], np.zeros((8, 0))))


def test_the_inner_product_is_that_of_the_dense_updates(random):
    first = Factors(random.standard_normal((2, 7)), random.standard_normal((5, 2)), 1.5)
    second = Factors(random.standard_normal((3, 7)), random.standard_normal((5, 3)), -0.5)
    assert spectra.inner_product(first, second) == pytest.approx((delta(first) * delta(second)).sum())
    assert spectra.inner_product(first, first) == pytest.approx(np.linalg.norm(delta(first)) ** 2)


def test_an_intruder_is_a_direction_like_none_that_was_there(random):
    whole = basis(random, 9, 9)
    before = whole[:, :6]
    mixed = (whole[:, 0] + whole[:, 1] + whole[:, 2]) / np.sqrt(3)  # cosine 0.577 to each: the limit is 0.6
    near = 0.8 * whole[:, 3] - 0.6 * whole[:, 8]
    after = np.stack([whole[:, 1], -whole[:, 2], whole[:, 7], mixed, near], axis=1)
    assert spectra.intruders(before, before) == 0
    assert spectra.intruders(before, after) == 2
