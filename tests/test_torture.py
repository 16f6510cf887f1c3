"""A quick version of every line of `make torture`."""

import pytest

from torture import files, runs
from torture.__main__ import TRIALS

QUICK = {"safetensors": 3000, "gguf": 2000, "rows": 500}
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


def test_killed_runs_end_as_they_would_have():
    line = runs.kill_runs(2)
    assert (line.wrong, line.tried) == (0, 2)


@pytest.mark.parametrize("name", STORAGE)
def test_storage_keeps_its_promises(name):
    line = TRIALS[name][0](STORAGE[name])
    assert line.wrong == 0
    assert line.tried >= STORAGE[name]


def test_no_hostile_template_hangs_or_fills_the_memory():
    line = TRIALS["templates"][0](400)
    assert (line.wrong, line.tried) == (0, 400)
