"""What a warm-up leaves to be compiled, counted in a process of its own, where nothing is compiled yet: nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thimble.backends.torch.session import TorchSession
from thimble.inference.warm_up import warm_up
from thimble.models.base import open_base

TESTS = Path(__file__).parents[1]
COUNT = """
import dataclasses, json, sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from samples import make_adapter
from thimble.backends.torch.session import TorchSession
from thimble.core.lowrank import Factors
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.inference.warm_up import warm_up
from thimble.models.base import open_base

made, compile = [], Dispatcher.compile

def counted(self, signature):  # whether it is compiled or loaded from the cache of an earlier process
    known = len(self.overloads)
    found = compile(self, signature)
    if len(self.overloads) > known:
        made.append(f"{self.py_func.__module__}.{self.py_func.__name__}")
    return found

def answer(*requests):
    for adapter, tokens, options in requests:
        prompt = np.random.default_rng(tokens).integers(5, 200, tokens).astype(np.int32)
        engine.add(prompt, options, adapter)
    while not engine.is_idle:
        engine.step()

def with_magnitudes(adapter):
    layers = {path: Factors(f.A, f.B, f.scale, np.ones(len(f.B), np.float32)) for path, f in adapter.layers.items()}
    return dataclasses.replace(adapter, layers=layers)

Dispatcher.compile = counted
path, compute, store, decode = sys.argv[1:]
base = open_base(path)
session = TorchSession(base, compute, store, decode=decode)
warm_up(session, 2)
warm = len(made)
engine = Engine(session, 2, keeps_prefixes=True)
bare = session.load(None)
# As a server loads them while it runs.
loaded = [session.load(make_adapter(base, rank=rank, b_size=0.5)) for rank in (1, 4, 3)]
loaded.append(session.load(with_magnitudes(make_adapter(base, rank=2, b_size=0.5))))
short, drawn = SamplingOptions(3), SamplingOptions(12, temperature=1.0, top_p=0.9, logprobs=2, seed=1)
for tokens in (1, 2, 3, 8, 9, 16, 17, 31, 33, 64, 65, 100, 110):
    answer((bare, tokens, short))
    answer((loaded[0], tokens, short))
for count in (1, 2, 3, 5, 17, 40):
    answer(*[(bare, 1 + number, drawn) for number in range(count)])
    answer(*[(loaded[number % 4], 3 + number, short) for number in range(count)])
    answer(*[([bare, *loaded][number % 5], 60 + number, drawn) for number in range(count)])
print(json.dumps([warm, made[warm:]]))
"""


@pytest.mark.parametrize(
    ("base", "compute", "store", "decode"),
    [("smollm2", "fp32", "file", "int8"), ("gemma2", "bf16", "file", "float")],
)
def test_nothing_is_compiled_behind_it(base, compute, store, decode):
    path = TESTS / "fixtures" / "gguf" / f"{base}.gguf"
    line = [sys.executable, "-c", COUNT, str(path), compute, store, decode]
    done = subprocess.run(line, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    warm, later = json.loads(done.stdout)
    assert warm > 0
    assert later == []


def test_it_ends_where_it_is_told_to(tiny_base, monkeypatch):
    session = TorchSession(open_base(tiny_base), "fp32", "file")
    monkeypatch.setattr(session, "forward", None)  # which a step would call
    warm_up(session, should_stop=lambda: True)
