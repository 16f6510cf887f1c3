"""The strength that a trained update is kept with: chosen by rows that judge nothing, stored in alpha, told."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import thimble
from families import hf_model, make_hf_folder
from samples import IDS
from thimble.backends.torch.session import TorchSession
from thimble.core.metrics import LossSum
from thimble.errors import InputError
from thimble.files.peft import load_adapter
from thimble.models.base import open_base
from thimble.training.strength import STRENGTHS, choose_strength, highest_rise
from training.toy import TRUTH, make_task, train

QUICK = {"seq_len": 64, "batch_tokens": 128, "max_new_tokens": 3, "compute": "fp32", "rank": 4, "metric": "none",
         "learning_rate": 0.02, "max_steps": 6}  # fmt: skip


def losses(rises, rows=30, spread=0.02):
    random, base = np.random.default_rng(0), np.random.default_rng(1).uniform(1, 4, rows)
    return {
        strength: [LossSum(20 * loss * (1 + rise + spread * noise), 20) for loss, noise in zip(base, draw, strict=True)]
        for (strength, rise), draw in zip(rises.items(), random.normal(0, 1, (len(rises), rows)), strict=True)
    }


@pytest.mark.parametrize(
    ("rises", "spread", "chosen"),
    [
        ({1.0: 0, 0.9: 0.001, 0.8: 0.002, 0.7: 0.003}, 0.005, 0.7),
        ({1.0: 0, 0.9: 0.001, 0.8: 0.004, 0.7: 0.03}, 0.005, 0.8),
        ({1.0: 0, 0.9: 0.03, 0.8: 0.1, 0.7: 0.3}, 0.005, 1.0),
        ({1.0: 0, 0.9: -0.01, 0.8: -0.02, 0.7: -0.05}, 0.005, 0.7),
        ({1.0: 0, 0.9: 0.001, 0.8: 0.002, 0.7: 0.003}, 0.2, 1.0),
    ],
    ids=["all cost little", "too weak", "each costs", "weaker is better", "too few to be sure"],
)
def test_the_smallest_strength_that_surely_costs_little_is_taken(rises, spread, chosen):
    found, why = choose_strength(losses(rises, spread=spread))
    assert found == chosen
    assert "30 validation rows by under 1%" in why


def test_what_is_not_finite_chooses_nothing():
    found = losses({1.0: 0.0, 0.9: 0.0, 0.8: 0.0, 0.7: 0.0}, spread=0.0)
    assert choose_strength({**found, 0.7: [LossSum(np.nan, 20)] * 30})[0] == 0.8
    assert choose_strength(dict.fromkeys(STRENGTHS, [LossSum(np.nan, 20)] * 30))[0] == 1.0
    assert choose_strength(dict.fromkeys(STRENGTHS, []))[0] == 1.0


def test_a_bound_is_exceeded_in_one_of_twenty_cases():
    seen = []
    for seed in range(1500):
        random = np.random.default_rng(seed)
        base = random.uniform(1, 4, 20)
        full, weak = ([LossSum(float(v), 1) for v in base + random.normal(0, 0.1, 20)] for _ in range(2))
        seen.append(highest_rise(full, weak) < 0)
    assert sum(seen) / 1500 == pytest.approx(0.05, abs=0.015)


def test_a_loop_keeps_the_update_at_the_strength_that_does_as_well():
    """The rows that choose want half of what is learned, so every smaller strength is better for them."""
    task = make_task(truth=TRUTH / 2, valid_rows=24)
    full, *_ = train(task=task, steps=40)
    weak, _, messages = train(task=task, steps=40, plan={"strength": None})
    assert (full.strength, weak.strength) == (1.0, 0.7)
    assert weak.adapter.layers["layer"].scale == pytest.approx(0.7 * full.adapter.layers["layer"].scale)
    assert any(text.startswith("strength: 0.7, the least that raises") for text in messages["decision"])
    same, _, messages = train(steps=40, plan={"strength": None})
    assert same.strength == 1.0
    asked, *_ = train(steps=40, plan={"strength": 0.5})
    assert asked.adapter.layers["layer"].scale == pytest.approx(0.5)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"say {n} ", "completion": f"{n} it is, and a little more of it"} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    "options",
    [{}, {"init": "pissa"}, {"use_rslora": True, "rank_pattern": "q_proj=2", "alpha_pattern": "v_proj=7"}],
    ids=["plain", "delta form", "rsLoRA and patterns"],
)
def test_peft_computes_what_was_measured_at_this_strength(tmp_path, data, options):
    from peft import PeftModel

    folder = make_hf_folder("llama", tmp_path / "base")
    given = {**QUICK, **options, "base": folder, "valid_split": 0.5}
    full = thimble.train(data, out=str(tmp_path / "full"), **given)
    weak = thimble.train(data, out=str(tmp_path / "weak"), strength=0.8, **given)
    assert (full.strength, weak.strength) == (1.0, 0.8)
    session = TorchSession(open_base(folder), "fp32", "dense")
    bare = session.logits(IDS)
    (whole, part), wanted = (load_adapter(tmp_path / name / "adapter") for name in ("full", "weak")), []
    for path, factors in whole.layers.items():
        assert part.layers[path].scale == pytest.approx(0.8 * factors.scale)
    wanted = session.logits(IDS, session.load(whole.at_strength(0.8)))
    with torch.no_grad():
        model = PeftModel.from_pretrained(hf_model("llama"), tmp_path / "weak" / "adapter")
        found = model(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    moved = np.abs(wanted - bare).max()
    assert np.abs(session.logits(IDS, session.load(whole)) - wanted).max() > 0.05 * moved > 1e-3
    assert weak.loss_after != full.loss_after, "what is reported is measured at the strength that is kept"


def test_a_strength_is_chosen_by_rows_that_do_not_judge(tiny_base, tmp_path, data):
    report = thimble.train(data, base=tiny_base, out=str(tmp_path / "run"), strength="auto", valid_split=0.5, **QUICK)
    assert report.untouched_rows == 30
    assert report.strength in STRENGTHS
    assert any(text.startswith(f"strength: {report.strength:g}, the least") for text in report.messages["decision"])
    assert report.validation_rows == 50


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"valid_split": 0.2}, "20 new validation rows are too few to choose another by (at least 40)"),
        ({"use_dora": True}, "DoRA"),
        ({"alpha": 16}, "--alpha was chosen by hand"),
        ({"alpha_pattern": "q_proj=8"}, "--alpha was chosen by hand"),
    ],
)
def test_where_no_strength_can_be_chosen_it_is_one_and_that_is_told(tiny_base, tmp_path, data, options, why):
    given = {**QUICK, "valid_split": 0.5, **options}
    report = thimble.train(data, base=tiny_base, out=str(tmp_path / "run"), strength="auto", **given)
    assert (report.strength, report.untouched_rows) == (1.0, 0)
    assert any(text.startswith("strength: 1, ") and why in text for text in report.messages["decision"])


def test_a_strength_that_cannot_be_is_refused(tiny_base, tmp_path, data):
    for strength, options, why in (
        (0, {}, "--strength"),
        (1.5, {}, "--strength"),
        (0.8, {"use_dora": True}, "--use-dora"),
    ):
        with pytest.raises(InputError, match=why):
            thimble.train(data, base=tiny_base, out=str(tmp_path / "run"), strength=strength, **options, **QUICK)


def test_magnitudes_cannot_be_weakened():
    result, *_ = train(steps=2)
    factors = result.adapter.layers["layer"]
    dora = replace(result.adapter, layers={"layer": replace(factors, magnitude=np.ones(len(factors.B)))})
    assert dora.at_strength(1).has_magnitudes
    with pytest.raises(ValueError, match="DoRA"):
        dora.at_strength(0.9)
