"""How fast answers are written: one stream and eight, against llama-server on the same file, alternating.

    python benchmarks/decode.py [--base FILE.gguf] [--rounds 3] [--tokens 128] [--only ours-int8 ...]

Every stream gets a prompt of 121 tokens and writes greedily. Ours runs in this process, llama-server (of the package
`xllamacpp`) in threads of its own; both may use all cores, and one is idle while the other works. Prints a line a
round, then medians of tokens per second and their ratios.
"""

import argparse
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable

import numpy as np

from thimble.backends.open import open_session
from thimble.backends.torch.threads import num_cores
from thimble.data.model import Model, open_model
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions

PROMPT_TOKENS, CONTEXT = 121, 1024
TEXT = "The old lighthouse keeper wrote down the weather of every day, and in the evening he read what he had written. "
WAYS = {"ours-int8": ("file", "int8"), "ours-float": ("file", "float"), "ours-dense": ("dense", "float")}
PEER = "llama-server"


def prompt_of(model: Model, stream: int) -> list[int]:
    """A prompt that no other stream shares a beginning with."""
    return model.tokenizer.encode(f"{stream + 1}. " + TEXT * 20)[:PROMPT_TOKENS]


def ours(model: Model, store: str, decode: str) -> Callable[[int, int], float]:
    """A function that answers so many streams and returns tokens a second while they are written."""
    session = open_session(model, "fp32", store, decode=decode)
    base = session.load(None)

    def measure(streams: int, tokens: int) -> float:
        engine = Engine(session, num_cores(), max_slots=streams)
        for stream in range(streams):
            engine.add(np.array(prompt_of(model, stream), np.int32), SamplingOptions(tokens), base)
        written, began = 0, 0.0
        while not engine.is_idle:
            told = sum(token.id is not None for token in engine.step())
            written += told if began else 0
            began = began or (time.perf_counter() if told else 0.0)
        return written / (time.perf_counter() - began)

    return measure


def theirs(model: Model, path: str, streams: int) -> Callable[[int, int], float]:
    """As `ours`, of a llama-server that runs from now on."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = path, CONTEXT * streams, streams, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_cores()
    params.warmup, params.n_gpu_layers = True, 0
    server = xllamacpp.Server(params)

    def answer(stream: int, tokens: int, found: list[dict]) -> None:
        body = {
            "prompt": prompt_of(model, stream), "n_predict": tokens, "temperature": 0, "cache_prompt": False,
            "ignore_eos": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            found.append(json.load(reply)["timings"])

    def measure(streams: int, tokens: int) -> float:
        found: list[dict] = []
        threads = [threading.Thread(target=answer, args=(stream, tokens, found)) for stream in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(timing["predicted_n"] for timing in found) / max(t["predicted_ms"] for t in found) * 1e3

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", nargs="+", default=[*WAYS, PEER], choices=[*WAYS, PEER])
    arguments = parser.parse_args()
    model = open_model(arguments.base)
    ways = {name: ours(model, *WAYS[name]) for name in arguments.only if name in WAYS}
    if PEER in arguments.only:
        ways[PEER] = theirs(model, str(model.base.path), max(arguments.streams))
    for streams in arguments.streams:
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(arguments.rounds + 1):
            for name, measure in ways.items():
                rate = measure(streams, arguments.tokens if number else 8)  # the first round warms up
                if number:
                    rates[name].append(rate)
                    print(f"{streams} streams, round {number}, {name}: {rate:.1f} tokens/s", flush=True)
        medians = {name: statistics.median(found) for name, found in rates.items()}
        last = medians.get(PEER)
        for name, rate in medians.items():
            against = f", {rate / last:.2f} of {PEER}" if last and name != PEER else ""
            print(f"{streams} streams, {name}: {rate:.1f} tokens/s{against}")


if __name__ == "__main__":
    main()
