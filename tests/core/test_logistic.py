"""The linear probe, against the answer of torch to the same problem."""

import numpy as np
import pytest
import torch

from thimble.core.logistic import cross_entropy, fit_probe


def made(rows, width, classes, noise, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    centres = rng.normal(size=(classes, width)) * 2
    return (centres[labels] + noise * rng.normal(size=(rows, width))).astype(np.float32), labels


@pytest.mark.parametrize("weights", [(), (0.2, 1.0, 3.0, 0.5)])
def test_it_finds_what_torch_finds(weights):
    features, labels = made(300, 12, 4, noise=4.0)
    probe = fit_probe(features, labels, 4, weights)
    x, y = torch.from_numpy((features - features.mean(0)) / features.std(0)).double(), torch.from_numpy(labels)
    weight, bias = torch.zeros(4, 12, dtype=torch.double, requires_grad=True), torch.zeros(4, dtype=torch.double)
    bias.requires_grad_()
    counts = torch.tensor(weights, dtype=torch.double) if weights else None
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def close():
        optimiser.zero_grad()
        each = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, counts, reduction="none")
        loss = each.mean() + probe.penalty / 2 * (weight**2).sum()
        loss.backward()
        return loss

    optimiser.step(close)
    ours = features @ probe.weight.T + probe.bias
    theirs = (x @ weight.T + bias).detach().numpy()
    shift = (ours - theirs).mean(1, keepdims=True)  # a constant added to all classes changes nothing
    assert np.abs(ours - theirs - shift).max() < 0.01


def test_the_penalty_is_chosen_on_rows_apart():
    clean, labels = made(400, 5, 3, noise=0.5)
    noisy, _ = made(400, 200, 3, noise=0.5, seed=1)
    rng = np.random.default_rng(2)
    assert fit_probe(clean, labels, 3).penalty < fit_probe(rng.permutation(noisy), labels, 3).penalty


def test_the_same_rows_give_the_same_head_and_odd_columns_do_no_harm():
    features, labels = made(100, 6, 2, noise=1.0)
    features[:, 3] = 7  # always the same
    features[:, 4] *= 1e6
    one, other = fit_probe(features, labels, 2), fit_probe(features, labels, 2)
    assert (one.weight == other.weight).all()
    assert np.isfinite(one.weight).all()
    assert (one.weight[:, 3] == 0).all()
    assert ((features @ one.weight.T + one.bias).argmax(1) == labels).mean() > 0.9


def test_cross_entropy_is_torchs():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, 5)).astype(np.float32) * 50, rng.integers(5, size=7)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none")
    assert np.allclose(cross_entropy(logits, labels), expected.numpy(), atol=1e-5)
