"""Inits as values: read from the option, written back, and the ranks each allows."""

import subprocess
import sys

import pytest

from thimble.core.lowrank import scale
from thimble.core.method import INITS, method_rates, parse_init


@pytest.mark.parametrize(
    "text", [*(name for name in INITS if name != "adapter"), "adapter:runs/mine-1", "adapter:C:/a b"]
)
def test_an_init_is_written_as_it_was_read(text):
    assert str(parse_init(text)) == text


def test_the_path_of_an_adapter_is_a_field():
    init = parse_init("adapter:runs/mine-1")
    assert (init.name, init.needs, init.path) == ("adapter", "adapter", "runs/mine-1")
    assert parse_init("pissa:exact").path == ""


@pytest.mark.parametrize("text", ["pisa", "adapter", "adapter:", "auto", "", "kaiming:", "pissa:exact:more", "Kaiming"])
def test_what_is_no_init_is_refused_with_what_is(text):
    with pytest.raises(ValueError, match="expected one of kaiming, .*, adapter:PATH"):
        parse_init(text)


def test_a_near_miss_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean pissa?"):
        parse_init("pisa")


def test_only_inits_that_keep_the_function_are_trained_as_a_difference():
    assert not any(init.is_delta and init.changes_base for init in INITS.values())


@pytest.mark.parametrize(
    ("init", "rank", "allowed", "most"),
    [("kaiming", 20, 20, 33), ("kaiming", 99, 33, 33), ("orthogonal", 7, 6, 32), ("orthogonal", 1, 2, 32),
     ("orthogonal", 99, 32, 32), ("gradient:lora-ga", 20, 16, 16), ("gradient:lora-ga", 3, 3, 16)],
)  # fmt: skip
def test_an_init_says_which_ranks_a_layer_can_have(init, rank, allowed, most):
    assert parse_init(init).allowed_rank(rank, (33, 64)) == allowed
    assert parse_init(init).most_rank((33, 64)) == most


def test_a_rate_factor_is_named_after_the_option_as_it_is_typed():
    assert method_rates(parse_init("pissa:exact"), False, 1.0) == {"init pissa:exact": 0.12}
    assert method_rates(parse_init("adapter:runs/mine-1"), True, 4.0).keys() == {"DoRA", "LoRA+"}


def test_a_step_of_rslora_is_as_long_as_one_of_plain_lora_whatever_the_ranks():
    sizes = [(4, 40), (64, 30), (16, 40)]
    factor = method_rates(parse_init("kaiming"), False, 1.0, sizes, use_rslora=True)["rsLoRA"]
    plain, with_roots = (sum(scale(32, rank, roots) * rank for rank, _ in sizes) for roots in (False, True))
    assert with_roots * factor == pytest.approx(plain)
    assert method_rates(parse_init("kaiming"), False, 1.0, [(16, 40)], use_rslora=True) == {"rsLoRA": 0.25}


def test_the_factor_of_lora_plus_is_continuous_in_its_ratio():
    found = [method_rates(parse_init("kaiming"), False, ratio).get("LoRA+", 1.0) for ratio in (1.0, 1.0001, 4.0, 16.0)]
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.25], rel=1e-3)


def test_names_of_inits_are_known_without_numpy():
    code = "import sys, thimble.core.method; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
