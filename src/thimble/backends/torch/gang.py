"""Threads that run one compiled program side by side and wait for one another at its phases.

A step of decoding has hundreds of phases of a few microseconds each, far less than it takes to hand a task to a thread.
So each thread runs the whole program, its share of every phase, and meets the others behind it by spinning, for
microseconds and only within a step. Nobody waits for a thread that has not come: it is counted in at the next
phase, if it does. Where other programs want the cores, one thread runs alone for a while.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from thimble.backends.torch.threads import helpers, usable_threads
from thimble.backends.torch.vectors import FEATURES, INT, call

# Places in the shared array, on cache lines of their own.
LINE = 8
DONE, JOINED, PHASE = (LINE * number for number in range(3))
MOST_THREADS = 1 << 10  # the word at PHASE is the phase times this and the number of its threads
CLOSED = -2  # the phase behind the last
PATIENCE = 1 << 10  # spins before a thread gives its core to whoever wants it
LEAST_BUSY = 0.6  # share of their time that threads have a core, unless others want it: they do not sleep
ALONE = 32  # runs on one thread after such a run
_CAN_YIELD = os.name == "posix"


@intrinsic
def _atomic_add(typing_context, array, place, value):
    """Add to an int64 of an array, visible to all threads; returns what was there."""

    def write(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), write


@intrinsic
def _read(typing_context, array, place):
    """An int64 of an array as other threads left it."""

    def write(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(array, types.intp), write


@intrinsic
def _rest(typing_context, is_long):
    """Rest a little in a loop that waits; if long, let another thread have the core, where the system can."""

    def write(context, builder, signature, arguments):
        if "sse2" in FEATURES:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        if _CAN_YIELD:
            with builder.if_then(arguments[0]):
                call(builder, "sched_yield", INT)
        return context.get_dummy_value()

    return types.none(types.boolean), write


@register_jitable
def join(shared):
    """Wait for a phase that counts this thread in; returns its number, that phase or CLOSED, and how many are in it.

    The first to come is number 0, and in phase -1, which is empty.
    """
    number, spins = _atomic_add(shared, JOINED, 1), 0
    while True:
        phase, threads = divmod(_read(shared, PHASE), MOST_THREADS)
        if phase == CLOSED or threads > number:
            return number, phase, threads
        spins += 1
        _rest(spins % PATIENCE == 0)


@register_jitable
def advance(shared, number, threads, phase):
    """Go on to a phase when all threads have done the last, with those that have come by now; returns how many.

    What a thread wrote before is seen by all behind it.
    """
    before, spins = _read(shared, PHASE), 0
    _atomic_add(shared, DONE, 1)
    if number == 0:
        while _read(shared, DONE) != threads:
            spins += 1
            _rest(spins % PATIENCE == 0)
        _atomic_add(shared, DONE, -threads)
        now = phase * MOST_THREADS + (_read(shared, JOINED) if phase != CLOSED else 0)
        _atomic_add(shared, PHASE, now - before)
        return now % MOST_THREADS
    while _read(shared, PHASE) == before:
        spins += 1
        _rest(spins % PATIENCE == 0)
    return _read(shared, PHASE) % MOST_THREADS


class _Crowd:
    """Whether other programs want the cores, so that threads which wait for one another would wait for those."""

    def __init__(self) -> None:
        self._alone = 0  # runs for which one thread is better

    def threads(self, most: int) -> int:
        """How many threads a run gets, of at most so many."""
        self._alone = max(self._alone - 1, 0)
        return 1 if self._alone else most

    def note(self, threads: int, wall: float, busy: float) -> None:
        """Learn how long a run took, and how long its threads had a core, both in seconds."""
        if threads > 1 and busy < LEAST_BUSY * threads * wall:
            self._alone = ALONE


_crowd = _Crowd()


def run_together(program: Callable[..., None], *arguments: Any) -> None:
    """Call program(shared, *arguments) here and on every other core that is free; returns when it is done.

    The program begins with `join`, goes on from the phase it is told, with `advance` before each further one, and ends
    with `advance` to CLOSED; it is compiled with `nogil=True`.
    """
    shared = np.zeros(PHASE + LINE, np.int64)
    shared[PHASE] = -MOST_THREADS + 1  # phase -1, for whoever comes first
    threads = _crowd.threads(min(usable_threads(), MOST_THREADS))
    wall, busy = time.perf_counter(), time.process_time()
    tasks = [helpers().submit(program, shared, *arguments) for _ in range(threads - 1)]
    try:
        program(shared, *arguments)
    finally:
        for task in tasks:
            task.cancel()
    _crowd.note(threads, time.perf_counter() - wall, time.process_time() - busy)
