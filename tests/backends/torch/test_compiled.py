"""Compiled loops where numba finds no place for its cache, or a damaged one."""

import os
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


TURNING = """
import hashlib
import numpy as np
from thimble.backends.torch import fused
random = np.random.default_rng(0)
shapes = ((64, 15, 64), (15, 64), (64, 32), (64, 32))
qkv, bias, cos, sin = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
q, k, v = np.zeros((3, 64, 3, 64), np.float32), np.zeros((3, 64, 64), np.float32), np.zeros((3, 64, 64), np.float32)
fused.split_heads(0, 64, qkv, bias, cos, sin, np.float32(0.125), q, k, v)
fused.join_heads(0, 64, q, k, v, cos, sin, np.float32(0.125), qkv)
print(hashlib.sha256(q.tobytes() + qkv.tobytes()).hexdigest())
"""


def test_the_process_that_compiles_a_loop_rounds_as_those_that_load_it(tmp_path):
    """numba's cache holds other code than what it has just compiled: products were fused in other places."""
    run = {"env": {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}, "capture_output": True, "text": True, "check": True}
    said = [subprocess.run([sys.executable, "-c", TURNING], **run).stdout for _ in range(2)]
    assert any(tmp_path.rglob("*.nbc"))
    assert said[0] == said[1]
