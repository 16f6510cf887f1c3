"""The laws of low-rank updates."""

import numpy as np
import pytest

from thimble.core.lowrank import (
    Factors,
    delta,
    difference,
    eigen,
    merge,
    pca,
    qr,
    randomised_svd,
    rank_for,
    scale,
    svd,
    svd_of_update,
    thin_svd,
    total,
    truncate,
    unmerge,
)

RANDOM = np.random.default_rng(0)


def factors(rank=4, fan_in=20, fan_out=30, number=0.5):
    return Factors(RANDOM.standard_normal((rank, fan_in)), RANDOM.standard_normal((fan_out, rank)), number)


def test_rslora_divides_by_the_root_of_the_rank():
    assert scale(32, 16) == 2.0
    assert scale(32, 16, use_rslora=True) == 8.0


def test_merge_equals_the_layer_with_its_adapter():
    update, weight, x = factors(), RANDOM.standard_normal((30, 20)), RANDOM.standard_normal((7, 20))
    with_adapter = x @ weight.T + update.scale * (x @ update.A.T) @ update.B.T
    np.testing.assert_allclose(x @ merge(weight, update).T, with_adapter, atol=1e-12)


def test_unmerge_undoes_merge_and_neither_changes_its_input():
    update, weight = factors(), RANDOM.standard_normal((30, 20)).astype(np.float32)
    before = weight.copy()
    np.testing.assert_allclose(unmerge(merge(weight, update), update), weight, atol=1e-5)
    np.testing.assert_array_equal(weight, before)


def test_merge_into_float16_adds_in_float32():
    weight, update = np.full((2, 2), 1000, np.float16), Factors(np.full((1, 2), 0.5), np.full((2, 1), 1.2), 1.0)
    np.testing.assert_array_equal(merge(weight, update), np.full((2, 2), np.float16(1000.6)))


def test_delta_has_at_most_the_rank_of_its_factors():
    assert np.linalg.matrix_rank(delta(factors(rank=3))) == 3


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
def test_truncation_is_the_best_approximation_and_reports_its_error(rank):
    update = factors(rank=4)
    small, error = truncate(update, rank)
    values = np.linalg.svd(delta(update), compute_uv=False)
    best = np.sqrt((values[min(rank, 4) :] ** 2).sum() / (values**2).sum())
    measured = np.linalg.norm(delta(update) - delta(small)) / np.linalg.norm(delta(update))
    assert small.rank == min(rank, 4)
    assert measured == pytest.approx(best, abs=1e-7)
    assert error == pytest.approx(best, abs=1e-7)


def test_truncating_a_zero_update_has_no_error():
    small, error = truncate(Factors(np.ones((4, 5)), np.zeros((6, 4)), 1.0), 2)
    assert error == 0.0
    assert not delta(small).any()


def test_factors_of_different_rank_are_refused():
    with pytest.raises(ValueError, match="expected \\(rank, in\\) and \\(out, rank\\)"):
        Factors(np.zeros((2, 3)), np.zeros((3, 4)), 1.0)


def test_a_magnitude_sets_the_lengths_of_the_merged_rows():
    weight, lengths = RANDOM.standard_normal((30, 20)), RANDOM.random(30) + 0.5
    update = factors()
    whole = merge(weight, Factors(update.A, update.B, update.scale, lengths))
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), lengths, rtol=1e-12)
    plain = merge(weight, update)
    cosines = (whole * plain).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(plain, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-12)


def test_a_difference_of_updates_is_one_update_of_both_ranks():
    update, origin = factors(rank=4), factors(rank=4)
    whole = difference(update, origin)
    assert whole.rank == 8
    assert not delta(difference(origin, origin)).any()
    np.testing.assert_allclose(delta(whole), delta(update) - delta(origin), atol=1e-12)


def test_a_sum_of_updates_is_one_update_whatever_their_scales():
    updates = [factors(rank=2, number=0.5), factors(rank=3, number=-4.0), factors(rank=1, number=0.0)]
    whole = total(updates)
    assert whole.rank == 6
    np.testing.assert_allclose(delta(whole), sum(delta(update) for update in updates), atol=1e-12)
    assert not delta(total([updates[2], updates[2]])).any()


def test_a_sum_of_updates_of_one_scale_keeps_every_number():
    updates = [factors(rank=2, number=0.3), factors(rank=3, number=0.3)]
    whole = total(updates)
    np.testing.assert_array_equal(whole.B, np.concatenate([update.B for update in updates], axis=1))
    assert whole.scale == 0.3


def test_magnitudes_do_not_add_up_and_one_alone_is_left_as_it_is():
    update = factors()
    with_lengths = Factors(update.A, update.B, update.scale, np.ones(30))
    assert total([with_lengths]) is with_lengths
    with pytest.raises(ValueError, match="magnitudes cannot be added"):
        total([update, with_lengths])


def test_the_spectrum_of_an_update_is_that_of_its_dense_form():
    update = factors(rank=4, number=0.3)
    found, dense = svd_of_update(update), np.linalg.svd(delta(update), compute_uv=False)
    np.testing.assert_allclose(found.values, dense[:4], rtol=1e-10)
    np.testing.assert_allclose(found.product, delta(update), atol=1e-12)


# ---- decompositions -------------------------------------------------------------------------------------------------

SHAPES = [(40, 40), (60, 25), (25, 60)]


def matrix(shape, decay=0.9):
    """A matrix whose singular values fall geometrically."""
    small = min(shape)
    u = np.linalg.qr(RANDOM.standard_normal((shape[0], small)))[0]
    v = np.linalg.qr(RANDOM.standard_normal((shape[1], small)))[0]
    return (u * decay ** np.arange(small)) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_exact_svd_is_numpys_at_either_end(shape, end):
    whole = matrix(shape)
    u, values, vt = np.linalg.svd(whole, full_matrices=False)
    kept = slice(0, 5) if end == "top" else slice(len(values) - 5, None)
    found = svd(whole, 5, end)
    np.testing.assert_allclose(found.values, values[kept], rtol=1e-9)
    np.testing.assert_allclose(found.product, (u[:, kept] * values[kept]) @ vt[kept], atol=1e-9)
    assert found.energy == pytest.approx((values[kept] ** 2).sum() / (values**2).sum(), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_kept_and_what_is_left_are_the_whole_and_the_error_is_the_tail(shape):
    whole = matrix(shape)
    values = np.linalg.svd(whole, compute_uv=False)
    kept = svd(whole, 5)
    left = whole - kept.product
    np.testing.assert_allclose(kept.product + left, whole, atol=1e-12)
    assert np.linalg.norm(left) == pytest.approx(np.sqrt((values[5:] ** 2).sum()), rel=1e-9)
    assert kept.energy == pytest.approx(1 - np.linalg.norm(left) ** 2 / np.linalg.norm(whole) ** 2, rel=1e-9)


@pytest.mark.parametrize("shape", [(300, 300), (500, 200), (200, 500)])
@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_a_randomised_svd_leaves_at_most_one_percent_more(shape, decay):
    whole = matrix(shape, decay)
    best = np.linalg.norm(whole - svd(whole, 16).product)
    found = randomised_svd(whole, 16)
    assert best <= np.linalg.norm(whole - found.product) <= 1.01 * best
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(16), atol=1e-5)
    np.testing.assert_array_equal(found.values, randomised_svd(whole, 16).values)


def test_qr_is_the_part_of_a_full_qr():
    whole = matrix((60, 25))
    q, r = np.linalg.qr(whole)
    found = qr(whole, 7)
    np.testing.assert_allclose(found.product, q[:, :7] @ r[:7], atol=1e-12)
    np.testing.assert_allclose(found.left.T @ found.left, np.eye(7), atol=1e-12)


def test_eigenvectors_of_a_second_moment_are_right_singular_vectors_of_the_samples():
    samples = RANDOM.standard_normal((50, 12)) * np.arange(1, 13)
    values = np.linalg.svd(samples, compute_uv=False)
    for end, kept in (("top", slice(0, 3)), ("bottom", slice(9, 12))):
        found = eigen(samples.T @ samples, 3, end)
        np.testing.assert_allclose(found.values, values[kept] ** 2, rtol=1e-9)
        np.testing.assert_allclose(samples.T @ samples @ found.left, found.left * found.values, atol=1e-8)


def test_pca_is_the_svd_of_centred_samples_and_says_what_centring_took():
    samples = RANDOM.standard_normal((50, 12)) + 5.0
    centred, raw = pca(samples, 2), pca(samples, 2, is_centred=False)
    covariance = np.cov(samples.T, bias=True) * len(samples)
    np.testing.assert_allclose(covariance @ centred.right.T, centred.right.T * centred.values**2, atol=1e-8)
    mean = samples.mean(0) / np.linalg.norm(samples.mean(0))
    assert abs(raw.right[0] @ mean) > 0.99
    assert abs(centred.right[0] @ mean) < 0.5


def test_a_matrix_on_which_lapack_fails_is_turned_over(monkeypatch):
    true, whole = np.linalg.svd, matrix((12, 7))

    def failing(found, **options):
        if found.shape[0] > found.shape[1]:
            raise np.linalg.LinAlgError("SVD did not converge")
        return true(found, **options)

    monkeypatch.setattr(np.linalg, "svd", failing)
    u, values, vt = thin_svd(whole)
    np.testing.assert_allclose((u * values) @ vt, whole, atol=1e-12)
    with pytest.raises(np.linalg.LinAlgError):
        thin_svd(whole * np.nan)


def test_the_rank_for_an_energy_is_the_smallest_that_holds_it():
    values = np.array([2.0, 1.0, 1.0])  # squares 4, 1, 1
    assert [rank_for(values, energy) for energy in (0.5, 4 / 6, 0.7, 5 / 6, 1.0)] == [1, 1, 2, 2, 3]
    assert rank_for(np.zeros(3), 0.9) == 1
