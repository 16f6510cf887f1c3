"""Patterns of ranks and alphas: they name the layers that PEFT's own matching finds."""

import itertools
import json
import re

import numpy as np
import pytest
from peft.utils.other import get_pattern_key
from safetensors.numpy import load_file, save_file

from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError
from thimble.files.peft import load_adapter, save_adapter
from thimble.files.peft_config import Pattern

LAYERS = (
    "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "layers.1.self_attn.q_proj", "q_proj",
    "blocks.1.1", "blocks.111", "x.blocks.1.1", "x_blocks.1.1", "blocks.1_1", "self_attn.q_proj", "self_attn_q_proj",
    "model.self_attn-q_proj", "blocks.1.1.1", "a.b", "a.b.c", "aXb",
)  # fmt: skip
KEYS = (
    "q_proj", "self_attn.q_proj", r"self_attn\.q_proj", "layers.1.self_attn.q_proj", "1.1", r"1\.1", "blocks.1.1",
    r"blocks\.1\.1", "^blocks.1.1", r"^blocks\.1\.1$", ".*blocks.1.1", r".*\.q_proj", ".*.q_proj", "^.*1.1", "a.b",
    "1", "b", r"^a\.b", "proj", ".*proj",
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_key_names_the_layers_that_it_names_for_peft(size):
    for keys in itertools.permutations(KEYS, size) if size < 3 else [KEYS, KEYS[::-1], KEYS[5:] + KEYS[:5]]:
        pattern = Pattern({key: number for number, key in enumerate(keys)})
        assert not pattern.unread
        for layer in LAYERS:
            key = get_pattern_key(keys, layer)
            assert pattern.of(layer, "none") == (keys.index(key) if key in keys else "none"), (keys, layer)


def test_keys_of_more_forms_than_any_model_has_are_not_tried():
    pattern = Pattern({"a" * size: 1 for size in range(1, 2001)})
    assert pattern.of("aaa", 0) == 1
    assert pattern.unread


def test_layers_whose_names_end_alike_keep_their_own_ranks_and_scales(tmp_path):
    random = np.random.default_rng(0)
    ranks = {"blocks.1.1": 2, "blocks.111": 3, "side.blocks.1.1": 4, "side.blocks.2.1": 3, "blocks.3": 3}
    layers = {
        path: Factors(random.random((rank, 6), np.float32), random.random((5, rank), np.float32), float(rank))
        for path, rank in ranks.items()
    }
    save_adapter(Adapter(layers), tmp_path)
    loaded = load_adapter(tmp_path).layers
    assert {path: (factors.rank, factors.scale) for path, factors in loaded.items()} == {
        path: (rank, float(rank)) for path, rank in ranks.items()
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    pattern = config["rank_pattern"]
    assert {path: pattern.get(get_pattern_key(pattern, path), config["r"]) for path in ranks} == ranks


@pytest.mark.parametrize("name", ["new_embeddings.safetensors", "non_lora_trainables.bin"])
def test_an_adapter_whose_other_half_would_be_ignored_is_refused_by_its_name(name, tmp_path):
    save_adapter(Adapter({"q_proj": Factors(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32), 1.0)}), tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"what training leaves, and no part of it")
    load_adapter(tmp_path)
    (tmp_path / name).write_bytes(b"\0" * 16)
    with pytest.raises(AdapterError, match=name):
        load_adapter(tmp_path)


def test_an_adapter_in_double_precision_is_read_as_peft_reads_it(tmp_path):
    layers = {"q_proj": Factors(np.full((1, 2), 0.1, np.float32), np.full((2, 1), 0.3, np.float32), 1.0)}
    save_adapter(Adapter(layers), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: values.astype(np.float64) for name, values in load_file(file).items()}, file)
    read = load_adapter(tmp_path).layers["q_proj"]
    assert (read.A.dtype, read.B.dtype) == (np.float32, np.float32)
    assert np.array_equal(read.A, layers["q_proj"].A)
    assert np.array_equal(read.B, layers["q_proj"].B)


EXPRESSIONS = (
    r".*layers\.1\..*", "(q_proj|k_proj)", r"model\.layers\.[0-9]+\.self_attn\.q_proj", "[]a-b.]+", ".+", "^a|b$",
    r"layers.\d{2}.self_attn.q_proj", r"^model.layers.(?:1|[2-9]\d?)\..*", "q_proj|^blocks.1.1", "[^.]*proj",
    r"\w+_proj", "(.*1.*)?", ".*?[qk]_proj", "(^model.*|a).*", r"x\.blocks.*|\S*-q_proj", r"^(?!.*[02]\.).*\bq_proj",
    r"(a)[*)+(]\*|\)*q_proj",
)  # fmt: skip


@pytest.mark.parametrize("key", EXPRESSIONS)
def test_an_expression_names_the_layers_that_it_names_for_peft(key):
    pattern = Pattern({key: 1})
    assert not pattern.unread
    for layer in LAYERS:
        is_match = re.match(rf"(.*\.)?({key})$", layer) is not None  # what PEFT's get_pattern_key asks
        assert pattern.of(layer, 0) == is_match, layer


def test_the_first_that_matches_counts_whether_it_is_a_name_or_an_expression():
    for keys in itertools.permutations(["q_proj", ".*1.*", "(a|blocks).*"]):
        pattern = Pattern({key: number for number, key in enumerate(keys)})
        for layer in LAYERS:
            key = get_pattern_key(keys, layer)
            assert pattern.of(layer, "none") == (keys.index(key) if key in keys else "none"), (keys, layer)


@pytest.mark.parametrize(
    "key",
    [
        r"(a)\1", "(?i)a", "a(", "a**", "[b-a]", "(" * 600, "(a|a)*x", "((.*)*)*x", "(a+){9}x", ".*.*.*.*x", "a?" * 30,
        r"(\))+x", r"([)])+x", "(?:ab|a.)" * 30 + "x", "(?x:a#[\n(a|a)*b#]\n)", "(?#[)(a|a)*x(?#])",
    ],
)  # fmt: skip
def test_an_expression_that_cannot_be_read_or_could_take_long_is_told(key):
    assert Pattern({key: 1}).unread == {key: 1}


def test_expressions_are_not_tried_with_paths_that_are_long():
    assert Pattern({"q_proj": 1}).of("a." * 80 + "q_proj", 0) == 1
    with pytest.raises(AdapterError, match="more than 128 characters.*write out the names"):
        Pattern({".*[q]_proj": 1}).of("a." * 80 + "q_proj", 0)
