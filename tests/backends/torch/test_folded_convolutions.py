"""Convolutions folded with what follows them, in training: against the module as it is, and against PEFT."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch import folded_convolutions
from thimble.backends.torch.module_session import ModuleTorchSession
from thimble.core.method import Method
from thimble.files.peft import save_adapter
from thimble.models.execution import ExecutionPlan

peft = pytest.importorskip("peft")
PLAN = ExecutionPlan("dense", 1, 1 << 20, 1 << 20)


class Block(nn.Module):
    """Wider, each channel by itself, narrower again; added to what came in."""

    def __init__(self, width=8):
        super().__init__()
        wide = 3 * width
        self.expand, self.expand_norm = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.deep, self.deep_norm = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.BatchNorm2d(wide, affine=False)
        self.project, self.project_norm = nn.Conv2d(wide, width, 1), nn.BatchNorm2d(width, eps=0.1)
        self.first, self.second = nn.ReLU6(), nn.ReLU()

    def forward(self, x):
        made = self.first(self.expand_norm(self.expand(x)))
        made = self.second(self.deep_norm(self.deep(made)))
        return x + self.project_norm(self.project(made))


def network(block=Block):
    """Its norms have seen other data, as those of a pretrained network have."""
    torch.manual_seed(4)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
    last = nn.Sequential(nn.Conv2d(8, 20, (3, 2), 2, (1, 0)), nn.BatchNorm2d(20), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    module = nn.Sequential(stem, block(), block(), last, nn.Flatten(), nn.Linear(20, 3))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.3)
    return module.eval()


def pictures(rows=6, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.normal(size=(rows, 3, 12, 12)).astype(np.float32)
    return ModuleBatch({"pixel_values": pixels}, {"labels": random.integers(3, size=rows)}, list(range(rows)))


def attached(module=None, folds=True, **options):
    session = ModuleTorchSession(network() if module is None else module, "labels", "5")
    session.attach(
        options.pop("targets", ["all-pointwise", "3.0"]),
        train_also=["5", *options.pop("also", ())], rank=4, alpha=6, seed=5, **options,
    )  # fmt: skip
    if not folds:
        session.folding.folded = ()
    random = torch.Generator().manual_seed(8)  # B begins at zero, where most of the gradient of A is zero too
    for layer in session.attachment.lora.values():
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=random) * 0.2)
    return session


def gradient_of(session, batch=None, method=None):
    batch = batch or pictures()
    state = session.start(session.fresh_adapter(), method or Method())
    return session.gradient(state, Work([[batch]], len(batch.numbers)), Objective(), PLAN, StepKey(0, 0))


def is_close(ours, theirs):
    return np.abs(ours - theirs).max() < 1e-5 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "pissa"},
        {"use_rslora": True},
        {"rank_pattern": {"3.0": 64, "project": 1}},
        {"targets": ["2.project", "3.0"]},
        {"targets": ["1.expand", "project"], "also": ["2.deep", "2.project_norm", "3.0"]},
        {"also": ["project_norm", "1.expand_norm"]},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"targets": ["deep", "project"], "rank_pattern": {"deep": 24}},
    ],
)
def test_loss_and_gradient_are_those_of_the_module_as_it_is(options):
    folded, plain = gradient_of(attached(**options)), gradient_of(attached(folds=False, **options))
    assert np.abs(plain.flat).max() > 0.01
    assert folded.loss.mean == pytest.approx(plain.loss.mean, abs=1e-6)
    assert is_close(folded.flat, plain.flat)


@pytest.mark.parametrize("cost", [0, 1 << 40])
@pytest.mark.parametrize("rank", [2, 40])
def test_updates_in_the_weight_and_beside_it_come_to_the_same(cost, rank, monkeypatch):
    monkeypatch.setattr(folded_convolutions, "MERGE_COST", cost)
    ranks = {"rank_pattern": {"3.0": rank, "expand": rank, "project": rank}}
    folded, plain = gradient_of(attached(**ranks)), gradient_of(attached(folds=False, **ranks))
    assert is_close(folded.flat, plain.flat)


def test_twenty_steps_are_those_of_peft_and_the_adapter_opens_there(tmp_path):
    session = attached()
    state = session.start(session.fresh_adapter(), Method(max_grad_norm=1e9))
    save_adapter(session.adapter(state), tmp_path / "initial")
    model = peft.PeftModel.from_pretrained(network(), tmp_path / "initial", is_trainable=True).eval()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    ours, theirs = [], []
    for step in range(20):
        batch = pictures(seed=step)
        gradient = session.gradient(state, Work([[batch]], 6), Objective(), PLAN, StepKey(0, step))
        ours.append(gradient.loss.mean)
        state = session.apply(state, gradient, 3e-3)
        made = model(torch.from_numpy(batch.inputs["pixel_values"]))
        loss = functional.cross_entropy(made, torch.from_numpy(batch.targets["labels"]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        theirs.append(float(loss.detach()))
    assert len(session.folding.folded) == 8
    assert np.abs(np.subtract(ours, theirs)).max() < 1e-5
    assert np.ptp(ours) > 0.05
    save_adapter(session.adapter(state), tmp_path / "trained")
    reopened = peft.PeftModel.from_pretrained(network(), tmp_path / "trained").eval()
    (logits,) = session.outputs(state.active, iter([pictures(5, 99)]), PLAN)
    expected = reopened(torch.from_numpy(pictures(5, 99).inputs["pixel_values"])).detach().numpy()
    assert is_close(logits, expected)


def test_the_module_is_what_it_was_after_each_gradient():
    session, bare = attached(), network().state_dict()
    before = [(name, id(value)) for name, value in session.module.named_parameters()]
    gradient_of(session)
    assert [(name, id(value)) for name, value in session.module.named_parameters()] == before
    assert not [name for name, layer in session.module.named_modules() if "forward" in layer.__dict__]
    assert {layer.state for layer in session.attachment.lora.values()} == {"on"}
    now = session.module.state_dict()
    assert all((now[name] == value).all() for name, value in bare.items())
    assert all(now[name].stride() == value.stride() for name, value in bare.items())


def test_a_failing_pass_leaves_the_module_as_it_was():
    session = attached()
    with pytest.raises(RuntimeError):
        gradient_of(session, ModuleBatch({"pixel_values": np.zeros((2, 5, 12, 12), np.float32)},
                                         {"labels": np.zeros(2, np.int64)}, [0, 1]))  # fmt: skip
    assert not [name for name, layer in session.module.named_modules() if "forward" in layer.__dict__]
    assert {layer.state for layer in session.attachment.lora.values()} == {"on"}


class ReadTwice(Block):
    """What comes out of the first convolution is read by its norm and once more."""

    def forward(self, x):
        wide = self.expand(x)
        made = self.second(self.deep_norm(self.deep(self.first(self.expand_norm(wide)))))
        return x + self.project_norm(self.project(made + wide))


class Decides(Block):
    """Goes one way or the other by the numbers, which no trace can follow."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class Shares(Block):
    """One nonlinearity for two places."""

    def forward(self, x):
        made = self.first(self.deep_norm(self.deep(self.first(self.expand_norm(self.expand(x))))))
        return x + self.project_norm(self.project(made))


def padded(x):
    """As networks that were trained in TensorFlow pad: by numbers that no trace knows."""
    more = int(x.shape[-1]) % 2
    return functional.pad(x, [0, more, 0, more])


class Pads(Block):
    """Computes with sizes in a function beside it."""

    def forward(self, x):
        made = self.deep(padded(self.first(self.expand_norm(self.expand(x)))))
        return x + self.project_norm(self.project(self.second(self.deep_norm(made))))


class Peeks(nn.Module):
    """Calls a convolution of a block from without, which the trace of the block does not show."""

    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        return self.inner(x) + self.inner.expand(x).mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("block", "folded", "norms"), [(Block, 8, 8), (ReadTwice, 8, 6), (Decides, 6, 2), (Shares, 8, 8), (Pads, 8, 8)]
)
def test_only_what_is_known_to_follow_alone_is_folded(block, folded, norms):
    session = attached(network(block))
    ours, plain = gradient_of(session), gradient_of(attached(network(block), folds=False))
    assert ours.loss.mean == pytest.approx(plain.loss.mean, abs=1e-6)
    assert is_close(ours.flat, plain.flat)
    assert len(session.folding.folded) == folded
    assert sum(one.norm is not None for one in session.folding.folded) == norms


class Views(nn.Module):
    """Reads what a convolution makes in the order in which it has always lain in memory."""

    def forward(self, x):
        return x.view(len(x), -1)


@pytest.mark.parametrize(
    ("block", "end", "told"),
    [
        (Block, nn.Flatten, "8 train channels last, 8 of them with the frozen norm behind folded in"),
        (Block, Views, "8 train in the module's layout, 8 of them with the frozen norm behind folded in"),
        (Peeks, Views, "as they are, since folded with what follows them the gradient is another"),
    ],
)
def test_what_a_module_does_not_bear_is_left_out(block, end, told):
    def made():
        module = network(block)
        module[3], module[4], module[5] = module[3][:3], end(), nn.Linear(20 * 3 * 3, 3)
        return module.eval()

    session = attached(made())
    measured = session.measure(pictures(2))
    assert measured.kept_bytes > 0
    assert session.convolutions == (f"convolutions: {told}",)
    ours, plain = gradient_of(session), gradient_of(attached(made(), folds=False))
    assert is_close(ours.flat, plain.flat)


def test_a_hook_of_the_users_own_sees_what_it_saw():
    module, seen = network(), []
    module[1].expand.register_forward_hook(lambda layer, args, made: seen.append(made.detach().clone()))
    session = attached(module)
    gradient_of(session)
    (made,) = seen
    assert not any(one.norm is module[1].expand_norm for one in session.folding.folded)
    with torch.no_grad():
        x = module[0](torch.from_numpy(pictures().inputs["pixel_values"]))
        assert is_close(made.numpy(), functional.conv2d(x, module[1].expand.weight).numpy())


def flat_network():
    """Norms and convolutions are themselves the blocks of the list that begins frozen."""
    module = network()
    return nn.Sequential(*module[0], *module[3][:2], module[3][3], nn.Flatten(), nn.Linear(20, 3)).eval()


def test_kept_features_take_the_place_of_folded_convolutions(tmp_path):
    batch, found = pictures(), []
    for is_kept in (False, True):
        session = ModuleTorchSession(flat_network(), "labels", "7")
        session.attach(["3"], train_also=["7"], rank=4, seed=5)
        state, features = session.start(session.fresh_adapter(), Method()), None
        if is_kept:
            with (tmp_path / "kept").open("w+b") as file:
                features = session.new_features(batch, lambda: file, 6)
                assert list(session.add_features(features, iter([batch]))) == [6]
        work = Work([[batch]], 6, features)
        found += [session.gradient(state, work, Objective(), PLAN, StepKey(0, 0)).flat for _ in range(2)]
    assert len(session.folding.folded) == 2
    assert (found[2] == found[3]).all()
    assert np.abs(found[0]).max() > 0.01
    assert is_close(found[2], found[0])


def test_less_is_kept_for_the_backward_pass():
    folded, plain = (attached(folds=folds).measure(pictures(4)).kept_bytes for folds in (True, False))
    assert folded < 0.6 * plain


def test_dropout_of_adapters_is_on_all_the_same():
    first, second = (gradient_of(attached(dropout=0.5), method=Method(dropout=0.5)) for _ in range(2))
    assert (first.flat == second.flat).all()
    assert not is_close(first.flat, gradient_of(attached()).flat)
