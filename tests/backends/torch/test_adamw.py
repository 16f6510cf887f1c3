"""Our AdamW against torch's."""

import numpy as np
import pytest
import torch

from thimble.backends.torch.adamw import AdamW


def gradients():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(500, generator=random) * 10.0**power for power in (0, -3, 1, -8, 0) * 6]


@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_it_takes_the_steps_of_torch(beta2):
    ours, theirs = torch.ones(500), torch.nn.Parameter(torch.ones(500))
    mine = AdamW(ours, 0.1, beta2=beta2)
    other = torch.optim.AdamW([theirs], lr=0.0, weight_decay=0.1, betas=(0.9, beta2))
    for number, gradient in enumerate(gradients()):
        rate = 1e-2 / (1 + number)
        mine.step(gradient, rate)
        theirs.grad, other.param_groups[0]["lr"] = gradient, rate
        other.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
    assert (ours - 1).abs().mean() > 1e-3


def test_a_restored_state_goes_on_bit_for_bit():
    numbers = torch.ones(500)
    first = AdamW(numbers, 0.1)
    for gradient in gradients()[:5]:
        first.step(gradient, 1e-2)
    other = numbers.clone()
    second = AdamW(other, 0.1)
    second.restore(first.state())
    for gradient in gradients()[5:8]:
        first.step(gradient, 1e-2)
        second.step(gradient, 1e-2)
    np.testing.assert_array_equal(numbers, other)
