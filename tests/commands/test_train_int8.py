"""Training with products in int8: what was chosen is told, stored and resumed, and what cannot be is refused."""

from pathlib import Path

import pytest

import thimble
from thimble.backends.torch import compute
from thimble.errors import InputError
from thimble.models.machine import Machine

BLOCKS = str(Path(__file__).parents[1] / "fixtures" / "gguf" / "llama_q8_0.gguf")
QUICK = {
    "rank": 4,
    "seq_len": 64,
    "batch_tokens": 128,
    "eval_rows": 0,
    "valid_split": 0.25,
    "checkpoint_every_steps": 2,
}


VNNI = {"fp32": 1e11, "bf16": 2e11, "int8": 4e11}


def on_machine(monkeypatch, **flops):
    """Plan as on a processor of such rates."""
    monkeypatch.setattr(compute, "machine", lambda is_fresh=False: Machine("a processor", 1, flops, 1e10, 0.0))


@pytest.fixture
def train(examples, tmp_path):
    return lambda name, **options: thimble.train(examples, out=str(tmp_path / name), **QUICK, **options)


def bytes_of(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "stored", "unrounded"),
    [
        ({"base": BLOCKS, "compute": "int8", "store": "file"}, ("int8", "file"), "fp32"),
        ({"base": BLOCKS, "compute": "bf16-int8"}, ("bf16-int8", "file"), "bf16"),
    ],
    ids=["blocks", "gradients"],
)
def test_a_run_in_int8_is_told_stored_and_resumed_to_the_same_adapter(
    options, stored, unrounded, train, tmp_path, monkeypatch
):
    on_machine(monkeypatch, **VNNI)
    whole = train("whole", max_steps=4, **options)
    assert any(text.startswith(f"compute: {stored[0]} was asked for") for text in whole.messages["decision"])
    assert (whole.config["compute"], whole.config["store"]) == stored
    taken = []
    train(
        "broken", max_steps=4, on_event=lambda event: taken.append(event) if event.kind == "step" else None,
        should_stop=lambda: len(taken) >= 2, **options,
    )  # fmt: skip
    again = thimble.train(out=str(tmp_path / "broken"), resume=True)
    assert (again.config["compute"], again.config["store"]) == stored
    assert bytes_of(tmp_path / "broken") == bytes_of(tmp_path / "whole")
    plain = train("plain", max_steps=4, **{**options, "compute": unrounded})
    assert bytes_of(tmp_path / "plain") != bytes_of(tmp_path / "whole"), "something was rounded"
    assert whole.loss_after == pytest.approx(plain.loss_after, rel=0.005)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compute": "bf16-int8"}, "compute is bf16-int8: this processor has no instructions for products of int8"),
        ({"compute": "int8"}, "the weights of smollm2.gguf are F32, no blocks that this processor multiplies"),
        ({"compute": "int8", "store": "dense"}, "--compute int8: not with store dense, which keeps the weights as"),
    ],
)
def test_what_int8_cannot_run_on_is_refused_before_anything_is_written(
    options, said, train, tiny_base, tmp_path, monkeypatch
):
    on_machine(monkeypatch, fp32=1e11, bf16=2e11)
    with pytest.raises(InputError, match=said):
        train("run", base=tiny_base, **options)
    assert not (tmp_path / "run").exists()


def test_a_run_on_int8_rows_goes_on_where_they_cannot_be_multiplied_as_its_refusal_says(train, tmp_path, monkeypatch):
    taken = []
    train(
        "run", base=BLOCKS, max_steps=4, compute="fp32", store="int8", should_stop=lambda: len(taken) >= 2,
        on_event=lambda event: taken.append(event) if event.kind == "step" else None,
    )  # fmt: skip
    config = tmp_path / "run" / "config.yaml"  # as where the processor has VNNI
    config.write_text(config.read_text().replace("compute: fp32", "compute: int8"))
    on_machine(monkeypatch, fp32=1e11, bf16=2e11)
    with pytest.raises(InputError, match="use --compute fp32, which decodes the rows, or, in a new run, --store file"):
        thimble.train(out=str(tmp_path / "run"), resume=True)
    again = thimble.train(out=str(tmp_path / "run"), resume=True, compute="fp32")
    assert (again.steps, again.config["compute"], again.config["store"]) == (4, "fp32", "int8")


def test_a_run_on_dense_weights_that_is_resumed_in_int8_blames_what_was_typed(train, tiny_base, tmp_path):
    train("run", base=tiny_base, max_steps=2, compute="fp32", store="dense", should_stop=lambda: True)
    with pytest.raises(InputError) as refused:
        thimble.train(out=str(tmp_path / "run"), resume=True, compute="int8")
    assert [problem.partition(":")[0] for problem in refused.value.problems] == ["--compute int8"]


def test_a_plan_offers_the_types_in_int8_that_can_run(examples, monkeypatch):
    on_machine(monkeypatch, fp32=1e11)
    found = {it.change: it for it in thimble.plan(examples, base=BLOCKS, **QUICK).alternatives}
    assert "--compute bf16-int8" not in found
    on_machine(monkeypatch, **VNNI)
    report = thimble.plan(examples, base=BLOCKS, **QUICK)
    both = {it.change: it for it in report.alternatives}
    assert both["--compute int8"].seconds_per_step < both["--compute bf16-int8"].seconds_per_step
    assert both["--compute bf16-int8"].seconds_per_step < report.seconds_per_step
