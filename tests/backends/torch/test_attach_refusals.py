"""What attach refuses or tells: never a silent no-op, and everything that is wrong at once."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import thimble
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import AdapterError, InputError, RunError


class Blocks(torch.Tensor):
    """A weight kept in a form of its own, as libraries that quantise make them: it has no storage."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    @classmethod
    def __torch_dispatch__(cls, operation, kinds, args=(), kwargs=None):
        return Blocks(args[0])


def in_blocks():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(Blocks(layer.weight), requires_grad=False)
    return layer


class Odd(nn.Module):
    """A module of each kind that cannot be adapted."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(4, 4)
        self.norm = nn.LayerNorm(4)
        self.act = nn.ReLU()
        self.up = nn.ConvTranspose1d(4, 4, 3)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.deep = nn.Conv1d(4, 4, 3, groups=4)
        self.normed = weight_norm(nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6)
        self.own = nn.Linear(4, 4)
        self.own.lora = nn.Identity()
        self.lazy = nn.LazyLinear(4)
        self.renormed = nn.Embedding(5, 4, max_norm=1.0)
        self.bags = nn.EmbeddingBag(5, 4)
        self.bits = nn.Linear(4, 4)
        self.bits.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
        self.eighths = nn.Linear(4, 4)
        self.eighths.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.blocks, self.blocks_too = in_blocks(), in_blocks()
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.renormed.weight
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight


REASONS = {
    "memory": "is an LSTM, which multiplies its weights inside of one call",
    "norm": "is a LayerNorm, which has no matrix to adapt: train it whole with train_also",
    "act": "is a ReLU, which has no matrix to adapt",
    "up": "is a ConvTranspose1d: LoRA is made for Linear, Conv1D, Conv1d",
    "block": "is a Sequential, which holds layers and is none: name them, such as 0",
    "deep": "is a convolution in 4 groups: expected a rank that they divide, not 2",
    "attention": "is a MultiheadAttention whose q, k and v have weights of their own",
    "attention.out_proj": "is used by attention without being called: name attention, which adapts both",
    "own": "has an attribute 'lora' of its own",
    "lazy": "is a LazyLinear that has no shape before its first batch",
    "renormed": "renormalises its weight at each call",
    "bags": "is an EmbeddingBag: LoRA is made for",
    "bits": "is a Linear with a weight of uint8: expected floats",
    "eighths": "is a Linear with a weight of float8_e4m3fn: expected floats of 16 bits or more",
    "blocks": "is a Linear whose weight is a Blocks: expected a plain tensor of floats",
    "one": "shares its weight with two.weight",
    "tied": "shares its weight with renormed.weight",
    "owm": "which no module of the model is called: did you mean own?",
}


def test_all_that_cannot_be_adapted_is_named_with_its_reason_at_once_and_nothing_is_changed():
    model = Odd()
    names = list(model.state_dict())
    with pytest.raises(InputError) as caught:
        thimble.attach(model, targets=list(REASONS), rank=2, train_also=[])
    told = {name: [p for p in caught.value.problems if f"targets names {name!r}" in p] for name in REASONS}
    for name, reason in REASONS.items():
        assert told[name], name
        assert any(reason in problem for problem in told[name]), told[name]
    assert list(model.state_dict()) == names
    with pytest.raises(InputError, match="normed is a ParametrizedLinear whose weight is computed at each call"):
        thimble.attach(model, targets=["normed"], rank=2)


def test_options_by_other_names_are_answered_with_the_right_ones():
    with pytest.raises(InputError) as caught:
        thimble.attach(nn.Linear(2, 2), r=8, rnak=8, modules_to_save=["x"], colour=3)
    hints = [problem.partition(": ")[2] for problem in caught.value.problems]
    assert hints[:3] == ["did you mean rank?", "did you mean rank?", "did you mean train_also?"]
    assert hints[3].startswith("it has targets, train_also, rank, alpha")


def test_names_and_options_are_told_together():
    with pytest.raises(InputError) as caught:
        thimble.attach(nn.Sequential(nn.Linear(2, 2)), ["frst"], rank=0, init="eva", train_also=["9"])
    starts = [problem.split(" names ")[0].split("=")[0] for problem in caught.value.problems]
    assert starts == ["rank", "init", "train_also", "targets"]


def test_options_are_checked_all_at_once():
    with pytest.raises(InputError) as caught:
        thimble.attach(
            nn.Linear(2, 2), rank=0, alpha=float("nan"), dropout=1, bias="some", init="eva", targets=[],
            rank_pattern={"x": 1.5}, alpha_pattern={"y": -1},
        )  # fmt: skip
    starts = [problem.split("=")[0] for problem in caught.value.problems]
    assert starts == [
        "rank", "alpha", "rank_pattern['x']", "alpha_pattern['y']", "dropout", "bias", "targets", "init",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "all-conv"}, "targets is all-conv, of which the model has none: it holds Linear .0."),
        ({"targets": "([a-z"}, "is called, and is no regular expression"),
        ({"targets": ["0"], "rank_pattern": {"9": 4}}, "rank_pattern names '9', which no module"),
        ({"targets": ["0"], "train_also": ["9"]}, "train_also names '9', which no module"),
        ({"targets": ["0"], "train_also": ["1"]}, "train_also names '1': 1 has no parameters to train"),
        ({"targets": ["0"], "train_also": ["0"]}, "targets names '0': 0 is trained whole too"),
        ({"targets": ["0"], "train_also": "2"}, "train_also='2': expected a list of names"),
        (
            {"targets": ["0"], "rank": 5, "init": "pissa"},
            r"rank=5: expected at most 3 for 0, which is \(out, in\) \(3, 4\)",
        ),
        ({"targets": ["0"], "rank": 3, "init": "orthogonal"}, "rank=3: expected a multiple of 2 for 0"),
    ],
)
def test_what_a_model_of_three_layers_refuses(options, message):
    with pytest.raises(InputError, match=message):
        thimble.attach(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), **options)


def test_a_model_without_anything_to_adapt_says_what_it_holds():
    with pytest.raises(
        InputError, match=r"all-linear, of which the model has none: it holds LSTM \(0\); 0 is an LSTM, "
    ):
        thimble.attach(nn.Sequential(nn.LSTM(4, 4)))


def test_a_model_that_is_a_single_layer_has_no_name_to_adapt_it_by():
    for layer, told in (
        (nn.Linear(4, 4), r"the model itself is a Linear, without a name: call attach on torch.nn.Sequential\(model\)"),
        (nn.LSTM(4, 4), "the model itself is an LSTM, which multiplies its weights inside of one call"),
    ):
        with pytest.raises(InputError, match=told):
            thimble.attach(layer)


def test_of_a_kind_what_cannot_be_adapted_is_left_out_and_told():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    found = thimble.attach(model, targets="all-conv", rank=4)
    assert sorted(found.lora) == ["0", "2"]
    assert "left out: 1 is a convolution in 8 groups" in str(found)


def test_tied_heads_are_left_out_of_all_linear_and_refused_by_name():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8)
    model = GPT2LMHeadModel(config)
    with pytest.raises(InputError, match=r"lm_head shares its weight with transformer.wte.weight"):
        thimble.attach(model, targets=["lm_head"])
    with pytest.raises(InputError, match="train_also names lm_head, whose weight is transformer.wte.weight too"):
        thimble.attach(model, train_also=["lm_head"])
    found = thimble.attach(model, train_also=["lm_head", "wte"])
    assert "lm_head" not in found.lora
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(found.whole)
    thimble.detach(model)
    assert "lm_head is the output layer" in str(thimble.attach(model))


def test_names_are_those_of_peft():
    """The end of a path, a list of them, or an expression for whole paths; containers match by the way."""
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=20)

    def adapted(targets):
        return sorted(thimble.attach(BertForMaskedLM(config), targets).lora)

    queries = [f"bert.encoder.layer.{n}.attention.self.query" for n in range(2)]
    assert adapted(["query"]) == adapted("query") == adapted(r".*\.query") == adapted("*.query") == queries
    assert adapted(["self.query", "1.attention.self.key"]) == sorted([*queries, queries[1].replace("query", "key")])
    assert adapted(r".*layer\.1.*(query|self)") == queries[1:]
    with pytest.raises(InputError, match="is a BertSelfAttention, which holds layers and is none: name them, such as"):
        adapted(["self"])


class Shortcut(nn.Module):
    """Multiplies with the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.one(x), self.two.weight)


def test_a_layer_that_is_never_called_is_told_after_the_first_step():
    model = Shortcut()
    thimble.attach(model, rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(torch.ones(1, 4))
    model.train()
    with pytest.warns(UserWarning, match="the first step did not call 1 adapted layer of 2, .*: two"):
        model(torch.ones(1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 4))


def test_an_optimiser_that_was_made_before_is_told():
    model = nn.Sequential(nn.Linear(4, 4))
    optimiser = torch.optim.AdamW(model.parameters())
    thimble.attach(model, rank=2)
    model(torch.ones(1, 4)).sum().backward()
    optimiser.step()
    with pytest.warns(UserWarning, match="none of the adapter's parameters has changed"):
        thimble.adapter_of(model)


def train_once(model, optimiser):
    model(torch.ones(1, 4)).sum().backward()
    optimiser.step()


def test_a_head_that_learns_does_not_hide_that_the_adapter_does_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimiser = torch.optim.AdamW(model.parameters())
    thimble.attach(model, ["0"], rank=2, train_also=["1"])
    train_once(model, optimiser)
    with pytest.warns(UserWarning, match="none of the adapter's parameters has changed .* make the optimiser after"):
        thimble.adapter_of(model)


def test_no_optimiser_that_trains_the_adapter_is_blamed():
    for optimiser in (lambda some: torch.optim.AdamW(some, fused=True), torch.optim.SGD, torch.optim.Adadelta):
        model = nn.Sequential(nn.Linear(4, 4))
        thimble.attach(model, rank=2)
        train_once(model, optimiser([parameter for parameter in model.parameters() if parameter.requires_grad]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            thimble.adapter_of(model)


def test_a_checkpoint_that_stops_the_gradient_is_told():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=True))

    model = Net()
    thimble.attach(model, ["body"], rank=2, train_also=["head"])
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        train_once(model, torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad))
    with pytest.warns(UserWarning, match="use_reentrant=True stops them behind a frozen beginning"):
        thimble.adapter_of(model)


def test_a_model_wrapped_for_several_processes_is_refused():
    kind = nn.parallel.DistributedDataParallel
    wrapped = kind.__new__(kind)  # without the processes that its constructor looks for
    with pytest.raises(InputError, match=r"DistributedDataParallel, .* call thimble.attach\(model\) first"):
        thimble.attach(wrapped, rank=2)


def test_steps_out_of_order_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    for step in (thimble.adapter_of, thimble.merge, thimble.unmerge, thimble.detach):
        with pytest.raises(InputError, match=r"Sequential has no adapters attached: .* call thimble.attach"):
            step(model)
    thimble.attach(model, rank=2)
    with pytest.raises(InputError, match="has an adapter already"):
        thimble.attach(model, rank=2)
    with pytest.raises(InputError, match="is not merged"):
        thimble.unmerge(model)
    thimble.merge(model)
    with pytest.raises(InputError, match="merged already"):
        thimble.merge(model)
    with pytest.raises(RunError, match="merged into the weights, where it cannot be trained"):
        model(torch.ones(1, 4))
    with torch.no_grad():
        model(torch.ones(1, 4))
    with pytest.raises(InputError, match="takes a torch.nn.Module, not str"):
        thimble.attach("model")


def test_a_convolution_in_groups_is_not_merged_and_a_broken_update_neither():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 1))
    thimble.attach(model, "all-conv", rank=2)
    with pytest.raises(InputError, match="0 cannot be merged: the weight of a convolution in groups"):
        thimble.merge(model)
    thimble.detach(model)
    thimble.attach(model, ["1"], rank=2)
    nn.init.constant_(model[1].lora.B, float("inf"))
    before = model[1].weight.clone()
    with pytest.raises(RunError, match="merged weights of 1 are NaN or Inf: nothing was merged"):
        thimble.merge(model)
    assert torch.equal(model[1].weight, before)


def test_an_adapter_of_another_model_is_refused_with_every_misfit(tmp_path):
    def factors(out, width, rank=2):
        return Factors(np.zeros((rank, width), "f4"), np.zeros((out, rank), "f4"), 1.0)

    layers = {"0": factors(4, 9), "1": factors(4, 4), "5": factors(4, 4), "2": factors(2, 4)}
    adapter = Adapter(layers, "some/base", replaced={"2.weight": np.zeros((3, 3), "f4"), "9.bias": np.zeros(3, "f4")})
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(AdapterError) as caught:
        thimble.attach(model, rank=4, adapter=adapter)
    told = "\n".join(caught.value.problems)
    for line in (
        "give no other option but dropout",
        "layer 0 is for (out, in) (4, 9), and the model's is (4, 4)",
        "layer 1 is a ReLU, which has no matrix to adapt",
        "layer 5 is not in the model",
        "replaces 2.weight by one of shape (3, 3), which is (2, 4) in the model",
        "replaces 9.bias by one of shape (3,), which the model lacks; it was made for some/base",
    ):
        assert line in told, told
    thimble.save_adapter(Adapter({"0": factors(4, 4)}), tmp_path)
    found = thimble.attach(model, adapter=tmp_path, dropout=0.5)
    assert found.lora["0"].dropout.p == 0.5


def test_what_is_printed_says_what_is_trained():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Bilinear(2, 2, 2))
    text = str(thimble.attach(model, ["0"], rank=2, train_also=["2"]))
    assert text.splitlines() == [
        "LoRA on 1 weight: 1 x Linear",
        "26 of 64 parameters are trained (40.62 %)",
        "trained themselves: 2.bias, 2.weight",
        "1 frozen norm keeps its running statistics, in train() too: 1",
        "frozen, and of no kind that LoRA takes: Bilinear (8 parameters)",
    ]
