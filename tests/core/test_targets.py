"""Which layers are adapted."""

import pytest

from thimble.core.targets import select_layers, select_parameters
from thimble.errors import ConfigError

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
LAYERS = [f"model.layers.{i}.{kind}" for i in range(3) for kind in KINDS]


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["all-linear"], 9), (["attention"], 6), (["mlp"], 3), (["q_proj", "up_proj"], 6), (["self_attn.v_proj"], 3),
     (["model.layers.[12].*"], 6), (["model.layers.0.mlp.up_proj"], 1), (["q_proj", "attention"], 6), (["last-1"], 3),
     (["last-2"], 6), (["last-99"], 9), (["last-1", "v_proj"], 5)],
)  # fmt: skip
def test_names_groups_and_patterns_choose_layers(targets, count):
    assert len(select_layers(targets, LAYERS)) == count


def test_every_target_that_matches_nothing_is_told_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        select_layers(["q_porj", "q_proj", "wte"], LAYERS)
    assert caught.value.problems == (
        "targets names 'q_porj', which matches none of the 9 layers: did you mean q_proj? the base has q_proj, v_proj, "
        "up_proj",
        "targets names 'wte', which matches none of the 9 layers: the base has q_proj, v_proj, up_proj",
    )


@pytest.mark.parametrize("target", ["all", "linear"])
def test_what_other_tools_call_all_layers_is_answered_with_our_word(target):
    with pytest.raises(ConfigError, match="did you mean all-linear?"):
        select_layers([target], LAYERS)


def test_parameters_are_taken_where_they_are_named_and_nowhere_else():
    parameters = [f"model.layers.{n}.mlp.experts.{name}" for n in range(2) for name in ("gate_up_proj", "down_proj")]
    assert select_parameters([], parameters) == []
    assert select_parameters(["down_proj", "layers.0.mlp.experts.gate_up_proj"], parameters) == [
        parameters[0], parameters[1], parameters[3],
    ]  # fmt: skip
    assert select_parameters(["*.1.mlp.*"], parameters) == parameters[2:]
    for word in ("all-linear", "mlp", "last-1"):
        with pytest.raises(ConfigError, match=f"target_parameters names '{word}', which no parameter of three dimensi"):
            select_parameters([word], parameters)
    with pytest.raises(ConfigError, match="did you mean experts.down_proj"):
        select_parameters(["experts.down_porj"], parameters)
    with pytest.raises(ConfigError, match="the base has none but the weights of its layers"):
        select_parameters(["experts.down_proj"], [])
