"""Every key of GGUF metadata that llama.cpp knows of a language model, and what becomes of it."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
from gguf.constants import Keys

from families import GGUF_FOLDER
from models.test_known_fields import LONG, YARN, config_of, described
from thimble.errors import BaseModelError
from thimble.files.tensors import open_tensors
from thimble.models import gguf_fields
from thimble.models.spec import spec_from_config, spec_from_gguf

SIZES = {
    "context_length": 128, "embedding_length": 32, "feed_forward_length": 24, "block_count": 4,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-3,
}  # fmt: skip
LONG_DIVISORS = {f"rope_factors_{name}.weight": np.array(LONG[f"{name}_factor"], "f4") for name in ("long", "short")}


def spec_of(family, changes=(), divisors=None):
    changes = {**({"attention.sliding_window": 8} if family == "gemma3" else {}), **dict(changes)}
    metadata = {"general.architecture": family, **{f"{family}.{k}": v for k, v in {**SIZES, **changes}.items()}}
    return spec_from_gguf(metadata, 64, False, divisors or {})


def ropes(spec):
    return [rope and (rope.inv_freq.round(6).tolist(), round(rope.scale, 6)) for rope in spec.ropes]


def test_every_key_of_a_language_model_has_an_answer():
    groups = [group for name, group in vars(Keys).items() if inspect.isclass(group)]
    keys = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    own = {key.removeprefix("{arch}.") for key in keys if key.startswith("{arch}.")} - {
        "{dense}_feat_in",
        "{dense}_feat_out",
    }
    known = {*gguf_fields.HONOURED, *gguf_fields.NO_EFFECT, *gguf_fields.REFUSED, *gguf_fields.SAME_AS_HEAD,
             gguf_fields.SAME_AS_ROPE, gguf_fields.SAME_AS_WIDTH, gguf_fields.HIDDEN_ACT}  # fmt: skip
    assert own - known == set()


@pytest.mark.parametrize("family", gguf_fields.FAMILIES)
def test_every_key_that_is_refused_is_refused_by_name_and_its_neutral_values_are_not(family):
    for key, neutral in gguf_fields.REFUSED.items():
        wrong = False if key == "attention.causal" else 7
        with pytest.raises(BaseModelError, match=f"(^|\n){family}.{re.escape(key)} is {wrong}, which is not supported"):
            spec_of(family, {key: wrong})
        for value in (*neutral, *([0, [0, 0]] if key != "attention.causal" else [])):
            assert spec_of(family, {key: value}).notes == ()


SAME = [
    ("llama", {"attention.head_count_kv": [2, 2, 2, 2]}, {}),
    ("llama", {"feed_forward_length": [24] * 4, "attention.head_count": [4] * 4}, {}),
    ("llama", {"rope.scaling.factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    ("llama", {"rope.scale_linear": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, {}),
    ("llama", {"attention.scale": 8**-0.5, "attention.value_length": 8, "rope.dimension_count": 8}, {}),
    ("llama", {"attention.value_length": 8, "pooling_type": 3, "vocab_size": 3, "rope.scaling.finetuned": True}, {}),
    ("gemma2", {}, {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    ("gemma3", {"attention.sliding_window": 8},
     {"attention.sliding_window": 8, "attention.sliding_window_pattern": 6, "rope.freq_base_swa": 1e4}),
    ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False, True, False]},
     {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "one", "other"), SAME, ids=lambda case: case if isinstance(case, str) else None)
def test_metadata_that_means_the_same_to_llama_cpp_is_read_alike(family, one, other):
    first, second = spec_of(family, one), spec_of(family, other)
    assert ropes(first) == ropes(second)
    assert dataclasses.replace(first, ropes=()) == dataclasses.replace(second, ropes=())


LIKE_FOLDERS = [
    ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
     {"rope_scaling": {**YARN, "beta_fast": 32}}),
    ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
               "rope.scaling.attn_factor": 0.5},
     {"rope_scaling": {**YARN, "beta_fast": 32, "attention_factor": (0.1 * math.log(4) + 1) / 2}}),
    ("phi3", {"rope.scaling.attn_factor": 1.5, "rope.scaling.original_context_length": 32},
     {"rope_scaling": {**LONG, "attention_factor": 1.5}, "original_max_position_embeddings": 32}),
    ("phi3", {"rope.dimension_count": 4}, {"partial_rotary_factor": 0.5}),
    ("gemma3", {"attention.sliding_window": 8, "rope.freq_base": 1e6, "attention.key_length": 16,
                "attention.sliding_window_pattern": 2, "rope.scaling.factor": 4.0},
     {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("smollm3", {}, {"rope_theta": 1e4}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "keys", "fields"), LIKE_FOLDERS, ids=lambda case: case if isinstance(case, str) else None
)
def test_a_gguf_turns_queries_and_keys_as_a_folder_of_the_same_model(family, keys, fields):
    divisors = LONG_DIVISORS if "rope_scaling" in fields and "long_factor" in fields["rope_scaling"] else {}
    ours, theirs = spec_of(family, keys, divisors), spec_from_config(config_of(family, fields))
    assert ropes(ours) == ropes(theirs)
    assert ours.windows == theirs.windows


REFUSALS = [
    ("llama", {"attention.head_count_kv": [2, 1, 2, 2]}, "attention.head_count_kv is .2, 1, 2, 2.: expected the same"),
    ("llama", {"feed_forward_length": [24, 48, 24, 24]}, "feed_forward_length is .*expected the same in all layers"),
    ("llama", {"attention.head_count": [4, 4, 0, 4]}, "attention.head_count is .*expected the same in all layers"),
    ("llama", {"attention.value_length": 16}, "attention.value_length is 16, expected 8"),
    ("llama", {"attention.scale": 0.5}, "attention.scale is 0.5, expected 0.353553"),
    ("llama", {"rope.dimension_count": 4}, "rope.dimension_count is 4, expected 8"),
    ("gemma3", {"attention.sliding_window": 8, "attention.key_length_swa": 4}, "key_length_swa is 4, expected 8"),
    ("gemma3", {"attention.sliding_window": 8, "rope.dimension_count_swa": 4}, "dimension_count_swa is 4, expected 8"),
    ("gemma2", {"rope.freq_base_swa": 5000.0}, "rope.freq_base_swa is 5000.0, expected 10000.0"),
    ("gemma3", {"attn_logit_softcapping": 30.0, "attention.sliding_window": 8}, "attn_logit_softcapping is 30.0"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, llama has none"),
    ("llama", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', expected silu"),
    ("llama", {"expert_count": 8, "expert_used_count": 2}, "llama.expert_count is 8.*\n.*expert_used_count is 2"),
    ("llama", {"rope.scaling.type": "longrope"}, "longrope, but the file has no rope_factors_long"),
    ("llama", {"rope.scaling.type": "dynamic"}, "rope.scaling.type is 'dynamic': supported are none, linear, yarn"),
    ("llama", {"rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5: expected 1 without yarn or longrope"),
    ("qwen3", {"classifier.output_labels": ["yes", "no"]}, "classifier.output_labels is .*which is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "message"), REFUSALS, ids=lambda case: case if isinstance(case, str) else None
)
def test_metadata_that_is_not_honoured_is_refused_by_name(family, changes, message):
    with pytest.raises(BaseModelError, match=message):
        spec_of(family, changes)


def test_divisors_of_longrope_beside_another_scaling_are_refused():
    with pytest.raises(BaseModelError, match="rope_factors_long and 'linear' scaling by 4: expected one of them"):
        spec_of("phi3", {"rope.scaling.factor": 4.0}, LONG_DIVISORS)


@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen2", "qwen3", "phi3"])
def test_a_window_that_llama_cpp_does_not_apply_is_told_and_not_applied(family):
    spec = spec_of(family, {"attention.sliding_window": 8})
    assert spec.windows == (None,) * 4
    assert "sliding window of 8 tokens; llama.cpp attends to all" in spec.notes[0]
    assert spec_of(family, {"attention.sliding_window": 0}).notes == ()


def test_keys_that_nobody_knows_are_told_by_name():
    assert spec_of("llama", {"my.key": 3}).notes == ("the GGUF has metadata that no llama reads: 'my.key'",)


@pytest.mark.parametrize("path", sorted(GGUF_FOLDER.glob("*.gguf")), ids=lambda path: path.stem)
def test_files_of_the_converter_have_nothing_to_tell(path):
    file = open_tensors(path)
    divisors = {name: file.read(name) for name in file.tensors if name.startswith("rope_f")}
    assert spec_from_gguf(file.metadata, 320, True, divisors).notes == ()


def test_a_folder_and_a_gguf_without_anything_special_are_described_alike():
    ours = dataclasses.replace(spec_of("llama"), biases=frozenset(), ropes=())
    assert dataclasses.asdict(ours) == {k: v if k != "ropes" else () for k, v in described(config_of("llama")).items()}
