"""A quick version of every line of `make torture`."""

import pytest

from torture import files, runs
from torture.__main__ import TRIALS

QUICK = {"safetensors": 3000, "gguf": 2000, "adapters": 500, "rows": 500}


@pytest.mark.parametrize("name", QUICK)
def test_a_mutated_file_is_refused_or_read_and_nothing_else(name, monkeypatch):
    monkeypatch.setattr(files, "SLOW_SECONDS", 5.0)  # of a machine that does other things too
    line = TRIALS[name][0](QUICK[name])
    assert (line.wrong, line.tried) == (0, QUICK[name])


def test_killed_runs_end_as_they_would_have():
    line = runs.kill_runs(2)
    assert (line.wrong, line.tried) == (0, 2)
