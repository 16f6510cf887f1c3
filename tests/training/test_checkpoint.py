"""Checkpoints: the old one or the new one after anything, and a run that goes on as if nothing had happened."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import thimble
from stress.crash import World, tree
from stress.disk import Operation, Record
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import ConfigError
from thimble.files.peft import load_adapter
from thimble.models.execution import ExecutionPlan
from thimble.training.checkpoint import (
    FOLDER,
    KEPT,
    clear_checkpoints,
    clear_unfinished,
    latest_checkpoint,
    locked,
    save_checkpoint,
)
from thimble.training.progress import Progress
from thimble.training.run_folder import StepLog, publish_adapter, write_json

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_old_release"  # stopped after 3 of 6 steps
QUICK = {"seq_len": 64, "batch_tokens": 64, "max_steps": 8, "max_new_tokens": 4, "compute": "fp32", "rank": 4}


def state(step):
    return {"adapter": np.full(50, step, np.float32), "step": np.array([step], np.float32)}


def save(folder, step):
    save_checkpoint(folder, step, state(step), {"tokens": 10 * step}, {"base": "b"})


def test_the_newest_is_found_and_older_ones_go(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    found = latest_checkpoint(tmp_path)
    assert (found.step, found.progress, found.origin, found.damaged) == (4, {"tokens": 40}, {"base": "b"}, ())
    np.testing.assert_array_equal(found.state["adapter"], state(4)["adapter"])
    assert len(list((tmp_path / FOLDER).iterdir())) == KEPT


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_any_bit_that_flips_is_noticed(name, tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / FOLDER / "step-00000002" / name
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 100):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        found = latest_checkpoint(tmp_path)
        assert (found.step, found.damaged) == (1, ("step-00000002",))


@pytest.mark.parametrize("wrong", ["missing", "empty", "not json", "foreign"])
def test_what_is_no_checkpoint_does_not_count(wrong, tmp_path):
    save(tmp_path, 1)
    other = tmp_path / FOLDER / "step-00000099"
    other.mkdir()
    if wrong != "missing":
        (other / "manifest.json").write_text({"empty": "", "not json": "{", "foreign": '{"step": 99}'}[wrong])
    assert latest_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("wrong", ["of another step", "vouching for nothing", "told otherwise"])
def test_what_was_not_saved_so_does_not_count(wrong, tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    one, two = (tmp_path / FOLDER / f"step-{step:08d}" for step in (1, 2))
    manifest = json.loads((two / "manifest.json").read_text())
    if wrong == "of another step":
        shutil.rmtree(two)
        shutil.copytree(one, two)
    elif wrong == "vouching for nothing":
        (two / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    else:
        (two / "manifest.json").write_text(json.dumps({**manifest, "progress": {"tokens": 21}}))
    found = latest_checkpoint(tmp_path)
    assert (found.step, found.damaged) == (1, (two.name,))


def test_a_damaged_older_one_does_not_crowd_out_a_valid_one(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / FOLDER / "step-00000002" / "state.safetensors").write_bytes(b"damaged")
    save(tmp_path, 3)
    (tmp_path / FOLDER / "step-00000003" / "state.safetensors").write_bytes(b"damaged")
    assert latest_checkpoint(tmp_path).step == 1


def test_a_folder_of_another_name_is_left_alone(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / FOLDER / "step-00000001", tmp_path / FOLDER / "step-00000001-mine")
    save(tmp_path, 2)
    save(tmp_path, 3)
    assert (tmp_path / FOLDER / "step-00000001-mine").is_dir()
    assert latest_checkpoint(tmp_path).damaged == ()


def test_what_a_save_promised_is_on_disk_when_it_returns(tmp_path):
    with Record(tmp_path) as disk:
        log = StepLog(tmp_path / "metrics.jsonl")
        log.add({"step": 1})
        save(tmp_path, 1)
        log.close()
    world = World()
    for operation in disk.operations:
        world.apply(operation)
    assert world.unsure() == ([], [])
    assert world.left() == tree(tmp_path)


def test_one_that_was_saved_by_a_process_that_died_is_on_disk_when_a_save_of_it_returns(tmp_path):
    save(tmp_path, 1)
    with Record(tmp_path) as disk:
        save(tmp_path, 1)
    assert Operation("fsync", FOLDER) in disk.operations


def test_damaged_newer_ones_do_not_crowd_out_valid_ones(tmp_path):
    for step in (8, 9):
        save(tmp_path, step)
        (tmp_path / FOLDER / f"step-{step:08d}" / "state.safetensors").write_bytes(b"damaged")
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path).step == 2
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["step-00000001", "step-00000002"]


def test_stopped_at_any_call_there_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    true = {name: getattr(os, name) for name in ("rename", "replace", "fsync", "open", "mkdir")}

    def attempt(folder, most):
        calls, raised = iter(range(10_000)), []

        def stopping(name):
            def call(*arguments, **options):
                if next(calls) == most:
                    raised.append(name)
                    raise OSError(28, "No space left on device")
                return true[name](*arguments, **options)

            return call

        for name in true:
            monkeypatch.setattr(os, name, stopping(name))
        try:
            save(folder, 2)
        except OSError:
            pass
        finally:
            for name, function in true.items():
                monkeypatch.setattr(os, name, function)
        return raised

    for most in range(100):
        folder = tmp_path / str(most)
        folder.mkdir()
        save(folder, 1)
        raised = attempt(folder, most)
        found = latest_checkpoint(folder)
        assert found.step in (1, 2) if raised else found.step == 2
        np.testing.assert_array_equal(found.state["adapter"], state(found.step)["adapter"])
        if not raised:
            break
    assert 8 < most < 99


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / FOLDER / ".step-00000123.tmp").mkdir(parents=True)
    (tmp_path / ".adapter.tmp").mkdir()
    (tmp_path / ".config.yaml.tmp").write_text("half")
    save(tmp_path, 1)
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["step-00000001"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match="another run is at work"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_no_reader_ever_sees_half_an_adapter(tmp_path):
    """Config and weights of each adapter agree: whoever mixes two of them would see it."""

    def made(number):
        a, b = np.full((2, 8), number, np.float32), np.full((8, 2), number, np.float32)
        return Adapter({f"model.layers.{layer}.mlp.up_proj": Factors(a, b, (number + 1) / 2) for layer in range(3)})

    publish_adapter(tmp_path, made(0))
    read, is_over = [], threading.Event()

    def look():
        while not is_over.is_set():
            layers = load_adapter(tmp_path).layers.values()
            numbers = {(float(f.A[0, 0]), float(f.B[0, 0]), f.scale) for f in layers}
            assert len(numbers) == 1, numbers
            (number, other, scale) = numbers.pop()
            assert number == other == 2 * scale - 1
            read.append(number)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(look) for _ in range(2)]
        for number in range(1, 150):
            publish_adapter(tmp_path, made(number))
        is_over.set()
        for reader in readers:
            reader.result()
    assert len(read) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_checkpoints_go_only_when_what_the_run_leaves_is_on_disk(tmp_path):
    save(tmp_path, 1)
    write_json(tmp_path / "report.json", {})
    with Record(tmp_path) as disk:
        clear_checkpoints(tmp_path)
    kinds = [(operation.kind, operation.path) for operation in disk.operations]
    assert ("fsync", ".") in kinds
    removed = min(number for number, (kind, _) in enumerate(kinds) if kind in ("unlink", "rmdir"))
    assert kinds.index(("fsync", ".")) < removed


def test_a_checkpoint_of_the_release_before_has_the_names_of_today():
    found = latest_checkpoint(OLD_RUN)
    assert (found.step, found.damaged) == (3, ())
    assert found.origin["execution"] == "file, 64 tokens at a time, 1 in parallel"
    assert "way" not in found.origin
    execution = ExecutionPlan(**found.progress["execution"])
    assert execution.described() == found.origin["execution"]
    progress = Progress(execution)
    progress.restore(found.step, found.progress)
    assert (progress.steps, progress.tokens, progress.target_tokens) == (3, 168, 30)
    assert (progress.guard.steps, progress.guard.rollbacks, progress.plateau.best_step) == (3, 0, 2)
    assert set(progress.initialization) == {"seconds"}
    again = Progress(execution)
    again.restore(3, json.loads(json.dumps(progress.state())))  # what is written today
    assert again == progress
    assert {"execution", "rollbacks", "target_tokens", "initialization"} <= set(progress.state())


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(examples, tiny_base, tmp_path):
    """A run that was stopped after three steps, with no flag that asks for checkpoints; its base may be changed."""
    base = tmp_path / "base.gguf"
    shutil.copy(tiny_base, base)
    taken = []
    thimble.train(
        examples, base=str(base), out=str(tmp_path / "run"), should_stop=lambda: len(taken) >= 3, **QUICK,
        on_event=lambda e: taken.append(e) if e.kind == "step" else None,
    )  # fmt: skip
    return tmp_path / "run"


def test_an_interrupted_run_goes_on_to_the_same_end(interrupted, examples, tiny_base, tmp_path):
    thimble.train(examples, base=tiny_base, out=str(tmp_path / "whole"), **QUICK)
    report = thimble.train(out=str(interrupted), resume=True)
    assert report.status == "done"
    one, two = (load_adapter(tmp_path / name).layers for name in ("whole", "run"))
    for path, factors in one.items():
        np.testing.assert_array_equal(factors.A, two[path].A)
        np.testing.assert_array_equal(factors.B, two[path].B)
    assert not (interrupted / FOLDER).exists()  # a finished run needs them no more


def test_a_run_of_the_release_before_is_resumed(examples, tiny_base, tmp_path):
    shutil.copytree(OLD_RUN, tmp_path / "run")
    config = (OLD_RUN / "config.yaml").read_text()
    config = config.replace("data: mine.jsonl", f"data: {examples}").replace("out: run", f"out: {tmp_path / 'run'}")
    config = config.replace("base: tests/fixtures/gguf/smollm2.gguf", f"base: {tiny_base}")
    (tmp_path / "run" / "config.yaml").write_text(config)
    report = thimble.train(out=str(tmp_path / "run"), resume=True)
    assert (report.status, report.steps) == ("done", 6)
    assert report.loss_base == pytest.approx(6.280394, abs=1e-4)  # as it was measured then
    ours, expected = load_adapter(tmp_path / "run").layers, load_adapter(OLD_RUN / "expected").layers
    for path, factors in expected.items():
        np.testing.assert_allclose(ours[path].A, factors.A, atol=1e-3)
        np.testing.assert_allclose(ours[path].B, factors.B, atol=1e-3)


def test_resuming_with_other_data_is_refused_unless_asked_for(interrupted, examples):
    examples.write_text(examples.read_text().replace("it is", "it was"))
    with pytest.raises(ConfigError, match="the data changed since the run to resume began.*--accept-changes"):
        thimble.train(out=str(interrupted), resume=True)
    report = thimble.train(out=str(interrupted), resume=True, accept_changes=True)
    assert any("the data changed since the run began" in text for text in report.messages["warning"])


def test_resuming_with_another_base_is_refused(interrupted, tmp_path):
    path = tmp_path / "base.gguf"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="the base changed since the run to resume began"):
        thimble.train(out=str(interrupted), resume=True)


def test_resuming_on_another_machine_says_what_may_differ(interrupted):
    found = latest_checkpoint(interrupted)
    shutil.rmtree(interrupted / FOLDER)
    save_checkpoint(interrupted, found.step, found.state, found.progress, {**found.origin, "cores": "96"})
    report = thimble.train(out=str(interrupted), resume=True)
    assert any("the last digits may differ" in text and "cores was 96" in text for text in report.messages["warning"])


def test_checkpoints_are_made_by_the_clock(examples, tiny_base, tmp_path):
    seen = []
    thimble.train(
        examples, base=tiny_base, out=str(tmp_path / "run"), checkpoint_every_minutes=1e-6, **QUICK,
        on_event=lambda e: seen.append(latest_checkpoint(tmp_path / "run")) if e.kind == "step" else None,
    )  # fmt: skip
    assert [found.step for found in seen[1:]] == list(range(1, 8))
