"""Every start, from the option to an adapter that PEFT loads; what is refused; ranks by evidence."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import thimble
from families import hf_model, make_hf_folder
from samples import IDS, RANDOM, loss_curves, make_adapter, make_batch
from thimble.backends.torch.session import TorchSession
from thimble.config.train import TrainConfig
from thimble.core.lowrank import delta
from thimble.core.method import INITS, init_name
from thimble.core.targets import share_out, size_layers
from thimble.data.encode import Row
from thimble.errors import InputError
from thimble.events import EventLog, ignore
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan
from thimble.training.initialise import check_start, make_start

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gguf"
LOOKING = [name for name, init in INITS.items() if name not in ("loftq", "adapter")]


def make_rows(count=6):
    rows = []
    for number in range(count):
        ids = RANDOM.integers(3, 290, 24).astype(np.int32)
        rows.append(Row(ids, np.append(ids[1:], -100).astype(np.int32), f"row {number}", 1))
    return rows


def make_job(base, store="dense", **options):
    config = TrainConfig.build({"data": "x", "rank": 4, "alpha": 8, "store": store, **options})
    assert not config.problems
    model, layers = SimpleNamespace(base=base), list(base.spec.linear_shapes())
    rows = make_rows()
    return SimpleNamespace(
        config=config, model=model, layers=layers, execution=ExecutionPlan(store),
        sizes=check_start(config, model, layers, Path("nowhere")),
        general=tuple(rows[4:]),
        examples=SimpleNamespace(train=rows[:4], valid=rows[4:]), seconds_per_step=1.0,
        step_schedule=SimpleNamespace(rows=lambda step: [step % 4], total_steps=100, minutes=None),
    )  # fmt: skip


def started(base, store="dense", **options):
    run_plan, told = make_job(base, store, **options), EventLog(ignore)
    session = TorchSession(base, "fp32", run_plan.execution.store)
    return make_start(run_plan, session, told), session, told


def steps_of(session, count):
    losses = []
    for _ in range(count):
        batch = make_batch()
        gradients = session.gradients([[batch]], int((batch.labels >= 0).sum()))
        session.apply(gradients, 1e-3, 1.0)
        losses.append(gradients.loss.mean)
    return losses


def peft_logits(folder):
    from peft import PeftModel

    with torch.no_grad():
        model = PeftModel.from_pretrained(hf_model("llama"), folder)
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()


# ---- every start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("init", LOOKING)
def test_a_start_leaves_the_base_alone_and_ends_as_an_adapter_of_peft(init, use_dora, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    start, session, _ = started(base, init=init, use_dora=use_dora)
    bare = session.logits(IDS)
    session.train(start.adapter)
    at_start = session.logits(IDS)
    if INITS[init].changes_base:
        assert np.abs(at_start - bare).max() > 1e-3
    else:
        np.testing.assert_allclose(at_start, bare, atol=1e-4)
    session.switch(False)
    np.testing.assert_array_equal(session.logits(IDS), bare)
    session.switch(True)
    steps_of(session, 3)
    save_adapter(session.adapter(), tmp_path / "adapter")
    ours = session.logits(IDS)
    assert np.abs(ours - at_start).max() > 1e-3
    np.testing.assert_allclose(peft_logits(tmp_path / "adapter"), ours, atol=1e-4)


def test_loftq_brings_an_int8_store_nearer_to_the_file(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    start, session, _ = started(base, store="int8", init="loftq")
    path = "model.layers.1.mlp.up_proj"
    lost = base.weights[f"{path}.weight"].read() - session.kept_weight(path)
    left = lost - delta(start.adapter.layers[path])
    values = np.linalg.svd(lost, compute_uv=False)
    assert np.linalg.norm(left) == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-3)


def test_a_warm_start_goes_on_where_the_adapter_ended(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    adapter = make_adapter(base)
    save_adapter(adapter, tmp_path / "first")
    start, session, _ = started(base, init=f"adapter:{tmp_path / 'first'}")
    session.attach(adapter)
    expected = session.logits(IDS)
    session.train(start.adapter)
    np.testing.assert_array_equal(session.logits(IDS), expected)


# ---- as PEFT has them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "theirs"), [("pissa:exact", "pissa"), ("olora", "olora")])
def test_twenty_steps_follow_those_of_peft_which_takes_the_piece_out_of_the_weight(init, theirs, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    start, session, _ = started(base, init=init)
    bare = session.logits(IDS)
    session.train(start.adapter)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=theirs, task_type="CAUSAL_LM")
    model = get_peft_model(hf_model("llama"), config)
    with torch.no_grad():
        found = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(found, bare, atol=1e-4)
    ours, expected = loss_curves(session, model, 20, 1e-3)
    assert ours[0] - ours[-1] > 0.2
    np.testing.assert_allclose(ours, expected, atol=1e-3)


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_are_shared_out_to_the_directions_with_most_energy_for_their_cost():
    ranks = share_out({"a": [9.0, 8.0, 1.0], "b": [4.0, 1.0, 1.0], "c": [7.0, 6.0]}, {"a": 10, "b": 10, "c": 20}, 60)
    assert ranks == {"a": 2, "b": 2, "c": 1}
    uneven = share_out({"a": [5.0, 1.0, 4.0, 3.0], "b": [0.5, 0.1, 0.05, 0.01]}, {"a": 1, "b": 1}, 6)
    assert uneven == {"a": 4, "b": 2}  # a direction of little energy is taken for the sake of the next one
    assert share_out({"a": [1.0], "b": [9.0, 9.0]}, {"a": 5, "b": 5}, 10) == {"a": 1, "b": 1}


def test_rank_auto_keeps_to_its_budget_and_one_scale(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    budget = 3 * sum(sum(shape) for shape in base.spec.linear_shapes().values())
    start, _, told = started(base, rank="auto", rank_budget=budget)
    ranks = {path: factors.rank for path, factors in start.adapter.layers.items()}
    assert 0.9 * budget < start.adapter.num_parameters <= budget
    assert len(set(ranks.values())) > 1
    assert {factors.scale for factors in start.adapter.layers.values()} == {8 / 16}
    assert any("by gradients" in text for text in told.messages["decision"])
    again = size_layers(list(ranks), start.config.rank, start.config.alpha, *patterns(start.config))
    assert {path: size.rank for path, size in again.items()} == ranks
    assert {round(size.scale, 6) for size in again.values()} == {0.5}


def patterns(config):
    from thimble.config.values import read_pattern

    return read_pattern(config.rank_pattern), read_pattern(config.alpha_pattern)


@pytest.mark.parametrize("init", ["orthogonal", "gradient:lora-ga"])
def test_rank_auto_gives_ranks_that_the_start_can_have(init, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    start, _, _ = started(base, rank="auto", init=init, energy=0.99)
    for path, factors in start.adapter.layers.items():
        assert (
            factors.rank % 2 == 0 if init == "orthogonal" else 2 * factors.rank <= min(base.spec.linear_shapes()[path])
        )


@pytest.mark.parametrize("energy_of", ["gradients", "activations", "weights"])
def test_ranks_by_energy_grow_with_the_share_asked_for(energy_of, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    sizes = []
    for energy in (0.3, 0.6, 0.95):
        start, _, told = started(base, rank="auto", energy=energy, energy_of=energy_of)
        sizes.append(start.adapter.num_parameters)
    assert sizes == sorted(set(sizes))
    assert any("says how well it can be truncated" in text for text in told.messages["warning"]) == (
        energy_of == "weights"
    )


def test_the_rank_for_an_energy_of_weights_is_the_one_of_their_singular_values(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    start, _, _ = started(base, rank="auto", energy=0.5, energy_of="weights")
    for path, factors in start.adapter.layers.items():
        values = np.linalg.svd(base.weights[f"{path}.weight"].read().astype(np.float64), compute_uv=False) ** 2
        assert factors.rank == np.searchsorted(np.cumsum(values), 0.5 * values.sum()) + 1


# ---- init auto ------------------------------------------------------------------------------------------------------


def test_auto_says_what_each_start_captures_and_takes_the_best(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    start, _, told = started(base, init="auto")
    captured = start.numbers["captured"]
    assert set(captured) == {"kaiming", "eva", "gradient"}
    assert 0 < captured["kaiming"] < captured["gradient"] <= 1
    best = max(("kaiming", "eva", "gradient"), key=captured.get)
    expected = best if captured[best] >= 5 * captured["kaiming"] else "kaiming"
    assert start.config.init == expected
    assert any("looks at" in text and "of the run" in text for text in told.messages["decision"])
    json.dumps(start.numbers)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(base, **options):
    with pytest.raises(InputError) as caught:
        make_job(base, **options)
    return str(caught.value)


def test_ranks_and_starts_that_cannot_be_are_refused_with_the_layer_named(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    assert "expected at most" in refused(base, rank=500)
    assert "model.layers.0" in refused(base, rank=500)
    assert "halved for gradient:lora-ga" in refused(base, rank=20, init="gradient:lora-ga")
    assert "expected even ranks" in refused(base, rank=3, init="orthogonal")
    assert "does not quantise: add --store int8" in refused(base, init="loftq")
    assert "rank 1 for every layer" in refused(base, rank="auto", rank_budget=10)
    assert "rank_pattern names 'qproj'" in refused(base, rank_pattern="qproj=4")
    assert "did you mean last-1?" not in refused(base, rank_pattern="last_1=4")
    both = refused(base, rank=31, init="orthogonal", rank_pattern="k_proj=999")
    assert "expected at most" in both
    assert "expected even ranks" in both
    assert "expected even ranks" in refused(base, rank=3, init="orthogonal", rank_pattern="qproj=4")


def test_loftq_on_a_quantised_base_is_refused():
    base = open_base(FIXTURES / "llama_q8_0.gguf")
    assert "is quantised already (Q8_0): take the folder of float weights" in refused(base, init="loftq", store="int8")


@pytest.mark.parametrize(("value", "said"), [(0.0, "holds only zeros"), (np.nan, "numbers that are NaN or Inf")])
def test_weights_that_cannot_be_decomposed_are_refused_before_anything_is_written(value, said, tmp_path, monkeypatch):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    path = "model.layers.1.mlp.up_proj"
    broken = np.full((32, 32), value, np.float32)
    run_plan = make_job(base, init="pissa")
    session = TorchSession(base, "fp32", run_plan.execution.store)
    monkeypatch.setattr(session, "file_weight", lambda name: broken if name == path else np.ones((32, 32), np.float32))
    with pytest.raises(InputError, match=f"{path} .*{said}|{path} {said}"):
        make_start(run_plan, session, EventLog(ignore))


# ---- whole runs -----------------------------------------------------------------------------------------------------

QUICK = {"seq_len": 64, "batch_tokens": 64, "max_steps": 6, "max_new_tokens": 4, "compute": "fp32", "rank": 4}


@pytest.mark.parametrize("init", ["pissa", "eva", "gradient", "corda", "auto"])
def test_a_run_from_a_computed_start_can_be_resumed_and_ends_the_same(init, examples, tiny_base, tmp_path):
    def train(name, **options):
        return thimble.train(examples, base=tiny_base, out=str(tmp_path / name), init=init, **{**QUICK, **options})

    whole = train("whole")
    assert whole.loss_before == pytest.approx(whole.loss_base, abs=1e-4)
    taken = []
    train(
        "broken", checkpoint_every_steps=2, on_event=lambda e: taken.append(e) if e.kind == "step" else None,
        should_stop=lambda: len(taken) >= 3,
    )  # fmt: skip
    report = thimble.train(out=str(tmp_path / "broken"), resume=True)
    assert report.status == "done"
    first, second = (load_adapter(tmp_path / name) for name in ("whole", "broken"))
    assert first.layers.keys() == second.layers.keys()
    for path, factors in first.layers.items():
        np.testing.assert_array_equal(factors.A, second.layers[path].A)
        np.testing.assert_array_equal(factors.B, second.layers[path].B)
    is_delta = INITS[init_name(report.config["init"])].is_delta
    assert {factors.rank for factors in first.layers.values()} == {8 if is_delta else 4} or init == "auto"


def interrupt(examples, base, out, **options):
    taken = []
    thimble.train(
        examples, base=base, out=str(out), checkpoint_every_steps=2, **{**QUICK, **options},
        on_event=lambda e: taken.append(e) if e.kind == "step" else None, should_stop=lambda: len(taken) >= 3,
    )  # fmt: skip


def test_a_run_cannot_be_resumed_as_another(examples, tiny_base, tmp_path):
    interrupt(examples, tiny_base, tmp_path / "run", init="pissa")
    with pytest.raises(InputError, match="--init kaiming: the run to resume began with pissa"):
        thimble.train(examples, base=tiny_base, out=str(tmp_path / "run"), resume=True, init="kaiming", **QUICK)


@pytest.mark.parametrize("options", [{"init": "auto", "max_steps": 60}, {"rank": "auto", "init": "eva"}], ids=str)
def test_what_auto_chose_stays_when_the_same_command_resumes(options, examples, tiny_base, tmp_path):
    given = {**QUICK, **options}
    interrupt(examples, tiny_base, tmp_path / "run", **options)
    report = thimble.train(
        examples, base=tiny_base, out=str(tmp_path / "run"), resume=True, checkpoint_every_steps=2, **given
    )
    assert report.status == "done"
    ranks = {path: factors.rank for path, factors in load_adapter(tmp_path / "run" / "start").layers.items()}
    assert {path: factors.rank for path, factors in load_adapter(tmp_path / "run").layers.items()} == ranks


@pytest.mark.parametrize("options", [{"rank": "auto", "init": "gradient"}, {"init": "auto", "max_steps": 60}], ids=str)
def test_a_run_that_auto_decided_is_repeated_by_its_config(options, examples, tiny_base, tmp_path):
    thimble.train(examples, base=tiny_base, out=str(tmp_path / "one"), **{**QUICK, **options})
    thimble.train(None, config=str(tmp_path / "one" / "config.yaml"), out=str(tmp_path / "two"))
    one, two = (load_adapter(tmp_path / name).layers for name in ("one", "two"))
    for path, factors in one.items():
        np.testing.assert_array_equal(factors.A, two[path].A)
        np.testing.assert_array_equal(factors.B, two[path].B)


def test_a_warm_start_is_resumed_without_the_adapter_it_came_from(examples, tiny_base, tmp_path):
    thimble.train(examples, base=tiny_base, out=str(tmp_path / "first"), **QUICK)
    options = {name: value for name, value in QUICK.items() if name != "rank"}
    interrupt(examples, tiny_base, tmp_path / "run", init=f"adapter:{tmp_path / 'first'}", **options)
    (tmp_path / "first" / "adapter").rename(tmp_path / "gone")
    assert thimble.train(out=str(tmp_path / "run"), resume=True).status == "done"


def test_every_variation_trains_with_shares_side_by_side_and_resumes(examples, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("thimble.training.memory_plan.SHARE_TOKENS", 16)
    options = {
        "dropout": 0.2,
        "use_dora": True,
        "lora_plus": 4.0,
        "keep_general": 0.3,
        "weight_decay": 0.1,
        "init": "pissa",
    }
    whole = thimble.train(examples, base=tiny_base, out=str(tmp_path / "whole"), **QUICK, **options)
    assert math.isfinite(whole.loss_after)
    interrupt(examples, tiny_base, tmp_path / "broken", **options)
    thimble.train(out=str(tmp_path / "broken"), resume=True)
    one, two = (load_adapter(tmp_path / name).layers for name in ("whole", "broken"))
    for path, factors in one.items():
        np.testing.assert_array_equal(factors.B, two[path].B)
        np.testing.assert_array_equal(factors.magnitude, two[path].magnitude)


def test_the_plan_counts_the_most_that_rank_auto_may_take(examples, tiny_base):
    def planned(**options):
        return thimble.plan(examples, base=tiny_base, seq_len=64, **options).adapter_parameters

    assert planned(rank="auto") == planned(rank=16)
    assert planned(rank="auto", rank_budget=3 * planned(rank=1)) == planned(rank=3)
    assert planned(rank="auto", energy=0.9) > planned(rank=16)


def test_keeping_general_answers_forgets_less(examples, tiny_base, tmp_path):
    moved = {}
    for keep in (0.0, 0.9):
        report = thimble.train(
            examples, base=tiny_base, out=str(tmp_path / str(keep)), keep_general=keep, learning_rate=0.01,
            **{**QUICK, "max_steps": 25},
        )  # fmt: skip
        moved[keep] = report.general_after - report.general_before
        assert report.loss_after < report.loss_before
    assert moved[0.9] < 0.5 * moved[0.0]
