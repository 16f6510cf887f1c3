"""Rates of the machine: kept for a week, measured again when anything changed."""

import dataclasses
import json
import math

import pytest

from thimble.models import machine as module
from thimble.models.machine import Machine, disk_bytes_per_second, remembered


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "thimble" / "machine.json"


def measuring(times, when=1e9):
    def measure():
        times.append(1)
        return Machine("a processor", 2, {"fp32": 1e11}, 1e10, when)

    return measure


def test_a_machine_is_measured_once(monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 60)
    times = []
    first, second = remembered("key", measuring(times)), remembered("key", measuring(times))
    assert first == second
    assert len(times) == 1


@pytest.mark.parametrize("change", ["key", "age", "clock set back", "damage", "missing field"])
def test_it_is_measured_again_when(change, cache, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 60)
    times = []
    remembered("key", measuring(times))
    if change == "age":
        monkeypatch.setattr(module.time, "time", lambda: 1e9 + module.STALE_AFTER_SECONDS + 1)
    if change == "clock set back":
        monkeypatch.setattr(module.time, "time", lambda: 1e9 - 60)
    if change == "damage":
        cache.write_text("{")
    if change == "missing field":
        cache.write_text(json.dumps({"key": "key", "machine": {"name": "x"}}))
    remembered("another key" if change == "key" else "key", measuring(times))
    assert len(times) == 2


def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "thimble").write_text("a file where the folder should be")
    times = []
    found = remembered("key", measuring(times))
    assert dataclasses.asdict(found)["cores"] == 2


def test_the_rate_of_a_disk_is_that_of_bytes_read(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(100_000))
    assert disk_bytes_per_second(path) > 1e5


def test_a_control_group_limits_what_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_control_groups", lambda controller: [tmp_path])
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert module.available_bytes() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert module.available_bytes() > 500_000


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, math.inf),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu.max": "no number"}, math.inf),
    ],
)
def test_a_quota_of_time_is_so_many_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(module, "_control_groups", lambda controller: [tmp_path / "none", tmp_path])
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert module.quota_cores.__wrapped__() == cores


def test_the_tightest_quota_of_all_groups_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_control_groups", lambda controller: [tmp_path / "above", tmp_path / "own"])
    for name, quota in (("above", 100_000), ("own", 300_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpu.max").write_text(f"{quota} 100000\n")
    assert module.quota_cores.__wrapped__() == 1
