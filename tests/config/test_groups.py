"""Options that exclude each other."""

import pytest

from thimble.config.train import TrainConfig


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"energy": 0.9}, "--energy 0.9: only with --rank auto, not 16"),
        ({"rank": 8, "rank_budget": 999}, "--rank-budget 999: only with --rank auto, not 8"),
        ({"rank": "auto", "energy": 0.9, "rank_budget": 1000}, "--rank-budget 1000 --energy 0.9: give one of them"),
        ({"rank": "auto", "rank_pattern": "q_proj=4"}, "--rank-pattern q_proj=4: not with --rank auto"),
        ({"rank": "auto", "alpha_pattern": {"q_proj": 4}}, "--alpha-pattern q_proj=4: not with --rank auto"),
        ({"rank_pattern": "q_proj=2.5"}, "--rank-pattern q_proj=2.5: expected whole numbers as ranks"),
        ({"compute": "int8", "store": "file"}, "--store file: --compute int8 keeps the weights as int8"),
        ({"epochs": 1, "max_steps": 2}, "--epochs 1 --max-steps 2: give one of --epochs, --max-steps, --max-minutes"),
        ({"resume": True}, "--resume: name the run folder to continue"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, said):
    (problem,) = TrainConfig.build({"data": "x", **options}).problems
    assert said in problem


@pytest.mark.parametrize("options", [{"rank": "auto", "energy": 0.9}, {"compute": "int8", "store": "int8"}])
def test_options_that_go_together_are_accepted(options):
    assert TrainConfig.build({"data": "x", **options}).problems == ()
