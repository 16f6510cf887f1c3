"""The adapter file: PEFT's layout, byte-stable, all or nothing."""

import json

import numpy as np
import pytest
import safetensors.numpy

from thimble.core.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, find_adapter, load_adapter, save_adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError

RANDOM = np.random.default_rng(0)


def make_adapter(ranks=(4, 4, 4, 4), scales=(2.0, 2.0, 2.0, 2.0)):
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in ("q_proj", "v_proj")]
    layers = {
        name: Factors(RANDOM.standard_normal((r, 8)).astype("f4"), RANDOM.standard_normal((6, r)).astype("f4"), s)
        for name, r, s in zip(names, ranks, scales, strict=True)
    }
    return Adapter(layers, "some/base", {"made_by": "test"})


def test_loading_what_was_saved_gives_the_same_adapter_and_the_same_bytes_again(tmp_path):
    adapter = make_adapter()
    save_adapter(adapter, tmp_path / "one")
    again = load_adapter(tmp_path / "one")
    save_adapter(again, tmp_path / "two")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for layer, factors in adapter.layers.items():
        np.testing.assert_array_equal(again.layers[layer].A, factors.A)
        np.testing.assert_array_equal(again.layers[layer].B, factors.B)
        assert again.layers[layer].scale == factors.scale


def test_layers_that_differ_are_told_in_patterns(tmp_path):
    adapter = make_adapter(ranks=(4, 4, 4, 2), scales=(2.0, 2.0, 1.0, 4.0))
    save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["r"] == 4
    assert config["rank_pattern"] == {"model.layers.1.self_attn.v_proj": 2}
    assert config["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 4.0}
    assert [f.scale for f in load_adapter(tmp_path).layers.values()] == [2.0, 2.0, 1.0, 4.0]


def test_config_has_exactly_the_fields_that_peft_writes(tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(make_adapter(), tmp_path / "ours")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**settings, inference_mode=True, base_model_name_or_path="some/base")
    config.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / CONFIG_FILE).read_text()) for who in ("ours", "theirs"))
    theirs["target_modules"] = sorted(theirs["target_modules"])
    assert {k: v for k, v in ours.items() if k != "peft_version"} == {
        k: v for k, v in theirs.items() if k != "peft_version"
    }


def test_rslora_gives_the_scale_that_peft_computes(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"use_rslora": True}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert {f.scale for f in load_adapter(tmp_path).layers.values()} == {8 / 4**0.5}


def test_a_run_folder_stands_for_its_adapter(tmp_path):
    save_adapter(make_adapter(), tmp_path / "adapter")
    assert find_adapter(tmp_path) == tmp_path / "adapter"


def test_an_adapter_that_is_not_finite_is_never_written(tmp_path):
    broken = Factors(np.full((1, 2), np.nan, "f4"), np.zeros((2, 1), "f4"), 1.0)
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(Adapter({"model.layers.0.mlp.up_proj": broken}), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r is 0: expected a number from 1"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"peft_type": "LOHA"}, "only LORA adapters are supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": 3}, "alpha_pattern is 3"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(tmp_path, change, message):
    save_adapter(make_adapter(), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | change
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


def test_all_faults_of_the_tensors_are_told_at_once(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS_FILE)
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"]
    tensors[f"{prefix}.1.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 8), "f4")
    tensors["surprise"] = np.zeros(3, "f4")
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    text = str(caught.value)
    assert "surprise" in text
    assert "model.layers.0.self_attn.q_proj has lora_A.weight: expected lora_A.weight, lora_B.weight" in text
    assert "model.layers.1.self_attn.q_proj has A (3, 8) and B (6, 4)" in text


def test_a_folder_without_adapter_says_what_it_holds(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(AdapterError, match="holds adapter_model.bin: expected a folder with adapter_config.json"):
        load_adapter(tmp_path)
