"""Compiled loops on every core: pieces of rows, taken one by one by a few threads of our own.

A core that is busy with other work delays nobody, and no thread ever spins, which would steal the cores of torch's own
threads (numba's OpenMP layer brings a second set that does). Small matrices are done before a second thread wakes.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PIECE = 1 << 19  # numbers that one thread handles at a time: enough to outweigh the hand-over, few enough to share


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """Make the threads that help the calling one."""
    return ThreadPoolExecutor(max(1, num_cores() - 1), thread_name_prefix="thimble")


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A forked process inherits the pool, but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)


def split(rows: int, work_per_row: int, kernel: Callable[..., None], *arguments: Any) -> None:
    """Call kernel(begin, end, *arguments) for pieces of all rows, on every core if there is enough to do.

    Args:
        rows: Rows in all.
        work_per_row: Numbers handled in a row, weighted by what they cost: 1 is a load, a few operations and a store.
        kernel: Compiled without the interpreter's lock (`nogil=True`).
        *arguments: Passed on.
    """
    step = max(1, min(PIECE // max(1, work_per_row), -(-rows // num_cores())))
    if rows * work_per_row <= PIECE // 4:
        step = max(1, rows)
    pieces = iter(range(0, rows, step))

    def work() -> None:
        for begin in pieces:
            kernel(begin, min(begin + step, rows), *arguments)

    num_helpers = min(num_cores(), -(-rows // step)) - 1
    tasks = [_helpers().submit(work) for _ in range(num_helpers)]
    work()
    for task in tasks:
        if not task.cancel():  # nothing is left to do for one that has not begun
            task.result()
