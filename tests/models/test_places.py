"""Where bases lie: folders of GGUF files, the hub's cache, Ollama's store, and places that only look like one."""

import json
import os

import pytest

from stress import TINY
from stress.foreign_files import CONFIGS, write_base
from thimble.errors import BaseModelError
from thimble.models.base import open_base

COMMITS = ("a" * 40, "b" * 40)


def cache(folder, refs="main", name="models--owner--some--name", commits=COMMITS):
    """A model in the cache of the hub's client: snapshots of links to files that are called by their hash."""
    outer = folder / name
    (outer / "refs").mkdir(parents=True)
    for number, commit in enumerate(commits):
        source = write_base(folder / f"source{number}", CONFIGS[number])
        snapshot = outer / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (outer / "blobs").mkdir(exist_ok=True)
        for path in source.iterdir():
            blob = outer / "blobs" / f"{number}{path.name}".encode().hex()
            path.replace(blob)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    if refs:
        (outer / "refs" / refs).write_text(commits[-1])
    return outer


@pytest.mark.parametrize("inner", ["", "snapshots", f"snapshots/{COMMITS[1]}"])
def test_a_model_in_the_cache_of_the_hubs_client_is_the_snapshot_of_main(inner, tmp_path):
    base = open_base(cache(tmp_path) / inner)
    assert (base.name, base.path.name, base.spec.family) == ("owner/some--name", COMMITS[1], CONFIGS[1]["model_type"])
    assert base.notes == (() if COMMITS[1] in inner else (
        f"the base is snapshot {COMMITS[1]} of models--owner--some--name, which refs/main names",))  # fmt: skip


def test_another_snapshot_can_be_named(tmp_path):
    assert open_base(cache(tmp_path) / "snapshots" / COMMITS[0]).path.name == COMMITS[0]


def test_the_only_snapshot_needs_no_ref(tmp_path):
    base = open_base(cache(tmp_path, refs="", name="models--gpt", commits=COMMITS[:1]))
    assert (base.name, base.notes) == ("gpt", (f"the base is snapshot {COMMITS[0]} of models--gpt, the only one",))


def test_a_cache_that_leaves_a_choice_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=f"has the snapshots {COMMITS[0]}, {COMMITS[1]} and no refs/main"):
        open_base(cache(tmp_path / "a", refs="v2"))
    outer = cache(tmp_path / "b")
    (outer / "refs" / "main").write_text("c" * 40)
    with pytest.raises(BaseModelError, match=f"has no snapshot {'c' * 40}, which refs/main names, but {COMMITS[0]}"):
        open_base(outer)


def test_the_cache_itself_lists_its_models(tmp_path):
    cache(tmp_path / "hub")
    with pytest.raises(
        BaseModelError, match="is a cache of the hub's client and holds models--owner--some--name: name"
    ):
        open_base(tmp_path / "hub")


def test_the_only_gguf_model_of_a_folder_is_opened(tmp_path):
    (tmp_path / "model.Q4_0.gguf").write_bytes(TINY.read_bytes())
    for name in ("mmproj-model-f16.gguf", "imatrix.gguf", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")  # some repositories of GGUF files have one
    base = open_base(tmp_path)
    assert (base.path, base.name) == (tmp_path / "model.Q4_0.gguf", "model.Q4_0.gguf")
    assert base.notes == (f"the base is model.Q4_0.gguf, the only GGUF model in {tmp_path.name}",)
    (tmp_path / "model.Q8_0.gguf").write_bytes(TINY.read_bytes())
    with pytest.raises(
        BaseModelError, match="holds 2 GGUF models, model.Q4_0.gguf, model.Q8_0.gguf: name one, such as"
    ):
        open_base(tmp_path)


def test_a_folder_of_floats_goes_before_a_gguf_beside_it(tmp_path):
    folder = write_base(tmp_path / "base", CONFIGS[0])
    (folder / "model.Q4_0.gguf").write_bytes(TINY.read_bytes())
    base = open_base(folder)
    assert base.path == folder
    assert "not read: model.Q4_0.gguf" in base.notes[0]


def test_a_file_without_a_suffix_is_known_by_its_content(tmp_path):
    blob = tmp_path / "blobs" / f"sha256-{'0' * 64}"
    blob.parent.mkdir()
    blob.write_bytes(TINY.read_bytes())
    assert open_base(blob).num_parameters == open_base(TINY).num_parameters


@pytest.mark.parametrize("named", [".", "blobs"])
def test_the_store_of_ollama_names_the_files_in_which_its_models_lie(named, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / f"sha256-{'a' * 64}").write_text("a license")
    (blobs / f"sha256-{'b' * 64}").write_bytes(TINY.read_bytes())
    with pytest.raises(
        BaseModelError, match=f"is the store of Ollama, .* name one, such as .*/blobs/sha256-{'b' * 64}"
    ):
        open_base(tmp_path / named)


def test_ollamas_description_of_a_model_says_where_the_weights_lie(tmp_path):
    blob = tmp_path / "models" / "blobs" / f"sha256-{'0' * 64}"
    manifest = tmp_path / "models" / "manifests" / "registry.ollama.ai" / "library" / "llama3" / "latest"
    for path in (blob, manifest):
        path.parent.mkdir(parents=True)
    layers = [{"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "1" * 64},
              {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}]  # fmt: skip
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    with pytest.raises(
        BaseModelError, match=f"Ollama's description of a model.*: name the file blobs/sha256-{'0' * 64}"
    ):
        open_base(manifest)
    blob.write_bytes(TINY.read_bytes())
    with pytest.raises(BaseModelError, match=f"name that file, {blob}"):
        open_base(manifest)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter, not a base: name with --base the model"),
        (["adapter/adapter_config.json", "report.json"], "is the run folder of an adapter, not a base"),
        (["m.gguf-split-a", "m.gguf-split-b"], "cat m.gguf-split-a m.gguf-split-b > m.gguf"),
        (["m 1.gguf.part2of10", "m 1.gguf.part10of10"], "cat 'm 1.gguf.part2of10' 'm 1.gguf.part10of10' > 'm 1.gguf'"),
        (["params.json", "consolidated.00.pth"], "in the layout of their makers' own programs"),
        (
            ["checkpoint-10/config.json", "trainer_state.json"],
            "bases lie in its folders checkpoint-10: name one, such as .*-10",
        ),
        (["Q4_0/m-00001-of-00002.gguf", "Q8_0/m-00001-of-00002.gguf"], "in its folders Q4_0, Q8_0: name one, such as"),
        (["notes.txt"], "has no config.json; it holds notes.txt"),
    ],
)
def test_a_folder_that_is_no_base_is_named_as_what_it_is(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(BaseModelError, match=message):
        open_base(tmp_path)


@pytest.mark.parametrize("name", ["model.gguf.incomplete", "model.gguf.part", "model.gguf.crdownload", "m.gguf.aria2"])
def test_a_download_that_has_not_ended_is_named_as_one(name, tmp_path):
    (tmp_path / name).write_bytes(TINY.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match="is a download that has not ended: download it again"):
        open_base(tmp_path / name)


@pytest.mark.parametrize("name", ["model.gguf.gz", "model.gguf.xz", "model.zip", "model.tar"])
def test_a_packed_file_is_no_piece_of_one(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(BaseModelError, match="is a packed file: unpack it, and name what comes out"):
        open_base(tmp_path / name)
    with pytest.raises(BaseModelError, match=f"has no config.json; it holds {name}"):
        open_base(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.model"])
def test_one_file_of_a_base_stands_for_its_folder(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(BaseModelError, match=f"is one file of a base: name the folder around it, {tmp_path}"):
        open_base(tmp_path / name)


@pytest.mark.parametrize("name", ["x", "x/y/z", "~", "modèle.gguf"])
def test_what_is_not_there_says_what_could_be(name, tmp_path):
    with pytest.raises(
        BaseModelError, match="does not exist: expected a GGUF file, a Hugging Face folder or a hub name"
    ):
        open_base(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/owner/name", "as a hub name: owner/name"),
        ("https://huggingface.co/owner/name/tree/main", "as a hub name: owner/name"),
        ("https://example.org/model.gguf", "nothing is fetched from an address"),
        ("llama3.2:1b", "ollama show llama3.2:1b --modelfile"),
    ],
)
def test_a_name_of_elsewhere_is_answered_with_what_to_name(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError) as caught:
        open_base(name)
    assert said in str(caught.value)
