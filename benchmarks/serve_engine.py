"""The engine in one process: streams with and without adapters, pauses while a long prompt arrives, shared beginnings.

    python benchmarks/serve_engine.py [--base BASE] [--store file] [--decode int8] [--rounds 3]

Loads alternate within each round, so that what else the machine does falls on all of them; medians are printed, of the
wall clock and of the processor's. Adapters are drawn at random, rank 16 on every linear layer.
"""

import argparse
import statistics
import time

import numpy as np

from thimble.backends.torch.compute import choose_compute
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.core.inits import LayerData, kaiming
from thimble.core.lowrank import Factors
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import default_base, open_base

STREAMS, PROMPT, ANSWER, LONG = 8, 121, 128, 1000
LOADS = {"base": 0, "one adapter": 1, "8 adapters": 8}


def draw_adapter(spec, seed, rank=16):
    random = np.random.default_rng(seed)
    layers = {}
    for path, (fan_out, fan_in) in spec.linear_shapes().items():
        first = kaiming(LayerData(path, (fan_out, fan_in), rank, 2.0))
        layers[path] = Factors(first.A, (random.standard_normal((fan_out, rank)) * 1e-3).astype(np.float32), 2.0)
    return Adapter(layers)


def draw_prompt(spec, tokens, seed):
    return np.random.default_rng(seed).integers(100, spec.vocab_size - 100, tokens).astype(np.int32)


def streams(session, spec, adapters, count=STREAMS):
    """Tokens a second, of the wall clock and of the processor's, of streams that write after all have begun."""
    engine = Engine(session, cache_tokens=32768, keeps_prefixes=True)
    for number in range(count):
        prompt = draw_prompt(spec, PROMPT, number)
        engine.add(prompt, SamplingOptions(ANSWER), adapters[number % len(adapters)], customer=number)
    begun, written = set(), 0
    while len(begun) < count:
        begun |= {token.request for token in engine.step()}
    clock, processor = time.perf_counter(), time.process_time()
    while engine.load.running == count:
        written += len(engine.step())
    return written / (time.perf_counter() - clock), written / (time.process_time() - processor)


def gaps(session, spec, adapter):
    """Median and 99th percentile of the seconds between tokens of running streams, without and with a long prompt."""
    engine = Engine(session, cache_tokens=32768, keeps_prefixes=True)
    for number in range(STREAMS - 1):
        engine.add(draw_prompt(spec, PROMPT, number), SamplingOptions(1000), adapter)
    while len(engine.step()) < STREAMS - 1:
        pass
    quiet = _steps(engine, 40)
    number = engine.add(draw_prompt(spec, LONG, 99), SamplingOptions(2), adapter)
    busy, is_read = [], False
    while not is_read:
        began = time.perf_counter()
        is_read = any(token.request == number for token in engine.step())
        busy.append(time.perf_counter() - began)
    return statistics.median(quiet), float(np.percentile([*quiet, *busy], 99)), sum(busy)


def _steps(engine, count):
    found = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - began)
    return found


def first_token(session, spec, adapter):
    """Seconds to the first token of a prompt of 1,000 tokens, cold, and again when only its last ten are new."""
    engine, found = Engine(session, cache_tokens=32768, keeps_prefixes=True), []
    prompt = draw_prompt(spec, LONG, 5)
    for ending in (1, 2):
        prompt = np.concatenate([prompt[:-10], draw_prompt(spec, 10, ending)])
        engine.add(prompt, SamplingOptions(1), adapter)
        began = time.perf_counter()
        while not engine.is_idle:
            engine.step()
        found.append(time.perf_counter() - began)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default=None)
    parser.add_argument("--store", default="file", choices=["file", "dense", "int8"])
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--decode", default="int8", choices=["int8", "float"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    base = open_base(options.base or default_base())
    compute = choose_compute(options.compute, False)[0]
    session = TorchSession(base, compute, options.store, decode=options.decode)
    actives = [session.load(draw_adapter(base.spec, seed)) for seed in range(STREAMS)]
    rates = {name: [] for name in LOADS}
    for _ in range(options.rounds):
        for name, count in LOADS.items():
            rates[name].append(streams(session, base.spec, actives[:count] or [session.load(None)]))
    ways = f"{compute}, store {options.store}, decode {options.decode}"
    print(f"{base.name}, {ways}, {STREAMS} streams, {PROMPT} tokens in, {ANSWER} out")
    medians = {name: [statistics.median(both) for both in zip(*found, strict=True)] for name, found in rates.items()}
    for name, (clock, processor) in medians.items():
        tax = medians["base"][1] / processor - 1
        print(f"{name:12} {clock:6.0f} tokens/s, {processor:6.0f} a second of the processor, tax {tax:+.0%}")
    clock, processor = streams(session, base.spec, actives, 1)
    print(f"one stream   {clock:6.0f} tokens/s, {processor:6.0f} a second of the processor")
    median, worst, reading = gaps(session, base.spec, actives[0])
    print(f"between tokens: median {median * 1e3:.0f} ms, p99 {worst * 1e3:.0f} ms while a prompt of {LONG:,} is read")
    print(f"that prompt is read in {reading:.1f} s beside {STREAMS - 1} streams")
    cold, warm = first_token(session, base.spec, actives[0])
    print(f"first token of a prompt of {LONG:,}: {cold:.2f} s cold, {warm:.3f} s with a known beginning")


if __name__ == "__main__":
    main()
