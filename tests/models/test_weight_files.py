"""Which of several weight files count: those that transformers reads."""

import json

import numpy as np
import pytest
import transformers

from families import make_hf_folder
from stress.foreign_files import CONFIGS, write_base
from thimble.errors import BaseModelError
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models.base import open_base
from thimble.models.weight_files import INDEX, WHOLE, choose_files, weight_files
from wrapped import edit

NORM = "model.norm.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def with_norm(source, target, value):
    """A copy of a safetensors file in which the last norm is another, so that one sees which file was read."""
    file = open_tensors(source)
    tensors = {name: file.read(name) for name in file.tensors}
    write_safetensors(target, {**tensors, NORM: np.full_like(tensors[NORM], value)}, {"format": "pt"})
    return tensors


def shards(folder, value, count=2):
    tensors = with_norm(folder / WHOLE, folder / "x", value)
    (folder / "x").unlink()
    tensors[NORM] = np.full_like(tensors[NORM], value)
    index = {}
    for part in range(count):
        name = f"model-{part + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[part::count]
        write_safetensors(folder / name, {key: tensors[key] for key in names}, {"format": "pt"})
        index |= dict.fromkeys(names, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = make_hf_folder("llama", tmp_path_factory.mktemp("made"))
    with_norm(folder / WHOLE, folder / "y.safetensors", 2.0)
    (folder / "y.safetensors").replace(folder / WHOLE)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def whole_and_shards(folder):
    shards(folder, 3.0)


def only_shards(folder):
    shards(folder, 3.0)
    (folder / WHOLE).unlink()


def shards_of_two_sets(folder):
    shards(folder, 4.0, 3)
    shards(folder, 3.0)
    (folder / WHOLE).unlink()


def named_in_the_config(folder):
    with_norm(folder / WHOLE, folder / "other.safetensors", 3.0)
    edit(folder / "config.json", transformers_weights="other.safetensors")


def index_named_in_the_config(folder):
    shards(folder, 3.0)
    (folder / INDEX).rename(folder / "other.safetensors.index.json")
    edit(folder / "config.json", transformers_weights="other.safetensors.index.json")


def beside_other_layouts(folder):
    for name in (
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "optimizer.safetensors",
        "adapter_model.safetensors",
    ):
        with_norm(folder / WHOLE, folder / name, 3.0)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (folder / "training_args.bin").write_bytes(b"PK\x03\x04")
    (folder / "original").mkdir()
    with_norm(folder / WHOLE, folder / "original" / WHOLE, 3.0)


LAYOUTS = [whole_and_shards, only_shards, shards_of_two_sets, named_in_the_config, index_named_in_the_config,
           beside_other_layouts]  # fmt: skip


@pytest.mark.parametrize("arrange", LAYOUTS)
def test_the_files_are_read_that_transformers_reads(arrange, folder):
    arrange(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.detach().numpy()
    np.testing.assert_array_equal(open_base(folder).weights[NORM].read(), theirs)


def test_weights_that_lie_there_twice_are_told(folder):
    whole_and_shards(folder)
    (told,) = open_base(folder).warnings
    assert (
        f"holds its weights twice: read from {WHOLE}, as transformers does, and not from {SHARDS[0]}, {SHARDS[1]}"
        in told
    )


def test_what_is_not_read_is_noted(folder):
    beside_other_layouts(folder)
    base = open_base(folder)
    assert base.notes == (
        "weights: model.safetensors; not read: consolidated.safetensors, model.fp16.safetensors, pytorch_model.bin",
    )
    assert not base.warnings


def test_an_adapter_in_the_folder_of_a_base_is_told(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter beside the base, which transformers would load with it" in open_base(folder).warnings[0]


def test_shards_without_an_index_are_read_if_all_are_there(folder):
    only_shards(folder)
    (folder / INDEX).unlink()
    assert open_base(folder).weights[NORM].read()[0] == 3.0
    (folder / SHARDS[1]).unlink()
    with pytest.raises(BaseModelError, match=f"lacks {SHARDS[1]}, and has no {INDEX}: copy the base again"):
        open_base(folder)


def test_the_only_file_is_taken_whatever_it_is_called(folder):
    (folder / WHOLE).rename(folder / "llama.safetensors")
    assert weight_files(folder) == [folder / "llama.safetensors"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.safetensors", "b.safetensors"],
            "holds a.safetensors, b.safetensors: expected model.safetensors, or an index",
        ),
        (["consolidated.safetensors"], "the layout of Mistral's own programs"),
        (
            ["model.fp16.safetensors"],
            "holds model.fp16.safetensors: if these are the weights, call them model.safetens",
        ),
        (["pytorch_model.bin"], "it holds only .bin files, which can run code when read: convert them"),
        (["model.safetensors.incomplete"], "a download that has not ended: download the base again"),
        (["optimizer.safetensors"], "if these are the weights"),
        (["README.md"], "has no .safetensors file; it holds README.md"),
        ([], "has no .safetensors file; it holds nothing"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(names, message, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BaseModelError, match=message):
        choose_files(tmp_path)


def test_a_shard_that_is_still_on_its_way_is_named(tmp_path):
    folder = write_base(tmp_path / "base", CONFIGS[0])
    (folder / SHARDS[0]).rename(folder / "model-00001.incomplete")
    with pytest.raises(
        BaseModelError, match=f"lacks {SHARDS[0]}, named in .*model-00001.incomplete, a download that has"
    ):
        open_base(folder)


def test_a_download_into_the_cache_that_has_not_ended_is_named(tmp_path):
    snapshot, blob = tmp_path / "snapshots" / "abc", tmp_path / "blobs" / "f00.incomplete"
    for path in (snapshot, blob.parent):
        path.mkdir(parents=True)
    blob.write_bytes(b"")
    with pytest.raises(BaseModelError, match="it holds f00.incomplete, a download that has not ended"):
        choose_files(snapshot)


@pytest.mark.parametrize("value", ["../x.safetensors", "x.bin", 7, "/x.safetensors", ""])
def test_a_name_in_the_config_is_that_of_a_file_beside_it(value, folder):
    edit(folder / "config.json", transformers_weights=value)
    with pytest.raises(BaseModelError, match="transformers_weights .*: expected the name of a .safetensors file"):
        open_base(folder)


def test_a_git_lfs_pointer_is_named_as_one(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in (WHOLE, "config.json"):
        (folder / name).write_bytes(pointer)
        with pytest.raises(
            BaseModelError, match=f"{name} .*a Git LFS pointer, not the file itself: run `git lfs pull`"
        ):
            open_base(folder)


# --- the head


def without_head(folder):
    file = open_tensors(folder / WHOLE)
    tensors = {name: file.read(name) for name in file.tensors if name != "lm_head.weight"}
    (folder / WHOLE).unlink()
    write_safetensors(folder / WHOLE, tensors, {"format": "pt"})


def equal_head(folder):
    file = open_tensors(folder / WHOLE)
    tensors = {name: file.read(name) for name in file.tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (folder / WHOLE).unlink()
    write_safetensors(folder / WHOLE, tensors, {"format": "pt"})


def only_head(folder):
    file = open_tensors(folder / WHOLE)
    tensors = {name: file.read(name) for name in file.tensors if name != "model.embed_tokens.weight"}
    (folder / WHOLE).unlink()
    write_safetensors(folder / WHOLE, tensors, {"format": "pt"})


@pytest.mark.parametrize(
    ("arrange", "ties"),
    [(str, True), (str, False), (without_head, True), (equal_head, True), (only_head, True)],
    ids=["other-head", "own-head", "no-head", "same-head", "only-head"],
)  # fmt: skip
def test_the_head_is_the_one_that_transformers_takes(arrange, ties, folder):
    arrange(folder)
    edit(folder / "config.json", tie_word_embeddings=ties)
    base, theirs = open_base(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    head = base.weights["model.embed_tokens.weight" if base.spec.is_tied else "lm_head.weight"]
    np.testing.assert_array_equal(head.read(), theirs.lm_head.weight.detach().numpy())
    embedding = theirs.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(base.weights["model.embed_tokens.weight"].read(), embedding)


@pytest.mark.parametrize("ties", [False, None])
def test_a_head_that_is_missing_is_not_made_up(ties, folder):
    without_head(folder)
    edit(folder / "config.json", tie_word_embeddings=ties)
    with pytest.raises(BaseModelError, match="lacks lm_head.weight: it is not complete, or config.json should say"):
        open_base(folder)


@pytest.mark.parametrize("around", ["", "base_model.model."])
def test_a_model_with_an_adapter_in_it_that_is_not_merged_is_named_as_one(around, folder):
    file = open_tensors(folder / WHOLE)
    tensors = {around + name.replace("q_proj.", "q_proj.base_layer."): file.read(name) for name in file.tensors}
    (folder / WHOLE).unlink()
    write_safetensors(folder / WHOLE, tensors, {"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"an adapter in it that is not merged, as .*base_layer.weight shows: .*merge"
    ):
        open_base(folder)
