"""`make bench-serve`: Thimble against llama-server over HTTP, the same file, alternating in one run; and PEFT.

    python benchmarks/serve.py [--base FILE.gguf] [--rounds 3] [--only streams prompts gaps peft]

Both servers run all the time, each idle while the other is asked; this process is the load. Prompts are pieces of
general text that differ between streams and rounds; answers are greedy, and no end of an answer counts. Adapters are
drawn at random, rank 16 on every linear layer. llama-server, built by `make bench-serve`, is told to keep no prompts:
its cache mixes adapters. PEFT's mixed batch (serve_peft.py) serves nobody: it runs the load of 8 streams and 8 adapters
in one call, on a model of the same shape, while the servers are idle. Writes serve.json and its part of RESULTS.md.
"""

import argparse
import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
from make_models import SHAPES
from run import BEGIN, END
from serve_engine import draw_adapter

from thimble.data.model import open_model
from thimble.data.records import general_records
from thimble.exports.gguf_adapter import write_gguf_adapter
from thimble.files.peft import save_adapter
from thimble.models.base import default_base
from thimble.models.machine import processor

HERE = Path(__file__).parent
LLAMA_SERVER = HERE / "peers-env" / "llama-server"
ADAPTERS, PROMPT, ANSWER, LONG, CORES = 8, 121, 128, 1000, 2
CONTEXT = 2048  # of each stream
START_SECONDS = 300
# Streams, and adapters that they have in turn; the most telling first.
STREAMS = {
    "8 streams, 8 adapters": (8, 8), "8 streams, base": (8, 0), "1 stream, base": (1, 0),
    "8 streams, 1 adapter": (8, 1), "1 stream, 1 adapter": (1, 1),
}  # fmt: skip
MIXED, PEFT = "8 streams, 8 adapters", "PEFT, float32"  # a load, and who has it in one call


@dataclass
class Answered:
    """When the tokens of an answer came, in seconds."""

    asked: float
    times: list = field(default_factory=list)

    @property
    def first(self):
        return self.times[0] - self.asked


@dataclass
class Server:
    """A server that runs, and how it is asked."""

    name: str
    process: subprocess.Popen
    port: int

    def body(self, prompt, answer, adapter):
        """A completion of tokens with an adapter by its number, or None."""
        body = {"prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True}
        if self.name == "thimble":
            return {**body, **({} if adapter is None else {"model": f"a{adapter}"})}
        scales = [{"id": number, "scale": float(number == adapter)} for number in range(ADAPTERS)]
        return {**body, "lora": scales, "cache_prompt": False}

    async def ask(self, prompt, answer, adapter=None, others=None):
        """Ask for an answer, and read it as it comes; if `others` is given, an event, set it once 10 tokens came."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(self.body(prompt, answer, adapter)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost:{self.port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        found = Answered(time.perf_counter())
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        async for line in reader:
            if line.startswith(b"data: {") and b'"text"' in line and b'"text":""' not in line:
                found.times.append(time.perf_counter())
                if others and len(found.times) == 10:
                    others.set()
        writer.close()
        assert found.times, f"{self.name} gave no answer"
        return found

    @property
    def resident_bytes(self):
        """Memory of its own; pages of the file, which both map, do not count."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


# ---- servers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(base, folder):
    """Both servers with the same adapters, in files of their own kind."""
    folders, files = [], []
    for number in range(ADAPTERS):
        adapter = draw_adapter(base.spec, number)
        folders.append(folder / f"a{number}")
        files.append(folder / f"a{number}.gguf")
        save_adapter(adapter, folders[-1])
        write_gguf_adapter(adapter, base, files[-1])
    ours = [sys.executable, "-m", "thimble", "serve", "--base", base.path, "--port", "0"]
    ours += [word for path in folders for word in ("--adapter", f"{path.name}={path}")]
    theirs = [LLAMA_SERVER, "-m", base.path, "--port", "8099", "-t", CORES, "-tb", CORES, "-np", 8, "-c", 8 * CONTEXT]
    theirs += [
        "--lora",
        ",".join(map(str, files)),
        "--lora-init-without-apply",
        "--no-cache-prompt",
        "--cache-ram",
        "0",
    ]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                started("thimble", ours, folder, lambda told: re.search(r"serving at \S+:(\d+)", told))
            ),
            stack.enter_context(started("llama-server", theirs, folder, is_healthy)),
        ]


@contextlib.contextmanager
def started(name, line, folder, port_of):
    """A server in a process of its own, once `port_of` finds its port in what it tells."""
    log = folder / f"{name}.log"
    with log.open("wb") as told:
        process = subprocess.Popen(list(map(str, line)), stdout=told, stderr=told)
    try:
        end = time.monotonic() + START_SECONDS
        while not (found := port_of(log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield Server(name, process, int(found[1]))
    finally:
        process.terminate()
        process.wait()


def is_healthy(told):
    """The port of llama-server, once it has read its files."""
    found = re.search(r"http://127.0.0.1:(\d+)", told)
    with contextlib.suppress(OSError):
        return found and urllib.request.urlopen(f"{found[0]}/health", timeout=5).status == 200 and found
    return None


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
        "tokens a second": len(prompts) * ANSWER / (last - began),
        "pieces a second once all have begun": written / (last - begun),
        "first token": [one.first for one in found],
    }


async def gaps(server, prompts, long):
    """Gaps between the tokens of 7 answers, before and while a long prompt is read."""
    begun = [asyncio.Event() for _ in prompts]
    asked = [asyncio.create_task(server.ask(one, ANSWER, 0, event)) for one, event in zip(prompts, begun, strict=True)]
    await asyncio.gather(*(event.wait() for event in begun))
    came = time.perf_counter()
    first = (await server.ask(long, 2, 1)).times[0]
    found = [gap for one in await asyncio.gather(*asked) for gap in zip(one.times, one.times[1:], strict=False)]
    beside = [end - start for start, end in found if end > came and start < first]
    quiet = [end - start for start, end in found if not (end > came and start < first)]
    return {
        "median gap": statistics.median(quiet),
        "p99 gap": float(np.percentile(beside, 99)),
        "read in": first - came,
    }


class Texts:
    """Prompts of any length from general text, each from a place of its own."""

    def __init__(self, tokenizer):
        texts = [
            record.text or "\n".join(message["content"] for message in record.messages or ())
            for record in general_records()
        ]
        self.ids, self.places = tokenizer.encode("\n\n".join(texts)), count(0, 137)

    def draw(self, tokens, number=1):
        starts = [next(self.places) % (len(self.ids) - tokens) for _ in range(number)]
        return [list(map(int, self.ids[start : start + tokens])) for start in starts]


async def measure(both, texts, rounds, only, shape):
    """All loads, in rounds; in each round each server has each load once, with the same prompts."""
    found = {}

    async def note(load, server, run):
        told = await run
        found.setdefault(load, {}).setdefault(server.name, []).append(told)
        print(f"{load}, {server.name}: {json.dumps(told)[:150]}", flush=True)

    for server in both:  # nothing is measured of what either does once
        await streams(server, texts.draw(PROMPT, 2), 2)
    for number in range(rounds):
        order = both if number % 2 == 0 else both[::-1]
        for load, (answers, adapters) in STREAMS.items() if "streams" in only else ():
            prompts = texts.draw(PROMPT, answers)
            for server in order:
                await note(load, server, streams(server, prompts, adapters))
        for tokens in (PROMPT, LONG) if "prompts" in only else ():
            (prompt,) = texts.draw(tokens)
            for server in order:
                await note(f"prompt of {tokens:,} tokens", server, reading(server, prompt))
        if "peft" in only and shape:
            found.setdefault(MIXED, {}).setdefault(PEFT, []).append(mixed_batch(shape))
            print(f"{MIXED}, {PEFT}: {found[MIXED][PEFT][-1]}", flush=True)
        if "gaps" in only:
            prompts, (long,) = texts.draw(PROMPT, 7), texts.draw(LONG)
            for server in order:
                await note(
                    f"7 streams, 1 adapter, while a prompt of {LONG:,} is read", server, gaps(server, prompts, long)
                )
    return found


def mixed_batch(shape):
    """PEFT's mixed batch, in a process of its own."""
    line = [sys.executable, HERE / "serve_peft.py", "--shape", shape, "--streams", str(STREAMS[MIXED][0])]
    return json.loads(subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def shape_of(spec):
    """The name of the shape of a base, or None."""
    sizes = spec.hidden_size, spec.intermediate_size, spec.num_layers
    return next((name for name, shape in SHAPES.items() if shape[:3] == sizes), None)


async def reading(server, prompt):
    return {"prompt tokens a second": len(prompt) / (await server.ask(prompt, 1)).first}


# ---- results ---------------------------------------------------------------------------------------------------------


def figure(rounds, name):
    """The median over rounds; of first tokens the 95th percentile over all answers."""
    if name == "first token, p95, seconds":
        return float(np.percentile([x for one in rounds for x in one["first token"]], 95))
    return statistics.median(one[name] for one in rounds)


def table(found, memory):
    """Rows of ours, theirs and the ratio."""
    lines = ["| load | figure | thimble | against | | ratio |", "|---|---|---|---|---|---|"]
    for load, by_server in found.items():
        ours = by_server.get("thimble")
        for server, theirs in by_server.items():
            if server == "thimble":
                continue
            for name in (name if name != "first token" else "first token, p95, seconds" for name in theirs[0]):
                one, other = figure(ours, name) if ours else float("nan"), figure(theirs, name)
                lines.append(f"| {load} | {name} | {one:.3g} | {server} | {other:.3g} | {one / other:.2f} |")
    one, other = (memory[name] / 1e6 for name in ("thimble", "llama-server"))
    lines.append(
        f"| all of them | memory of its own, MB | {one:.0f} | llama-server | {other:.0f} | {one / other:.2f} |"
    )
    return "\n".join(lines)


def write_down(text):
    """Put the table into RESULTS.md, in place of the last one."""
    page = HERE / "RESULTS.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before.rstrip()}\n\n{BEGIN}\n{text}\n{END}\n{after.lstrip()}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["streams", "prompts", "gaps", "peft"],
        default=["streams", "prompts", "gaps", "peft"],
    )
    options = parser.parse_args()
    if not LLAMA_SERVER.exists():
        sys.exit(f"{LLAMA_SERVER} is not there: `make bench-serve` builds it first")
    model = open_model(options.base or str(default_base()))
    with tempfile.TemporaryDirectory() as folder, servers(model.base, Path(folder)) as both:
        texts, shape = Texts(model.tokenizer), shape_of(model.base.spec)
        found = asyncio.run(measure(both, texts, options.rounds, options.only, shape))
        memory = {server.name: server.resident_bytes for server in both}
    name, rounds = processor()[0], options.rounds
    head = (
        f"## Serving\n\nWritten by `make bench-serve`: {model.base.name} on {CORES} cores of an {name}, {rounds} "
        f"alternating rounds, medians; {PROMPT} tokens in, {ANSWER} out, greedy, speculation as it is by default.\n"
    )
    told = f"{head}\n{table(found, memory)}"
    kept = {"base": model.base.name, "processor": name, "rounds": rounds, "loads": found, "memory": memory}
    (HERE / "serve.json").write_text(json.dumps(kept, indent=1))
    write_down(told)
    print(told)


if __name__ == "__main__":
    main()
