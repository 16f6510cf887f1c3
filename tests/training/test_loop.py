"""The training loop, by whole runs of a toy model: every way a run can go, in milliseconds."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thimble.core.metrics import LossSum
from thimble.training import loop
from thimble.training.guard import IN_A_ROW, MAX_ROLLBACKS
from thimble.training.protocols import Scores
from training.toy import NARROW, TRUTH, WIDE, MemorySink, ToySession, ToyTask, make_task, train


def values(result):
    return result.adapter.layers["layer"].A[0]


def losses(sink):
    return [row["loss"] for row in sink.steps]


def nan_at(*steps):
    return lambda step, loss: math.nan if step in steps else loss


def stopping_after(count):
    """A stop flag that is up after so many steps, and what has to hear of steps."""
    taken = []
    return {
        "on_event": lambda e: taken.append(e) if e.kind == "step" else None,
        "should_stop": lambda: len(taken) >= count,
    }


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_is_measured_before_and_after():
    result, sink, _ = train(steps=60)
    assert (result.status, result.progress.steps, result.best_step) == ("done", 60, 60)
    assert result.before.loss == result.before.base.loss > 1
    assert result.after.loss < 0.01
    np.testing.assert_allclose(values(result), TRUTH, atol=0.1)
    assert [row["step"] for row in sink.steps] == list(range(1, 61))
    assert sum(row["tokens"] for row in sink.steps) == result.progress.tokens == 60 * 64
    assert sum(row["label_tokens"] for row in sink.steps) == result.progress.target_tokens
    assert sink.is_ended


def test_the_state_is_kept_every_second_step_between_gradient_and_update():
    session = ToySession()
    train(session, steps=4)
    steps = [name for name in session.names() if name in ("gradient", "apply", "snapshot")]
    assert steps == ["snapshot", "gradient", "snapshot", "apply", "gradient", "apply",
                     "gradient", "snapshot", "apply", "gradient", "apply"]  # fmt: skip


def test_the_key_of_dropout_is_the_seed_and_the_number_of_the_step():
    session = ToySession()
    train(session, steps=3)
    assert [tuple(call[3]) for call in session.calls if call[0] == "gradient"] == [(5, 0), (5, 1), (5, 2)]


def test_kl_references_are_taken_in_turn():
    session = ToySession()
    train(session, make_task(weights=(0.2, 0.3)), steps=3)
    objectives = [call[2] for call in session.calls if call[0] == "gradient"]
    assert [objective.kl_weight for objective in objectives] == [0.2, 0.3, 0.2]
    assert {objective.kl_reference for objective in objectives} == {"the reference"}


def test_the_gradients_of_all_processes_are_added_up_before_they_are_judged():
    class Spoiling:
        def sum(self, gradient):
            return gradient.__class__(gradient.loss, gradient.flat, math.inf)

    result, _, _ = train(collective=Spoiling())
    assert result.diverged == "the gradient norm is inf"


def test_a_run_by_the_clock_ends_when_its_time_is_over():
    result, _, _ = train(options={"max_minutes": 0.001})
    assert result.status == "done"
    assert 0.06 <= result.progress.seconds < 5


# ---- the guard ------------------------------------------------------------------------------------------------------


def test_one_nan_is_left_out_and_the_run_goes_on():
    result, sink, messages = train(ToySession(nan_at(4)))
    assert (result.status, result.progress.steps, result.progress.guard.rollbacks) == ("done", 12, 0)
    assert messages["warning"] == ["step 4 was left out: the loss is nan"]
    assert len(sink.steps) == 12


def test_two_in_a_row_roll_the_run_back_and_halve_its_rate():
    session = ToySession(nan_at(4, 5))
    result, sink, messages = train(session, steps=6)
    assert result.progress.guard.rollbacks == 1
    assert messages["warning"][1] == "step 5: the loss is nan; back to the last good adapter, at 0.5 of the rate"
    assert [row["learning_rate"] for row in sink.steps] == [0.05] * 5 + [0.025]
    assert [call for call in session.calls if call[0] == "restore"] == [("restore", ("adapter", "exp_avg", "step"))]


def test_a_run_that_is_nan_for_good_is_given_up_and_keeps_the_last_valid_adapter():
    result, sink, _ = train(ToySession(lambda step, loss: loss if step <= 3 else math.nan), steps=40)
    assert (result.status, result.diverged) == ("diverged", "the loss is nan")
    assert len(sink.steps) == 3 + IN_A_ROW * (MAX_ROLLBACKS + 1)
    assert result.after is None
    kept, _, _ = train(steps=2)
    np.testing.assert_array_equal(values(result), values(kept))  # the state that step 3 was judged by


def test_an_update_that_is_nan_is_never_the_result():
    spoil = lambda step, numbers: numbers * math.nan if step == 6 else numbers  # noqa: E731
    result, _, _ = train(ToySession(spoil=spoil), steps=6)
    assert result.diverged == "parameters of the adapter or moments of its optimiser are NaN or Inf"
    assert np.isfinite(values(result)).all()
    assert values(result).any()


# ---- validation during training -------------------------------------------------------------------------------------


def spoilt_task():
    """What is learned is wrong for the validation rows from the middle of the way on."""
    return make_task(truth=TRUTH / 2, valid_rows=24)


def test_validation_rows_are_measured_every_few_steps_but_after_the_last():
    _, sink, _ = train(steps=9, plan={"eval_every_steps": 3})
    assert ["held_out_loss" in row for row in sink.steps] == [False, False, True, False, False, True] + [False] * 3


def test_patience_ends_the_run_and_the_best_adapter_is_kept():
    session = ToySession()
    result, sink, messages = train(session, spoilt_task(), steps=200, plan={"eval_every_steps": 2, "patience": 3})
    assert len(sink.steps) < 200
    measured = {row["step"]: row["held_out_loss"] for row in sink.steps if "held_out_loss" in row}
    assert result.best_step == min(measured, key=measured.get) < result.progress.steps
    assert result.after.loss == pytest.approx(measured[result.best_step])
    assert session.calls[-3:][0] == ("restore", ("adapter",))  # the optimiser is left as it is
    assert any(f"kept: the adapter of step {result.best_step}" in text for text in messages["decision"])


def test_a_run_whose_rows_are_known_by_heart_ends_and_says_where_and_why():
    """Of 32 rows in steps of 8: the mean loss of an epoch, before its updates, falls below a hundredth."""
    whole, _, _ = train(steps=200)
    result, sink, messages = train(steps=200, plan={"memorised_nats": 0.01})
    epochs = [np.mean([row["loss"] for row in sink.steps[at : at + 4]]) for at in range(0, len(sink.steps), 4)]
    assert len(sink.steps) % 4 == 0
    assert [loss < 0.01 for loss in epochs] == [False] * (len(epochs) - 2) + [True] * 2
    assert (result.status, result.progress.steps, result.best_step) == ("done", len(sink.steps), len(sink.steps))
    (why,) = (text for text in messages["decision"] if text.startswith("ended"))
    assert f"after step {len(sink.steps)} of 200; the training loss of 2 epochs in a row was below 0.01" in why
    assert whole.progress.steps == 200
    _, _, messages = train(steps=len(sink.steps), plan={"memorised_nats": 0.01})
    assert not any(text.startswith("ended") for text in messages.get("decision", ())), "its last step was its last"


def test_a_run_that_is_interrupted_in_an_epoch_ends_by_heart_where_it_would_have():
    plan = {"memorised_nats": 0.01, "checkpoint_every_steps": 1}
    whole, whole_sink, _ = train(steps=200, plan=plan)
    for cut in (whole.progress.steps - 6, whole.progress.steps - 2, whole.progress.steps):
        checkpoint = whole_sink.checkpoints[cut]
        found, sink, messages = train(steps=200, plan={**plan, "checkpoint": checkpoint}, sink=MemorySink())
        assert found.progress.steps == whole.progress.steps
        np.testing.assert_array_equal(values(found), values(whole))
        assert any(text.startswith("ended") for text in messages["decision"])


def test_a_run_of_an_earlier_release_goes_on_to_its_last_step():
    plan = {"memorised_nats": 0.01, "checkpoint_every_steps": 1}
    _, sink, _ = train(steps=200, plan=plan)
    checkpoint = sink.checkpoints[4]
    older = {name: value for name, value in checkpoint.progress.items() if name != "memorisation"}
    found, _, _ = train(steps=60, plan={**plan, "checkpoint": replace(checkpoint, progress=older)})
    assert found.progress.steps == 60


def test_a_rise_that_other_rows_do_not_show_ends_nothing_and_turns_nothing_back():
    task = replace(spoilt_task(), others=TRUTH)
    result, sink, messages = train(task=task, steps=60, plan={"eval_every_steps": 2, "patience": 3})
    assert (len(sink.steps), result.best_step) == (60, 60)
    assert any(
        text.startswith("on 24 other rows the validation loss has not clearly risen") for text in messages["note"]
    )
    plain, *_ = train(task=task, steps=60)
    assert repr(values(result)) == repr(values(plain)), "looking at other rows changes nothing"


def test_a_rise_that_other_rows_show_too_ends_the_run():
    task = replace(spoilt_task(), others=TRUTH / 2)
    result, sink, messages = train(task=task, steps=200, plan={"eval_every_steps": 2, "patience": 3})
    assert len(sink.steps) < 200
    assert result.best_step < result.progress.steps
    assert not any("other rows" in text for text in messages["note"])


def test_a_last_step_that_was_not_measured_is_before_the_best_is_kept():
    result, _, _ = train(task=spoilt_task(), steps=40, plan={"eval_every_steps": 3})
    assert result.progress.plateau.step == 40
    assert result.best_step < 40


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_in_a_step_makes_every_later_call_smaller():
    """One copy of the execution plan: training, validation during it, and the evaluation after it all use it."""
    session = ToySession(most_tokens=lambda step: 8 if step >= 4 else 64)
    result, _, messages = train(session, steps=8, plan={"eval_every_steps": 3})
    assert result.status == "done"
    tokens = [(name, found[0].micro_tokens) for name, *found in session.calls if name in ("gradient", "losses")]
    first = tokens.index(("gradient", 8))
    assert {count for _, count in tokens[first:]} == {8}
    assert [name for name, _ in tokens[first:]].count("losses") == 3  # of steps 6 and 8, and of the result
    assert {count for _, count in tokens[: first - 2]} == {WIDE.micro_tokens}
    assert result.progress.execution.micro_tokens == 8
    assert messages["warning"][-1] == (
        "memory ran out in step 4: from here on in micro-batches of 8 tokens, 2 in parallel; the last digits may differ"
    )
    unlimited, _, _ = train(steps=8)
    np.testing.assert_allclose(values(result), values(unlimited))


def test_the_smaller_execution_plan_is_kept_in_checkpoints():
    _, sink, _ = train(ToySession(most_tokens=8), steps=2, plan={"checkpoint_every_steps": 1})
    assert sink.checkpoints[2].progress["execution"]["micro_tokens"] == 8


def test_a_step_that_fits_in_no_way_ends_the_run_and_says_which():
    session = ToySession(most_tokens=lambda step: 4 if step == 3 else 64)
    with pytest.raises(MemoryError, match=r"in step 3, in the smallest parts there are: tried to allocate 8 bytes"):
        train(session)
    assert [call[1].num_shares for call in session.calls if call[0] == "gradient"][-1] == NARROW.num_shares


def test_memory_that_runs_out_while_the_result_is_measured_does_not_cost_the_adapter():
    class Scarce(ToySession):
        def losses(self, adapter, batches, execution):
            if "apply" in self.names():
                raise MemoryError("of 5 GB")
            return super().losses(adapter, batches, execution)

    result, _, messages = train(Scarce())
    assert (result.status, result.after) == ("done", None)
    assert (
        "memory ran out while the result was measured (of 5 GB): evaluate with --adapter can do that"
        in messages["warning"]
    )
    assert values(result).any()


# ---- stopping, checkpoints, resuming --------------------------------------------------------------------------------


def test_a_run_that_is_stopped_keeps_what_it_learned_and_is_not_measured():
    result, sink, _ = train(**stopping_after(5))
    assert (result.status, len(sink.steps), result.after) == ("interrupted", 5, None)
    assert values(result).any()


def test_a_run_that_is_stopped_before_its_first_step_has_measured_nothing():
    result, sink, _ = train(should_stop=lambda: True)
    assert (result.status, sink.steps, sink.before) == ("interrupted", [], None)
    assert not values(result).any()


@pytest.mark.parametrize("step", [1, 2, 5, 6, 11])
@pytest.mark.parametrize("bad", [(), (4, 5)])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(step, bad):
    plan = {"eval_every_steps": 2, "checkpoint_every_steps": 1}
    whole, whole_sink, _ = train(ToySession(nan_at(*bad)), plan=plan)
    _, sink, _ = train(ToySession(nan_at(*bad)), plan=plan, **stopping_after(step))
    session = ToySession(nan_at(*bad))
    resumed = {**plan, "checkpoint": sink.checkpoints[step]}
    again, sink, messages = train(session, sink=MemorySink(steps=sink.steps, before=sink.before), plan=resumed)
    np.testing.assert_array_equal(values(again), values(whole))
    assert repr(losses(sink)) == repr(losses(whole_sink))
    assert again.before is sink.before
    assert (again.progress.tokens, again.best_step) == (whole.progress.tokens, whole.best_step)
    assert messages["note"] == [f"resumed after step {step}"]


def test_what_was_measured_before_is_not_measured_again():
    _, sink, _ = train(plan={"checkpoint_every_steps": 5}, **stopping_after(5))
    session = ToySession()
    train(session, sink=MemorySink(before=sink.before), plan={"checkpoint": sink.checkpoints[5]})
    assert session.names().count("losses") == 1  # the result


def test_checkpoints_are_saved_by_steps_and_at_the_end():
    _, sink, _ = train(steps=7, plan={"checkpoint_every_steps": 3})
    assert sorted(sink.checkpoints) == [3, 6, 7]
    _, sink, _ = train(steps=3, plan={"checkpoint_every_minutes": 1e-9})
    assert sorted(sink.checkpoints) == [1, 2, 3]
    _, sink, _ = train(steps=3)
    assert sink.checkpoints == {}


def test_a_checkpoint_that_finds_no_room_does_not_end_the_run():
    result, sink, messages = train(sink=MemorySink(fails_at=(2, 6, 8)), steps=8, plan={"checkpoint_every_steps": 2})
    assert (result.status, result.saved_step, sorted(sink.checkpoints)) == ("done", 4, [4])
    assert messages["warning"] == [
        "the checkpoint of step 2 cannot be written (No space left on device): the run goes on, and there is no older "
        "one",
        *(f"the checkpoint of step {step} cannot be written (No space left on device): the run goes on, and that of "
          "step 4 is valid" for step in (6, 8)),
    ]  # fmt: skip


def test_a_base_that_is_cut_off_ends_the_run():
    checks = iter([None, None, Path("base.gguf")])
    result, sink, _ = train(cut_file=lambda: next(checks))
    assert (result.status, result.cut_file, len(sink.steps), result.after) == (
        "interrupted",
        Path("base.gguf"),
        2,
        None,
    )


# ---- pauses ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(loop, "PAUSE_SECONDS", 0.3)


def test_a_run_that_is_asked_to_wait_saves_a_checkpoint_and_goes_on():
    asked = iter(["", "", "", "asked for", "asked for", *[""] * 20])
    result, sink, messages = train(should_wait=lambda: next(asked))
    assert sorted(sink.checkpoints) == [4]
    assert messages["warning"] == ["paused after step 4, with a checkpoint: asked for"]
    assert messages["note"] == ["going on after a pause of 0 s"]
    assert result.progress.seconds < 0.3  # a pause is not training
    np.testing.assert_array_equal(values(result), values(train()[0]))


def test_a_run_can_be_stopped_while_it_waits():
    paused = []
    result, _, _ = train(
        should_wait=lambda: "rest" if paused or not paused.append(1) else "", should_stop=lambda: len(paused) > 0
    )
    assert result.status == "interrupted"


def test_layers_of_a_run_that_went_back_to_its_start_are_not_said_to_have_had_no_gradient():
    class Unmoved(ToySession):
        def unmoved_layers(self, state):
            return [] if state.mean.any() else ["layer"]

    nan_from_two = Unmoved(loss_at=lambda step, loss: loss if step == 1 else math.nan)
    result, _, messages = train(nan_from_two, steps=3)
    assert (result.status, result.progress.guard.rollbacks, result.adapter.layers["layer"].A.any()) == (
        "done",
        1,
        False,
    )
    assert not any("never had a gradient" in text for text in messages["warning"])


@pytest.mark.parametrize(
    ("rows", "told"), [(4, "on 4 rows compared one by one that may be chance"), (30, "fits the training rows and not")]
)
def test_a_rise_of_the_validation_loss_is_blamed_on_the_training_rows_if_it_is_clear(rows, told):
    def scores(nats):
        losses = {row: LossSum(nats + row / 100, 1) for row in range(rows)}
        return Scores(nats, 1.0, row_losses=losses)

    class Rising(ToyTask):
        def evaluate(self, session, adapter, execution, control):
            return scores(3.0 if adapter.any() else 2.0)

    task = Rising(**vars(make_task()))
    _, _, messages = train(task=task)
    (warning,) = (text for text in messages["warning"] if "the validation loss rose" in text)
    assert told in warning
