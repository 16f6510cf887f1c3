"""Work on every core, in two ways: whole tasks side by side, or one compiled loop shared out.

Tasks that need nothing of each other, such as the micro-batches of a step, run on one core each: no core waits for
another within a task, and a product on one core loses nothing to hand-overs. What is a single task is shared out by
torch and by `split`: pieces of rows, taken one by one by a few threads of our own. Those never spin, which would steal
the cores of torch's threads (numba's OpenMP layer brings a second set that does).
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from thimble.models.machine import usable_cores

T = TypeVar("T")

PIECE = 1 << 19  # numbers that one thread handles at a time: enough to outweigh the hand-over, few enough to share


class _Here(threading.local):
    """What this thread is doing."""

    cores = 0  # that a task among others has to itself; 0: not such a task


_here = _Here()


def num_cores() -> int:
    """Cores this process may use."""
    return usable_cores()


def usable_threads() -> int:
    """Cores that the calling thread may put to work: all, or its share among tasks that run side by side."""
    return _here.cores or num_cores()


if torch.get_num_threads() > num_cores():  # torch counts the cores it sees: its threads would wait for throttled ones
    torch.set_num_threads(num_cores())


# ---- tasks side by side ---------------------------------------------------------------------------------------------


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    """Make the threads that run whole tasks."""
    return ThreadPoolExecutor(count, thread_name_prefix="thimble-task")


def map_parallel(tasks: Sequence[Callable[[], T]], most: int) -> Iterator[T]:
    """Run tasks on a core each, at most `most` at a time where memory is short; a few tasks share the cores evenly.

    They must not write to the same places. Their results come in order, as they are ready.
    """
    count = min(len(tasks), most, num_cores())
    if count <= 1:
        return (task() for task in tasks)
    cores = num_cores() // count
    return _results([_workers(count).submit(_run, task, cores) for task in tasks])


def _results(futures: Sequence["Future[T]"]) -> Iterator[T]:
    """Results in order; if one failed, or nobody wants the rest, none is at work any more when that is told."""
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


def _run(task: Callable[[], T], cores: int) -> T:
    _here.cores = cores
    torch.set_num_threads(cores)  # of this thread's products
    return task()


# ---- one loop shared out --------------------------------------------------------------------------------------------


@functools.cache
def helpers() -> ThreadPoolExecutor:
    """Make the threads that help the calling one."""
    return ThreadPoolExecutor(max(1, num_cores() - 1), thread_name_prefix="thimble-loop")


# A forked process inherits the pools, but not their threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: (helpers.cache_clear(), _workers.cache_clear()))


def parallel_for(rows: int, work_per_row: int, kernel: Callable[..., None], *arguments: Any) -> None:
    """Call kernel(begin, end, *arguments) for pieces of all rows, on every core if there is enough to do.

    A unit of `work_per_row` is a load, a few operations and a store. The kernel is compiled with `nogil=True`.
    """
    cores = usable_threads()
    if cores == 1 or rows * work_per_row <= PIECE // 4:
        kernel(0, rows, *arguments)
        return
    step = max(1, min(PIECE // max(1, work_per_row), -(-rows // cores)))
    pieces = iter(range(0, rows, step))

    def work() -> None:
        for begin in pieces:
            kernel(begin, min(begin + step, rows), *arguments)

    num_helpers = min(cores, -(-rows // step)) - 1
    tasks = [helpers().submit(work) for _ in range(num_helpers)]
    work()
    for task in tasks:
        if not task.cancel():  # nothing is left to do for one that has not begun
            task.result()
