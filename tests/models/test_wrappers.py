"""Text models inside of models of text and images: the same logits as transformers, and adapters both ways."""

import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from families import make_hf_folder
from stress.foreign_files import CONFIGS as PLAIN_CONFIGS
from stress.foreign_files import write_base
from thimble.backends.tape import OPS
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError, BaseModelError
from thimble.files.peft import load_adapter, save_adapter
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models.adapters import check_fits, load_fitting
from thimble.models.base import open_base
from thimble.models.forward import Update, hidden, layout, logits
from thimble.models.wrappers import OTHER_KINDS, WRAPPERS, plain_name, unwrap
from wrapped import CONFIGS, edit, make_wrapped, rename

IDS = np.random.default_rng(1).integers(3, 290, 24).astype(np.int64)


def ours(base, layers=None):
    weights = {name: weight.read().astype(np.float64) for name, weight in base.weights.items()}
    updates = {path: Update(f.A, f.B, f.scale, None, None) for path, f in (layers or {}).items()}
    rows = layout(base.spec, np.array([0, len(IDS)]))
    return logits(OPS, base.spec, weights, hidden(OPS, base.spec, weights, IDS, rows, updates))


def theirs(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)[None]).logits[0].numpy()


def random_layers(base):
    random = np.random.default_rng(2)
    return {
        path: Factors(*(random.standard_normal(size).astype("f4") * 0.3 for size in ((2, fan_in), (out, 2))), 2.0)
        for path, (out, fan_in) in base.spec.linear_shapes().items()
    }


def load_peft(model, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_text_alone_gives_the_logits_of_transformers_and_peft_uses_our_adapter(kind, tmp_path):
    model = make_wrapped(kind, tmp_path / "base")
    base = open_base(tmp_path / "base")
    np.testing.assert_allclose(ours(base), theirs(model), atol=1e-4)
    layers = random_layers(base)
    save_adapter(Adapter(layers, prefix=base.prefix), tmp_path / "mine")
    loaded = getattr(transformers, base.loader).from_pretrained(tmp_path / "base", attn_implementation="eager")
    adapted = theirs(load_peft(loaded, tmp_path / "mine"))
    np.testing.assert_allclose(ours(base, layers), adapted, atol=1e-4)
    assert np.abs(adapted - theirs(model)).max() > 0.1
    save_adapter(load_adapter(tmp_path / "mine"), tmp_path / "again")
    for path in (tmp_path / "mine").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_every_wrapper_is_tested():
    assert set(CONFIGS) == set(WRAPPERS)


@pytest.mark.parametrize("kind", ["gemma3", "smolvlm"])
def test_an_adapter_that_peft_made_for_a_wrapper_is_used(kind, tmp_path):
    model = make_wrapped(kind, tmp_path / "base")
    targets = rf".*{'text' if kind == 'smolvlm' else 'language'}_model.*\.(q_proj|down_proj)"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    trained = get_peft_model(model, lora).eval()
    trained.save_pretrained(tmp_path / "theirs")
    base, adapter = open_base(tmp_path / "base"), load_adapter(tmp_path / "theirs")
    check_fits("theirs", adapter, base)
    np.testing.assert_allclose(ours(base, adapter.layers), theirs(trained), atol=1e-4)


# Where the layers lie in classes and versions of transformers: plain, without head, wrapped now, and before 4.52.
PREFIXES = ["model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.",
            "text_model.model.", "model.language_model.model."]  # fmt: skip


def write_adapter(folder, *paths):
    folder.mkdir()
    sides = {"A": np.ones((2, 8), "f4"), "B": np.ones((8, 2), "f4")}
    tensors = {f"base_model.model.{path}.lora_{side}.weight": array for path in paths for side, array in sides.items()}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {paths[0]: 2}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("prefix", PREFIXES)
def test_layers_are_known_under_the_names_of_every_class(prefix, tmp_path):
    adapter = load_adapter(write_adapter(tmp_path / "theirs", f"{prefix}layers.0.self_attn.q_proj"))
    assert (list(adapter.layers), adapter.prefix) == (["model.layers.0.self_attn.q_proj"], prefix)


def test_layers_of_two_names_are_refused(tmp_path):
    paths = ("model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj")
    with pytest.raises(AdapterError, match="its layers lie in model.layers, model.language_model.layers: expected one"):
        load_adapter(write_adapter(tmp_path / "theirs", *paths))


@pytest.mark.parametrize(
    "outside", ["model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.qkv",
                "base.vision_model.encoder.layers.0.mlp.fc1", "model.multi_modal_projector.linear_1"]
)  # fmt: skip
def test_an_adapter_of_the_vision_part_is_refused_by_name(outside, tmp_path):
    make_wrapped("llava", tmp_path / "base")
    adapter = load_adapter(write_adapter(tmp_path / "theirs", outside, "model.language_model.layers.0.mlp.up_proj"))
    with pytest.raises(AdapterError, match=f"1 layer outside of the text model, such as {outside}, which Thimble"):
        check_fits("theirs", adapter, open_base(tmp_path / "base"))


def test_an_adapter_of_the_head_is_refused_as_one_and_not_as_that_of_another_base(tmp_path):
    base = open_base(write_base(tmp_path / "base", PLAIN_CONFIGS[0]))
    adapter = load_adapter(write_adapter(tmp_path / "theirs", "lm_head", "model.layers.0.mlp.up_proj"))
    with pytest.raises(AdapterError, match="adapts lm_head, the output head, .*merge_and_unload") as caught:
        check_fits("theirs", adapter, base)
    assert "does not belong" not in str(caught.value)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_what_the_refusal_says_of_a_shared_weight_keeps_the_merged_model_what_it_was(target, tmp_path):
    base = make_hf_folder("qwen3_tied", tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", target], init_lora_weights=False, task_type="CAUSAL_LM")
    trained = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    trained.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match="merge_and_unload") as caught:
        load_fitting(str(tmp_path / "theirs"), open_base(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    exec(str(caught.value).partition("before PEFT loads the adapter: ")[2], {"torch": torch, "model": model})
    PeftModel.from_pretrained(model, tmp_path / "theirs").merge_and_unload().save_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 20)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)


# --- names in files, by the version that wrote them


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "vision_tower.encoder.layers.0.mlp.fc1.weight"),
    ],
)
def test_a_tensor_has_the_name_of_the_plain_model(given, plain):
    assert plain_name(given) == plain


@pytest.mark.parametrize("start", ["language_model.model.", "model.language_model.", "model."])
def test_one_model_opens_under_the_names_of_every_version(start, tmp_path):
    make_wrapped("qwen2_vl", tmp_path)
    whole = {name: weight.read() for name, weight in open_base(tmp_path).weights.items()}
    rename(tmp_path, lambda name: start + plain_name(name)[6:] if plain_name(name).startswith("model.l") else name)
    for name, weight in open_base(tmp_path).weights.items():
        np.testing.assert_array_equal(weight.read(), whole[name])


def test_a_tensor_under_two_names_is_refused(tmp_path):
    make_wrapped("llava", tmp_path)
    file = open_tensors(tmp_path / "model.safetensors")
    tensors = {name: file.read(name) for name in file.tensors}
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"]
    (tmp_path / "model.safetensors").unlink()
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(BaseModelError, match=r"more than once: .*norm.weight.* expected each under one name"):
        open_base(tmp_path)


def test_older_qwen_folders_have_all_settings_on_one_level(tmp_path):
    model = make_wrapped("qwen2_vl", tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    flat = {**whole, **whole.pop("text_config"), "model_type": "qwen2_vl", "rope_theta": 1e6}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    for name in ("text_config", "rope_parameters"):
        flat.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(flat))
    np.testing.assert_allclose(ours(open_base(tmp_path)), theirs(model), atol=1e-4)


def test_what_a_text_config_leaves_out_is_what_its_class_takes():
    text, wrapper = unwrap({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}})
    assert (text["hidden_size"], text["vocab_size"], wrapper.prefix) == (4096, 32064, "model.language_model.")
    for kind, config in (("llama", "LlamaConfig"), ("mistral", "MistralConfig"), ("qwen2", "Qwen2Config")):
        text, _ = unwrap({"model_type": "llava", "text_config": {"model_type": kind}})
        defaults = getattr(transformers, config)()
        assert {key: getattr(defaults, key) for key in text if hasattr(defaults, key)} == text


# --- what is not supported


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava", "text_config": {"model_type": "opt"}}, "'llava' with a text model of type 'opt'"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, "supported in it is mistral"),
        ({"model_type": "paligemma", "text_config": {}}, "paligemma is a model of text and images"),
        ({"model_type": "t5"}, "'t5': supported are llama, .*; t5 is an encoder-decoder model"),
        ({"model_type": "bert"}, "bert is an encoder"),
        ({"model_type": "whisper"}, "whisper is a speech model"),
    ],
)  # fmt: skip
def test_another_kind_of_model_is_refused_by_what_it_is(config, message):
    with pytest.raises(BaseModelError, match=message):
        unwrap(config)


def test_no_kind_is_both_supported_and_not():
    assert not OTHER_KINDS.keys() & (WRAPPERS.keys() | {config["model_type"] for config in PLAIN_CONFIGS})


# --- the head


def test_a_head_of_its_own_counts_though_the_config_ties_it(tmp_path):
    model = make_wrapped("llava", tmp_path, tie_word_embeddings=False)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    base = open_base(tmp_path)
    assert "lm_head.weight holds other numbers: it is used as the head, as transformers does" in base.warnings[0]
    np.testing.assert_allclose(ours(base), theirs(model), atol=1e-4)
