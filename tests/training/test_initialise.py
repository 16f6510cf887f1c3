"""Every init, from the option to an adapter that PEFT loads; what is refused; runs that begin with one."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import thimble
from families import hf_model, make_hf_folder
from samples import IDS, Trainer, count, loss_curves, make_adapter, make_batch, make_rows
from thimble.backends.torch.session import TorchSession
from thimble.config.train import TrainConfig
from thimble.core.lowrank import delta
from thimble.core.method import INITS, method_rates, parse_init
from thimble.errors import ConfigError, InputError
from thimble.events import EventLog, ignore
from thimble.exports.gguf_adapter import write_gguf_adapter
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan
from thimble.training.calibration import CalibrationData
from thimble.training.initialise import check_init, initialise
from thimble.training.memory_plan import rate_layers

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gguf"
OF_A_FLOAT_BASE = [name for name in INITS if name not in ("loftq", "adapter")]


def checked(base, store="dense", **options):
    """The options, and what `check_init` says of the layers' sizes."""
    config = TrainConfig.build({"data": "x", "rank": 4, "alpha": 8, "store": store, **options})
    assert not config.problems
    model, layers = SimpleNamespace(base=base), list(base.spec.linear_shapes())
    return config, check_init(parse_init(config.init), config, model, layers, Path("nowhere"))


def initialised(base, session, config, sizes):
    rows, log = make_rows(), EventLog(ignore)
    data = CalibrationData.of_steps(
        rows[:4], lambda step: [step % 4], 2, general_rows=rows[4:], execution=ExecutionPlan("dense", micro_tokens=512),
        shapes=base.spec.linear_shapes(), seed=config.seed,
    )  # fmt: skip
    return initialise(parse_init(config.init), config, sizes, data, session, log), log


def started(base, store="dense", **options):
    config, sizes = checked(base, store, **options)
    session = TorchSession(base, "fp32", store)
    begun, log = initialised(base, session, config, sizes)
    return begun, session, log


def peft_logits(folder):
    from peft import PeftModel

    with torch.no_grad():
        model = PeftModel.from_pretrained(hf_model("llama"), folder)
        return model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()


# ---- every init -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("init", OF_A_FLOAT_BASE)
def test_an_init_leaves_the_base_alone_and_ends_as_an_adapter_of_peft(init, use_dora, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    begun, session, _ = started(base, init=init, use_dora=use_dora)
    bare = session.logits(IDS)
    trainer = Trainer(session, begun.adapter)
    at_start = trainer.logits(IDS)
    if INITS[init].changes_base:
        assert np.abs(at_start - bare).max() > 1e-3
    else:
        np.testing.assert_allclose(at_start, bare, atol=1e-4)
    np.testing.assert_array_equal(session.logits(IDS), bare)
    for _ in range(3):
        batch = make_batch()
        trainer.step(batch, 1e-3, count(batch))
    save_adapter(trainer.adapter, tmp_path / "adapter")
    ours = trainer.logits(IDS)
    assert np.abs(ours - at_start).max() > 1e-3
    np.testing.assert_allclose(peft_logits(tmp_path / "adapter"), ours, atol=1e-4)


def test_loftq_brings_an_int8_store_nearer_to_the_file(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    begun, session, _ = started(base, store="int8", init="loftq")
    path = "model.layers.1.mlp.up_proj"
    lost = base.weights[f"{path}.weight"].read() - session.kept_weight(path)
    left = lost - delta(begun.adapter.layers[path])
    values = np.linalg.svd(lost, compute_uv=False)
    assert np.linalg.norm(left) == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-3)


def test_a_warm_start_goes_on_where_the_adapter_ended(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    adapter = make_adapter(base)
    save_adapter(adapter, tmp_path / "first")
    begun, session, _ = started(base, init=f"adapter:{tmp_path / 'first'}")
    expected = session.logits(IDS, session.load(adapter))
    np.testing.assert_array_equal(session.logits(IDS, session.load(begun.adapter)), expected)


def test_a_gguf_adapter_to_begin_with_is_refused_with_the_way_to_a_folder(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    write_gguf_adapter(make_adapter(base), base, tmp_path / "x.gguf")
    with pytest.raises(InputError, match="--init adapter:.*x.gguf: .* this is a GGUF file; .* --to peft --out folder"):
        started(base, init=f"adapter:{tmp_path / 'x.gguf'}")


# ---- as PEFT has them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "theirs"), [("pissa:exact", "pissa"), ("olora", "olora")])
def test_twenty_steps_follow_those_of_peft_which_takes_the_piece_out_of_the_weight(init, theirs, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    begun, session, _ = started(base, init=init)
    bare = session.logits(IDS)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=theirs, task_type="CAUSAL_LM")
    model = get_peft_model(hf_model("llama"), config)
    with torch.no_grad():
        found = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(found, bare, atol=1e-4)
    ours, expected = loss_curves(Trainer(session, begun.adapter), model, 20, 1e-3)
    assert ours[0] - ours[-1] > 0.2
    np.testing.assert_allclose(ours, expected, atol=1e-3)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(base, **options):
    with pytest.raises(InputError) as caught:
        checked(base, **options)
    return str(caught.value)


def test_ranks_and_inits_that_cannot_be_are_refused_with_the_layer_named(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    assert "expected at most" in refused(base, rank=500)
    assert "model.layers.0" in refused(base, rank=500)
    assert "takes 2 directions for each rank" in refused(base, rank=20, init="gradient:lora-ga")
    assert "expected a multiple of 2" in refused(base, rank=3, init="orthogonal")
    assert "does not quantise: add --store int8" in refused(base, init="loftq")
    assert "rank 1 for every layer" in refused(base, rank="auto", rank_budget=10)
    assert "rank_pattern names 'qproj'" in refused(base, rank_pattern="qproj=4")
    assert "did you mean last-1?" not in refused(base, rank_pattern="last_1=4")
    both = refused(base, rank=31, init="orthogonal", rank_pattern="k_proj=999")
    assert "expected at most" in both
    assert "expected a multiple of 2" in both
    assert "expected a multiple of 2" in refused(base, rank=3, init="orthogonal", rank_pattern="qproj=4")


def test_loftq_on_a_quantised_base_is_refused():
    base = open_base(FIXTURES / "llama_q8_0.gguf")
    assert "is quantised already (Q8_0): take the folder of float weights" in refused(base, init="loftq", store="int8")


@pytest.mark.parametrize(("value", "said"), [(0.0, "holds only zeros"), (np.nan, "holds NaN or Inf")])
def test_weights_that_cannot_be_decomposed_are_refused_before_anything_is_written(value, said, tmp_path, monkeypatch):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    path = "model.layers.1.mlp.up_proj"
    broken = np.full((32, 32), value, np.float32)
    config, sizes = checked(base, init="pissa")
    session = TorchSession(base)
    monkeypatch.setattr(session, "file_weight", lambda name: broken if name == path else np.ones((32, 32), np.float32))
    with pytest.raises(InputError, match=f"{path} {said}: init pissa decomposes it"):
        initialised(base, session, config, sizes)


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"init": "eva"}, {"rank": "auto"}], ids=str)
def test_a_session_that_cannot_calibrate_is_refused_by_name_for_what_needs_it(options, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    config, sizes = checked(base, **options)
    with pytest.raises(
        ConfigError, match=rf"--{'init ' + options['init'] if 'init' in options else 'rank auto'}: this"
    ):
        initialised(base, SimpleNamespace(capabilities=frozenset()), config, sizes)


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_an_orthogonal_init_is_exactly_at_the_base(compute, tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    config, sizes = checked(base, init="orthogonal", alpha=64)
    session = TorchSession(base, compute, "dense")
    begun, _ = initialised(base, session, config, sizes)
    np.testing.assert_array_equal(Trainer(session, begun.adapter).logits(IDS), session.logits(IDS))


def test_the_default_rate_counts_the_rank_of_each_layer(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    for options in ({"rank": 16}, {"rank": "auto"}, {"rank_pattern": "q_proj=16"}):
        config, sizes = checked(base, use_rslora=True, **options)
        layers = rate_layers(config, sizes, base.spec)
        expected = np.mean([math.sqrt(16 if config.rank is None else size.rank) for size in sizes.values()])
        factors = method_rates(parse_init("kaiming"), False, 1.0, layers, use_rslora=True)
        assert factors["rsLoRA"] == pytest.approx(1 / expected)


def test_a_session_that_cannot_calibrate_begins_with_a_random_init(tmp_path):
    base = open_base(make_hf_folder("llama", tmp_path / "base"))
    begun, _ = initialised(base, SimpleNamespace(capabilities=frozenset()), *checked(base, init="orthogonal"))
    assert begun.adapter.layers.keys() == base.spec.linear_shapes().keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": "pisa"}, "did you mean pissa?"),
        ({"energy": 1.5, "rank": "auto"}, "expected a share above 0 and up to 1"),
        ({"energy": 0.0, "rank": "auto"}, "expected a share above 0 and up to 1"),
        ({"energy": 0.9}, "--energy 0.9: only with --rank auto, not 16"),
        ({"rank": 0}, "expected at least 1"),
        ({"rank": "auto", "energy": 0.9, "rank_budget": 1000}, "--rank-budget 1000 --energy 0.9: give one of them"),
        ({"rank": "auto", "rank_pattern": "q_proj=4"}, "--rank-pattern q_proj=4: not with --rank auto"),
        ({"rank_pattern": "q_proj"}, "expected pairs such as q_proj=8"),
        ({"rank_pattern": "q_proj=2.5"}, "expected whole numbers as ranks"),
        ({"keep_general": 1.0}, "up to, but not including, 1"),
        ({"dropout": 1.0}, "up to, but not including, 1"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, said):
    problems = TrainConfig.build({"data": "x", **options}).problems
    assert any(said in problem for problem in problems), problems


# ---- runs -----------------------------------------------------------------------------------------------------------

QUICK = {"seq_len": 64, "batch_tokens": 64, "max_steps": 6, "max_new_tokens": 4, "compute": "fp32", "rank": 4}


@pytest.mark.parametrize("init", ["pissa", "eva", "gradient", "corda"])
def test_a_run_from_a_computed_init_can_be_resumed_and_ends_the_same(init, examples, tiny_base, tmp_path):
    def train(name, **options):
        return thimble.train(examples, base=tiny_base, out=str(tmp_path / name), init=init, **{**QUICK, **options})

    first = train("uninterrupted")
    assert first.loss_before == pytest.approx(first.loss_base, abs=1e-4)
    taken = []
    train(
        "broken", checkpoint_every_steps=2, on_event=lambda e: taken.append(e) if e.kind == "step" else None,
        should_stop=lambda: len(taken) >= 3,
    )  # fmt: skip
    report = thimble.train(out=str(tmp_path / "broken"), resume=True)
    assert report.status == "done"
    first, second = (load_adapter(tmp_path / name) for name in ("uninterrupted", "broken"))
    assert first.layers.keys() == second.layers.keys()
    for path, factors in first.layers.items():
        np.testing.assert_array_equal(factors.A, second.layers[path].A)
        np.testing.assert_array_equal(factors.B, second.layers[path].B)
    is_delta = parse_init(report.config["init"]).is_delta
    assert {factors.rank for factors in first.layers.values()} == {8 if is_delta else 4}


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


@pytest.mark.parametrize("init", ["eva", "gradient"])
def test_a_run_with_ranks_that_auto_chose_can_be_resumed_and_ends_the_same(init, examples, tiny_base, tmp_path):
    options = {**QUICK, "rank": "auto", "init": init}
    thimble.train(examples, base=tiny_base, out=str(tmp_path / "uninterrupted"), **options)
    interrupt(examples, tiny_base, tmp_path / "run", **options)
    report = thimble.train(
        examples, base=tiny_base, out=str(tmp_path / "run"), resume=True, checkpoint_every_steps=2, **options
    )
    assert report.status == "done"
    one, two = (load_adapter(tmp_path / name).layers for name in ("uninterrupted", "run"))
    assert len({factors.rank for factors in one.values()}) > 1
    for path, factors in one.items():
        np.testing.assert_array_equal(factors.A, two[path].A)
        np.testing.assert_array_equal(factors.B, two[path].B)


def test_a_run_with_ranks_that_auto_chose_is_repeated_by_its_config(examples, tiny_base, tmp_path):
    thimble.train(examples, base=tiny_base, out=str(tmp_path / "one"), **{**QUICK, "rank": "auto", "init": "gradient"})
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
    report = thimble.train(examples, base=tiny_base, out=str(tmp_path / "uninterrupted"), **QUICK, **options)
    assert math.isfinite(report.loss_after)
    interrupt(examples, tiny_base, tmp_path / "broken", **options)
    thimble.train(out=str(tmp_path / "broken"), resume=True)
    one, two = (load_adapter(tmp_path / name).layers for name in ("uninterrupted", "broken"))
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
            **{**QUICK, "max_steps": 25}, keep_general_on="general", keep_general_every_steps=1,
        )  # fmt: skip
        moved[keep] = report.general_after - report.general_before
        assert report.loss_after < report.loss_before
    assert moved[0.9] < 0.5 * moved[0.0]
