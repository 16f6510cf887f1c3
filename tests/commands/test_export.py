"""`thimble export`: the file, its proof, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import transformers
from huggingface_hub import ModelCard

import thimble
from families import make_hf_folder
from fixtures.tiny_tokenizers import write_tokenizer
from samples import make_adapter
from stress.foreign_files import CONFIGS, write_base
from thimble.commands import export as command
from thimble.commands import export_model
from thimble.core.adapter import Adapter
from thimble.errors import InputError, RunError
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from thimble.models.base import open_base
from thimble.training import run_folder

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"


@pytest.fixture
def adapter(tmp_path):
    save_adapter(make_adapter(open_base(GGUF)), tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"Number {number}?", "completion": f"It is {number} today."} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def test_an_adapter_is_written_proved_and_can_be_used(adapter, data, tmp_path):
    out = tmp_path / "my adapter.gguf"
    report = thimble.export(adapter=adapter, base=str(GGUF), data=data, out=str(out))
    assert report.proof["holds"]
    assert report.proof["rows"] == 3
    assert json.loads((tmp_path / "my adapter.gguf.proof.json").read_text()) == report.proof
    found = thimble.evaluate(data=data, base=str(GGUF), adapter=[adapter, str(out)], compute="fp32", metric="none")
    base, ours, exported = (result.loss for result in found.results)
    assert ours != base
    assert exported == ours
    again = thimble.export(adapter=adapter, base=str(GGUF), data=data, out=str(out), verify_only=True)
    assert again.proof["holds"]
    back = thimble.export(adapter=str(out), base=str(GGUF), to="peft", out=str(tmp_path / "back"))
    assert (back.proof, back.layers) == (None, 14)
    for path, factors in load_adapter(adapter).layers.items():
        assert (load_adapter(tmp_path / "back").layers[path].B == factors.B).all()
    card = ModelCard((tmp_path / "back" / "README.md").read_text())
    assert (card.data.library_name, "my adapter.gguf" in card.text) == ("peft", True)


def test_there_and_back_as_a_folder_for_peft_no_tensor_changes(adapter, tmp_path):
    for source, name in ((adapter, "one"), (str(tmp_path / "one"), "two")):
        thimble.export(adapter=source, base=str(GGUF), to="peft", out=str(tmp_path / name))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "two" / name).read_bytes() == Path(adapter, name).read_bytes()
    save_as_peft(adapter, tmp_path / "three")
    ours, theirs = load_adapter(adapter), load_adapter(tmp_path / "three")
    for path, factors in ours.layers.items():
        assert (theirs.layers[path].A == factors.A).all()
        assert (theirs.layers[path].B == factors.B).all()
        assert theirs.layers[path].scale == factors.scale


def save_as_peft(adapter, folder):
    """Load an adapter into PEFT and have it saved from there."""
    config = transformers.AutoConfig.from_pretrained(make_hf_folder("llama", folder.parent / "hf"))
    spec = open_base(GGUF).spec
    for name, value in (("num_hidden_layers", spec.num_layers), ("hidden_size", spec.hidden_size),
                        ("intermediate_size", spec.intermediate_size), ("num_attention_heads", spec.num_heads),
                        ("num_key_value_heads", spec.num_kv_heads), ("head_dim", spec.head_dim)):  # fmt: skip
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    peft.PeftModel.from_pretrained(model, adapter).save_pretrained(folder)


def test_what_is_not_the_same_gets_no_name(adapter, data, tmp_path, monkeypatch):
    write = command.write_gguf_adapter

    def wrong(adapter, base, path):
        write(make_adapter(base, b_size=0.3), base, path)

    monkeypatch.setattr(command, "write_gguf_adapter", wrong)
    with pytest.raises(RunError, match="does not do in llama.cpp what .* does here"):
        thimble.export(adapter=adapter, base=str(GGUF), data=data, out=str(tmp_path / "x.gguf"))
    assert not [path.name for path in tmp_path.iterdir() if "x.gguf" in path.name]


def test_an_interrupted_export_leaves_nothing(adapter, data, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "prove_adapter", stopped)
    with pytest.raises(KeyboardInterrupt):
        thimble.export(adapter=adapter, base=str(GGUF), data=data, out=str(tmp_path / "x.gguf"))
    assert not [path.name for path in tmp_path.iterdir() if "x.gguf" in path.name]


def test_without_the_runtime_the_file_is_written_and_the_way_told(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "is_installed", lambda: False)
    report = thimble.export(adapter=adapter, base=str(GGUF), out=str(tmp_path / "x.gguf"))
    assert report.proof is None
    assert any("not proved in llama.cpp, which is not installed" in text for text in report.messages["warning"])
    for options in ({"proof": "always", "out": "y.gguf"}, {"verify_only": True, "out": "x.gguf"}):
        with pytest.raises(InputError, match="not proved in llama.cpp"):
            thimble.export(adapter=adapter, base=str(GGUF), **{**options, "out": str(tmp_path / options["out"])})
    assert not (tmp_path / "y.gguf").exists()


def test_every_command_takes_the_gguf_adapter_and_does_what_it_does_with_the_folder(adapter, data, tmp_path):
    file = str(tmp_path / "x.gguf")
    thimble.export(adapter=adapter, base=str(GGUF), data=data, out=file, proof="never")
    looked = [thimble.inspect(path, base=str(GGUF)) for path in (adapter, file)]
    assert [report.subject for report in looked] == ["adapter", "adapter"]
    assert looked[0].overall == looked[1].overall
    assert thimble.inspect(adapter, file, base=str(GGUF)).overall["cosine"] == pytest.approx(1)
    answers = []
    for number, path in enumerate((adapter, file)):
        out = tmp_path / f"answers {number}.jsonl"
        how = {"temperature": 0, "max_new_tokens": 8, "compute": "fp32"}
        thimble.generate(data=data, base=str(GGUF), adapter=path, out=str(out), **how)
        answers.append(out.read_text())
        talk = thimble.chat(base=str(GGUF), adapter=path, **how)
        answers[-1] += talk.ask("Number 3?")
    assert answers[0] == answers[1]
    small = thimble.merge(file, base=str(GGUF), rank=1, out=str(tmp_path / "small"))
    assert small.kinds[-1].rank_after == [1, 1]
    for wrong in ({"base": file}, {"base": str(GGUF), "adapter": [str(GGUF)]}):
        with pytest.raises(InputError, match="is an adapter, not a base|is a base and no adapter: name it with --base"):
            thimble.chat(**wrong)
    for command_ in (thimble.chat, thimble.generate):
        with pytest.raises(InputError, match="only makes sense beside its base: name it with --base"):
            command_(**({"data": data, "out": "x.jsonl"} if command_ is thimble.generate else {}), adapter=file)
    with pytest.raises(InputError, match="only makes sense beside its base"):
        thimble.inspect(file)


def test_dora_is_refused_or_approximated_with_what_that_costs(tmp_path, data):
    base = open_base(GGUF)
    layers = {}
    for path, factors in make_adapter(base).layers.items():
        lengths = 1.1 * np.linalg.norm(base.weights[f"{path}.weight"].read(), axis=1)
        layers[path] = replace(factors, magnitude=lengths.astype("f4"))
    save_adapter(Adapter(layers), tmp_path / "dora")
    given = {"adapter": str(tmp_path / "dora"), "base": str(GGUF), "data": data}
    with pytest.raises(InputError, match="is DoRA .* or approximate it by a plain adapter with --approximate-rank"):
        thimble.export(**given, out=str(tmp_path / "x.gguf"))
    report = thimble.export(**given, out=str(tmp_path / "x.gguf"), approximate_rank=8)
    assert report.proof["holds"]
    assert "DoRA: approximated by plain LoRA of rank 8, which leaves out" in report.messages["warning"][0]
    thimble.export(**given, out=str(tmp_path / "plain"), approximate_rank=1000, to="peft")
    found = thimble.evaluate(data=data, base=str(GGUF), adapter=[given["adapter"], str(tmp_path / "plain")],
                             compute="fp32", metric="none")  # fmt: skip
    base_loss, dora, plain = (result.loss for result in found.results)
    assert plain == pytest.approx(dora, abs=1e-4)
    assert abs(dora - base_loss) > 1e-3


def test_plain_lora_is_not_approximated(adapter, tmp_path):
    with pytest.raises(InputError, match="--approximate-rank is for DoRA, and .* is plain LoRA"):
        thimble.export(adapter=adapter, base=str(GGUF), out=str(tmp_path / "x.gguf"), approximate_rank=4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": ""}, "no adapter is given"),
        ({"out": ""}, "no out is given: name what to write, such as --out adapter.gguf"),
        ({"out": "."}, "exists: name another file"),
        ({"out": "new/"}, "--out .*/new/ is a folder: name a file in it, such as .*/new/adapter.gguf"),
        ({"out": "nowhere/x.gguf"}, "there is no folder"),
        ({"verify_only": True}, "is no file: with --verify-only name"),
        ({"to": "peft", "verify_only": True}, "--to peft has no proof, .* leave out --verify-only"),
        ({"to": "peft", "proof": "always"}, "--to peft has no proof, .* leave out --proof always"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_is_refused(options, said, adapter, tmp_path):
    given = {"adapter": adapter, "base": str(GGUF), "out": "x.gguf", **options}
    if given["out"]:
        given["out"] = f"{tmp_path}/{given['out']}"
    with pytest.raises(InputError, match=said):
        thimble.export(**given)


def test_a_proof_that_is_asked_for_is_not_left_out_for_want_of_a_gguf_file(tmp_path):
    write_tokenizer("llama-bpe", write_base(tmp_path / "base", CONFIGS[0]))
    base = open_base(tmp_path / "base")
    save_adapter(make_adapter(base), tmp_path / "mine")
    given = {"adapter": str(tmp_path / "mine"), "base": str(base.path)}
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for options in ({"proof": "always", "out": "y.gguf"}, {"verify_only": True, "out": "x.gguf"}):
        with pytest.raises(InputError, match="is a folder, and llama.cpp reads GGUF files: name one"):
            thimble.export(**given, **{**options, "out": str(tmp_path / options["out"])})
    assert not (tmp_path / "y.gguf").exists()


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with tokenizer and template, and an adapter for it."""
    base = make_hf_folder("smollm2", tmp_path / "base")
    save_adapter(make_adapter(open_base(base)), tmp_path / "of folder")
    return {"base": str(base), "adapter": str(tmp_path / "of folder")}


def left_of(tmp_path):
    return [path.name for path in tmp_path.iterdir() if "x.gguf" in path.name]


def test_a_folder_with_an_adapter_becomes_a_model_for_llama_cpp_and_back(folder, data, tmp_path):
    out = tmp_path / "x.gguf"
    report = thimble.export(**folder, data=data, merged=True, type="F32", out=str(out))
    assert report.proof["holds"]
    assert (report.type, report.layers, report.proof["rows"]) == ("F32", 14, 3)
    assert report.weights["worst_update"] == pytest.approx(1, abs=1e-5)
    assert report.proof["different_texts"] == []
    text = Path(report.modelfile).read_text()
    assert text.startswith("# Untested")
    assert "\nFROM ./x.gguf\n" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "<|im_start|>{{ .Role }}" in text
    found = thimble.evaluate(data=data, base=str(out), compute="fp32", metric="none").results[0].loss
    merged = thimble.evaluate(data=data, **{**folder, "adapter": [folder["adapter"]]}, compute="fp32", metric="none")
    assert found == pytest.approx(merged.results[1].loss, rel=1e-5)
    again = thimble.export(**folder, data=data, merged=True, type="F32", out=str(out), verify_only=True)
    assert again.proof["holds"]
    assert json.loads((tmp_path / "x.gguf.proof.json").read_text()) == again.proof


def test_a_gguf_base_takes_a_merge_with_importance_in_another_type(data, tmp_path):
    out, base = tmp_path / "x.gguf", GGUF.with_name("llama.gguf")  # whose rows are whole blocks
    save_adapter(make_adapter(open_base(base)), tmp_path / "mine")
    given = {"adapter": str(tmp_path / "mine"), "base": str(base), "data": data, "merged": True, "proof": "never"}
    thimble.export(**given, type="Q4_0", imatrix=True, out=str(out))
    thimble.export(**given, type="q4_0", out=str(tmp_path / "plain.gguf"))  # letters as llama.cpp takes them
    assert out.read_bytes() != (tmp_path / "plain.gguf").read_bytes()
    found = open_base(out)
    assert set(found.dtypes()) == {"Q4_0", "Q8_0", "F32"}
    assert found.metadata["tokenizer.chat_template"] == open_base(base).metadata["tokenizer.chat_template"]


def test_what_rounding_takes_is_told_and_the_file_is_written(data, tmp_path):
    base = tmp_path / "base.gguf"
    thimble.export(base=str(GGUF.with_name("llama.gguf")), merged=True, type="Q4_1", out=str(base), proof="never")
    save_adapter(make_adapter(open_base(base), b_size=2e-4), tmp_path / "mine")
    given = {"adapter": str(tmp_path / "mine"), "base": str(base), "data": data, "merged": True}
    report = thimble.export(**given, type="Q4_1", out=str(tmp_path / "x.gguf"))
    assert report.weights["kept_update"] < 0.5
    assert report.proof["holds"]
    assert report.proof["kept_update"] == report.weights["kept_update"]
    assert report.proof["divergence"] >= 0
    (told,) = (text for text in report.messages["warning"] if "what the adapter does" in text)
    assert f"{report.weights['kept_update']:.2f} of its update is in the weights" in told
    assert "the adapter beside the base loses nothing" in told
    assert f"thimble export {tmp_path / 'mine'} --base {base} --out adapter.gguf" in told
    assert "--type Q8_0 next to nothing" in told
    assert any("less than the runtime's own noise" in text for text in report.messages["warning"])
    assert thimble.export(**given, type="Q4_1", out=str(tmp_path / "x.gguf"), verify_only=True).proof["holds"]
    better = thimble.export(**given, type="F16", out=str(tmp_path / "better.gguf"), proof="never")
    assert better.weights["kept_update"] > report.weights["kept_update"]


def test_a_file_that_was_weighed_by_importance_is_proved_again(data, tmp_path):
    base = GGUF.with_name("llama.gguf")
    save_adapter(make_adapter(open_base(base)), tmp_path / "mine")
    given = {"adapter": str(tmp_path / "mine"), "base": str(base), "data": data, "merged": True, "type": "Q4_0",
             "out": str(tmp_path / "x.gguf")}  # fmt: skip
    thimble.export(**given, imatrix=True)
    assert open_base(tmp_path / "x.gguf").metadata["quantize.imatrix.entries_count"] == 14
    assert thimble.export(**given, verify_only=True).proof["holds"]


def test_a_base_without_an_adapter_is_written_too(data, tmp_path):
    report = thimble.export(base=str(GGUF), data=data, merged=True, type="BF16", out=str(tmp_path / "x.gguf"))
    assert (report.layers, report.proof["effect"], report.proof["holds"]) == (0, 0.0, True)


def test_a_wrong_model_gets_no_name(folder, data, tmp_path, monkeypatch):
    plan = export_model.plan_tensors

    def wrong(base, updates, *others):
        return plan(base, dict(list(updates.items())[1:]), *others)

    monkeypatch.setattr(export_model, "plan_tensors", wrong)
    with pytest.raises(RunError, match=r"does not hold what it should: .*0.00 of the update of .* is in the file"):
        thimble.export(**folder, data=data, merged=True, type="Q8_0", out=str(tmp_path / "x.gguf"))
    assert left_of(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
def test_a_model_that_is_interrupted_or_finds_no_room_leaves_nothing(error, folder, data, tmp_path, monkeypatch):
    def stopped(done, total):
        raise error

    monkeypatch.setattr(export_model, "partial", lambda *_: stopped)
    with pytest.raises(type(error)):
        thimble.export(**folder, data=data, merged=True, type="Q8_0", out=str(tmp_path / "x.gguf"))
    assert left_of(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="has 0 MB free"):
        thimble.export(**folder, merged=True, type="F32", out=str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merged": True}, "--merged needs a type: add --type with one of F32, F16"),
        ({"merged": True, "type": "Q4_X"}, "type Q4_X is not known: expected one of F32, F16"),
        ({"type": "Q4_0"}, "--type is for whole models: add --merged"),
        ({"imatrix": True}, "--imatrix is for whole models: add --merged"),
        ({"merged": True, "type": "F32", "to": "peft"}, "is what thimble merge writes"),
        ({"merged": True, "type": "F32", "imatrix": True, "proof": "never"}, "--imatrix needs examples"),
        ({"merged": True, "type": "F32", "adapter": "", "base": None}, "no adapter is given"),
    ],
    ids=str,
)
def test_what_a_whole_model_cannot_be_is_refused(options, said, adapter, tmp_path):
    given = {"adapter": adapter, "base": str(GGUF), "out": str(tmp_path / "x.gguf"), **options}
    with pytest.raises(InputError, match=said):
        thimble.export(**given)
    assert left_of(tmp_path) == []
