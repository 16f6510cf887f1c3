"""Adapters of any model on disk: what PEFT writes is read, kept to the byte, and loads in PEFT again."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import thimble
from samples import drawn_by_peft, make_adapter
from stress import TINY
from thimble.core.lowrank import Factors, Layout
from thimble.errors import InputError
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, modules_to_save, save_adapter
from thimble.files.peft_parameters import wrapped
from thimble.models.base import open_base


class Net(nn.Module):
    """A layer of each kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.picture = nn.Conv2d(3, 8, (3, 5))
        self.sound = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dense = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))

    def forward(self, words, pixels):
        seen = self.picture(pixels).mean((2, 3))
        x = self.norm(self.words(words) + seen)[:, None]
        x = self.attention(x, x, x)[0] + x
        x = self.sound(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.dense(x[:, 0]))


LAYERS = ["words", "picture", "sound", "attention", "dense"]
INPUTS = (torch.arange(10), torch.randn(10, 3, 6, 7, generator=torch.Generator().manual_seed(0)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def trained_by_peft(folder, targets=None, **options):
    """A PEFT adapter of the net, its numbers drawn at random; returns what the model computes with it."""
    options = {"modules_to_save": ["norm", "head"], **options}
    config = peft.LoraConfig(r=4, target_modules=targets or LAYERS, **options)
    return drawn_by_peft(net(), config, folder)(*INPUTS).detach()


CASES = {
    "heads and norms": {},
    "all biases": {"bias": "all"},
    "biases of layers": {"bias": "lora_only"},
    "no heads": {"modules_to_save": None},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True, "targets": ["words", "picture", "dense"], "modules_to_save": None},
    "ranks of some": {"rank_pattern": {"picture": 2, "attention": 3}, "alpha_pattern": {"words": 3}},
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_read_and_loads_in_peft_again(tmp_path, case):
    expected = trained_by_peft(tmp_path / "theirs", **CASES[case])
    save_adapter(load_adapter(tmp_path / "theirs"), tmp_path / "ours")
    save_adapter(load_adapter(tmp_path / "ours"), tmp_path / "again")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    theirs, ours = (load_file(tmp_path / who / WEIGHTS_FILE) for who in ("theirs", "ours"))
    copies = {name for name in theirs if ".modules_to_save." in name or ".original_module." in name}
    assert ours.keys() == theirs.keys() - copies
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype
        np.testing.assert_array_equal(values, theirs[name])
    model = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(model(*INPUTS), expected, rtol=0, atol=0)


def test_the_config_says_what_peft_has_to_wrap(tmp_path):
    trained_by_peft(tmp_path / "theirs", bias="all")
    adapter = load_adapter(tmp_path / "theirs")
    save_adapter(adapter, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert (config["bias"], config["task_type"]) == ("all", None)
    assert config["target_modules"] == sorted(LAYERS)  # and not attention.out_proj, which PEFT adapts with attention
    assert config["modules_to_save"] == modules_to_save(adapter) == ["head.0", "head.1", "norm"]
    assert adapter.layers["attention.out_proj"].shape == (8, 8)
    assert adapter.layers["picture"].layout == Layout((3, 5))
    assert adapter.layers["sound"].layout == Layout((3,), 2)
    assert adapter.layers["sound"].B.shape == (8, 2)
    assert adapter.layers["words"].layout.is_embedding
    assert adapter.replaced["norm.num_batches_tracked"].dtype == np.int64
    assert "attention.out_proj.bias" in adapter.replaced


def test_contents_alone_make_the_identity(tmp_path):
    trained_by_peft(tmp_path, targets=["picture", "dense"])
    one, two = load_adapter(tmp_path), load_adapter(tmp_path)
    assert one.identity() == two.identity()
    two.replaced["head.0.bias"][0] += 1
    assert one.identity() != two.identity()


def test_a_layer_inside_of_another_is_named_by_way_of_it():
    assert wrapped("a.b.bias", {"a": 1, "a.b": 1}) == "a.base_layer.b.base_layer.bias"
    assert wrapped("a.b", {"a.b": 1, "a.c": 1}) == "a.b"


def test_a_factor_of_another_size_is_no_factor():
    with pytest.raises(ValueError, match="expected"):
        Factors(np.ones((4, 6), "f4"), np.ones((8, 4), "f4"), 1.0, None, Layout((3,), 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"targets": ["picture", "dense"], "modules_to_save": None},
            "factors of convolutions: picture, which no",
        ),
        ({"targets": ["words"], "modules_to_save": None}, "factors of embeddings: words"),
        ({"targets": ["dense"]}, r"modules trained whole \(modules_to_save\): head.0, head.1, norm"),
        ({"targets": ["dense"], "modules_to_save": None, "bias": "lora_only"}, "trained biases: dense.bias"),
    ],
)
def test_commands_refuse_by_name_what_they_cannot_run(tmp_path, change, message):
    trained_by_peft(tmp_path / "theirs", **change)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    calls = [
        lambda: thimble.plan(rows, base=str(TINY), init=f"adapter:{tmp_path / 'theirs'}"),
        lambda: thimble.export(tmp_path / "theirs", to="gguf", base=str(TINY), out=str(tmp_path / "x.gguf")),
        lambda: thimble.chat(adapter=[str(tmp_path / "theirs")], base=str(TINY)),
        lambda: thimble.merge(tmp_path / "theirs", truncate=0.9, out=str(tmp_path / "merged")),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message):
            call()
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_text_is_written_as_ever(tmp_path):
    adapter = make_adapter(open_base(TINY))
    save_adapter(adapter, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["bias"], config["modules_to_save"], config["task_type"]) == ("none", None, "CAUSAL_LM")


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: f"module._orig_mod.{name}",
    ],
    ids=["compiled", "parallel", "compiled before", "compiled by blocks", "both"],
)
def test_an_adapter_that_was_saved_from_within_a_wrapper_of_torch_is_that_adapter(change, tmp_path):
    adapter = make_adapter(open_base(TINY))
    save_adapter(adapter, tmp_path / "plain")
    save_adapter(adapter, tmp_path / "wrapped")
    path = tmp_path / "wrapped" / WEIGHTS_FILE
    save_file({change(name): values for name, values in load_file(path).items()}, path)
    save_adapter(load_adapter(tmp_path / "wrapped"), tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (tmp_path / "plain" / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_an_adapter_whose_head_was_not_kept_is_not_taken_for_one_that_writes_text(task, tmp_path):
    save_adapter(make_adapter(open_base(TINY)), tmp_path / "theirs")
    config = tmp_path / "theirs" / CONFIG_FILE
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": task}))
    for call in (
        lambda: thimble.export(tmp_path / "theirs", to="gguf", base=str(TINY), out=str(tmp_path / "x.gguf")),
        lambda: thimble.export(tmp_path / "theirs", to="peft", base=str(TINY), out=str(tmp_path / "x")),
        lambda: thimble.chat(adapter=[str(tmp_path / "theirs")], base=str(TINY)),
    ):
        with pytest.raises(InputError, match=f"was trained for PEFT's {task} and holds no head"):
            call()
    assert not {path.name for path in tmp_path.iterdir()} & {"x", "x.gguf"}
    save_adapter(load_adapter(tmp_path / "theirs"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG_FILE).read_text())["task_type"] == task
