"""A quick version of every line of `make stress`."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from stress import files, runs, server, traffic
from stress.__main__ import TRIALS

QUICK = {"safetensors": 3000, "gguf": 2000, "gguf_adapters": 500, "data": 500, "csv": 500, "arrow": 300, "columns": 500}
FOREIGN = {"adapters": 1000, "adapter_tensors": 1000, "bases": 1000, "tokenizers": 400, "gguf_metadata": 400}
STORAGE = {"stops": 1, "cuts": 300, "full": 10, "flips": 100, "publishes": 20, "modes": 1}


@pytest.mark.parametrize("name", QUICK)
def test_a_mutated_file_is_refused_or_read_and_nothing_else(name, monkeypatch):
    monkeypatch.setattr(files, "SLOW_SECONDS", 5.0)  # of a machine that does other things too
    line = TRIALS[name][0](QUICK[name])
    assert (line.wrong, line.tried) == (0, QUICK[name])


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_wrong_but_well_formed_is_refused_or_read_and_nothing_else(name, monkeypatch):
    monkeypatch.setattr(files, "SLOW_SECONDS", 5.0)
    line = TRIALS[name][0](FOREIGN[name])
    assert (line.wrong, line.tried) == (0, FOREIGN[name])


def test_no_hostile_folder_runs_anything():
    line = TRIALS["canaries"][0](52)
    assert (line.wrong, line.tried) == (0, 52)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("kill", 2),
        ("kill_pictures", 2),
        ("stopped", 3),
        ("numbers", 15),
        ("signals", 2),
        ("full_runs", 4),
        ("many_rows", 20_000),
    ],
)
def test_runs_end_as_they_would_have_or_say_that_they_failed(name, count, monkeypatch):
    monkeypatch.setattr(runs, "MOST_SECONDS_TO_END", 60.0)  # of a machine that does other things too
    line = TRIALS[name][0](count)
    assert (line.wrong, line.tried) == (0, count)


def test_hundreds_of_steps_leave_no_memory_and_no_files_behind(monkeypatch):
    monkeypatch.setattr(runs, "SETTLED", 0.5)
    monkeypatch.setattr(runs, "MOST_GROWN_BYTES", 100_000_000)
    line = TRIALS["soak"][0](400)
    assert line.wrong == 0, line.note


def test_a_run_with_too_little_memory_takes_less_or_is_refused(tmp_path):
    line = TRIALS["memory"][0](1)
    assert (line.wrong, line.tried) == (0, 1)


@pytest.mark.parametrize("name", STORAGE)
def test_storage_keeps_its_promises(name):
    line = TRIALS[name][0](STORAGE[name])
    assert line.wrong == 0
    assert line.tried >= STORAGE[name]


def test_no_hostile_template_hangs_or_fills_the_memory():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # whose children are those of the templates alone
        line = pool.submit(TRIALS["templates"][0], 70).result()
    assert (line.wrong, line.tried) == (0, 70)


@pytest.mark.parametrize(("name", "count"), [("server_bodies", 2000), ("server_requests", 150)])
def test_no_request_hurts_a_server(name, count, monkeypatch):
    monkeypatch.setattr(server, "MOST_SECONDS", 30.0)  # of a machine that does other things too
    line = TRIALS[name][0](count)
    assert line.wrong == 0


def test_traffic_of_all_kinds_at_once_ends_in_no_fault(monkeypatch):
    monkeypatch.setattr(traffic, "MOST_HEALTH_SECONDS", 60.0)  # of a machine that does other things too
    monkeypatch.setattr(traffic, "MOST_GROWN_BYTES", 300_000_000)  # in seconds nothing has settled
    line = TRIALS["traffic"][0](3)
    assert line.wrong == 0, line.note
    assert line.tried >= traffic.STREAMS
