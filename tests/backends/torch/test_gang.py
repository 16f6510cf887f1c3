"""Threads that meet at every phase: what one wrote is seen by all, and late ones are counted in or sent away."""

import threading
import time

import numpy as np
import pytest

from thimble.backends.torch import gang
from thimble.backends.torch.compiled import compiled
from thimble.backends.torch.threads import helpers


@compiled(nogil=True, error_model="numpy")
def running_sums(shared, rounds, values, seen):
    """Each phase replaces every value by the sum of all, modulo 1009, a share on each thread, from row to row."""
    number, begun, threads = gang.join(shared)
    if begun == gang.CLOSED:
        return
    for phase in range(begun, rounds):
        if phase > begun:
            threads = gang.advance(shared, number, threads, phase)
        if phase < 0:
            continue
        size = values.shape[1]
        seen[phase] = threads
        for i in range(size * number // threads, size * (number + 1) // threads):
            values[phase + 1, i] = (values[phase].sum() + i) % 1009
    gang.advance(shared, number, threads, gang.CLOSED)


def expected(rounds, first):
    rows = [first]
    for _ in range(rounds):
        rows.append((rows[-1].sum() + np.arange(len(first))) % 1009)
    return np.array(rows)


LEARN = gang._Crowd.note


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch):
    """As on a machine whose cores nobody else wants."""
    monkeypatch.setattr(gang._Crowd, "note", lambda self, threads, wall, busy: None)


def run(rounds=300, size=500):
    values, seen = np.zeros((rounds + 1, size), np.int64), np.zeros(rounds, np.int64)
    values[0] = np.arange(size)
    gang.run_together(running_sums, rounds, values, seen)
    return values, seen, expected(rounds, np.arange(size))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_phase_sees_what_the_last_one_wrote(threads, monkeypatch):
    monkeypatch.setattr(gang, "usable_threads", lambda: threads)
    for _ in range(20):
        values, seen, wanted = run()
        assert np.array_equal(values, wanted)
        assert seen.max() <= threads


def test_a_thread_that_comes_is_counted_in(monkeypatch):
    monkeypatch.setattr(gang, "usable_threads", lambda: 2)
    assert any(run(3000)[1].max() == 2 for _ in range(2000))  # on a busy machine it comes late


def test_nobody_waits_for_threads_that_are_at_work_elsewhere(monkeypatch):
    monkeypatch.setattr(gang, "usable_threads", lambda: 2)
    release = threading.Event()
    busy = [helpers().submit(release.wait) for _ in range(helpers()._max_workers)]
    time.sleep(0.05)
    try:
        values, seen, wanted = run()
    finally:
        release.set()
    assert np.array_equal(values, wanted)
    assert seen.max() == 1
    for task in busy:
        task.result()


def test_several_programs_may_run_at_once(monkeypatch):
    monkeypatch.setattr(gang, "usable_threads", lambda: 2)
    results = []
    threads = [threading.Thread(target=lambda: results.append(run())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(values, wanted) for values, _, wanted in results)


def test_where_others_want_the_cores_one_thread_runs_alone_for_a_while():
    crowd = gang._Crowd()
    LEARN(crowd, 4, 1.0, 3.9)
    assert crowd.threads(4) == 4
    LEARN(crowd, 4, 1.0, 1.2)
    assert [crowd.threads(4) for _ in range(gang.ALONE)] == [1] * (gang.ALONE - 1) + [4]
    LEARN(crowd, 1, 1.0, 0.1)  # one thread waits for nobody
    assert crowd.threads(4) == 4
