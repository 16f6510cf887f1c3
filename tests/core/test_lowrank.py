"""The laws of low-rank updates."""

import numpy as np
import pytest

from thimble.core.lowrank import Factors, delta, merge, scale, start_a, truncate, unmerge

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


def test_start_of_a_depends_on_seed_and_layer_only():
    first = start_a("kaiming", 4, 64, 0, "model.layers.0.mlp.up_proj")
    np.testing.assert_array_equal(first, start_a("kaiming", 4, 64, 0, "model.layers.0.mlp.up_proj"))
    assert not np.array_equal(first, start_a("kaiming", 4, 64, 1, "model.layers.0.mlp.up_proj"))
    assert not np.array_equal(first, start_a("kaiming", 4, 64, 0, "model.layers.1.mlp.up_proj"))


def test_starts_have_the_spread_of_peft():
    kaiming, gaussian = (start_a(kind, 16, 4096, 0, "x") for kind in ("kaiming", "gaussian"))
    assert np.abs(kaiming).max() <= 1 / 64
    assert kaiming.std() == pytest.approx(1 / np.sqrt(3 * 4096), rel=0.02)
    assert gaussian.std() == pytest.approx(1 / 16, rel=0.02)
