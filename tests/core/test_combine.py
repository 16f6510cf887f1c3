"""Adapters combined: PEFT's add_weighted_adapter is the oracle, kind by kind."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

from thimble.config.merge import COMBINATION_TYPES
from thimble.core import combine as combining
from thimble.core.adapter import Adapter
from thimble.core.combine import Combination, combination_problems, combine, drawn_mask
from thimble.core.lowrank import Factors, delta
from thimble.files.peft import load_adapter

RANDOM = np.random.default_rng(5)


class Net(nn.Module):
    """Three layers of sizes that differ, so that adapters may share some and not others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side = (nn.Linear(*size) for size in ((18, 24), (24, 18), (21, 20)))


def peft_model(folder, *configs):
    """Adapters with random numbers, in PEFT and, saved by it, here."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    for number in range(len(configs)):
        model.set_adapter(str(number))
        model.save_pretrained(folder, selected_adapters=[str(number)])
    return model, [load_adapter(folder / str(number)) for number in range(len(configs))]


def config(rank=4, targets=("up", "down"), alpha=8, **how):
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **how)


VARIANTS = {
    "alike": lambda: [config(), config()],
    "other alphas, rsLoRA": lambda: [config(alpha=3), config(alpha=5, use_rslora=True), config(alpha=1)],
    "other layers": lambda: [config(targets=("up", "side")), config(targets=("side", "down"))],
}
RANKS = {"other ranks": lambda: [config(2), config(5, use_rslora=True), config(3, rank_pattern={"down": 6})]}


def weights_for(count):
    return [0.7, -0.4, 1.3][:count]


def in_peft(model, count, how: Combination):
    model.add_weighted_adapter(
        [str(number) for number in range(count)], list(how.weights), "all", how.kind, svd_rank=how.rank,
        density=how.density, majority_sign_method=how.majority_sign_method,
    )  # fmt: skip
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear) and "all" in module.lora_A
    }


def assert_close(found, wanted):
    """Apart by float32 alone, in which PEFT decomposes."""
    np.testing.assert_allclose(delta(found), wanted, atol=2e-6 * np.linalg.norm(wanted))


def sides(module):
    return (getattr(module, f"lora_{side}")["all"].weight.detach().numpy() for side in "AB")


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("kind", [kind for kind in COMBINATION_TYPES if "dare" not in kind])
@pytest.mark.parametrize("variant", [*VARIANTS, *RANKS])
def test_each_way_gives_what_peft_gives(tmp_path, kind, majority, variant):
    configs = {**VARIANTS, **RANKS}[variant]()
    model, ours = peft_model(tmp_path, *configs)
    how = Combination(weights_for(len(ours)), kind, 0.6, majority)
    if variant in RANKS and kind != "cat" and not how.is_svd:
        with pytest.raises(ValueError, match="same r value"):
            in_peft(model, len(ours), how)
        assert combination_problems(dict(zip("abc", ours, strict=True)), kind)
        return
    assert not combination_problems(dict(zip("abc", ours, strict=False)), kind)
    theirs, found = in_peft(model, len(ours), how), dict(combine(ours, how))
    assert found.keys() == theirs.keys()
    for path, module in theirs.items():
        wanted = module.get_delta_weight("all").detach().numpy()
        if kind == "cat" or variant in RANKS or path == "side":  # PEFT pads what fewer adapters have with zeros
            assert_close(found[path], wanted)
        elif how.is_svd:  # vectors have either sign, and singular values stand where one likes
            assert found[path].rank == module.lora_A["all"].weight.shape[0]
            assert_close(found[path], wanted)
        else:
            a, b = sides(module)
            np.testing.assert_allclose(found[path].A, a, atol=1e-6)
            np.testing.assert_allclose(found[path].B, b, atol=1e-6)
            assert found[path].scale == 1.0


@pytest.mark.parametrize("kind", [kind for kind in COMBINATION_TYPES if "dare" in kind])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dare_gives_what_peft_gives_with_the_same_masks(tmp_path, kind, variant, monkeypatch):
    model, ours = peft_model(tmp_path, *VARIANTS[variant]())
    how, drawn = Combination(weights_for(len(ours)), kind, 0.5, seed=3), {}

    def noted(*arguments):
        mask = drawn_mask(*arguments)
        drawn.setdefault(mask.shape, []).append(torch.from_numpy(mask).float())
        return mask

    monkeypatch.setattr(combining, "drawn_mask", noted)
    found = dict(combine(ours, how))
    monkeypatch.setattr(torch, "bernoulli", lambda input: drawn[tuple(input.shape)].pop(0))
    for path, module in in_peft(model, len(ours), how).items():
        wanted = module.get_delta_weight("all").detach().numpy()
        assert_close(found[path], wanted)
    assert not any(drawn.values()), "PEFT drew as many"


def test_what_dare_drops_is_made_up_for_and_the_seed_says_what_it_is():
    """Each number stays with the probability `density` and is divided by it: the mean over seeds is the number."""
    size, density, seeds = (40, 50), 0.3, 200
    a = RANDOM.standard_normal(size).astype("f4")
    one = Adapter({"x": Factors(a, np.ones((3, 40), "f4"), 1.0)})
    kept, mean = 0.0, np.zeros(size)
    for seed in range(seeds):
        found = dict(combine([one], Combination([1.0], "dare_linear", density, seed=seed)))["x"].A
        kept += (found != 0).mean() / seeds
        mean += found / seeds
        np.testing.assert_allclose(found[found != 0], (a / density)[found != 0], rtol=1e-6)
    assert kept == pytest.approx(density, abs=0.003)
    error = np.abs(a) * ((1 - density) / density / seeds) ** 0.5  # standard deviation of a mean
    assert (np.abs(mean - a) / np.maximum(error, 1e-9)).max() < 5.5
    again, other = (drawn_mask("x:0:A", size, density, seed) for seed in (1, 2))
    assert (drawn_mask("x:0:A", size, density, 1) == again).all()
    assert (other != again).any()
    assert (drawn_mask("x:1:A", size, density, 1) != again).any(), "another adapter, another mask"


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_one_adapter_of_weight_one_and_full_density_stays_the_same_update(kind):
    one = Factors(RANDOM.standard_normal((3, 8)).astype("f4"), RANDOM.standard_normal((6, 3)).astype("f4"), 0.5)
    found = dict(combine([Adapter({"x": one})], Combination([1.0], kind)))["x"]
    np.testing.assert_allclose(delta(found), delta(one), atol=1e-5)


def test_a_negative_weight_takes_off_and_leaves_the_scale_positive():
    one = Adapter({"x": Factors(np.ones((1, 4), "f4"), np.ones((3, 1), "f4"), 2.0)})
    found = dict(combine([one], Combination([-0.5])))["x"]
    assert found.scale == 1.0
    np.testing.assert_array_equal(delta(found), -np.ones((3, 4)))
