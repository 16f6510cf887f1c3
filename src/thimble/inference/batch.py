"""Many prompts answered by one engine, which always has some that wait for a slot."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.backends.session import ActiveAdapter
from thimble.inference.engine import MAX_SLOTS, Engine
from thimble.inference.sampling import SamplingOptions

MOST_KNOWN = 4 * MAX_SLOTS  # requests that the engine has been given: enough to fill every slot that falls free


class Request(NamedTuple):
    """A prompt to be answered."""

    key: int  # the caller's own
    prompt: NDArray[np.int32]  # int32 (T,)
    options: SamplingOptions


class Written(NamedTuple):
    """An answer."""

    key: int  # of its request
    ids: list[int]  # its tokens
    finish: str  # `stop` or `length`


def answer_all(engine: Engine, requests: Iterable[Request], adapter: ActiveAdapter) -> Iterator[list[Written]]:
    """Answer requests; yields after each step what has ended, mostly nothing, so that a caller can leave between."""
    waiting = iter(requests)
    known: dict[int, Written] = {}
    while True:
        for request in itertools.islice(waiting, MOST_KNOWN - len(known)):
            number = engine.add(request.prompt, request.options, adapter)
            known[number] = Written(request.key, [], "")
        if engine.is_idle:
            return
        ended = []
        for token in engine.step():
            if token.id is not None:
                known[token.request].ids.append(token.id)
            if token.finish:
                ended.append(known.pop(token.request)._replace(finish=token.finish))
        yield ended


def own_seed(seed: int, row: int) -> int:
    """The seed of a row, counted from 0: it depends on no other row, and row 0 has the seed that was given."""
    return (seed + (row << 64)) % (1 << 128)
