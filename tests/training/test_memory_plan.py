"""How a step is run: the fastest way that fits the memory allowed."""

import pytest

from thimble.config.train import TrainConfig
from thimble.errors import DoesNotFitError
from thimble.events import EventLog
from thimble.models.execution import ExecutionPlan
from thimble.training.memory_plan import execution_plans
from thimble.training.plan import plan_run

BLOCKS = 16


def plans(stores=("file",), step_tokens=2048, longest=300):
    return execution_plans(step_tokens, longest, stores, BLOCKS)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr("thimble.backends.torch.threads.num_cores", lambda: 2)


def test_the_first_plan_is_the_fastest():
    assert plans(("dense", "file"))[0] == ExecutionPlan("dense", 2, 1024, 2048)
    assert plans(step_tokens=400)[0] == ExecutionPlan("file", 1, 400, 400)


def test_a_step_is_not_cut_without_need():
    lengths = ((step, longest) for step in range(40, 1024, 5) for longest in range(20, step, 7))
    cut = [pair for pair in lengths if plans(step_tokens=pair[0], longest=pair[1])[0].micro_tokens != pair[0]]
    assert cut == []


def test_no_micro_batch_is_shorter_than_the_longest_row():
    assert min(execution.micro_tokens for execution in plans(longest=700)) == 700


def test_only_weights_of_a_file_are_streamed():
    assert {execution.store for execution in plans(("dense", "file")) if execution.is_streamed} == {"file"}


def test_less_memory_makes_for_slower_plans_down_to_streaming(examples, tiny_base):
    def decided(budget):
        config = TrainConfig.build({"data": str(examples), "base": tiny_base, "memory_budget": budget})
        return plan_run(config, EventLog(lambda event: None), needs_folder=False)

    found = [decided("8GB")]

    def descend():
        while True:
            found.append(decided(str(found[-1].memory.total - 1)))

    with pytest.raises(DoesNotFitError, match="allow at least 0.[0-9]+GB"):
        descend()
    relative_cost = [each.execution.relative_cost(4, 2) for each in found]
    assert len(found) > 1
    assert relative_cost == sorted(relative_cost)
    assert all(later.memory.total < each.memory.total for each, later in zip(found, found[1:], strict=False))
