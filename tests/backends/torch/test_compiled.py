"""Compiled loops where numba finds no place for its cache, or a damaged one."""

import subprocess
import sys

import numpy as np
import pytest

from thimble.backends.torch.compiled import compiled

PROGRAM = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import numpy as np
from thimble.backends.torch.kernels import quantize_rows_into
q, scale = np.empty((2, 4), np.int8), np.empty(2, np.float32)
quantize_rows_into(np.ones((2, 4), np.float32), q, scale)
print(q.sum())
"""


def test_loops_run_where_no_cache_can_be_written():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(8 * 127)), done.stderr


@pytest.mark.parametrize("side", ["save_overload", "load_overload"])
def test_a_cache_that_fails_costs_time_only(side, monkeypatch):
    from numba.core.caching import Cache

    def fail(*_):
        raise OSError("the disk is full") if side == "save_overload" else ValueError("damaged")

    monkeypatch.setattr(Cache, side, fail)

    @compiled(nogil=True)
    def double(x):
        return 2 * x

    assert double(np.float32(3)) == 6
