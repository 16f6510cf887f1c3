"""Commands on a base of a family that Thimble's own engine lacks: trained, asked, merged, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers

from other_families import folder_of
from thimble import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on a tiny GPT-2; gives its folder, its data and what was printed."""
    folder = tmp_path_factory.mktemp("other")
    data = folder / "mine.jsonl"
    rows = ({"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", data, "--base", folder_of("gpt2"), "--rank", "4", "--max-steps", "8", "--out", folder / "run"]
    assert cli.main([*map(str, words), "--eval-rows", "2", "--max-new-tokens", "4"]) == 0
    return folder


def test_a_run_learns_and_its_adapter_has_the_logits_of_peft(run):
    peft = pytest.importorskip("peft")
    report = json.loads((run / "run" / "report.json").read_text())
    assert report["loss_after"] < report["loss_base"]
    told = "gpt2, no family of Thimble's own engine: it runs through transformers, slower and in more memory; "
    assert any(told in text for text in report["messages"]["note"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        bare = model(ids).logits
        found = peft.PeftModel.from_pretrained(model, run / "run" / "adapter").eval()(ids).logits
    assert (found - bare).abs().max() > 1e-3


def test_its_adapter_is_measured_and_written_with(run, thimble):
    code, out, _ = thimble("evaluate", run / "mine.jsonl", "--adapter", run / "run", "--eval-rows", "2", "--json",
                           "--max-new-tokens", "4")  # fmt: skip
    assert code == 0
    base, adapted = json.loads(out)["results"]
    assert adapted["loss"] < base["loss"]
    code, out, _ = thimble("generate", run / "mine.jsonl", "--adapter", run / "run", "--out", "answers.jsonl",
                           "--max-new-tokens", "3", "--json")  # fmt: skip
    assert (code, json.loads(out)["answered"]) == (0, 40)


def test_decoding_in_int8_is_refused_where_there_are_no_blocks(run, thimble):
    code, _, told = thimble(
        "generate", run / "mine.jsonl", "--adapter", run / "run", "--out", "x.jsonl", "--decode", "int8"
    )
    assert code == 2
    assert "--decode int8: gpt2 is a gpt2, which runs through transformers" in told


def test_a_merged_folder_has_the_logits_of_base_and_adapter(run, thimble, tmp_path):
    peft = pytest.importorskip("peft")
    code, *_ = thimble("merge", run / "run", "--out", "merged")
    assert code == 0
    ids = torch.arange(5, 25)[None]
    adapted = transformers.AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    adapted = peft.PeftModel.from_pretrained(adapted, run / "run" / "adapter").eval()
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
        np.testing.assert_allclose(found, adapted(ids).logits, atol=1e-4)


def test_a_base_and_its_adapter_are_inspected(run, thimble):
    assert thimble("inspect", folder_of("gpt2"), "--json")[0] == 0
    code, out, _ = thimble("inspect", run / "run", "--json")
    assert (code, len(json.loads(out)["updates"])) == (0, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--adapter", "{run}"], "thimble serve: base gpt2 is a gpt2, no family of Thimble's own engine"),
        (["export", "{run}", "--out", "a.gguf"], "thimble export --to gguf: base gpt2 is a gpt2"),
        (["plan", "{data}", "--base", "{base}", "--init", "eva"], "--init eva: gpt2, which runs through transformers"),
        (["plan", "{data}", "--base", "{base}", "--rank", "auto"], "--rank auto: gpt2, which runs through"),
        (["plan", "{data}", "--base", "{base}", "--store", "int8"], "--store int8: gpt2 is a gpt2"),
        (["plan", "{data}", "--base", "{base}", "--compute", "int8"], "--compute int8: gpt2 is a gpt2, which runs"),
        (["plan", "{data}", "--base", "{base}", "--targets", "q_proj"], "the base has c_attn, c_proj, c_fc"),
    ],
)
def test_what_only_our_own_engine_does_is_refused_by_name(run, thimble, words, message):
    places = {"run": run / "run", "data": run / "mine.jsonl", "base": folder_of("gpt2")}
    code, out, err = thimble(*(word.format(**places) for word in words))
    assert code == 2
    assert message in out + err


def test_without_transformers_a_command_ends_with_two_and_names_the_package(run, thimble, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    code, out, err = thimble("plan", run / "mine.jsonl", "--base", folder_of("gpt2"))
    assert code == 2
    assert "runs through transformers, which is not installed" in out + err
