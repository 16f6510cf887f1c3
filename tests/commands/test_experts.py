"""Commands on a base whose experts are parameters: trained beside its layers, asked, and what is refused."""

import json

import peft
import pytest
import torch
import transformers

from other_families import folder_of
from thimble import cli
from thimble.files.peft import load_adapter
from thimble.models.transformers_spec import describe

EXPERTS = "experts.gate_up_proj,experts.down_proj"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on a tiny Qwen2-MoE; gives its folder and its data."""
    folder = tmp_path_factory.mktemp("experts")
    data = folder / "mine.jsonl"
    rows = ({"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(24))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", data, "--base", folder_of("qwen2_moe"), "--max-steps", "6", "--out", folder / "run"]
    words += ["--rank", "4", "--targets", "q_proj", "--target-parameters", EXPERTS]
    words += ["--rank-pattern", "experts.down_proj=2"]
    assert cli.main([*map(str, words), "--eval-rows", "0"]) == 0
    return folder


def test_a_run_learns_and_its_adapter_has_the_losses_of_peft(run):
    report = json.loads((run / "run" / "report.json").read_text())
    assert report["loss_after"] < report["loss_base"]
    assert any("--target-parameters experts.gate_up_proj,experts.down_proj" in n for n in report["messages"]["note"])
    layers = load_adapter(run / "run").layers
    kinds = {path.rpartition(".")[2]: (factors.layout.experts, factors.rank) for path, factors in layers.items()}
    assert kinds == {"q_proj": (0, 4), "gate_up_proj": (4, 16), "down_proj": (4, 8)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of("qwen2_moe"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        bare = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, run / "run" / "adapter").eval()
        found = adapted(ids).logits
    assert (found - bare).abs().max() > 1e-3
    for name in ("gate_up_proj", "down_proj"):
        wrapper = next(m for m in adapted.modules() if getattr(m, "parameter_name", "") == name)
        assert wrapper.get_delta_weight("default").abs().max() > 1e-4


def test_its_adapter_is_measured_as_when_it_was_trained(run, thimble):
    code, out, _ = thimble("evaluate", run / "mine.jsonl", "--adapter", run / "run", "--eval-rows", "0", "--json")
    assert code == 0
    base, adapted = json.loads(out)["results"]
    assert adapted["loss"] < base["loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-parameters", "experts.dwn_proj"], "did you mean experts.down_proj? the base has experts.gate_up"),
        (["--target-parameters", EXPERTS, "--use-dora"], f"--use-dora: not with --target-parameters {EXPERTS}"),
        (["--target-parameters", EXPERTS, "--dropout", "0.1"], "--dropout 0.1: not with --target-parameters"),
        (["--target-parameters", EXPERTS, "--init", "pissa"], "--init pissa: not with --target-parameters"),
        (["--target-parameters", EXPERTS, "--rank", "auto"], "--rank auto: not with --target-parameters"),
    ],
)
def test_what_experts_cannot_have_is_refused_by_name(run, thimble, words, message):
    code, _, err = thimble("plan", run / "mine.jsonl", "--base", folder_of("qwen2_moe"), *words)
    assert code == 2
    assert message in err


def test_a_gate_of_one_output_has_the_rank_that_it_can_have(run, thimble, tmp_path):
    base, gate = folder_of("qwen2_moe"), "mlp.shared_expert_gate"
    words = ["--base", base, "--rank", "4", "--eval-rows", "0", "--max-steps", "2"]
    code, _, err = thimble("train", run / "mine.jsonl", *words, "--out", tmp_path / "run")
    assert code == 0, err
    assert f"rank: 4 is more than some layers can have, which get less: model.layers.0.{gate} 1" in err
    layers = load_adapter(tmp_path / "run").layers
    found = {path.rpartition(".")[2]: (factors.rank, factors.scale) for path, factors in layers.items()}
    assert found.pop("shared_expert_gate") == (1, found["q_proj"][1])
    assert {rank for rank, _ in found.values()} == {4}
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    opened = peft.PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    assert opened.get_submodule(f"base_model.model.model.layers.0.{gate}").scaling["default"] == found["q_proj"][1]
    code, _, err = thimble("plan", run / "mine.jsonl", *words, "--rank-pattern", "shared_expert_gate=2")
    assert code == 2
    assert "--rank 2: expected at most 1 for model.layers.0.mlp.shared_expert_gate" in err


def test_a_base_of_our_own_engine_has_no_such_parameters(run, thimble, tiny_base):
    code, _, err = thimble("plan", run / "mine.jsonl", "--base", tiny_base, "--target-parameters", "experts.down_proj")
    assert code == 2
    assert "the base has none but the weights of its layers" in err


def test_merge_and_export_say_how_to_merge_them(run, thimble):
    for words in (["merge"], ["export"], ["export", "--to", "peft"]):
        code, _, err = thimble(*words, run / "run", "--out", "merged")
        assert code == 2
        assert "thimble.merge(model)" in err
        assert "thimble merge" not in err


def test_a_row_of_numbers_with_three_axes_is_no_experts(tmp_path):
    transformers.RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2).save_pretrained(tmp_path)
    spec = describe(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert spec.parameter_shapes() == {}
    assert not [note for note in spec.notes if "three dimensions" in note]
