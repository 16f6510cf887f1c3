"""Ranks by evidence, and the rows that evidence comes from."""

from dataclasses import replace

import numpy as np
import pytest

from families import make_hf_folder
from samples import make_rows
from thimble.backends.torch.session import TorchSession
from thimble.config.train import TrainConfig
from thimble.config.values import read_pattern
from thimble.core.method import parse_init
from thimble.core.targets import share_out, size_layers
from thimble.events import EventLog, ignore
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan
from thimble.training.calibration import Calibration, CalibrationData, choose_ranks
from thimble.training.initialise import initialise


def make_data(base, rows=None):
    rows = rows or make_rows()
    return CalibrationData.of_steps(
        rows[:4], lambda step: [step % 4], 2, general_rows=rows[4:], execution=ExecutionPlan("dense", micro_tokens=512),
        shapes=base.spec.linear_shapes(), seed=0,
    )  # fmt: skip


@pytest.fixture
def base(tmp_path):
    return open_base(make_hf_folder("llama", tmp_path / "base"))


def chosen(base, init="kaiming", **options):
    """Ranks by layer, the common scale, and the messages."""
    config, log = TrainConfig.build({"data": "x", "alpha": 8, "rank": "auto", **options}), EventLog(ignore)
    assert not config.problems
    session = TorchSession(base)
    sizes = choose_ranks(config, parse_init(init), Calibration(make_data(base), session, log))
    (scale,) = {size.scale for size in sizes.values()}
    return {path: size.rank for path, size in sizes.items()}, scale, log.messages


# ---- rows -----------------------------------------------------------------------------------------------------------


def taken(rows_of_step, steps=2):
    rows = make_rows(8)
    data = CalibrationData.of_steps(
        rows, rows_of_step, steps, general_rows=[], execution=ExecutionPlan("dense", micro_tokens=64), shapes={}, seed=0
    )  # fmt: skip
    return [[int(row.source.removeprefix("row ")) for row in some] for some in (data.rows, data.judging_rows)]


def test_directions_are_judged_on_rows_they_were_not_found_on():
    assert taken(lambda step: [2 * step, 2 * step + 1]) == [[0, 1, 2, 3], [4, 5]]
    assert taken(lambda step: [[0, 1], [1, 2], [2, 3]][step]) == [[0, 1, 2], [3]]


def test_of_few_rows_each_side_gets_a_half():
    assert taken(lambda step: [0, 1, 2]) == [[0, 2], [1]]
    assert taken(lambda step: [0]) == [[0], [0]]


def test_gradients_are_sketched_once_for_the_same_question(base):
    class Counting:
        capabilities = frozenset({"calibration"})
        asked = 0

        def gradient_sketches(self, batches, ranks, is_weighted, seed, checkpointed_blocks):
            self.asked += 1
            return dict(ranks)

    session = Counting()
    calibration = Calibration(make_data(base), session, EventLog(ignore))
    for ranks, is_weighted in (({"a": 2}, False), ({"a": 2}, False), ({"a": 2}, True), ({"a": 3}, True)):
        assert calibration.sketches(ranks, is_weighted) == ranks
    assert session.asked == 3


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_are_shared_out_to_the_directions_with_most_energy_for_their_cost():
    ranks = share_out({"a": [9.0, 8.0, 1.0], "b": [4.0, 1.0, 1.0], "c": [7.0, 6.0]}, {"a": 10, "b": 10, "c": 20}, 60)
    assert ranks == {"a": 2, "b": 2, "c": 1}
    uneven = share_out({"a": [5.0, 1.0, 4.0, 3.0], "b": [0.5, 0.1, 0.05, 0.01]}, {"a": 1, "b": 1}, 6)
    assert uneven == {"a": 4, "b": 2}  # a direction of little energy is taken for the sake of the next one
    assert share_out({"a": [1.0], "b": [9.0, 9.0]}, {"a": 5, "b": 5}, 10) == {"a": 1, "b": 1}


def test_rank_auto_keeps_to_its_budget_and_one_scale(base):
    shapes = base.spec.linear_shapes()
    budget = 3 * sum(sum(shape) for shape in shapes.values())
    ranks, scale, messages = chosen(base, rank_budget=budget)
    assert 0.9 * budget < sum(rank * sum(shapes[path]) for path, rank in ranks.items()) <= budget
    assert len(set(ranks.values())) > 1
    assert scale == 8 / 16
    assert any("by gradients" in text for text in messages["decision"])


@pytest.mark.parametrize("energy_of", ["gradients", "activations", "weights"])
def test_layers_keep_the_order_of_the_model_whatever_ranks_are_chosen_by(base, energy_of):
    """A checkpoint holds parameters in this order, and a resumed run reads them in it."""
    assert list(chosen(base, energy_of=energy_of)[0]) == list(base.spec.linear_shapes())


def test_the_options_give_every_layer_its_chosen_size_again(base):
    config = TrainConfig.build({"data": "x", "alpha": 8, "rank": "auto", "rank_budget": 4000})
    session = TorchSession(base)
    begun = initialise(parse_init("kaiming"), config, {}, make_data(base), session, EventLog(ignore))
    layers, patterns = begun.adapter.layers, (begun.config.rank_pattern, begun.config.alpha_pattern)
    again = size_layers(list(layers), begun.config.rank, begun.config.alpha, *map(read_pattern, patterns))
    assert {path: size.rank for path, size in again.items()} == {path: f.rank for path, f in layers.items()}
    assert {round(size.scale, 6) for size in again.values()} == {0.5}


def test_explain_names_the_rank_of_every_layer(base):
    assert len([text for text in chosen(base, explain=True)[2]["note"] if text.startswith("rank of model.")]) == 14
    assert chosen(base)[2]["note"] == []


@pytest.mark.parametrize("init", ["orthogonal", "gradient:lora-ga"])
def test_rank_auto_gives_ranks_that_the_init_can_have(init, base):
    ranks, _, _ = chosen(base, init, energy=0.99)
    for path, rank in ranks.items():
        assert rank % 2 == 0 if init == "orthogonal" else 2 * rank <= min(base.spec.linear_shapes()[path])


def test_ranks_by_inputs_or_weights_do_not_depend_on_their_unit(base, monkeypatch):
    before = {energy_of: chosen(base, energy_of=energy_of)[0] for energy_of in ("activations", "weights")}
    large = next(iter(base.spec.linear_shapes()))
    moments, weight = TorchSession.input_moments, TorchSession.file_weight

    def larger_moments(session, batches):
        for paths, found in moments(session, batches):
            factor = np.float32(10_000 if large in paths else 1)
            yield paths, replace(found, square=found.square * factor, total=found.total * factor**0.5)

    monkeypatch.setattr(TorchSession, "input_moments", larger_moments)
    monkeypatch.setattr(
        TorchSession, "file_weight", lambda session, path: weight(session, path) * (100 if path == large else 1)
    )
    for energy_of, ranks in before.items():  # where two layers stand alike, rounding decides for one of them
        after = chosen(base, energy_of=energy_of)[0]
        assert max(abs(after[path] - rank) for path, rank in ranks.items()) <= 4  # by absolute energy it is 16


@pytest.mark.parametrize("energy_of", ["gradients", "activations", "weights"])
def test_ranks_by_energy_grow_with_the_share_asked_for(energy_of, base):
    sizes = []
    for energy in (0.3, 0.6, 0.95):
        ranks, _, messages = chosen(base, energy=energy, energy_of=energy_of)
        sizes.append(sum(ranks.values()))
    assert sizes == sorted(set(sizes))
    assert any("says how well it can be truncated" in text for text in messages["warning"]) == (energy_of == "weights")


def test_the_rank_for_an_energy_of_weights_is_the_one_of_their_singular_values(base):
    for path, rank in chosen(base, energy=0.5, energy_of="weights")[0].items():
        values = np.linalg.svd(base.weights[f"{path}.weight"].read().astype(np.float64), compute_uv=False) ** 2
        assert rank == np.searchsorted(np.cumsum(values), 0.5 * values.sum()) + 1
