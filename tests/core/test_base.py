"""What a base must be to be opened."""

import json

import pytest

from families import make_hf_folder
from thimble.core.base import _from_gguf_name, open_base
from thimble.errors import BaseModelError


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
    assert _from_gguf_name("blk.0.weight", spec) is None
    assert _from_gguf_name("blk.0.attn_q.weight", spec) == "model.layers.0.self_attn.q_proj.weight"


def test_a_quick_fingerprint_notices_another_file_and_is_the_same_for_the_same(tmp_path):
    one, two = open_base(make_hf_folder("llama", tmp_path / "a")), open_base(make_hf_folder("qwen2", tmp_path / "b"))
    assert one.quick_fingerprint() == one.quick_fingerprint() != two.quick_fingerprint()
