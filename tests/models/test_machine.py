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


# ---- one result for each set of cores and quota, and none that was taken under load ----------------------------------


def test_sets_of_cores_do_not_forget_one_another(monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 60)
    times = []
    for key in ("cores 0-1", "cores 0", "cores 0-1", "cores 0"):
        remembered(key, measuring(times))
    assert len(times) == 2


def test_of_very_many_sets_the_latest_are_kept(cache, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 600)
    for number in range(module.MOST_REMEMBERED + 5):
        remembered(f"key {number}", measuring([], 1e9 + number))
    kept = json.loads(cache.read_text())["machines"]
    assert len(kept) == module.MOST_REMEMBERED
    assert "key 0" not in kept


def test_what_is_asked_for_anew_is_measured_and_remembered(monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 60)
    times = []
    remembered("other", measuring(times))
    remembered("key", measuring(times))
    remembered("key", measuring(times), is_fresh=True)
    assert len(times) == 3
    remembered("key", measuring(times))
    remembered("other", measuring(times))
    assert len(times) == 3


def loaded(flops, load, when=1e9):
    return lambda: Machine("a processor", 2, flops, 1e10, when, load)


def test_what_was_measured_under_load_is_measured_again_and_the_higher_rate_kept(monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 1)
    first = remembered("key", loaded({"fp32": 5e10}, 0.6))
    assert first.is_loaded
    assert remembered("key", loaded({"fp32": 1e12}, 0.0)) == first, "not twice in one command"
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 100)
    second = remembered("key", loaded({"fp32": 4e10, "bf16": 3e11}, 0.5, 1e9 + 100))
    assert (dict(second.flops), second.load) == ({"fp32": 5e10, "bf16": 3e11}, 0.5)
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 200)
    third = remembered("key", loaded({"fp32": 1e11, "bf16": 4e11}, 0.02, 1e9 + 200))
    assert (third.flops["fp32"], third.is_loaded) == (1e11, False)
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 5000)
    assert remembered("key", loaded({"fp32": 1.0}, 0.0)) == third


@pytest.mark.parametrize(
    ("busy", "own", "share"),
    [((10.0, 12.0), 2.0, 0.0), ((10.0, 14.0), 2.0, 0.5), ((10.0, 10.5), 2.0, 0.0), ((10.0, 99.0), 0.0, 1.0)],
)
def test_load_is_the_time_that_others_took(busy, own, share, monkeypatch):
    """Over two seconds on two cores."""
    clocks = {"busy": iter(busy), "own": iter((5.0, 5.0 + own)), "wall": iter((100.0, 102.0))}
    monkeypatch.setattr(module, "busy_seconds", lambda: next(clocks["busy"]))
    monkeypatch.setattr(module, "_count_cores", lambda: 2)
    monkeypatch.setattr(module.time, "process_time", lambda: next(clocks["own"]))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clocks["wall"]))
    assert module.LoadMeter().share() == share


def test_where_the_system_tells_nothing_the_last_minute_counts(monkeypatch):
    monkeypatch.setattr(module, "busy_seconds", lambda: None)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(module.os, "getloadavg", lambda: (1.0, 0, 0))
    assert module.LoadMeter().share() == 0.25


@pytest.mark.parametrize(
    ("cores", "quota", "text"),
    [({0, 1, 2, 5}, math.inf, "0-2,5"), ({3}, math.inf, "3"), ({0, 1}, 1.5, "0-1 for 1.5 cores' time")],
)
def test_a_set_of_cores_has_a_name(cores, quota, text, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: cores, raising=False)
    monkeypatch.setattr(module, "quota_cores", lambda: quota)
    assert module.core_set() == text


@pytest.mark.parametrize(
    "wrong",
    [{"flops": {"fp32": -1}}, {"flops": {}}, {"flops": {"fp32": None}}, {"flops": 3}, {"copy_bytes": "x"},
     {"copy_bytes": 0}, {"measured": "today"}, {"measured": None}, {"load": math.nan}, {"flops": {"fp32": math.inf}}],
)  # fmt: skip
def test_rates_that_are_none_are_measured_again(wrong, cache, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1e9 + 60)
    remembered("key", measuring([]))
    saved = json.loads(cache.read_text())
    saved["machines"]["key"] |= wrong
    cache.write_text(json.dumps(saved))
    times = []
    assert remembered("key", measuring(times)).flops == {"fp32": 1e11}
    assert len(times) == 1
