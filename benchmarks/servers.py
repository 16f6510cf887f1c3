"""Servers in processes of their own, and how they are asked over HTTP: Thimble and llama-server, on one file."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from thimble.data.records import general_records

LLAMA_SERVER = Path(__file__).parent / "peers-env" / "llama-server"
CORES = 2
CONTEXT = 2048  # of each stream of llama-server
START_SECONDS = 600
ADMIN_KEY = "admin"
# As drawn: a greedy answer of a small model soon goes in circles, which guesses ahead would be praised for.
DRAWN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
GREEDY = {"temperature": 0.0}


@dataclass
class Answered:
    """What came of a request: when each of its tokens did, in seconds, and the text."""

    asked: float
    times: list = field(default_factory=list)
    text: str = ""

    @property
    def first(self):
        return self.times[0] - self.asked


@dataclass
class Server:
    """A server that runs, with so many adapters."""

    name: str
    process: subprocess.Popen
    port: int
    adapters: int = 0

    @property
    def is_ours(self):
        return self.name.startswith("thimble")

    def body(self, prompt, answer, adapter, way):
        """A completion of tokens with an adapter by its number, or None."""
        body = {"prompt": prompt, "max_tokens": answer, "ignore_eos": True, "stream": True, "seed": sum(prompt), **way}
        if self.is_ours:
            return {**body, **({} if adapter is None else {"model": f"a{adapter}"})}
        scales = [{"id": number, "scale": float(number == adapter)} for number in range(self.adapters)]
        return {**body, "lora": scales, "cache_prompt": False}

    async def ask(self, prompt, answer, adapter=None, way=DRAWN, others=None):
        """Ask for an answer, and read it as it comes; if `others` is given, an event, set it once 10 tokens came."""
        found = Answered(time.perf_counter())
        async for line in self._lines("/v1/completions", self.body(prompt, answer, adapter, way)):
            if line.startswith(b"data: {") and (text := json.loads(line[6:])["choices"][0]["text"]):
                found.text += text
                found.times.append(time.perf_counter())
                if others and len(found.times) == 10:
                    others.set()
        if others:
            others.set()
        assert found.times, f"{self.name} gave no answer"
        return found

    async def post(self, path, body):
        """Send a request that is answered at once; gives the seconds that took."""
        began = time.perf_counter()
        async for _ in self._lines(path, body):
            pass
        return time.perf_counter() - began

    async def _lines(self, path, body):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost:{self.port}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {ADMIN_KEY}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        status = await reader.readline()
        assert b" 200 " in status, status + await reader.read()
        async for line in reader:
            yield line
        writer.close()

    def figure(self, name):
        """A figure of Thimble's /metrics."""
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60).read().decode()
        return float(re.search(rf"^{name}\S* (\S+)$", page, re.MULTILINE)[1])

    @property
    def resident_bytes(self):
        """Memory of its own; pages of the file, which others map too, do not count."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def thimble(base, adapters, folder, name="thimble"):
    """Thimble with adapter folders, as it is by default."""
    line = [sys.executable, "-m", "thimble", "serve", "--base", base.path, "--port", "0", "--admin-key", ADMIN_KEY]
    line += [word for path in adapters for word in ("--adapter", path)]
    return started(name, line, folder, lambda told: re.search(r"serving at \S+:(\d+)", told), len(adapters))


def llama_server(base, adapters, folder, name="llama-server", *more):
    """llama-server with adapter files; it keeps no prompts, since its cache mixes adapters."""
    line = [LLAMA_SERVER, "-m", base.path, "--port", _free_port(), "-t", CORES, "-tb", CORES, "-np", 8]
    line += ["-c", 8 * CONTEXT, "--no-cache-prompt", "--cache-ram", 0, *more]
    line += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"] if adapters else []
    return started(name, line, folder, _is_healthy, len(adapters))


@contextlib.contextmanager
def started(name, line, folder, port_of, adapters):
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
        yield Server(name, process, int(found[1]), adapters)
    finally:
        process.terminate()
        process.wait()


def _free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _is_healthy(told):
    """The port of llama-server, once it has read its files."""
    found = re.search(r"http://127.0.0.1:(\d+)", told)
    with contextlib.suppress(OSError):
        return found and urllib.request.urlopen(f"{found[0]}/health", timeout=5).status == 200 and found
    return None


class Texts:
    """Prompts of any length from general text, each from a place of its own."""

    def __init__(self, tokenizer):
        texts = [
            record.text or "\n".join(message["content"] for message in record.messages or ())
            for record in general_records()
        ]
        self.tokenizer, self.ids, self.places = tokenizer, tokenizer.encode("\n\n".join(texts)), count(0, 137)

    def draw(self, tokens, number=1):
        starts = [next(self.places) % (len(self.ids) - tokens) for _ in range(number)]
        return [list(map(int, self.ids[start : start + tokens])) for start in starts]

    def to_repeat(self, tokens, begun):
        """A passage twice, and the beginning of it once more; and how it goes on, as text."""
        (passage,) = self.draw(tokens)
        between = list(map(int, self.tokenizer.encode("\n\n")))
        return [*passage, *between, *passage, *between, *passage[:begun]], self.tokenizer.decode(passage[begun:])


def worst(values, share):
    """A percentile."""
    return float(np.percentile(values, share))
