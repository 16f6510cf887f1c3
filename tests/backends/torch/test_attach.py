"""LoRA on any module: what PEFT computes, step by step, and what a person's own loop relies on."""

import copy
import json
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.pytorch_utils import Conv1D

import thimble


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8, padding_idx=0)
        self.picture = nn.Conv2d(3, 8, (3, 5), stride=(1, 2), padding=(1, 2))
        self.sound = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.turned = Conv1D(8, 8)
        self.dense = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, words, pixels):
        seen = self.picture(pixels).mean((2, 3))
        x = self.norm(self.words(words) + seen).reshape(5, 2, 8)
        x = self.attention(x, x, x)[0] + x
        x = self.turned(self.sound(x.transpose(1, 2)).transpose(1, 2).contiguous())
        return self.head(self.dense(x.mean(1)))


LAYERS = ["words", "picture", "sound", "attention", "turned", "dense"]
PLAIN = ["picture", "turned", "dense"]
WORDS, PIXELS = torch.arange(10), torch.randn(10, 3, 6, 8, generator=torch.Generator().manual_seed(0))
GOAL = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return Net().eval()


def outputs(model):
    with torch.no_grad():
        return model.eval()(WORDS, PIXELS)


def fit(model, steps=20):
    """Losses of a person's own loop. The norms are in eval: in training, PEFT lets those drift that are frozen."""
    model.eval()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = (model(WORDS, PIXELS) - GOAL).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def once(model):
    """A PEFT model in which the update of an attention's out_proj counts once; some versions add it twice."""
    probe = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(2, 1)), peft.LoraConfig(r=1, target_modules=["0"]))
    inner = probe.base_model.model[0].base_layer.out_proj
    nn.init.ones_(inner.lora_B["default"].weight)
    nn.init.ones_(inner.lora_A["default"].weight)
    before = inner.weight.detach().clone()
    merged = probe.merge_and_unload()[0].out_proj.weight
    times = round(((merged - before) / inner.get_delta_weight("default")).mean().item())
    assert times in (1, 2)
    for path, module in model.named_modules():
        if path.endswith("attention.base_layer.out_proj"):
            module.scaling["default"] /= times
    return model


def as_begun(model, start):
    """A PEFT model with A and B as ours begin."""
    with torch.no_grad():
        for path, factors in start.items():
            layer = model.base_model.model.get_submodule(path.replace("attention.", "attention.base_layer."))
            sides = (layer.lora_embedding_A, layer.lora_embedding_B) if factors.layout.is_embedding else None
            a, b = (side["default"] for side in sides or (layer.lora_A, layer.lora_B))
            a, b = (a, b) if sides else (a.weight, b.weight)
            a.copy_(torch.from_numpy(factors.A).reshape(a.shape))
            b.copy_(torch.from_numpy(factors.B).reshape(b.shape))


CASES = {
    "all kinds": {},
    "heads and norms": {"train_also": ["norm", "head"]},
    "biases of layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "rank-stabilised": {"use_rslora": True, "alpha": 8},
    "patterns": {"rank_pattern": {"picture": 2, "attention": 6}, "alpha_pattern": {"words": 5, "dense": 3}},
    "gaussian": {"init": "gaussian", "targets": [*PLAIN, "sound"]},
    "DoRA": {"use_dora": True, "targets": ["picture", "turned", "dense"]},
    "DoRA on words": {"use_dora": True, "targets": ["words", "dense"], "init": "gaussian"},
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_have_the_losses_of_peft_and_both_load_in_the_other(tmp_path, case):
    options = {"targets": LAYERS, "rank": 4, "alpha": 8, **CASES[case]}
    ours, theirs = net(), net()
    before = outputs(ours)
    thimble.attach(ours, **options)
    torch.testing.assert_close(outputs(ours), before, rtol=1e-6, atol=1e-6)
    config = peft.LoraConfig(
        r=4, lora_alpha=options["alpha"], target_modules=options["targets"], bias=options.get("bias", "none"),
        modules_to_save=options.get("train_also"), use_rslora=options.get("use_rslora", False),
        use_dora=options.get("use_dora", False), rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern=options.get("alpha_pattern", {}),
    )  # fmt: skip
    theirs = once(peft.get_peft_model(theirs, config))
    as_begun(theirs, thimble.adapter_of(ours).layers)
    np.testing.assert_allclose(fit(ours), fit(theirs), rtol=0, atol=2e-6)
    result = outputs(ours)
    thimble.save_adapter(thimble.adapter_of(ours), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    opened = once(peft.PeftModel.from_pretrained(net(), tmp_path / "ours"))
    torch.testing.assert_close(outputs(opened), result, rtol=1e-5, atol=1e-6)
    loaded = net()
    thimble.attach(loaded, adapter=tmp_path / "theirs")
    torch.testing.assert_close(outputs(loaded), outputs(theirs), rtol=1e-5, atol=1e-6)
    thimble.detach(loaded)
    thimble.attach(loaded, adapter=tmp_path / "ours")
    torch.testing.assert_close(outputs(loaded), result, rtol=0, atol=0)


@pytest.mark.parametrize("init", ["pissa", "pissa:exact", "milora", "olora", "orthogonal"])
def test_an_init_in_delta_form_leaves_the_model_as_it_is_and_learns_what_peft_learns(tmp_path, init):
    ours, theirs = net(), net()
    before = outputs(ours)
    thimble.attach(ours, targets=["dense", "turned"], rank=4, alpha=8, init=init)
    torch.testing.assert_close(outputs(ours), before, rtol=0, atol=0)
    start = thimble.adapter_of(ours).layers
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["dense", "turned"]))
    as_begun(theirs, start)
    with torch.no_grad():  # as PEFT's own inits do: what A and B begin with is taken out of the base
        for path, factors in start.items():
            layer = theirs.base_model.model.get_submodule(path).base_layer
            product = torch.from_numpy(factors.scale * factors.B @ factors.A)
            layer.weight -= product if path == "dense" else product.t()
    np.testing.assert_allclose(fit(ours), fit(theirs), rtol=0, atol=2e-6)
    thimble.save_adapter(thimble.adapter_of(ours), tmp_path)
    opened = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(outputs(opened), outputs(ours), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init": "pissa"}, {"train_also": ["head"], "bias": "all"}]
)
def test_merged_weights_are_those_of_peft_and_unmerging_gives_every_bit_back(tmp_path, options):
    targets = PLAIN if "use_dora" in options or "init" in options else [*PLAIN, "words", "attention"]
    model = net()
    thimble.attach(model, targets=targets, rank=4, **options)
    fit(model, 5)
    result, base = outputs(model), copy.deepcopy({name: p.data for name, p in net().named_parameters()})
    thimble.save_adapter(thimble.adapter_of(model), tmp_path)
    thimble.merge(model)
    torch.testing.assert_close(outputs(model), result, rtol=1e-5, atol=1e-6)
    theirs = once(peft.PeftModel.from_pretrained(net(), tmp_path)).merge_and_unload().state_dict()
    own = {name: values for name, values in model.state_dict().items() if ".lora." not in name}
    for name, values in own.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-6)
    with thimble.adapter_off(model):
        torch.testing.assert_close(outputs(model), outputs(net()), rtol=0, atol=0)
    thimble.unmerge(model)
    torch.testing.assert_close(outputs(model), result, rtol=0, atol=0)
    thimble.detach(model)
    for name, values in model.named_parameters():
        assert torch.equal(values, base[name]), name


def test_merging_costs_a_model_in_double_precision_none_of_its_digits():
    base, x = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64)), torch.ones(2, 6, dtype=torch.float64)
    model = copy.deepcopy(base)
    thimble.attach(model, rank=2)  # B is zero: the update is none
    thimble.merge(model)
    assert torch.equal(model.eval()(x), base(x))


def test_a_module_trained_whole_with_layers_inside_opens_in_peft(tmp_path):
    class Head(nn.Module):
        """Has a parameter of its own beside its layer."""

        def __init__(self):
            super().__init__()
            self.shift, self.layer = nn.Parameter(torch.zeros(3)), nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) + self.shift

    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Head()).eval()

    model, x = made(), torch.ones(2, 4)
    thimble.attach(model, ["0"], rank=2, train_also=["1"])
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.add_(0.5)
    thimble.save_adapter(thimble.adapter_of(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["1"]
    torch.testing.assert_close(peft.PeftModel.from_pretrained(made(), tmp_path)(x), model(x))
    again = made()
    thimble.attach(again, adapter=tmp_path)
    assert torch.equal(again(x), model(x))


def test_a_layer_in_two_places_has_its_update_in_both():
    def made():
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model, x = made(), torch.ones(2, 4)
    assert list(thimble.attach(model, rank=2).lora) == ["0"]
    with torch.no_grad():
        model[0].lora.B.fill_(0.5)
        expected = made()
        expected[0].weight.add_(model[0].lora.scale * model[0].lora.B @ model[0].lora.A)
        torch.testing.assert_close(model(x), expected(x))
    theirs = peft.get_peft_model(made(), peft.LoraConfig(target_modules=["0", "2"])).base_model.model
    assert type(theirs[2]) is nn.Linear  # as the page says


def test_a_merged_model_can_be_left_alone():
    model = net()
    thimble.attach(model, targets=PLAIN)
    fit(model, 3)
    thimble.merge(model)
    result = outputs(model)
    thimble.detach(model)
    assert model.state_dict().keys() == net().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(outputs(model), result, rtol=0, atol=0)


def test_switched_off_the_model_is_its_base_to_the_bit_and_a_backward_pass_begun_before_goes_on():
    model = net()
    thimble.attach(model, targets=LAYERS, rank=4, train_also=["head"], bias="all")
    fit(model, 3)
    loss = model(WORDS, PIXELS).square().mean()
    with thimble.adapter_off(model), torch.no_grad():
        assert torch.equal(model(WORDS, PIXELS), outputs(net()))
    loss.backward()
    assert model.head[0].weight.grad.abs().sum() > 0
    after = outputs(model)
    assert not torch.equal(after, outputs(net()))


def test_a_shared_weight_that_is_trained_is_switched_off_and_back_once():
    def tied():
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"inputs": nn.Embedding(6, 4), "dense": nn.Linear(4, 4), "outputs": nn.Linear(4, 6, False)}
        )
        model.outputs.weight = model.inputs.weight
        return model

    model = tied()
    thimble.attach(model, ["dense"], train_also=["inputs", "outputs"])
    with torch.no_grad():
        model.inputs.weight += 1
    with thimble.adapter_off(model):
        assert torch.equal(model.outputs.weight, tied().inputs.weight)
    assert torch.equal(model.outputs.weight, tied().inputs.weight + 1)
    adapter = thimble.adapter_of(model)
    np.testing.assert_array_equal(adapter.replaced["inputs.weight"], adapter.replaced["outputs.weight"])
    thimble.detach(model)
    assert torch.equal(model.inputs.weight, tied().inputs.weight)


def test_statistics_of_frozen_norms_never_drift_and_those_that_are_trained_do():
    for train_also, drifts in (((), False), (["norm"], True)):
        model = net()
        before = model.norm.running_mean.clone()
        thimble.attach(model, targets=["dense"], train_also=train_also)
        model.train()
        model(WORDS, PIXELS)
        assert (not torch.equal(model.norm.running_mean, before)) == drifts
        if drifts:
            assert thimble.adapter_of(model).replaced["norm.num_batches_tracked"] == 1


def test_a_copy_is_a_model_of_its_own_and_a_wrapper_finds_the_adapter_inside():
    model = net()
    thimble.attach(model, targets=LAYERS, rank=4)
    fit(model, 2)
    twin, before = copy.deepcopy(model), outputs(model)
    fit(twin, 3)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=0)
    assert not torch.equal(outputs(twin), before)
    thimble.detach(twin)
    torch.testing.assert_close(outputs(twin), outputs(net()), rtol=0, atol=0)
    wrapper = nn.ModuleDict({"model": model})
    assert thimble.adapter_of(wrapper).layers.keys() == thimble.adapter_of(model).layers.keys()


def test_a_state_dict_goes_on_to_the_bit():
    """What a trainer's checkpoint holds: A and B are parameters of the model like others."""

    def begun():
        model = net()
        thimble.attach(model, targets=["dense", "turned"], rank=4, init="pissa", train_also=["head"])
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    def steps(model, optimiser, count):
        for _ in range(count):
            optimiser.zero_grad()
            (model(WORDS, PIXELS) - GOAL).square().mean().backward()
            optimiser.step()

    whole, its = begun()
    steps(whole, its, 6)
    first, its_first = begun()
    steps(first, its_first, 3)
    second, its_second = begun()
    second.load_state_dict(first.state_dict())
    its_second.load_state_dict(its_first.state_dict())
    steps(second, its_second, 3)
    assert thimble.adapter_of(second).identity() == thimble.adapter_of(whole).identity()


def test_pytorchs_own_transformer_feels_its_adapter_in_inference_too():
    """Its fast path calls no layer; with an adapter it is not taken."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, goal, padding = (
        torch.randn(2, 5, 8),
        torch.randn(2, 5, 8),
        torch.tensor([[False] * 5, [False, False, False, True, True]]),
    )
    thimble.attach(model, rank=4)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        (model(x, src_key_padding_mask=padding) * goal).mean().backward()
        optimiser.step()
    with_graph = model(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding)[1, :3], with_graph[1, :3], rtol=1e-5, atol=1e-6
        )
        with thimble.adapter_off(model):
            assert not torch.allclose(model(x)[0], with_graph[0], atol=1e-3)
    assert {path.rsplit(".", 1)[-1] for path in thimble.adapter_of(model).layers} == {
        "self_attn", "out_proj", "linear1", "linear2",
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_a_convolution_with_holes_and_any_padding_is_merged_to_what_it_was(mode):
    """PEFT leaves out dilation and the mode of padding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2, padding=2, padding_mode=mode), nn.Conv1d(4, 4, 1))
    model = nn.Sequential(model[0], nn.Flatten(2), model[1])
    x = torch.randn(2, 3, 7, 7)
    thimble.attach(model, targets="all-conv", rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    before = model(x)
    thimble.merge(model)
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-4, atol=1e-4)


class Positions(nn.Embedding):
    """As OPT's: what it is called with is not what it looks up."""

    def forward(self, mask):
        return super().forward(mask.cumsum(1) + 1)


def test_a_layer_with_a_forward_pass_of_its_own_has_its_weight_replaced():
    torch.manual_seed(0)
    model = nn.Sequential(Positions(9, 4), nn.Linear(4, 4))
    mask = torch.ones(2, 5, dtype=torch.long)
    thimble.attach(model, targets=["0"], rank=2)
    nn.init.normal_(model[0].lora.A)
    with_adapter = model(mask)
    assert with_adapter.requires_grad
    thimble.merge(model)
    torch.testing.assert_close(model.eval()(mask), with_adapter, rtol=1e-5, atol=1e-5)


def test_the_page_says_what_can_be_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "any_model.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "any_model.md", "exec"), {})
    assert peft.PeftConfig.from_pretrained(tmp_path / "my_adapter").modules_to_save == ["3"]


class Reader(nn.Module):
    """As Whisper does, it reads fields of its convolution."""

    def __init__(self):
        super().__init__()
        self.wave = nn.Conv1d(3, 4, 3, stride=2)

    def forward(self, x):
        return self.wave(x[..., : self.wave.stride[0] * 8])


def test_code_that_reads_a_layers_own_fields_goes_on_working():
    model = Reader()
    thimble.attach(model, "all-conv", rank=2)
    assert model(torch.randn(2, 3, 40)).requires_grad
    assert type(model.wave) is nn.Conv1d


@pytest.mark.parametrize("wrap", [lambda part: torch.compile(part, backend="eager"), checkpoint_wrapper])
def test_parts_that_are_wrapped_have_the_names_that_the_plain_model_and_peft_know(wrap, tmp_path):
    body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    parts = {"body": body, "dense": nn.Linear(8, 8), "head": nn.Linear(8, 2)}
    plain = nn.Sequential(OrderedDict(parts))

    def wrapped():
        return nn.Sequential(OrderedDict((name, wrap(copy.deepcopy(part))) for name, part in parts.items()))

    model, x = wrapped(), torch.randn(3, 4)
    found = thimble.attach(model, ["body.0", "dense"], rank=2, train_also=["head"], bias="all")
    assert found.kept_norms == ["body.1"]
    with torch.no_grad():
        for parameter in found.trained.values():
            parameter.add_(0.1)
    thimble.save_adapter(thimble.adapter_of(model), tmp_path / "adapter")
    expected = model.eval()(x)
    again, there = wrapped().eval(), peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    thimble.attach(again, adapter=tmp_path / "adapter")
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(there(x), expected)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_has_the_adapter_of_the_model_inside(wrap):
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    wrapped, x = wrap(plain), torch.ones(3, 4)
    before = wrapped(x)
    thimble.attach(wrapped, ["0", "2"], rank=2)
    with torch.no_grad():
        for low_rank in (plain[0].lora, plain[2].lora):
            low_rank.B.add_(0.5)
    assert list(thimble.adapter_of(wrapped).layers) == ["0", "2"]
    assert not torch.allclose(wrapped(x), before)
    assert torch.equal(wrapped(x), plain(x))
    thimble.detach(wrapped)
    assert torch.equal(wrapped(x), before)
