"""The learning rate that a run has when none is given."""

import math

from thimble.config.train import TrainConfig
from thimble.training.step_schedule import StepSchedule


def default_rate(**options):
    return StepSchedule(TrainConfig.build({"data": "x", **options}), [40] * 300, "llama", 576).rate


def test_rank_auto_has_the_default_rate_of_the_rank_whose_parameters_it_shares_out():
    assert default_rate(rank="auto") == default_rate(rank=16)
    assert default_rate(rank="auto", use_rslora=True) == default_rate(rank=16, use_rslora=True)


def test_rslora_takes_the_root_of_the_rank_off_the_default_rate():
    assert math.isclose(
        default_rate(rank=64, use_rslora=True), default_rate(rank=64) / 8, rel_tol=0.05
    )  # rates have two digits
