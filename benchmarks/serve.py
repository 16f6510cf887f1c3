"""`make bench-serve`: Thimble against llama-server over HTTP, the same file, alternating in one run; PEFT and vLLM.

    python benchmarks/serve.py [--base FILE.gguf] [--rounds 3] [--only streams prompts gaps repeats peft vllm]

The servers run all the time, each idle while another is asked; this process is the load. Prompts are pieces of general
text that differ between streams and rounds; no end of an answer counts. Adapters are drawn at random, rank 16 on every
linear layer. llama-server, built by `make bench-serve`, is told to keep no prompts: its cache mixes adapters. PEFT's
mixed batch (serve_peft.py) and vLLM (serve_vllm.py, in an environment of its own) serve nobody: they run the load of 8
streams and 8 adapters in one call, on a model of the same shape and type, while the servers are idle. A base may be a
shape and a type of make_models.py, which has random weights. Serve_table.py writes what was found.
"""

import argparse
import asyncio
import contextlib
import difflib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_models import SHAPES
from run import model
from serve_engine import draw_adapter
from serve_table import FIRST, RATE, keep
from servers import GREEDY, LLAMA_SERVER, Texts, llama_server, thimble, worst

from thimble.data.model import open_model
from thimble.exports.gguf_adapter import write_gguf_adapter
from thimble.files.peft import save_adapter
from thimble.models.base import default_base

HERE = Path(__file__).parent
ADAPTERS, PROMPT, ANSWER, LONG = 8, 121, 128, 1000
PASSAGE, BEGUN = 160, 24  # tokens that an answer is to repeat, and those of them that are given
# Streams, and adapters that they have in turn; the most telling first.
STREAMS = {
    "8 streams, 8 adapters": (8, 8), "8 streams, base": (8, 0), "1 stream, base": (1, 0),
    "8 streams, 1 adapter": (8, 1), "1 stream, 1 adapter": (1, 1),
}  # fmt: skip
MIXED = "8 streams, 8 adapters"  # the load of those who have it in one call
# Who they are: the program, and the Python that runs it.
CALLED = {
    "peft": ("PEFT", "serve_peft.py", sys.executable),
    "vllm": ("vLLM", "serve_vllm.py", HERE / "vllm-env" / "bin" / "python"),
}
GUESSING = "llama-server, ngram-simple"  # its own guesses ahead, which are off by default


@contextlib.contextmanager
def servers(base, folder, are_guessing):
    """The servers with the same adapters, in files of their own kind; a second llama-server that guesses, if asked."""
    folders, files = [], []
    for number in range(ADAPTERS):
        adapter = draw_adapter(base.spec, number)
        folders.append(folder / f"a{number}")
        files.append(folder / f"a{number}.gguf")
        save_adapter(adapter, folders[-1])
        write_gguf_adapter(adapter, base, files[-1])
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(thimble(base, folders, folder)),
            stack.enter_context(llama_server(base, files, folder)),
        ]
        guessing = llama_server(base, [], folder, GUESSING, "--spec-type", "ngram-simple")
        yield found, [stack.enter_context(guessing)] if are_guessing else []


# ---- loads -----------------------------------------------------------------------------------------------------------


async def streams(server, prompts, adapters):
    """Answers to prompts at the same time: tokens a second over all, and the times of each."""
    began = time.perf_counter()
    asked = [
        server.ask(prompt, ANSWER, number % adapters if adapters else None) for number, prompt in enumerate(prompts)
    ]
    found = await asyncio.gather(*asked)
    last = max(one.times[-1] for one in found)
    begun = max(one.times[0] for one in found)
    written = sum(sum(time > begun for time in one.times) for one in found)
    return {
        RATE: len(prompts) * ANSWER / (last - began),
        "pieces a second once all have begun": written / (last - begun),
        FIRST: [one.first for one in found],
    }


async def gaps(server, prompts, long):
    """Gaps between the tokens of 7 answers, before and while a long prompt is read."""
    begun = [asyncio.Event() for _ in prompts]
    asked = [
        asyncio.create_task(server.ask(one, ANSWER, 0, others=event)) for one, event in zip(prompts, begun, strict=True)
    ]
    await asyncio.gather(*(event.wait() for event in begun))
    came = time.perf_counter()
    first = (await server.ask(long, 2, 1)).times[0]
    found = [gap for one in await asyncio.gather(*asked) for gap in zip(one.times, one.times[1:], strict=False)]
    beside = [end - start for start, end in found if end > came and start < first]
    quiet = [end - start for start, end in found if not (end > came and start < first)]
    return {"median gap": statistics.median(quiet), "p99 gap": worst(beside, 99), "read in": first - came}


async def reading(server, prompt):
    """How fast a prompt is read."""
    return {"prompt tokens a second": len(prompt) / (await server.ask(prompt, 1)).first}


async def repeating(server, prompt, rest):
    """How fast an answer is written that says again what the prompt says; and whether it does."""
    found = await server.ask(prompt, ANSWER, way=GREEDY)
    same = difflib.SequenceMatcher(None, found.text, rest[: len(found.text)], autojunk=False).ratio()
    # A piece may hold several tokens: all of them but the first were written after it came.
    return {"tokens a second after the first": (ANSWER - 1) / (found.times[-1] - found.times[0]), "repeated": same}


def one_call(name, shape, dtype):
    """A mixed batch in a process of its own, with what else the program tells on standard error."""
    _, program, python = CALLED[name]
    line = [python, HERE / program, "--shape", shape, "--dtype", dtype, "--streams", str(STREAMS[MIXED][0])]
    return json.loads(subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


# ---- rounds ----------------------------------------------------------------------------------------------------------


class Rounds:
    """What was measured, by load and server: a list of rounds."""

    def __init__(self, both, guessing, texts, only):
        self.both, self.guessing, self.texts, self.only, self.found = both, guessing, texts, only, {}

    async def measure(self, rounds, shape, dtype):
        """All loads; in each round each server has each load once, with the same prompts."""
        for server in self.both:  # nothing is measured of what either does once
            await streams(server, self.texts.draw(PROMPT, 2), 2)
        for number in range(rounds):
            order = self.both if number % 2 == 0 else self.both[::-1]
            for load, server, run in self.loads(order):
                self.note(load, server.name, await run)
            for name in self.only & CALLED.keys():
                self.note(MIXED, f"{CALLED[name][0]}, {dtype}", one_call(name, shape, dtype))

    def loads(self, order):
        """What is asked in a round: the name of the load, the server, and the asking."""
        for load, (answers, adapters) in STREAMS.items() if "streams" in self.only else ():
            prompts = self.texts.draw(PROMPT, answers)
            for server in order:
                yield load, server, streams(server, prompts, adapters)
        for tokens in (PROMPT, LONG) if "prompts" in self.only else ():
            (prompt,) = self.texts.draw(tokens)
            for server in order:
                yield f"prompt of {tokens:,} tokens", server, reading(server, prompt)
        if "repeats" in self.only:
            prompt, rest = self.texts.to_repeat(PASSAGE, BEGUN)
            for server in [*order, *self.guessing]:
                yield "1 stream, base, greedy: the answer repeats the prompt", server, repeating(server, prompt, rest)
        if "gaps" in self.only:
            prompts, (long,) = self.texts.draw(PROMPT, 7), self.texts.draw(LONG)
            for server in order:
                yield f"7 streams, 1 adapter, while a prompt of {LONG:,} is read", server, gaps(server, prompts, long)

    def note(self, load, server, told):
        self.found.setdefault(load, {}).setdefault(server, []).append(told)
        print(f"{load}, {server}: {json.dumps(told)[:150]}", flush=True)


def shape_and_type(base):
    """The name of the shape of a base and the type that others run it in; a shape that is not known is None."""
    sizes = base.spec.hidden_size, base.spec.intermediate_size, base.spec.num_layers
    shape = next((name for name, shape in SHAPES.items() if shape[:3] == sizes), None)
    return shape, "bf16" if "BF16" in base.name.upper() else "fp32"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default=None, help="a file, or shape and type, such as 1b-Q8_0")
    parser.add_argument("--rounds", type=int, default=3)
    parts = ["streams", "prompts", "gaps", "repeats", *CALLED]
    parser.add_argument("--only", nargs="+", choices=parts, default=["streams", "prompts", "gaps", "repeats", "peft"])
    options = parser.parse_args()
    if not LLAMA_SERVER.exists():
        sys.exit(f"{LLAMA_SERVER} is not there: `make bench-serve` builds it first")
    shape, _, dtype = (options.base or "").partition("-")
    path = model(shape, dtype) if shape in SHAPES else options.base or str(default_base())
    opened, only = open_model(path), set(options.only)
    with tempfile.TemporaryDirectory() as folder, servers(opened.base, Path(folder), "repeats" in only) as (both, more):
        rounds = Rounds(both, more, Texts(opened.tokenizer), only)
        asyncio.run(rounds.measure(options.rounds, *shape_and_type(opened.base)))
        keep(opened.base.name, rounds.found, {server.name: server.resident_bytes for server in both})


if __name__ == "__main__":
    main()
