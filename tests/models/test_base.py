"""What a base must be to be opened."""

import json
import os
import shutil
import tracemalloc

import gguf
import numpy as np
import pytest

from families import make_hf_folder
from other_families import folder_of
from stress import TINY
from stress.foreign_files import CONFIGS, write_base
from thimble.errors import BaseModelError
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models.base import open_base
from thimble.models.gguf_base import from_gguf_name
from thimble.models.spec import spec_from_config, spec_from_gguf
from wrapped import rename


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 10**9), ("num_attention_heads", 0), ("head_dim", -8)]
)
def test_sizes_that_no_model_has_are_refused_at_once(name, value, tmp_path):
    folder = make_hf_folder("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(BaseModelError, match=f"{name} is {value}: expected from 1 to"):
        open_base(folder)


def test_a_tensor_with_half_a_name_is_none_of_the_decoders(tmp_path):
    spec = open_base(make_hf_folder("llama", tmp_path)).spec
    assert from_gguf_name("blk.0.weight", spec) is None
    assert from_gguf_name("blk.0.attn_q.weight", spec) == "model.layers.0.self_attn.q_proj.weight"


def test_a_quick_fingerprint_notices_another_file_and_is_the_same_for_the_same(tmp_path):
    one, two = open_base(make_hf_folder("llama", tmp_path / "a")), open_base(make_hf_folder("qwen2", tmp_path / "b"))
    assert one.quick_fingerprint() == one.quick_fingerprint() != two.quick_fingerprint()


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("model.layers.2.input_layernorm.weight", True),  # of a layer beyond num_hidden_layers
        ("model.layers.0.self_attn.q_norm.weight", True),  # as Qwen 3 has it
        ("model.layers.0.mlp.up_proj.weight_scale", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", False),  # left by older versions of transformers
        ("vision_tower.layers.0.weight", False),
    ],
)
def test_tensors_of_layers_that_the_config_does_not_read_are_told(name, warned, tmp_path):
    folder = make_hf_folder("llama", tmp_path)
    file = open_tensors(folder / "model.safetensors")
    tensors = {given: file.read(given).copy() for given in file.tensors}
    write_safetensors(folder / "model.safetensors", {**tensors, name: np.ones(8, "f4")}, {"format": "pt"})
    warnings = open_base(folder).warnings
    assert any(f"holds {name}, which a llama of this config.json does not read" in text for text in warnings) == warned


def test_tensors_that_a_tool_has_renamed_are_told_with_the_name_that_they_should_have(tmp_path):
    folder = make_hf_folder("llama", tmp_path)
    rename(folder, lambda name: f"base_model.model.{name}")
    with pytest.raises(BaseModelError, match=r"are called base_model.model.model.embed_tokens.weight and so on: save"):
        open_base(folder)


@pytest.mark.parametrize("size", [300, 384])
def test_a_vocabulary_of_another_size_than_config_json_says_is_told_as_that(size, tmp_path):
    folder = make_hf_folder("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    said = rf"embed_tokens.weight has 320 rows, and config.json says {size} \(vocab_size\): the vocabulary was made"
    with pytest.raises(BaseModelError, match=said):
        open_base(folder)


WRAPPED = {
    "compiled": ("_orig_mod.", lambda name: f"_orig_mod.{name}"),
    "compiled by blocks": ("_orig_mod.", lambda name: name.replace("layers.0.", "layers.0._orig_mod.")),
    "parallel": ("module.", lambda name: f"module.{name}"),
    "both": ("_orig_mod.", lambda name: f"module._orig_mod.{name}"),
    "checkpointed": ("_checkpoint_wrapped_module.", lambda name: name.replace(
        "layers.0.", "layers.0._checkpoint_wrapped_module.")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRAPPED)
def test_a_base_that_was_saved_from_within_a_wrapper_of_torch_is_that_base_and_told(case, tmp_path):
    around, change = WRAPPED[case]
    folder = make_hf_folder("llama", tmp_path)
    plain = {name: weight.read() for name, weight in open_base(folder).weights.items()}
    rename(folder, change)
    base = open_base(folder)
    assert plain.keys() == base.weights.keys()
    assert all((base.weights[name].read() == values).all() for name, values in plain.items())
    [warning] = base.warnings
    assert f"names its tensors with {around}, as torch does" in warning
    told = {name: name for name in open_tensors(folder / "model.safetensors").tensors}
    script = warning[warning.index("{name.replace") : warning.index(", path, {'format'")]
    written = eval(script, {"load_file": lambda path: told, "path": ""})  # noqa: S307 - the line that we print
    assert all(around not in name for name in written)


def test_a_base_that_transformers_would_not_find_in_its_wrapper_is_refused(tmp_path):
    folder = shutil.copytree(folder_of("gpt2"), tmp_path / "gpt2")
    rename(folder, lambda name: f"_orig_mod.{name}")
    with pytest.raises(BaseModelError, match=r"gpt2 names its tensors with _orig_mod\., as torch does.* save_file"):
        open_base(folder)


# --- bases from untrusted sources

INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    return write_base(tmp_path / "base", CONFIGS[0])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_small_sound_folders_of_every_kind_are_opened(tmp_path, config):
    assert open_base(write_base(tmp_path / "base", config)).weights


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a\0b", "x/../model.safetensors", "config.json", "model.bin",
     "model.safetensors\n", "x\\y.safetensors", "猫.safetensors", "x" * 300 + ".safetensors", ".safetensors"],
)  # fmt: skip
def test_an_index_names_nothing_but_files_beside_it(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name, "lm_head.weight": SHARD}}))
    with pytest.raises(BaseModelError, match="expected at most 1,000 names of .safetensors files in the same folder"):
        open_base(folder)


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, ["model.safetensors"], {"a": 3}, {"a": None}, {"a": [SHARD]}])
def test_an_index_maps_names_to_names(folder, value):
    (folder / INDEX).write_text(json.dumps({"weight_map": value}))
    with pytest.raises(BaseModelError, match="expected an object of names of tensors and files"):
        open_base(folder)


def test_an_index_does_not_name_thousands_of_files(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(1001)}}))
    with pytest.raises(BaseModelError, match="names 1,001 files: expected at most 1,000"):
        open_base(folder)


def test_a_shard_that_an_index_names_must_be_there(folder):
    (folder / SHARD).unlink()
    with pytest.raises(BaseModelError, match=f"lacks {SHARD}, named in {INDEX}"):
        open_base(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
@pytest.mark.parametrize(("kind", "make"), [("a pipe", os.mkfifo), ("a directory", os.mkdir)])
def test_what_is_no_file_is_refused_without_waiting_for_it(folder, name, kind, make):
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(BaseModelError, match=f"{name} is {kind}: expected a file"):
        open_base(folder)


def test_a_pipe_is_no_base(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(BaseModelError, match="model.gguf is a pipe"):
        open_base(tmp_path / "model.gguf")


def test_a_folder_of_links_into_the_cache_of_the_hub_client_is_opened(tmp_path):
    blobs = write_base(tmp_path / "blobs", CONFIGS[0])
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_base(snapshot).weights.keys() == open_base(blobs).weights.keys()


def test_a_config_that_links_to_something_else_is_refused_by_content(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(BaseModelError, match="config.json is damaged: it is not JSON"):
        open_base(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    (folder / INDEX).unlink()
    write_safetensors(folder / "model-00003-of-00002.safetensors", {"model.norm.weight": np.ones(8, "f4")})
    with pytest.raises(BaseModelError, match="more than once: model.norm.weight in model-00003"):
        open_base(folder)


def test_weights_that_are_no_floats_are_refused(folder):
    (folder / INDEX).unlink()
    write_safetensors(folder / SHARD, {name: open_tensors(folder / SHARD).read(name).astype("i4")
                                       for name in open_tensors(folder / SHARD).tensors})  # fmt: skip
    with pytest.raises(BaseModelError, match="is I32, expected one of F32"):
        open_base(folder)


CONFIG_FAULTS = [
    ({"model_type": "llama\nimport os"}, r"names model_type 'llama.nimport os': supported are"),
    ({"model_type": ["llama"]}, "names model_type ..llama..: supported are"),
    ({"model_type": "x" * 100_000}, r"names model_type 'x+\.\.\.x+': supported"),
    ({"hidden_size": "8"}, "hidden_size is '8': expected from 1"),
    ({"hidden_size": True}, "hidden_size is True: expected from 1"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"vocab_size": 16.0}, "vocab_size is 16.0: expected from 1"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 heads of 8 numbers share 2 key heads"),
    ({"head_dim": 7}, "expected an even width"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5': expected a number"),
    ({"rms_norm_eps": 1e308}, "rms_norm_eps is 1e.308: expected a number"),
    ({"rope_theta": -1}, "rope_theta is -1: expected a number"),
    ({"rope_theta": 10**400 // 10**301}, "rope_theta is 1000000.*: expected a number"),
    ({"model_type": "phi3", "partial_rotary_factor": 1e9}, "partial_rotary_factor is 1000000000.0: expected a number"),
    ({"model_type": "phi3", "partial_rotary_factor": 0.1}, "positions turn 0 numbers"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear': expected an object"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "scales its positions by 'dynamic'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": [2]}}, "factor is .2.: expected a number"),
    ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}}, "high_freq_factor is 4"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1] * 4}}, "original_max_position"),
    ({"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1]}},
     "short_factor is .1.: expected 4 positive numbers"),
    ({"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 32, "short_factor": [0] * 4}},
     "short_factor is .0, 0, 0, 0.: expected 4 positive"),
    ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
     "full_attention without sliding_attention"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "has full_attention, settings of one kind of layer"),
    ({"hidden_act": ["silu"]}, "activation ..silu..: supported are"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': expected true or false"),
    ({"max_position_embeddings": 1e9}, "max_position_embeddings is 1000000000.0: expected from 1"),
    ({"model_type": "mistral", "sliding_window": "8"}, "sliding_window is '8': expected a whole number"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layer_types is"),
    ({"model_type": "qwen3", "layer_types": ["a", "b"]}, "expected sliding_attention or full"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers is .1.: expected 0 or 1 for each of the 2"),
    ({"model_type": "smollm3", "no_rope_layer_interval": "4"}, "no_rope_layer_interval is '4'"),
    ({"model_type": "gemma3", "text_config": "x"}, "text_config is 'x': expected an object"),
    ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0: expected a number"),
    ({"model_type": "gemma2", "attn_logit_softcapping": "50"}, "attn_logit_softcapping is '50': expected a number"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONFIG_FAULTS)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(changes, message):
    with pytest.raises(BaseModelError, match=message):
        spec_from_config({**CONFIGS[0], "rope_scaling": None, **changes})


def test_all_sizes_that_are_wrong_are_told_at_once():
    with pytest.raises(BaseModelError) as caught:
        spec_from_config(
            {**CONFIGS[0], "hidden_size": "8", "vocab_size": -1, "head_dim": [], "num_hidden_layers": None}
        )
    assert len(caught.value.problems) == 4


def test_rotary_divisors_of_another_number_are_refused():
    metadata = dict(open_tensors(TINY).metadata)
    for wrong in (np.ones(1, "f4"), np.zeros(4, "f4"), np.full(4, np.nan, "f4")):
        with pytest.raises(BaseModelError, match="rope_freqs.weight is .*: expected 4 positive numbers"):
            spec_from_gguf(metadata, 320, True, {"rope_freqs.weight": wrong})


def write_gguf(path, **tensors):
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{key}")({"head_count": 4096, "block_count": 1024}.get(key, 1 << 14))
    writer.add_key_length(8192)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, array in tensors.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sizes_that_the_tensors_do_not_have_cost_no_memory(tmp_path):
    """The order of the rows of q is made for 33 million rows only if there are so many."""
    names = {f"blk__{n}__attn_q__weight": np.ones((2, 2), "f4") for n in range(1024)}
    path = write_gguf(tmp_path / "model.gguf", token_embd__weight=np.ones((4, 4), "f4"), **names)
    tracemalloc.start()
    with pytest.raises(BaseModelError, match="not complete"):
        open_base(path)
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_embd__weight": np.ones(4, "f4")}, "has no matrix token_embd.weight"),
        (
            {"token_embd__weight": np.ones((4, 4), "f4"), "rope_freqs__weight": np.ones(5000, "f4")},
            r"rope_freqs.weight as F32 \(5000,\): expected at most 4,096 F32 numbers",
        ),
    ],
)
def test_a_gguf_whose_tensors_are_of_another_kind_is_refused(tmp_path, tensors, message):
    with pytest.raises(BaseModelError, match=message):
        open_base(write_gguf(tmp_path / "model.gguf", **tensors))
