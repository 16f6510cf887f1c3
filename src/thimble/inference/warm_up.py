"""Answers that nobody asked for, so that what is compiled when it is first used is compiled before somebody waits."""

from collections.abc import Callable, Sequence

import numpy as np

from thimble.backends.session import ActiveAdapter, Session
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions

# In tokens: with the shortest, adapters take the loops of few tokens; with the longest, attention and adapters take
# those of whole prompts.
PROMPTS = 2, 100
ANSWER = 3  # tokens: the first comes of the prompt, all others of steps of decoding
MANY = 20  # answers at a time: with float activations, steps of more than 16 rows take other products


def warm_up(session: Session, num_workers: int = 1, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Write short answers of every kind: base and adapters, alone and mixed, short and long prompts, few and many.

    Args:
        session: The base.
        num_workers: As for the engine that is to answer.
        should_stop: Asked between steps; what is not compiled by then is compiled when it is used.
    """
    base, *adapters = [session.load(adapter) for adapter in (None, _adapter(session, 1), _adapter(session, 2))]
    engine = Engine(session, num_workers)
    for active in ([base], adapters[:1], [base, *adapters]):
        for tokens in PROMPTS:
            _answer(engine, min(tokens, session.max_positions - ANSWER), active, len(active), should_stop)
    _answer(engine, PROMPTS[0], [base, *adapters], MANY, should_stop)


def _adapter(session: Session, rank: int) -> Adapter:
    """An adapter of every layer that changes nothing."""
    layers = {}
    for layer in session.layers:
        rows, columns = layer.shape
        layers[layer.path] = Factors(np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32), 1.0)
    return Adapter(layers)


def _answer(
    engine: Engine, tokens: int, adapters: Sequence[ActiveAdapter], count: int, should_stop: Callable[[], bool]
) -> None:
    """Write so many answers to prompts of some tokens, with the adapters in turn."""
    for number in range(count):
        engine.add(np.zeros(tokens, np.int32), SamplingOptions(ANSWER), adapters[number % len(adapters)])
    while not (engine.is_idle or should_stop()):
        engine.step()
