"""Every init: what it takes out of which matrix, and that B₀ A₀ is that piece."""

import numpy as np
import pytest

from thimble.core.inits import BUILDERS, LayerData, Moments, Sketch, at_kaiming_length
from thimble.core.lowrank import delta
from thimble.core.method import INITS, method_rates

RANDOM = np.random.default_rng(1)
SHAPES = [(40, 40), (64, 24), (24, 64), (300, 280)]


def weight(shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def moments(n, tokens=400, mean=0.0):
    x = RANDOM.standard_normal((tokens, n)) * np.linspace(2, 0.1, n) + mean
    return x, Moments((x.T @ x).astype(np.float32), x.sum(0).astype(np.float32), tokens)


def build(init, shape, rank, scale, seed=0, path="x", **given):
    return BUILDERS[init](LayerData(path, shape, rank, scale, seed, **given))


def of_weight(init, w, rank, scale, **given):
    return build(init, w.shape, rank, scale, weight=w, **given)


def test_every_init_has_a_builder_but_the_one_that_reads_an_adapter():
    assert BUILDERS.keys() == INITS.keys() - {"adapter"}


@pytest.mark.parametrize("init", [name for name, init in INITS.items() if init.needs not in ("nothing", "adapter")])
def test_an_init_that_lacks_what_it_needs_says_where_that_is_written_down(init):
    with pytest.raises(ValueError, match="needs more than the layer data hold; see thimble.core.method.INITS"):
        build(init, (8, 9), 2, 1.0)


# ---- random ---------------------------------------------------------------------------------------------------------


def test_a_random_init_depends_on_seed_and_layer_only():
    def drawn(seed, name):
        return build("kaiming", (32, 64), 4, 2.0, seed, name).A

    first = drawn(0, "model.layers.0.mlp.up_proj")
    np.testing.assert_array_equal(first, drawn(0, "model.layers.0.mlp.up_proj"))
    assert not np.array_equal(first, drawn(1, "model.layers.0.mlp.up_proj"))
    assert not np.array_equal(first, drawn(0, "model.layers.1.mlp.up_proj"))


def test_random_inits_have_the_spread_of_peft():
    kaiming, gaussian = (build(kind, (8, 4096), 16, 2.0).A for kind in ("kaiming", "gaussian"))
    assert np.abs(kaiming).max() <= 1 / 64
    assert kaiming.std() == pytest.approx(1 / np.sqrt(3 * 4096), rel=0.02)
    assert gaussian.std() == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (8, 2048)])
@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_the_rate_of_a_random_init_makes_up_for_the_length_of_its_rows(init, shape):
    lengths = [
        np.sqrt(np.mean([np.square(build(kind, shape, 8, 2.0, seed).A).sum(1).mean() for seed in range(200)]))
        for kind in ("kaiming", init)
    ]
    factor = method_rates(INITS[init], False, 1.0, [(8, shape[1])])[f"init {init}"]
    assert factor * lengths[1] == pytest.approx(lengths[0], rel=0.03)


def test_an_orthogonal_init_changes_nothing_though_a_and_b_are_not_zero():
    start = build("orthogonal", (50, 70), 8, 2.0)
    assert np.linalg.matrix_rank(start.A) == np.linalg.matrix_rank(start.B) == 4
    assert np.abs(delta(start)).max() < 1e-6


# ---- from the weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "kept"), [("pissa:exact", slice(0, 6)), ("milora", slice(-6, None))])
def test_a_piece_of_the_spectrum_equals_the_float64_reference(shape, kind, kept):
    w = weight(shape)
    u, values, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    piece = (u[:, kept] * values[kept]) @ vt[kept]
    start = of_weight(kind, w, 6, 2.0)
    assert np.linalg.norm(delta(start) - piece) <= 1e-6 * np.linalg.norm(w)
    np.testing.assert_allclose(np.linalg.norm(start.A, axis=1), np.linalg.norm(start.B, axis=0), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_fast_pissa_leaves_at_most_one_percent_more_than_the_exact_one(shape):
    w = weight(shape)
    best, found = (np.linalg.norm(w - delta(of_weight(kind, w, 6, 2.0))) for kind in ("pissa:exact", "pissa"))
    assert found <= 1.01 * best


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_first_columns_of_q_and_rows_of_r(shape):
    w = weight(shape)
    q, r = np.linalg.qr(w.astype(np.float64))
    start = of_weight("olora", w, 6, 2.0)
    piece = q[:, :6] @ r[:6]
    np.testing.assert_allclose(delta(start) / 2.0, piece, atol=1e-5)
    np.testing.assert_allclose(start.B.T @ start.B, np.eye(6), atol=1e-6)


def test_loftq_is_the_best_update_for_what_quantising_lost_whatever_the_scale():
    w = weight((40, 30))
    kept = np.round(w * 2) / 2
    u, values, vt = np.linalg.svd((w - kept).astype(np.float64), full_matrices=False)
    for scale in (0.5, 2.0):
        np.testing.assert_allclose(
            delta(of_weight("loftq", w, 5, scale, kept=kept)), (u[:, :5] * values[:5]) @ vt[:5], atol=1e-5
        )


# ---- from the inputs ------------------------------------------------------------------------------------------------


def test_eva_spans_the_main_directions_and_keeps_the_length_of_kaiming():
    x, seen = moments(40, mean=1.0)
    a = build("eva", (8, 40), 5, 1.0, moments=seen).A
    vt = np.linalg.svd(x, full_matrices=False)[2]
    angles = np.linalg.svd(a / np.linalg.norm(a, axis=1)[:, None] @ vt[:5].T, compute_uv=False)
    np.testing.assert_allclose(angles, 1, atol=1e-3)
    kaiming = build("kaiming", (8, 40), 2000, 1.0).A  # so many rows that the mean is sharp
    wanted = np.square(x @ kaiming.T).mean() * 5
    assert np.square(x @ a.T).sum(1).mean() == pytest.approx(wanted, rel=0.05)


def test_centred_eva_is_pca_of_the_inputs():
    x, seen = moments(40, mean=3.0)
    a = build("eva:centred", (8, 40), 5, 1.0, moments=seen).A
    vt = np.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    np.testing.assert_allclose(np.linalg.svd(a @ vt[:5].T, compute_uv=False), 1, atol=1e-2)
    np.testing.assert_allclose(a @ a.T, np.eye(5), atol=1e-5)


def test_layers_that_read_the_same_input_share_the_a_of_eva():
    _, seen = moments(40)
    first, second = (build("eva", (out, 40), 5, 1.0, moments=seen) for out in (8, 12))
    assert first.A is second.A
    assert [first.B.shape, second.B.shape] == [(8, 5), (12, 5)]
    assert build("eva", (8, 40), 3, 1.0, moments=seen).rank == 3
    assert not np.array_equal(build("eva:centred", (8, 40), 5, 1.0, moments=seen).A, first.A)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
@pytest.mark.parametrize(("init", "kept"), [("corda", slice(0, 5)), ("corda:knowledge", slice(-5, None))])
def test_corda_needs_no_inverse(init, kept, shape):
    w = weight(shape).astype(np.float64)
    x, seen = moments(shape[1], tokens=4000)
    c = x.T @ x / len(x)
    u, values, vt = np.linalg.svd(w @ c, full_matrices=False)
    published = (u[:, kept] * values[kept]) @ vt[kept] @ np.linalg.inv(c)
    start = of_weight(init, w, 5, 2.0, moments=seen)
    assert np.linalg.norm(delta(start) - published) < 1e-3 * np.linalg.norm(published)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_corda_for_knowledge_takes_a_piece_of_w_where_few_inputs_were_seen(shape):
    w = weight(shape)
    x, seen = moments(shape[1], tokens=12)  # W E[xᵀ x] has rank 12
    start = of_weight("corda:knowledge", w, 5, 2.0, moments=seen)
    assert np.linalg.norm(start.A, axis=1).min() > 0.5  # not where W writes nothing
    assert np.abs(x @ delta(start).T).max() < 1e-3 * np.abs(x @ w.T).max()


def test_corda_of_white_inputs_is_pissa():
    w = weight((30, 40))
    white = Moments(np.eye(40, dtype=np.float32) * 7, np.zeros(40, np.float32), 7)
    corda_start, pissa_start = (of_weight(init, w, 5, 2.0, moments=white) for init in ("corda", "pissa"))
    np.testing.assert_allclose(np.abs(corda_start.A), np.abs(pissa_start.A), atol=1e-4)
    np.testing.assert_allclose(delta(corda_start), delta(pissa_start), atol=1e-4)


# ---- from the gradient ----------------------------------------------------------------------------------------------


def sketch(gradient, x, k):
    u, values, vt = np.linalg.svd(gradient, full_matrices=False)
    right = vt[:k].astype(np.float32)
    answer = (x @ right.T).T @ (x @ right.T) / len(x)
    return Sketch(u[:, :k], values[:k], right, float(np.square(x).sum(1).mean()), answer)


def test_an_init_along_the_gradient_spans_its_right_vectors_at_kaiming_length():
    x, _ = moments(40)
    gradient = RANDOM.standard_normal((30, 400)) @ x
    start = build("gradient", (30, 40), 5, 2.0, sketch=sketch(gradient, x, 12))
    vt = np.linalg.svd(gradient, full_matrices=False)[2]
    unit = start.A / np.linalg.norm(start.A, axis=1)[:, None]
    np.testing.assert_allclose(np.abs(unit @ vt[:5].T), np.eye(5), atol=1e-5)
    assert not start.B.any()
    wanted = 5 * np.square(x).sum(1).mean() / (3 * 40)
    assert np.square(x @ start.A.T).sum(1).mean() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_a_whitened_start_answers_alike_in_every_row(shape):
    x, _ = moments(shape[1])
    gradient = RANDOM.standard_normal((shape[0], 400)) @ x
    given = sketch(gradient, x, 12)
    start = build("gradient:whitened", shape, 5, 2.0, sketch=given)
    unit = start.A / np.linalg.norm(start.A, axis=1)[:, None]
    np.testing.assert_allclose(np.abs(unit @ given.right[:5].T), np.eye(5), atol=1e-5)
    wanted = np.square(x).sum(1).mean() / (3 * shape[1])  # E(a x)² of a row that Kaiming draws
    np.testing.assert_allclose(np.square(x @ start.A.T).mean(0), wanted, rtol=1e-4)
    assert not start.B.any()


def test_lora_ga_takes_the_next_left_vectors_for_b():
    x, _ = moments(40)
    gradient = RANDOM.standard_normal((30, 400)) @ x
    start = build("gradient:lora-ga", (30, 40), 5, 2.0, sketch=sketch(gradient, x, 12))
    u, _, vt = np.linalg.svd(gradient, full_matrices=False)
    length = 30**0.25 / 4
    np.testing.assert_allclose(start.A, length * vt[:5], atol=1e-5)
    np.testing.assert_allclose(start.B, length * u[:, 5:10], atol=1e-5)


def test_lora_one_is_a_step_against_the_gradient():
    x, _ = moments(40)
    gradient = RANDOM.standard_normal((30, 400)) @ x
    start = build("gradient:lora-one", (30, 40), 5, 2.0, sketch=sketch(gradient, x, 12))
    u, values, vt = np.linalg.svd(gradient, full_matrices=False)
    step = -(u[:, :5] * values[:5]) @ vt[:5] / (128 * values[0])
    np.testing.assert_allclose(delta(start), 2.0 * step, atol=1e-6)


def test_length_is_left_alone_where_there_is_nothing_to_measure():
    a = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(at_kaiming_length(a, 0.0, np.zeros((2, 2))), a)
