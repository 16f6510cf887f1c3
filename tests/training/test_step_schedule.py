"""The learning rate that a run has when none is given."""

import math

from thimble.config.train import TrainConfig
from thimble.training.step_schedule import StepSchedule


def default_rate(rank=16, **options):
    config = TrainConfig.build({"data": "x", "rank": rank, **options})
    return StepSchedule(config, [40] * 300, "llama", 576, [(rank, 576), (rank, 1536)]).rate


def test_rslora_takes_the_root_of_the_rank_off_the_default_rate():
    assert math.isclose(
        default_rate(rank=64, use_rslora=True), default_rate(rank=64) / 8, rel_tol=0.05
    )  # rates have two digits
