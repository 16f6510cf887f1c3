"""Every field of config.json against the config classes of transformers, and what is honoured against its models."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from families import hf_model_of, make_hf_folder
from thimble.backends.tape import OPS
from thimble.errors import BaseModelError
from thimble.files.tensors import open_tensors, write_safetensors
from thimble.models.base import open_base
from thimble.models.forward import hidden, layout, logits
from thimble.models.known_fields import ALL, DROPOUTS, HONOURED, NO_EFFECT, REFUSED, ROPE_REFUSED, ROPE_SETTINGS
from thimble.models.spec import DEFAULTS, spec_from_config

CLASSES = {
    "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "smollm3": transformers.SmolLM3Config,
    "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config, "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig, "phi3": transformers.Phi3Config,
}  # fmt: skip
WRAPPERS = (transformers.Gemma3Config, transformers.Mistral3Config)
# Fields that transformers reads beside those of its config classes: names of its older versions.
OLDER = {"rope_theta", "rope_scaling", "torch_dtype", "name_or_path", "num_labels", "_commit_hash", "per_layer_config",
         "attn_implementation", "experts_implementation", "_experts_implementation"}  # fmt: skip
OLDER_OF = {"gemma3": {"sliding_window_pattern", "rope_local_base_freq"}, "phi3": {"partial_rotary_factor"}}
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-3}
OWN = {
    "mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16},
    **dict.fromkeys(("gemma2", "gemma3"), {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 60, 40)  # longer than every window and every original length


def config_of(family, changes=(), **more):
    """A small config.json of a family."""
    kind = {"gemma3": "gemma3_text"}.get(family, family)
    return {**SMALL, "model_type": kind, **OWN.get(family, {}), **dict(changes), **more}


def known_to_transformers(cls):
    """Names that a config class knows: its fields and their other names, and what it writes."""
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map) | set(cls().to_dict())
    return names | OLDER | set(transformers.GenerationConfig._get_default_generation_params())


def described(config):
    """A description as plain values that can be compared."""
    spec = spec_from_config(config)
    ropes = [rope and (rope.inv_freq.round(9).tolist(), rope.scale, rope.long_from) for rope in spec.ropes]
    return {**dataclasses.asdict(dataclasses.replace(spec, notes=(), ropes=())), "ropes": ropes}


# ---- the tables are complete -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_every_field_that_transformers_knows_of_a_family_is_honoured_or_refused_or_has_a_reason(family):
    names = known_to_transformers(CLASSES[family]) | OLDER_OF.get(family, set())
    honoured = {name for name, families in HONOURED.items() if family in families}
    assert names - honoured - NO_EFFECT.keys() - REFUSED.keys() - {*DROPOUTS} == set()
    assert all(reason.strip() for reason in NO_EFFECT.values())
    assert not NO_EFFECT.keys() & (REFUSED.keys() | {*DROPOUTS}), "one answer for each"
    assert all(families or name in REFUSED for name, families in HONOURED.items())


@pytest.mark.parametrize("cls", WRAPPERS, ids=lambda cls: cls.model_type)
def test_every_field_of_a_wrapper_has_an_answer(cls):
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    assert names <= {*HONOURED, *NO_EFFECT, *REFUSED, *DROPOUTS}


def test_what_a_family_does_not_honour_has_an_answer_there():
    for name, families in HONOURED.items():
        assert set(families) == set(ALL) or name in REFUSED or name in NO_EFFECT, name


@pytest.mark.parametrize("family", ALL)
def test_fields_that_are_left_out_are_what_the_config_class_takes(family):
    """Only sizes are given; then all that the class of transformers makes of them, as it writes it."""
    kind = config_of(family)["model_type"]
    bare = {**SIZES, "model_type": kind, "num_attention_heads": 32, "hidden_size": 128}
    whole = CLASSES[family](**{key: value for key, value in bare.items() if key != "model_type"})
    assert described(bare) == described({**whole.to_dict(), "model_type": kind})
    taken = {**whole.to_dict(), "rope_theta": None, "rope_local_base_freq": None, "sliding_window_pattern": None}
    for name, value in DEFAULTS[family].items():
        assert taken[name] in (value, None) or name in SIZES, name


# ---- what is honoured is what transformers computes ------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32}  # fmt: skip
HALF = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 32}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
TURNS = ["sliding_attention", "full_attention"] * 2
LINEAR, PLAIN = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}
GLOBAL = {"sliding_window_pattern": 2}  # so that a model of four layers has two that see everything
HONOURED_VALUES = [
    ("llama", {"head_dim": 16}),
    ("llama", {"num_key_value_heads": None}),
    ("llama", {"rms_norm_eps": 0.05}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"hidden_act": "gelu_new"}),
    ("llama", {"rope_theta": 500.0}),
    ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 300.0}, "rope_theta": 500.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {**PLAIN, "rope_theta": 300.0}}),
    ("llama", {"rope_scaling": LLAMA3, "head_dim": 16}),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32, "head_dim": 16}),
    ("llama", {"rope_scaling": {k: v for k, v in LLAMA3.items() if k[0] != "o"}, "head_dim": 16}),
    ("llama", {"rope_scaling": YARN, "head_dim": 16}),
    ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 24, "head_dim": 16}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "head_dim": 16}),
    ("llama", {"rope_scaling": {**YARN, "factor": None}, "head_dim": 16}),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 2}, "head_dim": 16}),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 1}, "head_dim": 16}),
    ("llama", {"rope_scaling": {**YARN, "truncate": False}, "head_dim": 16}),
    ("llama", {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}, "head_dim": 16}),
    ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.7}, "head_dim": 16}),
    ("llama", {"rope_scaling": LONG}),
    ("llama", {"rope_scaling": {**LONG, "attention_factor": 1.5}}),
    ("llama", {"rope_scaling": {**LONG, "factor": 16.0}}),
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"head_dim": 16}),
    ("smollm3", {"no_rope_layer_interval": 2}),
    ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}),
    ("smollm3", WINDOWS),
    ("smollm3", {**WINDOWS, "no_rope_layers": [0, 0, 1, 1]}),
    ("smollm3", {**WINDOWS, "layer_types": TURNS}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {**WINDOWS, "max_window_layers": 2}),
    ("qwen2", {**WINDOWS, "layer_types": TURNS}),
    ("qwen2", {"rope_scaling": {**YARN, "type": "yarn"}}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {**WINDOWS, "max_window_layers": 2}),
    ("qwen3", {**WINDOWS, "layer_types": TURNS}),
    ("gemma2", {"attention_bias": True}),
    ("gemma2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    ("gemma2", {"attn_logit_softcapping": 1.0}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 1.0}),
    ("gemma2", {"hidden_activation": "silu"}),
    ("gemma2", {"query_pre_attn_scalar": 4}),
    ("gemma2", {"rope_scaling": LINEAR}),
    ("gemma3", {"attention_bias": True}),
    ("gemma3", {"tie_word_embeddings": False}),
    ("gemma3", {"final_logit_softcapping": 1.0}),
    ("gemma3", GLOBAL),
    ("gemma3", {**GLOBAL, "rope_scaling": LINEAR, "rope_theta": 5000.0, "rope_local_base_freq": 300.0}),
    ("gemma3", {**GLOBAL, "rope_scaling": YARN}),
    ("gemma3", {**GLOBAL, "rope_scaling": LLAMA3}),
    ("gemma3", {**GLOBAL, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {**LINEAR, "factor": 2}}}),
    ("gemma3", {**GLOBAL, "rope_scaling": {"factor": 2.0},
                "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}}),
    ("phi3", {"sliding_window": 8}),
    ("phi3", {"head_dim": 16}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 20}),
    ("phi3", {"rope_scaling": {**LONG, "rope_type": "su"}, "original_max_position_embeddings": 48}),
    ("phi3", {"rope_scaling": {**LONG, "rope_type": "yarn"}, "original_max_position_embeddings": 32}),
    ("phi3", {"rope_scaling": {**LONG, "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}, **HALF}),
]  # fmt: skip
WITHOUT_EFFECT = [
    ("llama", {"pretraining_tp": 2, "layer_types": ["full_attention"] * 4, "use_cache": False, "is_decoder": True}),
    ("qwen2", {"attention_bias": False, "use_sliding_window": True, "sliding_window": None}),
    ("gemma2", {"hidden_act": "silu"}),
    ("phi3", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
]


def title(case):
    return f"{case[0]}-{'-'.join(f'{key}={value}' for key, value in case[1].items())}"[:90]


def logits_of_transformers(config):
    cls = CONFIG_MAPPING[config["model_type"]]
    model = hf_model_of(cls(**{key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}))
    with torch.no_grad():
        return model, model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def our_logits(config, model):
    spec = spec_from_config(config)
    weights = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    assert not spec.bias_problems(weights)
    norms = spec.norm_offset
    weights = {name: value + norms * name.endswith("norm.weight") for name, value in weights.items()}
    rows = layout(spec, np.array([0, len(IDS)]))
    return logits(OPS, spec, weights, hidden(OPS, spec, weights, IDS, rows))


@pytest.mark.parametrize(("family", "changes"), HONOURED_VALUES, ids=[title(case) for case in HONOURED_VALUES])
def test_a_value_that_is_honoured_gives_the_logits_of_transformers(family, changes):
    config = config_of(family, changes)
    model, theirs = logits_of_transformers(config)
    np.testing.assert_allclose(our_logits(config, model), theirs, atol=1e-4)
    assert described(config) != described(config_of(family)), "the case would pass without the field"


@pytest.mark.parametrize(("family", "changes"), WITHOUT_EFFECT, ids=[title(case) for case in WITHOUT_EFFECT])
def test_a_value_without_effect_has_none_in_transformers_either(family, changes):
    config = config_of(family, changes)
    model, theirs = logits_of_transformers(config)
    np.testing.assert_allclose(our_logits(config, model), theirs, atol=1e-4)
    assert described(config) == described(config_of(family))


@pytest.mark.parametrize("family", ALL)
def test_a_family_without_anything_special_gives_the_logits_of_transformers(family):
    config = config_of(family)
    model, theirs = logits_of_transformers(config)
    np.testing.assert_allclose(our_logits(config, model), theirs, atol=1e-4)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_every_field_that_is_refused_is_refused_by_name_and_its_neutral_values_are_not(family):
    names = [name for name in REFUSED if family not in HONOURED.get(name, ())]
    quiet = {("qwen2", "attention_bias")}  # which has biases, whatever the file says
    for name in names:
        if name == "original_max_position_embeddings" and family != "gemma3":
            continue
        wrong = False if name in ("is_causal", "causal") else 3
        if (family, name) not in quiet:
            with pytest.raises(BaseModelError, match=f"(^|\n)config.json has {name} {wrong}, which changes"):
                spec_from_config(config_of(family, {name: wrong}))
        for neutral in (None, *REFUSED[name]):
            assert described(config_of(family, {name: neutral})) == described(config_of(family)), name


REFUSALS = [
    ("llama", {"sliding_window": 8}, "sliding_window 8, which changes"),
    ("llama", {"layer_types": TURNS}, "layer_types .*, which changes"),
    ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
    ("llama", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    ("mistral", {"sliding_window": 8, "layer_types": TURNS}, "layer_types .*, which changes"),
    ("mistral", {"sliding_window": 8, "use_sliding_window": False}, "use_sliding_window False"),
    ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),  # which transformers reads and ignores
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma3", {"_sliding_window_pattern": 2}, "_sliding_window_pattern 2"),  # the same
    ("gemma2", {"sliding_window": None}, "sliding_window is None: expected a whole number"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0: expected a whole number"),
    ("gemma2", {"hidden_activation": None}, "activation None"),
    ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
    ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
    ("smollm3", {"layer_types": TURNS, "sliding_window": 8}, "layer_types has sliding_attention, but use_sliding"),
    ("qwen2", {"layer_types": TURNS}, "layer_types has sliding_attention, but use_sliding_window is off"),
    ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types is .*expected sliding_attention or full"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "layer_types is .*expected sliding_attention or full"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "scales its positions by 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "positions by 'proportional'"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is None: expected a number"),
    ("llama", {"rope_scaling": {"factor": 8.0}}, "rope_scaling has factor 8.0, which rope_type 'default' does not use"),
    ("llama", {"rope_scaling": {**LINEAR, "beta_fast": 8}}, "has beta_fast 8, which rope_type 'linear' does not use"),
    ("llama", {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "a llama turns whole heads"),
    ("gemma3", {"rope_scaling": {**YARN, "truncate": False}}, "truncate False, which transformers does not read"),
    ("gemma3", {"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, "without full_attention"),
    ("phi3", {"rope_scaling": LINEAR}, "rope_type 'linear': a phi3 knows longrope alone"),
    ("qwen2", {"rope_parameters": {"full_attention": PLAIN}}, "full_attention, settings of one kind of layer"),
    *(("llama", {"rope_parameters": {**LINEAR, name: 2}}, f"has {name} 2, which is not") for name in ROPE_REFUSED),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification', which has no"),
    ("gemma3", {"architectures": ["Gemma3ForSequenceClassification"]}, "Gemma3ForSequenceClassification', which has"),
    ("llama", {"architectures": ["LlamaBidirectionalModel"]}, "'LlamaBidirectionalModel', which has no language head"),
    ("qwen2", {"architectures": ["Qwen2Model"]}, "'Qwen2Model', which has no language head"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM': expected a list of names"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSALS, ids=[title(case) for case in REFUSALS])
def test_a_value_that_is_not_honoured_is_refused_by_name(family, changes, message):
    with pytest.raises(BaseModelError, match=message):
        spec_from_config(config_of(family, changes))


def test_all_that_is_refused_is_told_at_once():
    changes = {"residual_multiplier": 0.22, "logits_scaling": 8.0, "hidden_size": "8", "architectures": ["X"]}
    with pytest.raises(BaseModelError) as caught:
        spec_from_config(config_of("llama", changes))
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("kind", sorted(set(ROPE_SETTINGS) - {"default"}))
def test_settings_of_a_rotary_embedding_that_are_null_are_none(kind):
    settings = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN, "longrope": LONG}[kind]
    empty = {name: None for names in ROPE_SETTINGS.values() for name in names if name != "truncate"}
    assert described(config_of("llama", rope_scaling={**empty, **settings})) == described(
        config_of("llama", rope_scaling=settings)
    )


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_fields_that_nobody_knows_are_told_by_name_and_those_of_tools_are_not():
    quiet = {"_name_or_path": "x", "unsloth_fixed": True, "use_cache": True, "transformers.js_config": {"dtype": "q4"},
             "quantity": None, "torch_dtype": "bfloat16", "id2label": {"0": "a"}}  # fmt: skip
    assert spec_from_config(config_of("llama", quiet)).notes == ()
    told = spec_from_config(config_of("llama", {"my_field": 3, "rope_scaling": {**LINEAR, "finetuned": True}})).notes
    assert told == ("config.json has fields that no llama reads: 'my_field', 'rope_scaling.finetuned'",)


def test_code_of_a_folder_and_dropout_of_a_base_are_told():
    auto_map, rate = {"auto_map": {"AutoModel": "x.Y"}}, {"attention_dropout": 0.1}
    assert "(auto_map): it is not run" in spec_from_config(config_of("phi3", auto_map)).notes[0]
    assert "attention_dropout 0.1: it is not applied" in spec_from_config(config_of("phi3", rate)).notes[0]


# ---- biases ----------------------------------------------------------------------------------------------------------


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    file = open_tensors(path)
    tensors = change({name: file.read(name).copy() for name in file.tensors})
    write_safetensors(path, tensors, {"format": "pt"})


def test_biases_that_config_json_does_not_ask_for_are_refused_by_name(tmp_path):
    folder = make_hf_folder("llama", tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(folder, lambda tensors: {**tensors, name: np.ones(32, "f4")})
    with pytest.raises(BaseModelError, match=f"holds {name}, which a llama of this config.json does not read: set att"):
        open_base(folder)


def test_biases_that_config_json_asks_for_must_be_there(tmp_path):
    folder = make_hf_folder("llama_bias", tmp_path)
    change_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("down_proj.bias")})
    with pytest.raises(
        BaseModelError, match="lacks model.layers.0.mlp.down_proj.bias, model.*, which config.json asks"
    ):
        open_base(folder)


# ---- files as they are published -------------------------------------------------------------------------------------

_PHI4 = {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"}
PUBLISHED = {
    "Llama 3.2": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
         "eos_token_id": [1, 2], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
         "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
         "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
         "rms_norm_eps": 1e-05, "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
         "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256, "unsloth_fixed": True},
        {"head_dim": 64, "is_tied": True, "max_positions": 131072},
    ),
    "SmolLM2": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
         "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
         "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
         "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
         "tie_word_embeddings": True, "vocab_size": 49152, "transformers.js_config": {"kv_cache_dtype": {"q4": "x"}}},
        {"head_dim": 64, "is_tied": True},
    ),
    "Mistral 7B v0.3": (
        {"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
         "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
         "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768},
        {"windows": (None,) * 32, "biases": frozenset()},
    ),
    "Qwen 2.5": (
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896,
         "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
         "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
         "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False,
         "use_sliding_window": False, "vocab_size": 151936},
        {"windows": (None,) * 24, "biases": frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})},
    ),
    "Qwen 3": (
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
         "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
         "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
        {"head_dim": 128, "has_qk_norm": True},
    ),
    "Gemma 2": (
        {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
         "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 2304,
         "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 9216, "max_position_embeddings": 8192,
         "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
         "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
         "vocab_size": 256000},
        {"activation": "gelu_tanh", "attention_softcap": 50.0, "windows": (4096, None) * 13},
    ),
    "Gemma 3 4B": (  # which leaves most to the class
        {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
         "image_token_index": 262144, "mm_tokens_per_image": 256, "model_type": "gemma3",
         "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                         "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                         "sliding_window": 1024},
         "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"}},
        {"activation": "gelu_tanh", "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "is_tied": True},
    ),
    "Phi 3 mini": (
        {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "hidden_act": "silu",
         "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05,
         "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rope_scaling": None, "rope_theta": 10000.0,
         "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064},
        {"windows": (2047,) * 32, "head_dim": 96},
    ),
    "Phi 4 mini": (
        {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0, "full_attn_mod": 1,
         "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "interpolate_factor": 1,
         "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "phi3",
         "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
         "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": _PHI4,
         "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064},
        {"head_dim": 128, "is_tied": True, "is_fused": True},
    ),
    "SmolLM3": (
        {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
         "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
         "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
         "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "pretraining_tp": 2,
         "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
         "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
        {"is_tied": True, "windows": (None,) * 36},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_with_the_fields_of_a_published_one_is_read_and_says_no_more_than_needed(name):
    config, expected = PUBLISHED[name]
    spec = spec_from_config(config)
    assert {key: getattr(spec, key) for key in expected} == expected
    assert spec.notes == ()
