"""Where A and B of modules begin: found on the rows of the task, made of weights, or of what int8 loses."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn import functional

import thimble
from encoders import sentences, write_encoder, write_rows
from media_files import write_picture
from thimble.backends.module_session import ModuleBatch
from thimble.backends.torch.kept_int8 import KeptInt8, decoded, rounded
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.adapter import Adapter
from thimble.core.inits import BUILDERS, LayerData
from thimble.core.method import INITS
from thimble.errors import InputError

SIZE = 12
NET = """
import torch
from torch import nn

class Net(nn.Module):
    preprocessing = {"size": 12, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.mix, self.head = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x):
        x = self.grouped(self.conv(x).relu()).relu().mean((2, 3))
        return self.head(self.mix(x).relu())

def build():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, label in enumerate(["cat", "dog"] * 16):
        write_picture(folder / label / f"{number}.png", number, (SIZE, SIZE))
    return folder


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(NET)
    return f"{path}:build"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def opened(module, targets, batches=None, loss="labels", head="", **options):
    session = ModuleTorchSession(module, loss, head)
    session.attach(targets, **options)
    return session


def batch_of(inputs, labels):
    return ModuleBatch({"x": inputs}, {"labels": labels}, range(len(labels)))


# ---- what is seen of a layer ----------------------------------------------------------------------------------------


def made_net():
    scope = {}
    exec(NET, scope)
    return scope["build"]().eval()


def test_inputs_and_gradients_of_a_layer_are_those_that_autograd_knows():
    module, random = made_net(), np.random.default_rng(0)
    inputs = random.standard_normal((6, 3, SIZE, SIZE)).astype(np.float32)
    labels = np.array([0, 1, 0, 1, 1, 0])
    bare = made_net()
    functional.cross_entropy(bare(torch.from_numpy(inputs)), torch.from_numpy(labels), reduction="sum").backward()
    session = opened(module, ["conv", "mix"], rank=2, train_also=["head"])
    batches = [batch_of(inputs[:4], labels[:4]), batch_of(inputs[4:], labels[4:])]
    sketches = session.gradient_sketches(batches, {"conv": 8, "mix": 8}, False, 0, 0)
    for path, gradient in (("conv", bare.conv.weight.grad.flatten(1)), ("mix", bare.mix.weight.grad)):
        left, values, right = np.linalg.svd(gradient.numpy(), full_matrices=False)
        found = sketches[path]
        np.testing.assert_allclose(found.values[: len(values)], values, rtol=1e-3, atol=1e-5)
        product = found.left * found.values @ found.right
        np.testing.assert_allclose(product, gradient.numpy(), atol=1e-4)
    moments = {paths[0]: of for paths, of in session.input_moments(batches)}
    with torch.no_grad():
        padded = functional.pad(torch.from_numpy(inputs), (1, 1, 1, 1), mode="reflect")
        patches = functional.unfold(padded, 3, stride=2).transpose(1, 2).reshape(-1, 27)
    np.testing.assert_allclose(moments["conv"].square, (patches.T @ patches).numpy(), rtol=1e-4, atol=1e-3)
    assert moments["conv"].count == len(patches) == 6 * 36
    assert not any(bool(parameter.grad is not None) for parameter in module.parameters())


def test_tokens_that_fill_up_short_texts_are_left_out(encoder):
    module = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2).eval()
    session = opened(module, ["query"], rank=2, train_also=["classifier"])
    ids = np.array([[2, 20, 21, 3], [2, 22, 3, 0]])
    mask = (ids != 0).astype(np.int64)
    batch = ModuleBatch({"input_ids": ids, "attention_mask": mask}, {"labels": np.array([0, 1])}, [0, 1])
    counts = {paths[0]: of.count for paths, of in session.input_moments([batch])}
    assert set(counts.values()) == {7}


# ---- as PEFT has them -----------------------------------------------------------------------------------------------


def test_eva_spans_what_that_of_peft_spans(encoder):
    """PEFT sees the same inputs in an incremental PCA, until two batches in a row give the same directions."""
    texts = [row["text"] for row in sentences()][::2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    rows = [{**tokenizer(texts[start::3], padding=True, return_tensors="pt")} for start in range(3)]
    model = transformers.AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    config = peft.LoraConfig(
        r=4, target_modules=["query", "output.dense"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, use_label_mask=False),
    )  # fmt: skip
    theirs = peft.get_peft_model(transformers.AutoModel.from_pretrained(encoder, add_pooling_layer=False), config)
    peft.initialize_lora_eva_weights(theirs, dataloader=rows, show_progress_bar=False)
    session = opened(model, ["query", "output.dense"], loss="pairs", rank=4)
    batches = [ModuleBatch({name: values.numpy() for name, values in row.items()}, {}, range(20)) for row in rows]
    for (path,), moments in session.input_moments(batches):
        shape = next(layer.shape for layer in session.layers if layer.path == path)
        found = BUILDERS["eva:centred"](LayerData(path, shape, 4, 1.0, moments=moments)).A
        other = theirs.base_model.model.get_submodule(path).lora_A["default"].weight.detach().numpy()
        ours = np.linalg.qr(found.T)[0]
        shares = np.linalg.svd(ours.T @ np.linalg.qr(other.T)[0])[1]
        assert shares[:3].min() > 0.95, (path, shares)  # the last moves still when PEFT stops


@pytest.mark.parametrize(("init", "theirs"), [("pissa:exact", "pissa"), ("olora", "olora")])
def test_twenty_steps_follow_those_of_peft(init, theirs, encoder):
    """PEFT takes the piece out of the weight, and here the difference is trained."""
    torch.manual_seed(0)
    ids, labels = torch.randint(5, 30, (8, 6)), torch.arange(8) % 2
    ours, other = (transformers.AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval() for _ in range(2))
    thimble.attach(ours, ["query", "value"], rank=4, alpha=8, init=init)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], init_lora_weights=theirs)
    other = peft.get_peft_model(other, config)

    def losses(model):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, weight_decay=0.0)
        for _ in range(20):
            loss = functional.cross_entropy(model(input_ids=ids).last_hidden_state[:, 0, :2], labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield float(loss.detach())

    np.testing.assert_allclose(list(losses(ours)), list(losses(other)), atol=1e-4)


# ---- from the command -----------------------------------------------------------------------------------------------

FROM_DATA = [
    name for name, init in INITS.items() if init.needs in ("inputs", "gradients") and not init.uses_general_text
]


@pytest.mark.parametrize("init", ["eva", "corda", "gradient:lora-ga", "gradient:lora-one", "weighted-pca"])
def test_a_run_begins_at_its_base_and_is_taken_up_to_the_bit(init, pictures, net, tmp_path):
    options = {
        "base": net, "targets": ["conv", "mix"], "rank": 2, "max_steps": 4, "batch_rows": 8, "valid_split": 0.25,
        "learning_rate": 0.01, "checkpoint_every_steps": 1, "init": init,
    }  # fmt: skip
    whole = thimble.train(pictures, out=str(tmp_path / "whole"), **options)
    assert (whole.loss_before == whole.loss_base) is not INITS[init].changes_base
    steps = []
    cut = thimble.train(
        pictures, out=str(tmp_path / "cut"), **options, should_stop=lambda: len(steps) == 2,
        on_event=lambda event: steps.append(event) if event.kind == "step" else None,
    )  # fmt: skip
    assert cut.status == "interrupted"
    thimble.train(pictures, out=str(tmp_path / "cut"), resume=True)
    names = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_every_init_from_data_is_there(pictures, net, tmp_path):
    begins = set()
    for number, init in enumerate(FROM_DATA):
        out = tmp_path / str(number)
        thimble.train(pictures, base=net, targets="mix", rank=2, max_steps=1, batch_rows=8, out=str(out), init=init)
        begins.add((out / "start" / "adapter_model.safetensors").read_bytes())
    assert len(begins) == len(FROM_DATA)


def test_texts_begin_where_their_rows_point(encoder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    report = thimble.train(
        data, base=encoder, task="classify-text", init="eva", rank=4, max_steps=2, out=str(tmp_path / "run")
    )
    assert report.loss_before == report.loss_base
    assert any(text.startswith("init eva took") for text in report.messages["note"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": "eva", "targets": ["conv", "grouped"]}, "--init eva: grouped is a convolution in groups"),
        ({"init": "gradient:lora-ga", "rank": 5, "targets": ["conv"]}, "--rank 5: expected at most 4 for conv"),
        ({"init": "corda:knowledge"}, "is found on general text, which only text reads"),
        ({"init": "loftq"}, "nothing is quantised: add --store int8"),
        ({"init": "loftq", "store": "int8", "targets": ["conv"]}, "--init loftq: conv is no Linear layer"),
        ({"init": "adapter:x"}, "--init adapter:x: only for text"),
        ({"store": "file"}, "--store file: only for text"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_anything_is_written(options, said, pictures, net, tmp_path):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        thimble.train(pictures, base=net, out=str(tmp_path / "run"), **{"rank": 2, "targets": "all-conv", **options})
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_what_an_init_takes(encoder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    plans = {
        init: thimble.plan(data, base=encoder, task="classify-text", init=init, targets=["intermediate.dense"]).memory
        for init in ("kaiming", "pissa")
    }
    assert plans["pissa"]["adapter"] >= plans["kaiming"]["adapter"]
    assert plans["pissa"]["weights"] == plans["kaiming"]["weights"] > 4 * 32 * 48


# ---- int8 -----------------------------------------------------------------------------------------------------------


def test_a_layer_kept_as_int8_is_that_of_the_rounded_weight_forward_and_back():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    session = opened(module, ["0", "2"], rank=2)
    rows = [rounded(module[number].weight.detach()) for number in (0, 2)]
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    for number, (q, scale) in zip((0, 2), rows, strict=True):
        plain[number].weight.data = decoded(q, scale)
        plain[number].bias.data = module[number].bias.data.clone()
        assert float((decoded(q, scale) - module[number].weight).abs().max()) <= float(scale.max()) / 2
    kept, total = session.keep_as_int8(is_new=True)
    assert (kept, total) == (50, 50 + 9 + sum(p.numel() for p in session.attachment.trained.values()))
    assert isinstance(module[0], KeptInt8)
    x, y = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    y.data = x.data.clone()
    y.requires_grad_()
    made, other = module(x), plain(y)
    torch.testing.assert_close(made, other)
    made.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    saved = session.module.state_dict()
    assert saved["0.weight_int8"].dtype == torch.int8


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}, {"init": "eva"}], ids=str)
def test_a_run_on_int8_begins_at_its_base_and_is_measured_again(options, encoder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    report = thimble.train(
        data, base=encoder, task="classify-text", rank=4, max_steps=3, out=str(tmp_path / "run"), store="int8",
        valid_split=0.3, **options,
    )  # fmt: skip
    assert report.loss_before == pytest.approx(report.loss_base, abs=1e-6)
    [told] = [text for text in report.messages["decision"] if text.startswith("store int8")]
    assert "of the weights" in told
    asked = {"adapter": str(tmp_path / "run")}
    again = [thimble.evaluate(data, **asked, store=store).results[-1].loss for store in ("int8", "auto")]
    assert again[0] != again[1]
    assert again[0] == pytest.approx(again[1], abs=0.05)


def test_loftq_begins_nearer_to_the_base_than_rounding_leaves_it(encoder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    report = thimble.train(
        data, base=encoder, task="classify-text", rank=8, max_steps=2, out=str(tmp_path / "run"), store="int8",
        init="loftq", valid_split=0.3,
    )  # fmt: skip
    assert report.loss_before != report.loss_base
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "done"


def test_a_module_without_linear_layers_is_not_kept_as_int8(pictures, tmp_path):
    path = tmp_path / "net.py"
    short = NET.replace("self.mix, self.head = nn.Linear(8, 12), nn.Linear(12, 2)", "self.head = nn.Linear(8, 2)")
    path.write_text(short.replace("self.head(self.mix(x).relu())", "self.head(x)"))
    with pytest.raises(InputError, match="--store int8: the module has no frozen Linear layer"):
        thimble.train(pictures, base=f"{path}:build", out=str(tmp_path / "run"), store="int8", rank=2, targets="conv")


def test_the_difference_of_a_found_start_is_what_is_saved(pictures, net, tmp_path):
    thimble.train(
        pictures, base=net, targets="mix", rank=2, max_steps=1, batch_rows=8, out=str(tmp_path / "run"), init="corda"
    )
    saved = thimble.load_adapter(tmp_path / "run")
    assert isinstance(saved, Adapter)
    assert saved.layers["mix"].rank == 4  # a difference of two of rank 2
