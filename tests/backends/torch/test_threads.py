"""How many cores are used."""

import math

import pytest

from thimble.backends.torch import threads


@pytest.mark.parametrize(("quota", "cores"), [(math.inf, 2), (1.9, 1), (0.5, 1), (64.0, 2)])
def test_whole_cores_of_a_quota_are_used(monkeypatch, quota, cores):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(threads, "quota_cores", lambda: quota)
    assert threads.num_cores() == cores
