"""Which base an adapter was trained on: written down, found again where it lies now, and never silently another."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from families import make_hf_folder
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError
from thimble.files.peft import load_adapter, save_adapter
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models import adapter_base, hub_cache
from thimble.models.adapter_base import base_notes, base_of, difference, manifest_entry, peft_name
from thimble.models.base import open_base

TINY = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No default base, an empty hub cache, and a working folder that has nothing to do with the runs."""
    (tmp_path / "working folder").mkdir()
    monkeypatch.chdir(tmp_path / "working folder")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("thimble.models.base.DEFAULT_PACKAGE", "no_such_package")


def make_run(folder: Path, base_path: Path, has_manifest: bool = True) -> Path:
    """What a run leaves that tells its base, with an adapter of one layer."""
    base = open_base(base_path)
    fan_out, fan_in = base.spec.linear_shapes()["model.layers.0.self_attn.q_proj"]
    update = Factors(np.ones((2, fan_in), "f4"), np.ones((fan_out, 2), "f4"), 1.0)
    adapter = Adapter({"model.layers.0.self_attn.q_proj": update}, peft_name(base))
    hash_ = base.quick_fingerprint()
    save_adapter(Adapter(adapter.layers, adapter.base, base_notes(hash_)), folder / "adapter")
    if has_manifest:
        entry = {"name": base.name, **manifest_entry(base, folder, hash_)}
        (folder / "manifest.json").write_text(json.dumps({"base": entry}))
    return folder


def found(*runs: Path) -> Path:
    return base_of({str(run): load_adapter(run) for run in runs}).path.resolve()


def move(path: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)
    return target


def changed_copy(source: Path, target: Path) -> Path:
    """The same model with one other weight."""
    content = bytearray(source.read_bytes())
    content[-3] ^= 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


@pytest.fixture(scope="module")
def folder_base(tmp_path_factory) -> Path:
    return make_hf_folder("llama", tmp_path_factory.mktemp("base") / "folder")


@pytest.fixture
def gguf(tmp_path) -> Path:
    (tmp_path / "my models").mkdir()
    return Path(shutil.copy(TINY, tmp_path / "my models" / "a base.gguf"))


def test_a_run_leads_to_its_base(tmp_path, gguf):
    assert found(make_run(tmp_path / "runs" / "1", gguf)) == gguf


@pytest.mark.parametrize("place", ["runs/1", "runs/1/adapter", "runs", "", "working folder"])
def test_a_base_that_was_moved_beside_its_run_is_found_by_its_hash(tmp_path, gguf, place):
    run = make_run(tmp_path / "runs" / "1", gguf)
    there = move(gguf, tmp_path / place / gguf.name)
    assert found(run) == there


def test_a_run_and_its_base_that_moved_together_are_together(tmp_path, gguf):
    make_run(tmp_path / "project" / "runs" / "1", move(gguf, tmp_path / "project" / "models" / gguf.name))
    move(tmp_path / "project", tmp_path / "another machine" / "project")
    there = tmp_path / "another machine" / "project"
    assert found(there / "runs" / "1") == there / "models" / gguf.name


def test_another_file_of_that_name_is_not_taken_for_it(tmp_path, gguf):
    run = make_run(tmp_path / "runs" / "1", gguf)
    changed_copy(gguf, tmp_path / "runs" / "1" / gguf.name)
    gguf.unlink()
    with pytest.raises(AdapterError, match="is not found") as refused:
        found(run)
    assert f"(it was {gguf})" in str(refused.value)
    assert "--base 'a base.gguf'" in str(refused.value)


def test_a_base_that_changed_in_its_place_is_used_and_told(tmp_path, gguf):
    run = make_run(tmp_path / "runs" / "1", gguf)
    changed_copy(gguf, gguf)
    assert found(run) == gguf
    told = difference(str(run), load_adapter(run), open_base(gguf))
    assert told
    assert f"adapter {run} was trained on a base.gguf of other weights (hash " in told


def test_the_one_with_the_right_hash_goes_before_a_changed_one(tmp_path, gguf):
    run = make_run(tmp_path / "runs" / "1", gguf)
    there = Path(shutil.copy(gguf, tmp_path / "runs" / gguf.name))
    changed_copy(gguf, gguf)
    assert found(run) == there


def test_a_renamed_base_is_found_by_its_hash_and_another_one_beside_it_is_not_taken(tmp_path, gguf):
    run = make_run(tmp_path / "runs" / "1", gguf)
    changed_copy(gguf, gguf.with_name("other.gguf"))
    renamed = move(gguf, gguf.with_name("renamed.gguf"))
    assert found(run) == renamed
    renamed.unlink()
    with pytest.raises(AdapterError, match="is not found"):
        found(run)


def test_an_adapter_that_left_its_run_is_led_by_peft_s_field(tmp_path, gguf):
    run = make_run(tmp_path / "runs" / "1", gguf)
    assert found(move(run / "adapter", tmp_path / "elsewhere" / "mine")) == gguf


def test_adapters_of_one_base_agree_and_of_two_are_refused(tmp_path, gguf):
    one, two = (make_run(tmp_path / "runs" / name, gguf) for name in ("one", "two"))
    assert found(one, two) == gguf
    other = make_run(tmp_path / "runs" / "other", changed_copy(gguf, tmp_path / "other.gguf"))
    with pytest.raises(AdapterError, match="trained on different bases") as refused:
        found(one, other)
    assert f"'{gguf}'" in str(refused.value)
    assert "--base" in str(refused.value)


def test_an_adapter_that_says_nothing_is_not_put_on_the_default_base(tmp_path, gguf, monkeypatch):
    monkeypatch.setattr(adapter_base, "default_base", lambda: gguf)
    update = Factors(np.ones((2, 8), "f4"), np.ones((8, 2), "f4"), 1.0)
    save_adapter(Adapter({"model.layers.0.mlp.up_proj": update}), tmp_path / "mine")
    with pytest.raises(AdapterError, match="does not say which base it belongs to"):
        found(tmp_path / "mine")


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2.gguf"])
def test_the_default_base_is_taken_for_adapters_that_name_it(tmp_path, name, monkeypatch):
    """By PEFT's field: of adapters that PEFT made for its model, or that an earlier release made."""
    monkeypatch.setattr(adapter_base, "default_base", lambda: TINY)
    update = Factors(np.ones((2, 8), "f4"), np.ones((8, 2), "f4"), 1.0)
    save_adapter(Adapter({"model.layers.0.mlp.up_proj": update}, name), tmp_path / "mine")
    assert found(tmp_path / "mine") == TINY


def test_a_hub_name_is_a_folder_here_or_in_the_hub_s_cache_and_never_fetched(tmp_path, monkeypatch):
    update = Factors(np.ones((2, 8), "f4"), np.ones((8, 2), "f4"), 1.0)
    save_adapter(Adapter({"model.layers.0.mlp.up_proj": update}, "owner/name"), tmp_path / "mine")
    with pytest.raises(AdapterError, match="--base owner/name"):
        found(tmp_path / "mine")
    cache = tmp_path / "hub" / "models--owner--name"
    make_hf_folder("llama", cache / "snapshots" / "abc123")
    assert found(tmp_path / "mine") == cache / "snapshots" / "abc123"
    make_hf_folder("qwen2", cache / "snapshots" / "def456")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def456")
    assert found(tmp_path / "mine") == cache / "snapshots" / "def456"
    here = make_hf_folder("llama", Path("owner/name"))
    assert found(tmp_path / "mine") == here.resolve()
    assert hub_cache.hub_name_of(cache / "snapshots" / "def456") == "owner/name"


def test_what_a_hostile_manifest_names_is_no_base(tmp_path, gguf):
    run = make_run(tmp_path / "runs" / "1", gguf)
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), "\0", "/etc/passwd", "x" * 5000, 7, None):
        (run / "manifest.json").write_text(json.dumps({"base": {"path": path, "path_from_run": path, "name": path}}))
        assert found(run) == gguf, path
    (run / "manifest.json").write_text('{"base": []}')
    assert found(run) == gguf


# ---- what PEFT is told ----------------------------------------------------------------------------------------------


def with_metadata(**metadata: str):
    base = open_base(TINY)
    return type(base)(base.name, base.path, base.spec, base.weights, {**(base.metadata or {}), **metadata})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("general.source.huggingface.repository", "owner/name", "owner/name"),
        ("general.source.repo_url", "https://huggingface.co/owner/name", "owner/name"),
        ("general.repo_url", "https://huggingface.co/owner/name/", "owner/name"),
        ("general.repo_url", "https://huggingface.co/owner/name-GGUF", str(TINY.parent)),
        ("general.repo_url", "https://example.org/owner/name", str(TINY.parent)),
        ("general.base_model.0.repo_url", "https://huggingface.co/owner/parent", str(TINY.parent)),
        ("general.repo_url", "../../etc", str(TINY.parent)),
    ],
)
def test_a_gguf_is_named_as_what_it_was_made_from_or_by_its_folder(key, value, expected):
    assert peft_name(with_metadata(**{key: value})) == expected


def test_the_default_base_is_named_as_the_hub_does(monkeypatch):
    monkeypatch.setattr(adapter_base, "default_base", lambda: TINY)
    assert peft_name(open_base(TINY)) == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_peft_opens_the_base_by_what_the_adapter_says(tmp_path, gguf, kind):
    """PEFT's own loader, with nothing named but the adapter (and the file of a GGUF), adds the update."""
    import torch
    from peft import AutoPeftModelForCausalLM

    path = gguf if kind == "GGUF" else make_hf_folder("llama", tmp_path / "my models" / "folder")
    adapter = make_run(tmp_path / "runs" / "1", path) / "adapter"
    extra = {"gguf_file": path.name} if kind == "GGUF" else {}
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **extra)
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad(), model.disable_adapter():
        without = model(ids).logits
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, without)


def test_an_adapter_tells_no_place_but_in_the_field_that_peft_reads(tmp_path, gguf):
    adapter = make_run(tmp_path / "runs" / "1", gguf) / "adapter"
    header = open_tensors(adapter / "adapter_model.safetensors").metadata
    assert str(tmp_path) not in json.dumps(header)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert [key for key, value in config.items() if str(tmp_path) in json.dumps(value)] == ["base_model_name_or_path"]


@pytest.mark.parametrize(
    "name",
    ["a\nb", "é ü 数据", os.fsdecode(b"caf\xe9"), "/".join(["n" * 250] * 5)],
    ids=["newline", "letters", "no UTF-8", "long"],
)
def test_an_adapter_of_a_base_with_any_name_can_be_read_again(tmp_path, name, folder_base):
    """And leads to its base, though a path that is too long for its config, or no text, is not written there."""
    place = tmp_path / name
    place.mkdir(parents=True)
    for path in (Path(shutil.copy(TINY, place / "base.gguf")), Path(shutil.copytree(folder_base, place / "folder"))):
        run = make_run(tmp_path / "runs" / path.name, path)
        assert found(run) == path


# ---- compared -------------------------------------------------------------------------------------------------------


def test_a_renamed_base_is_the_same_and_one_of_the_same_shape_is_another(tmp_path, gguf):
    run = str(make_run(tmp_path / "runs" / "1", gguf))
    adapter = load_adapter(run)
    assert difference(run, adapter, open_base(shutil.copy(gguf, tmp_path / "renamed.gguf"))) is None
    told = difference(run, adapter, open_base(changed_copy(gguf, tmp_path / "other.gguf")))
    assert told
    assert "was trained on a base.gguf (hash " in told
    assert "other.gguf is used" in told


@pytest.mark.parametrize(
    ("name", "is_told"),
    [("", False), ("smollm2.gguf", False), ("/home/me/SmolLM2.gguf", False), ("owner/other", True)],
)
def test_without_a_hash_names_are_compared(name, is_told):
    assert (difference("mine", Adapter({}, name), open_base(TINY)) is not None) == is_told


def test_notes_of_others_are_text_like_any(tmp_path, gguf):
    run = make_run(tmp_path / "runs" / "1", gguf)
    file = open_tensors(run / "adapter" / "adapter_model.safetensors")
    tensors = {name: file.read(name) for name in file.tensors}
    hostile = {"base_fingerprint": "\x1b[31m" * 99}
    write_safetensors(run / "adapter" / "adapter_model.safetensors", tensors, hostile)
    told = difference("mine", load_adapter(run), open_base(gguf))
    assert told
    assert "\x1b" not in told
