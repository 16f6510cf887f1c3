"""The plan's laws: what costs more is said to cost more; the measured peak is compared in test_plan_memory.py."""

from dataclasses import replace
from pathlib import Path

import pytest

from thimble.core.sizes import logit_chunk, padded, windows
from thimble.models.base import open_base
from thimble.models.cost import MemoryInputs, StepWork, estimate_memory, estimate_seconds, lowest_block
from thimble.models.execution import ExecutionPlan
from thimble.models.machine import Machine

BASE = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"
MACHINE = Machine("a processor", 2, {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}, 1e10, 0.0)


@pytest.fixture
def base():
    return open_base(BASE)


def memory(base, execution, compute="bf16", trained=1000, longest=64, lowest=0):
    return estimate_memory(base, MemoryInputs(compute, trained, longest, lowest), execution).total


def test_each_way_to_save_memory_saves_memory(base):
    most = ExecutionPlan("dense", 2, 512, 1024)
    layers = base.spec.num_layers
    assert memory(base, replace(most, checkpointed_blocks=layers)) < memory(base, most)
    assert memory(base, replace(most, num_shares=1, tokens_at_once=512)) < memory(base, most)
    assert memory(base, most, lowest=layers - 1) < memory(base, most)
    assert memory(base, most, compute="bf16") < memory(base, most, compute="fp32")
    assert memory(base, most, trained=1000) < memory(base, most, trained=2000)


def test_the_delta_form_and_what_an_init_is_made_of_take_memory(base):
    execution = ExecutionPlan("dense", 2, 512, 1024)
    plain = MemoryInputs("bf16", 1000, 64)
    for needy in (replace(plain, is_delta=True), replace(plain, longest=4096), replace(plain, needs=("gradients",))):
        assert estimate_memory(base, needy, execution).total > estimate_memory(base, plain, execution).total


def test_answers_that_are_kept_take_memory_and_time(base):
    small, plain = ExecutionPlan("dense", 1, 64, 64), MemoryInputs("bf16", 1000, 64)
    found = estimate_memory(base, plain, small)
    longer = estimate_memory(base, replace(plain, kl_pass_tokens=256), small)
    assert longer.activations == estimate_memory(base, plain, ExecutionPlan("dense", 1, 256, 256)).activations
    tables = longer.scratch - found.scratch
    assert 3 * 4 * base.spec.vocab_size <= tables <= 1.2 * 64_000_000, "logits of some places of two models, compared"
    assert longer.activations > found.activations, "a pass of more tokens than a micro-batch has"
    kept = estimate_memory(base, replace(plain, kl_places=1000), small)
    assert kept.total - found.total == 1000 * base.spec.hidden_size * 2
    work = StepWork(1024, 512, 256, 1000)
    seconds = [estimate_seconds(base, "bf16", replace(work, kl_tokens=n), small, MACHINE) for n in (0, 64, 128)]
    assert seconds[0] < seconds[1] < seconds[2]


def test_each_way_to_save_memory_is_slower_by_the_order_of_execution_plans():
    fast = ExecutionPlan("dense", 2, 1024, 2048)
    for slow in (replace(fast, checkpointed_blocks=4), replace(fast, num_shares=1), replace(fast, micro_tokens=512),
                 replace(fast, is_streamed=True)):  # fmt: skip
        assert slow.relative_cost(8, 2) > fast.relative_cost(8, 2)


def test_time_grows_with_work_and_falls_with_the_rate(base):
    execution, work = ExecutionPlan("dense", 2, 512, 1024), StepWork(1024, 512, 256, 1000)
    seconds = estimate_seconds(base, "bf16", work, execution, MACHINE)
    layers = base.spec.num_layers
    assert estimate_seconds(base, "fp32", work, execution, MACHINE) > seconds
    assert estimate_seconds(base, "bf16", replace(work, tokens=2048), execution, MACHINE) > seconds
    assert estimate_seconds(base, "bf16", replace(work, target_tokens=1024), execution, MACHINE) > seconds
    assert estimate_seconds(base, "bf16", work, replace(execution, checkpointed_blocks=layers), MACHINE) > seconds
    upper = replace(work, lowest=layers - 1)
    assert estimate_seconds(base, "bf16", upper, execution, MACHINE) < seconds
    above = estimate_seconds(base, "bf16", replace(upper, epochs=3.0), execution, MACHINE)
    assert above < estimate_seconds(base, "bf16", upper, execution, MACHINE)


def test_a_second_copy_of_the_weights_in_int8_is_counted(base):
    """A byte for each number and a scale for each row, but for a store that keeps them so."""
    shapes = base.spec.linear_shapes().values()
    copy = sum(rows * (cols + 4) for rows, cols in shapes)
    for store, expected in (("dense", copy), ("file", copy), ("int8", 0)):
        plan = ExecutionPlan(store, 1, 512, 512)
        bf16, rounded = (estimate_memory(base, MemoryInputs(it, 1000, 64), plan) for it in ("bf16", "bf16-int8"))
        assert rounded.weights - bf16.weights == expected
        assert rounded.scratch > bf16.scratch


def test_products_in_int8_are_counted_at_their_rates(base):
    work = StepWork(1024, 512, 256, 1000)

    def seconds(compute, store):
        return estimate_seconds(base, compute, work, ExecutionPlan(store, 2, 512, 1024), MACHINE)

    assert seconds("int8", "int8") < seconds("bf16-int8", "dense") < seconds("bf16", "dense")
    assert seconds("bf16-int8", "file") < seconds("bf16", "file"), "gradients need no decoding"
    assert seconds("int8", "file") < seconds("fp32", "file"), "nor does a forward pass over blocks"
    assert seconds("int8", "file") > seconds("bf16", "file"), "its results and its gradients are fp32"


def test_the_lowest_adapted_block():
    assert lowest_block(["model.layers.7.mlp.up_proj", "model.layers.12.mlp.up_proj"]) == 7


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (256, 64), (300, 64), (49152, 576), (128256, 4096), (2048, 8192)])
def test_windows_cover_all_rows_once(rows, cols):
    found = windows(rows, cols)
    assert [row for window in found for row in range(window.start, window.stop)] == list(range(rows))


def test_sizes_are_padded_to_a_few():
    assert [padded(n) for n in (1, 8, 9, 64, 65, 1000)] == [8, 8, 16, 64, 128, 1024]
    assert logit_chunk(0, 98304) == 8
    assert logit_chunk(2048, 98304) * 98304 <= 1.2 * 64_000_000
