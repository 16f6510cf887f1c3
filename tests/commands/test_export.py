"""`thimble export`: the file, its proof, and what is refused."""

import json
from pathlib import Path

import pytest

import thimble
from fixtures.tiny_tokenizers import write_tokenizer
from samples import make_adapter
from stress.foreign_files import CONFIGS, write_base
from thimble.commands import export as command
from thimble.errors import InputError, RunError
from thimble.files.peft import load_adapter, save_adapter
from thimble.models.base import open_base

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

    monkeypatch.setattr(command, "prove", stopped)
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter": ""}, "no adapter is given"),
        ({"out": ""}, "no out is given: name what to write, such as --out adapter.gguf"),
        ({"out": "."}, "exists: name another file"),
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
        given["out"] = str(tmp_path / given["out"])
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
