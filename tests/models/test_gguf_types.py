"""The rules of llama.cpp's quantiser, on layers and shapes that they tell apart."""

from pathlib import Path

import pytest

from thimble.errors import BaseModelError
from thimble.models.base import open_base
from thimble.models.gguf_types import FILE_TYPES, check_file_type, tensor_type

SPEC = open_base(Path(__file__).parents[1] / "fixtures" / "gguf" / "llama.gguf").spec


def spec(**changes):
    from dataclasses import replace

    return replace(SPEC, **{"num_layers": 32, "is_tied": False, **changes})


def types(part, wanted, layers=32, **options):
    given = {"shape": (512, 512), "has_importance": False, **options}
    return [
        tensor_type(
            f"blk.{layer}.{part}.weight", given["shape"], wanted, spec(num_layers=layers), given["has_importance"]
        )
        for layer in range(layers)
    ]


def test_the_first_and_last_eighth_and_every_third_layer_between_get_more_bits():
    # src/llama-quant.cpp: i < n/8 || i >= 7*n/8 || (i - n/8) % 3 == 2
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for part in ("attn_v", "ffn_down", "attn_qkv"):
        found = types(part, "Q4_K_M")
        assert {layer for layer, dtype in enumerate(found) if dtype == "Q6_K"} == more
        assert set(found) == {"Q4_K", "Q6_K"}
        assert set(types(part, "Q5_K_M")) == {"Q5_K", "Q6_K"}
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert set(types(part, "Q4_K_M")) == {"Q4_K"}


@pytest.mark.parametrize(
    ("name", "is_tied", "wanted", "columns", "expected"),
    [
        ("output.weight", False, "Q4_K_M", 512, "Q6_K"),
        ("output.weight", False, "Q8_0", 512, "Q8_0"),
        ("output.weight", False, "Q4_0", 512, "Q6_K"),
        ("output.weight", False, "F16", 512, "F16"),
        ("token_embd.weight", False, "Q4_K_M", 512, "Q4_K"),
        ("token_embd.weight", True, "Q4_K_M", 512, "Q6_K"),
        ("token_embd.weight", True, "Q4_K_M", 576, "Q8_0"),  # SmolLM2: no whole blocks of 256
        ("token_embd.weight", True, "Q4_0", 576, "Q8_0"),
        ("blk.3.attn_q.weight", True, "Q4_K_M", 576, "Q5_0"),
        ("blk.3.attn_q.weight", True, "Q5_K_M", 576, "Q5_1"),
        ("blk.3.attn_q.weight", True, "Q6_K", 576, "Q8_0"),
        ("blk.0.ffn_down.weight", True, "Q4_K_M", 576, "Q8_0"),
        ("blk.3.attn_q.weight", True, "Q4_0", 24, "F16"),
        ("blk.3.attn_q.weight", True, "Q4_K_M", 24, "F16"),
        ("blk.3.attn_norm.weight", True, "Q4_K_M", 512, "F32"),
    ],
)
def test_tensors_beside_the_layers_and_odd_shapes(name, is_tied, wanted, columns, expected):
    assert tensor_type(name, (64, columns), wanted, spec(is_tied=is_tied), False) == expected


def test_vectors_stay_as_they_are():
    assert tensor_type("blk.0.attn_q.bias", (512,), "Q4_0", spec(), False) == "F32"
    assert tensor_type("blk.0.attn_norm.weight", (512,), "F16", spec(), False) == "F32"


def test_with_importance_the_first_down_projections_get_a_low():
    found = types("ffn_down", "Q4_0", has_importance=True)
    assert found == ["Q4_1"] * 4 + ["Q4_0"] * 28
    assert types("ffn_down", "Q5_0", has_importance=True)[:5] == ["Q5_1"] * 4 + ["Q5_0"]
    assert set(types("ffn_down", "Q4_0")) == {"Q4_0"}


def test_a_type_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(BaseModelError, match="type Q4_X is not known: expected one of F32, F16, BF16, Q8_0"):
        check_file_type("Q4_X")
    import gguf

    for name, found in FILE_TYPES.items():
        known = gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]
        assert int(known) == found.number, name
