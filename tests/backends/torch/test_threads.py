"""How many cores are used."""

import math

import pytest

from thimble.backends.torch import threads
from thimble.models import machine


@pytest.mark.parametrize(("quota", "cores"), [(math.inf, 2), (1.9, 1), (0.5, 1), (64.0, 2)])
def test_whole_cores_of_a_quota_are_used(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(machine, "CPUS", tmp_path)  # where no core is told to be the sibling of another
    monkeypatch.setattr(machine, "quota_cores", lambda: quota)
    monkeypatch.setattr(threads, "usable_cores", machine.usable_cores.__wrapped__)
    assert threads.num_cores() == cores
