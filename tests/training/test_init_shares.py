"""What share of the gradient each init captures, against the dense gradient."""

import numpy as np
import pytest

from thimble.config.inspect_ import InspectConfig
from thimble.core.method import parse_init
from thimble.errors import InputError
from thimble.events import EventLog, ignore
from thimble.models.base import open_base
from thimble.training.init_shares import measure_init_shares, plan_measurement


def test_a_share_is_that_of_all_of_the_gradient(examples, tiny_base):
    run_plan = plan_measurement(InspectConfig(data=str(examples), base=tiny_base), EventLog(ignore))
    rows = measure_init_shares(run_plan, EventLog(ignore))
    shapes = open_base(tiny_base).spec.linear_shapes()
    assert [row.layer for row in rows] == list(shapes)
    for row in rows:
        assert row.energy > 0
        assert row.rank == parse_init("kaiming").allowed_rank(16, shapes[row.layer])
        assert 0 < row.kaiming < row.gradient <= 1 + 1e-5
        assert 0 < row.eva <= 1 + 1e-5
    assert np.mean([row.kaiming for row in rows]) < 0.8 * np.mean([row.eva for row in rows])


def test_what_is_read_is_reported_and_what_training_would_decide_is_not(examples, tiny_base):
    log = EventLog(ignore)
    plan_measurement(InspectConfig(data=str(examples), base=tiny_base), log)
    assert any(text.startswith("data: ") for text in log.messages["note"])
    assert log.messages["decision"] == []


def test_everything_that_is_wrong_is_reported_at_once(examples, tiny_base):
    config = InspectConfig.build({
        "data": "nowhere.jsonl", "base": tiny_base, "path": tiny_base, "blocks": "0", "out": "figures", "seed": -1,
    })  # fmt: skip
    with pytest.raises(InputError) as caught:
        plan_measurement(config, EventLog(ignore))
    for part in (
        "is given with --data",
        "--blocks and --out cannot be used with --data",
        "nowhere.jsonl",
        "--seed -1",
    ):
        assert part in str(caught.value)
