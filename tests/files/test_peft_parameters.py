"""Adapters of parameters that are no layer's weight: what PEFT writes is read, kept to the byte, and loads again."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import thimble
from samples import drawn_by_peft
from stress import TINY
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors, delta, of_each_expert, of_experts
from thimble.errors import AdapterError, InputError
from thimble.files.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from thimble.files.peft_parameters import SETTING, in_order
from thimble.training.card import about_adapter

EXPERTS, WIDTH, INNER = 3, 6, 4
INPUT = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Two layers of each expert, all of which read the same; the second parameter of PEFT's order comes first here."""

    def __init__(self, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        self.up_proj = nn.Parameter(torch.randn(down if is_transposed else up))
        self.down_proj = nn.Parameter(torch.randn(up if is_transposed else down))

    def forward(self, x):
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up_proj, self.down_proj))
        return (torch.relu(x @ up) @ down).sum(0)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return x @ self.weight.T


class Net(nn.Module):
    def __init__(self, is_transposed=False):
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.router = Router()
        self.experts = Experts(is_transposed)

    def forward(self, x):
        return self.experts(self.router(self.dense(x)))


def net(is_transposed=False):
    torch.manual_seed(0)
    return Net(is_transposed).eval()


def trained_by_peft(folder, is_transposed=False, **options):
    """A PEFT adapter of the net, its numbers drawn at random; returns what the model computes with it."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": [], **options})
    return drawn_by_peft(net(is_transposed), config, folder)(INPUT).detach()


BOTH = ["experts.up_proj", "experts.down_proj"]
CASES = {
    "experts": {"target_parameters": BOTH},
    "one of two": {"target_parameters": ["experts.down_proj"]},
    "names alone": {"target_parameters": ["up_proj", "down_proj"]},
    "stored as (in, out)": {"target_parameters": BOTH, "is_transposed": True},
    "of two axes": {"target_parameters": ["router.weight", *BOTH]},
    "with layers": {"target_parameters": BOTH, "target_modules": ["dense"], "rank_pattern": {"dense": 3}},
    "rank-stabilised": {"target_parameters": BOTH, "use_rslora": True},
    "ranks of some": {"target_parameters": BOTH, "rank_pattern": {"up_proj": 4}, "alpha_pattern": {"down_proj": 3}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_read_and_loads_in_peft_again(tmp_path, case):
    expected = trained_by_peft(tmp_path / "theirs", **CASES[case])
    save_adapter(load_adapter(tmp_path / "theirs"), tmp_path / "ours")
    save_adapter(load_adapter(tmp_path / "ours"), tmp_path / "again")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    theirs, ours = (load_file(tmp_path / who / WEIGHTS_FILE) for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name])
    model = peft.PeftModel.from_pretrained(net(CASES[case].get("is_transposed", False)), tmp_path / "ours").eval()
    torch.testing.assert_close(model(INPUT), expected, rtol=0, atol=1e-5)  # sums of one order or another
    assert not torch.allclose(net(CASES[case].get("is_transposed", False))(INPUT), expected)


def test_the_update_of_experts_is_that_of_peft(tmp_path):
    trained_by_peft(tmp_path, target_parameters=BOTH)
    model = peft.PeftModel.from_pretrained(net(), tmp_path)
    adapter = load_adapter(tmp_path)
    outer = model.base_model.model.experts
    for name, wrapper in (("experts.down_proj", outer), ("experts.up_proj", outer.base_layer)):
        theirs = wrapper.get_delta_weight("default").detach()
        factors = adapter.layers[name]
        assert factors.layout.experts == EXPERTS
        np.testing.assert_allclose(delta(factors), theirs.flatten(0, 1).numpy(), atol=1e-6)
        again = of_experts(of_each_expert(factors))
        assert (again.layout, again.scale) == (factors.layout, factors.scale)
        np.testing.assert_array_equal(again.A, factors.A)
        np.testing.assert_array_equal(again.B, factors.B)


def test_parameters_named_in_another_order_than_the_model_has_them_are_put_in_its_order(tmp_path):
    expected = trained_by_peft(tmp_path / "theirs", target_parameters=BOTH[::-1])
    thought = load_adapter(tmp_path / "theirs")
    assert thought.settings[SETTING] == tuple(BOTH[::-1])
    adapter = in_order(thought, BOTH)
    assert adapter.settings[SETTING] == tuple(BOTH)
    assert adapter.layers["experts.up_proj"].shape == (INNER, WIDTH)
    assert in_order(adapter, BOTH) is adapter
    save_adapter(adapter, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(model(INPUT), expected, rtol=0, atol=1e-5)


def test_scales_by_names_in_another_order_are_refused(tmp_path):
    trained_by_peft(tmp_path, target_parameters=BOTH[::-1], alpha_pattern={"up_proj": 3})
    with pytest.raises(AdapterError, match=r"write them in the order of the model, experts.up_proj, experts.down"):
        in_order(load_adapter(tmp_path), BOTH)


def with_fields(folder, **fields):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({SETTING: ["experts.up_proj"]}, "experts has LoRA for 2 of its parameters, and target_parameters names "
         "experts.up_proj: expected as many"),
        ({SETTING: None}, "experts has LoRA for 2 of its parameters, and target_parameters names none of its"),
        ({SETTING: [*BOTH, "router.weight"]}, "target_parameters names router.weight, for which it holds no LoRA"),
        ({"r": 5}, "experts.up_proj has 6 rows in its A: expected 5 for each of its experts"),
        ({"use_dora": True}, "use_dora is true with target_parameters"),
        *[({SETTING: wrong}, f"{SETTING} is .*: expected at most") for wrong in ("all", True, 3, {"a": 1})],
        ({SETTING: [1]}, f"{SETTING} names 1: expected the name of a parameter"),
        ({SETTING: ["a b"]}, f"{SETTING} names .*a b.*: expected the name of a parameter"),
    ],
)  # fmt: skip
def test_what_does_not_say_which_parameter_is_meant_is_refused(tmp_path, fields, told):
    trained_by_peft(tmp_path, target_parameters=BOTH)
    with_fields(tmp_path, **fields)
    with pytest.raises(AdapterError, match=told):
        load_adapter(tmp_path)


def test_a_wrapper_of_nothing_is_no_layer(tmp_path):
    trained_by_peft(tmp_path, target_modules=["dense"])
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    inner = {name.replace("dense.", "dense.base_layer."): value for name, value in tensors.items()}
    save_file(inner, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="dense has LoRA for 1 of its parameters, and target_parameters names none"):
        load_adapter(tmp_path)


def test_experts_have_one_rank():
    with pytest.raises(ValueError, match="expected one rank for each of 3 experts"):
        Factors(np.ones((4, 2), "f4"), np.ones((2, 4), "f4"), 1.0, layout=of_experts([FLAT] * 3).layout)
    assert Adapter({"a": of_experts([FLAT] * 3)}).num_parameters == 12


FLAT = Factors(np.ones((1, 2), "f4"), np.ones((2, 1), "f4"), 1.0)


def test_each_expert_is_inspected_for_itself(tmp_path):
    trained_by_peft(tmp_path, target_parameters=BOTH)
    model = peft.PeftModel.from_pretrained(net(), tmp_path).base_model.model.experts
    found = {update.layer: update.norm for update in thimble.inspect(tmp_path).updates}
    for name, wrapper in (("down_proj", model), ("up_proj", model.base_layer)):
        for expert, update in enumerate(wrapper.get_delta_weight("default").detach()):
            assert found[f"experts.{expert}.{name}"] == pytest.approx(float(update.norm()), rel=1e-5)


def test_commands_refuse_by_name_what_they_cannot_run(tmp_path):
    trained_by_peft(tmp_path / "theirs", target_parameters=BOTH)
    held = r"holds factors of parameters \(target_parameters\): experts.up_proj, experts.d"
    out, lacks = str(tmp_path / "out"), "which the base lacks"
    for call, message in (
        (lambda: thimble.export(tmp_path / "theirs", base=str(TINY), out=f"{out}.gguf"), lacks),
        (lambda: thimble.chat(adapter=[str(tmp_path / "theirs")], base=str(TINY)), lacks),
        (lambda: thimble.merge(tmp_path / "theirs", truncate=0.9, out=out), held),
        (lambda: thimble.inspect(tmp_path / "theirs", base=str(TINY)), "more than linear layers of a text model"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_an_adapter_made_of_layers_alone_keeps_their_order(tmp_path):
    expected = trained_by_peft(tmp_path / "theirs", target_parameters=BOTH)
    save_adapter(Adapter(load_adapter(tmp_path / "theirs").layers, settings={"task_type": None}), tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(model(INPUT), expected, rtol=0, atol=1e-5)


def test_the_rank_on_a_card_is_that_of_an_expert(tmp_path):
    trained_by_peft(tmp_path, target_parameters=BOTH)
    assert set(about_adapter(load_adapter(tmp_path), None).ranks) == {2}
