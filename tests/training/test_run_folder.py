"""What is written into a run folder is there whole and on disk, or not at all."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from stress.crash import World
from stress.disk import Operation, Record
from thimble.config.merge import MergeConfig
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.errors import ConfigError
from thimble.files.peft import load_adapter
from thimble.report.card import About, derived_card
from thimble.training import run_folder
from thimble.training.checkpoint import clear_unfinished
from thimble.training.run_folder import (
    atomic_folder,
    check_new_file,
    make_folder,
    publish_adapter,
    read_steps,
    write_text,
)

CARD_OF_OURS = derived_card(
    About("a", "", "", "", "AutoModelForCausalLM", [2], [1.0], 32, use_dora=False), "merge", MergeConfig(), []
)


def made(number):
    factors = Factors(np.full((2, 8), number, np.float32), np.full((8, 2), number, np.float32), 1.0)
    return Adapter({"model.layers.0.mlp.up_proj": factors})


def number_of(folder):
    return float(load_adapter(folder).layers["model.layers.0.mlp.up_proj"].A[0, 0])


def left_by_the_worst_power_cut(operations):
    """What is there if everything that was not synced is lost."""
    world = World()
    for operation in operations:
        world.apply(operation)
    names, _ = world.unsure()
    return world.left(frozenset(names), lambda node: node.bytes(node.synced))


def refuse(monkeypatch, name, number, most=1):
    """Have the system refuse a call, or several, after so many others."""
    true, calls = getattr(os, name), iter(range(10_000))

    def call(*arguments, **options):
        if number <= next(calls) < number + most:
            raise OSError(5, "Input/output error")
        return true(*arguments, **options)

    monkeypatch.setattr(os, name, call)


def test_a_folder_and_those_above_it_survive_a_power_cut(tmp_path):
    with Record(tmp_path) as disk:
        make_folder(tmp_path / "runs" / "mine")
    assert left_by_the_worst_power_cut(disk.operations) == {"runs": None, "runs/mine": None}


def test_a_folder_that_a_process_made_before_it_died_survives_a_power_cut_too(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with Record(tmp_path) as disk:
        make_folder(tmp_path / "runs" / "mine")
    assert {Operation("fsync", "."), Operation("fsync", "runs")} <= set(disk.operations)


@pytest.mark.parametrize("tidy", [clear_unfinished, lambda folder: publish_adapter(folder, made(2))])
def test_the_earlier_adapter_goes_when_the_exchange_of_a_process_that_died_is_on_disk(tidy, tmp_path):
    publish_adapter(tmp_path, made(1))
    shutil.copytree(tmp_path / "adapter", tmp_path / ".adapter.tmp")
    with Record(tmp_path) as disk:
        tidy(tmp_path)
    removed = next(number for number, operation in enumerate(disk.operations) if operation.kind == "unlink")
    assert Operation("fsync", ".") in disk.operations[:removed]


def test_a_published_adapter_survives_a_power_cut(tmp_path):
    with Record(tmp_path) as disk:
        publish_adapter(tmp_path, made(1))
    left = left_by_the_worst_power_cut(disk.operations)
    assert left == {f"adapter/{path.name}": path.read_bytes() for path in (tmp_path / "adapter").iterdir()} | {
        "adapter": None
    }


def test_an_adapter_gets_its_name_after_its_files_are_on_disk(tmp_path):
    with Record(tmp_path) as disk:
        publish_adapter(tmp_path, made(1))
    (named,) = [n for n, o in enumerate(disk.operations) if o.other == "adapter"]
    synced = {o.path.rpartition("/")[2] for o in disk.operations[:named] if o.kind == "fsync"}
    assert {".adapter.tmp", "adapter_config.json"} <= synced


def test_a_folder_that_is_moved_whole_survives_a_power_cut(tmp_path):
    with Record(tmp_path) as disk, atomic_folder(tmp_path / "new" / "export") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "config.json").write_text("{}")
    left = left_by_the_worst_power_cut(disk.operations)
    assert left == {"new": None, "new/export": None, "new/export/part": None, "new/export/part/config.json": b"{}"}


@pytest.mark.parametrize("name", ["replace", "fsync", "rename", "mkdir"])
def test_a_publish_that_fails_leaves_nothing_half_written(name, tmp_path, monkeypatch):
    before = {"fsync": len(tmp_path.parents) + 1, "mkdir": 1}.get(name, 0)  # those for the run folder itself
    with monkeypatch.context() as patch:
        refuse(patch, name, before)
        with pytest.raises(OSError, match="Input/output"):
            publish_adapter(tmp_path, made(1))
    assert not list(tmp_path.iterdir())


def test_text_that_cannot_be_written_leaves_nothing_half_written(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    refuse(monkeypatch, "fsync", 0)
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"\0\0\0\0", b'{"step": \xff}', b'{"stap": 2}', b"2"])
def test_a_log_is_read_up_to_a_line_that_is_damaged(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert read_steps(path) == [{"step": 1}]


# ---- where the system cannot exchange two names ---------------------------------------------------------------------


@pytest.fixture
def without_exchange(monkeypatch):
    monkeypatch.setattr(run_folder, "_exchange", lambda one, other: False)


def test_an_adapter_is_replaced_without_an_exchange(without_exchange, tmp_path):
    publish_adapter(tmp_path, made(1))
    publish_adapter(tmp_path, made(2))
    assert number_of(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_earlier_adapter_stays_until_the_names_are_on_disk(without_exchange, tmp_path):
    publish_adapter(tmp_path, made(1))
    with Record(tmp_path) as disk:
        publish_adapter(tmp_path, made(2))
    named = disk.operations.index(Operation("rename", ".adapter.tmp", "adapter"))
    removed = next(n for n, o in enumerate(disk.operations) if o.kind == "unlink" and ".adapter.old" in o.path)
    assert Operation("fsync", ".") in disk.operations[named:removed]


@pytest.mark.parametrize("number", [0, 1])
def test_the_earlier_adapter_comes_back_if_the_new_one_cannot_be_named(number, without_exchange, tmp_path, monkeypatch):
    publish_adapter(tmp_path, made(1))
    with monkeypatch.context() as patch:
        refuse(patch, "rename", number)
        with pytest.raises(OSError, match="Input/output"):
            publish_adapter(tmp_path, made(2))
    assert number_of(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_earlier_adapter_is_kept_if_it_cannot_come_back_at_once(without_exchange, tmp_path, monkeypatch):
    publish_adapter(tmp_path, made(1))
    with monkeypatch.context() as patch:
        refuse(patch, "rename", 1, most=2)
        with pytest.raises(OSError, match="Input/output"):
            publish_adapter(tmp_path, made(2))
    with pytest.raises(ValueError, match="not a number"):
        _publish_and_fail(tmp_path)
    assert number_of(tmp_path) == 1


def test_the_earlier_adapter_comes_back_if_the_process_died_between_two_names(tmp_path):
    publish_adapter(tmp_path, made(1))
    Path(tmp_path, "adapter").rename(tmp_path / ".adapter.old")
    with pytest.raises(ValueError, match="not a number"):
        _publish_and_fail(tmp_path)
    assert number_of(tmp_path) == 1


def _publish_and_fail(folder):
    class Unwritable(Adapter):
        def plain(self):
            raise ValueError("not a number")

    publish_adapter(folder, Unwritable(made(2).layers))


def test_a_card_that_somebody_changed_goes_along_when_the_adapter_is_replaced(tmp_path):
    folder = publish_adapter(tmp_path, made(1))
    (folder / "README.md").write_text("My own words.\n")
    publish_adapter(tmp_path, made(2))
    assert (number_of(folder), (folder / "README.md").read_text()) == (2, "My own words.\n")
    (folder / "README.md").write_text(CARD_OF_OURS)
    publish_adapter(tmp_path, made(3))
    assert not (folder / "README.md").exists(), "its figures are of another adapter"


def test_a_folder_is_not_taken_for_the_name_of_a_file_to_write(tmp_path):
    with pytest.raises(ConfigError, match="--answers is .*/new/, a folder: name a file in it, such as .*/new/answers"):
        check_new_file(f"{tmp_path}/new/", "--answers")
    check_new_file(f"{tmp_path}/answers.jsonl", "--answers")
