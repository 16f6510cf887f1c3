"""The learning rate that a run has when none is given."""

import math

from thimble.config.train import TrainConfig
from thimble.training.step_schedule import text_schedule


def schedule(rank=16, target_tokens=30_000, **options):
    config = TrainConfig.build({"data": "x", "rank": rank, **options})
    return text_schedule(config, [400] * 300, target_tokens, "llama", 576, [(rank, 576), (rank, 1536)])


def default_rate(rank=16, target_tokens=30_000, **options):
    return schedule(rank, target_tokens, **options).rate


def test_rslora_takes_the_root_of_the_rank_off_the_default_rate():
    assert math.isclose(
        default_rate(rank=64, use_rslora=True), default_rate(rank=64) / 8, rel_tol=0.05
    )  # rates have two digits


def test_the_default_rate_grows_with_the_root_of_the_target_tokens_in_a_step_and_not_with_its_rows():
    """Rows of 400 tokens, of which 100 or 400 are learned, in steps of 4,000 or 16,000 tokens."""
    plain, whole = default_rate(batch_tokens=4000), default_rate(target_tokens=120_000, batch_tokens=4000)
    larger = default_rate(batch_tokens=16_000)
    assert math.isclose(whole, 2 * plain, rel_tol=0.03)
    assert math.isclose(larger, 2 * plain, rel_tol=0.03)


def test_fewer_than_fifty_rows_take_a_part_of_the_rate_and_that_is_told():
    """Nine rows at the whole rate make a model forget twice as much, for the same answers (docs/tuning.md)."""

    def of(rows):
        return text_schedule(TrainConfig.build({"data": "x"}), [40] * rows, 400, "llama", 576, [(16, 576)])

    assert of(50).rate == of(500).rate
    assert math.isclose(of(49).rate_factors["49 rows"], 0.99, rel_tol=0.01)
    assert math.isclose(of(9).rate, of(50).rate * math.sqrt(9 / 50), rel_tol=0.03)
    assert of(50).rate_factors == {}


def test_an_epoch_ends_where_every_row_has_been_seen():
    steps = schedule(batch_tokens=10_000)
    seen = 0
    for step in range(3 * steps.steps_per_epoch):
        seen += len(steps.rows(step))
        assert steps.ends_epoch(step) == (seen % 300 == 0)


def test_a_run_by_the_clock_takes_the_steps_of_warm_up_that_are_asked_for():
    """Without a number the rate rises in 3 % of the minutes, and a config.yaml that repeats the run has none."""
    named = schedule(max_minutes=10, warmup_steps=4, learning_rate=1e-3, schedule="constant")
    assert [named.rate_at(step, 300.0) for step in range(5)] == [1.25e-4, 3.75e-4, 6.25e-4, 8.75e-4, 1e-3]
    assert schedule(max_minutes=10, warmup_steps=0, learning_rate=1e-3).rate_at(0, 0.0) == 1e-3
    usual = schedule(max_minutes=10, learning_rate=1e-3)
    assert math.isclose(usual.rate_at(0, 9.0), 5e-4)
    assert (named.resolved_warmup, usual.resolved_warmup, schedule(warmup_steps=4).resolved_warmup) == (4, None, 4)
