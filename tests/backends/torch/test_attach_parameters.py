"""LoRA on parameters that are no layer's weight, of experts above all: what PEFT computes, and what is refused."""

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import thimble
from thimble.errors import InputError

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
SIZE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE, num_local_experts=4)),
    "Qwen2-MoE": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=20)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZE, head_dim=8, num_local_experts=4)),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def fresh(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def fit(model, steps=20):
    """Losses of a person's own loop."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_have_the_losses_of_peft_and_both_load_in_the_other(tmp_path, name):
    ours = fresh(name)
    base = logits(ours)
    thimble.attach(ours, ["q_proj"], rank=3, alpha=6, target_parameters=EXPERTS)
    assert torch.equal(logits(ours), base)
    thimble.save_adapter(thimble.adapter_of(ours), tmp_path / "start")
    theirs = peft.PeftModel.from_pretrained(fresh(name), tmp_path / "start", is_trainable=True).eval()
    trained = (sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs))
    assert len(set(trained)) == 1
    ours_losses, their_losses = fit(ours), fit(theirs)
    assert ours_losses == pytest.approx(their_losses, abs=1e-4)
    assert ours_losses[-1] < ours_losses[0] - 0.1
    thimble.save_adapter(thimble.adapter_of(ours), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    in_peft = peft.PeftModel.from_pretrained(fresh(name), tmp_path / "ours")
    torch.testing.assert_close(logits(in_peft), logits(ours), rtol=0, atol=1e-5)
    in_thimble = fresh(name)
    thimble.attach(in_thimble, adapter=tmp_path / "theirs")
    torch.testing.assert_close(logits(in_thimble), logits(theirs), rtol=0, atol=1e-5)
    assert (logits(in_thimble) - base).abs().max() > 0.1


def moved(name, **options):
    """A model with an adapter that does something, and the logits of its base."""
    model = fresh(name)
    base = logits(model)
    thimble.attach(model, [], rank=2, target_parameters=EXPERTS, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, base


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_switched_off_merged_and_detached(name):
    model, base = moved(name)
    changed = logits(model)
    names = set(fresh(name).state_dict())
    with thimble.adapter_off(model):
        assert torch.equal(logits(model), base)
    thimble.merge(model)
    torch.testing.assert_close(logits(model), changed, rtol=0, atol=1e-5)
    thimble.unmerge(model)
    assert torch.equal(logits(model), changed)
    thimble.merge(model)
    thimble.detach(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), changed, rtol=0, atol=1e-5)


def test_a_detached_model_is_its_base_again():
    model, base = moved("Mixtral")
    thimble.detach(model)
    assert torch.equal(logits(model), base)


def test_an_adapter_that_names_parameters_in_another_order_is_put_in_that_of_the_model(tmp_path):
    theirs = peft.get_peft_model(
        fresh("Mixtral"), peft.LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS[::-1])
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    theirs.save_pretrained(tmp_path)
    ours = fresh("Mixtral")
    thimble.attach(ours, adapter=tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)


def test_ranks_and_alphas_of_some_parameters_are_those_of_peft(tmp_path):
    model, _ = moved("gpt-oss", rank_pattern={"experts.down_proj": 3}, alpha_pattern={"experts.gate_up_proj": 5})
    thimble.save_adapter(thimble.adapter_of(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh("gpt-oss"), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_the_router_is_a_parameter_of_two_axes(tmp_path):
    model = fresh("Mixtral")
    found = thimble.attach(model, [], rank=2, target_parameters=["gate.weight", "experts.down_proj"])
    assert "MixtralExperts (6,144 parameters)" in str(found)  # gate_up_proj is out of reach still
    fit(model, 2)
    thimble.save_adapter(thimble.adapter_of(model), tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh("Mixtral"), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


REFUSALS = [
    ({"target_parameters": ["experts.gate_up_prj"]}, "no parameter with two or three axes is called: did you mean "
     "experts.gate_up_proj"),
    ({"target_parameters": "experts"}, "target_parameters='experts': expected a list of names"),
    ({"targets": []}, r"targets=\[\]: expected at least one layer"),
    ({"dropout": 0.1}, "dropout=0.1: .*down_proj.* computes with its weight in a way of its own"),
    ({"use_dora": True}, "use_dora: .*experts.down_proj.* is a parameter, which PEFT's DoRA does not know"),
    ({"init": "pissa"}, "init=pissa: .*experts.down_proj.* is a parameter, for which kaiming or gaussian"),
    ({"train_also": ["mlp"]}, "mlp.experts.down_proj is trained whole too, by train_also"),
    ({"targets": ["q_proj"], "target_parameters": ["q_proj.weight"]}, "q_proj.weight belongs to a module that targets"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "told"), REFUSALS)
def test_what_parameters_cannot_have_is_refused_by_name(options, told):
    model = fresh("Mixtral")
    given = {"targets": [], "target_parameters": ["experts.down_proj"], "rank": 2, **options}
    if options == {"targets": []}:
        given.pop("target_parameters")
    with pytest.raises(InputError, match=told):
        thimble.attach(model, **given)
    assert set(model.state_dict()) == set(fresh("Mixtral").state_dict())


def test_parameters_that_no_update_would_reach_are_refused():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Conv1d(4, 4, 3))
    with pytest.raises(InputError) as caught:
        thimble.attach(model, [], target_parameters=["0.weight_ih_l0", "1.weight"])
    assert "0.weight_ih_l0 is read inside of one call" in caught.value.problems[0]
    assert "1.weight is the weight of a convolution: name the layer in targets" in caught.value.problems[1]


def test_each_expert_begins_as_a_layer_does():
    model = fresh("Mixtral")
    thimble.attach(model, [], rank=2, target_parameters=["experts.down_proj"], init="gaussian")
    found = thimble.adapter_of(model).layers["model.layers.0.mlp.experts.down_proj"]
    assert not (found.A[:2] == found.A[2:4]).any()
    assert 0.4 < found.A.std() < 0.6  # 1 / rank, and not 1 / all ranks
