"""Everything at once on a server in a process of its own: 64 streams, new adapters, slow clients, clients that leave.

No request may end in a fault of the server, nobody may wait for a client that does not read, and memory may not grow.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from samples import make_adapter
from stress import TINY, Line
from thimble.files.peft import save_adapter
from thimble.models.base import open_base

STREAMS, NAMES = 64, 8
MOST_HEALTH_SECONDS = 0.1  # of 99 in 100 answers to /health
MOST_GROWN_BYTES = 20_000_000  # from when a third of the time is over
HEALTH_EVERY, SWAP_EVERY = 0.1, 0.6  # seconds
KINDS = {"whole": 12, "slow": 4, "leaves": 3, "half": 1}  # clients, and how many of each in twenty
SLOW_SECONDS, SMALL_BUFFER = 0.05, 2048  # between two reads of a slow client; bytes that it holds


class Traffic:
    """Clients of one server, and what came of their requests."""

    def __init__(self, port, folder, seconds, watcher):
        self.port, self.folder, self.seconds, self.watcher, self.end = port, folder, seconds, watcher, 0.0
        self.statuses, self.kinds, self.health = Counter(), Counter(), []  # of /health: seconds
        self.tokens = self.swaps = 0

    @property
    def is_over(self):
        return time.monotonic() > self.end

    async def run(self):
        self.end = time.monotonic() + self.seconds
        clients = [self.client(random.Random(number)) for number in range(STREAMS)]
        watching = asyncio.get_running_loop().run_in_executor(self.watcher, health_seconds, self.port, self.seconds)
        await asyncio.gather(self.swap(), *clients)
        self.health = await watching

    async def client(self, dice):
        while not self.is_over:
            kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
            self.kinds[kind] += 1
            model = dice.choice([None, *(f"a{number}" for number in range(NAMES))])
            prompt = [dice.randrange(3, 290) for _ in range(dice.randrange(1, 60))]
            body = {"prompt": prompt, "max_tokens": dice.randrange(1, 60), "stream": True, "seed": 1}
            data = json.dumps({**body, **({"model": model} if model else {})}).encode()
            with suppress(ConnectionError):  # of a client that left
                await self.ask(kind, data, dice)

    async def ask(self, kind, data, dice):
        limit = SMALL_BUFFER if kind == "slow" else 1 << 16
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        try:
            writer.write(head("/v1/completions", len(data)) + (data[: len(data) // 2] if kind == "half" else data))
            await writer.drain()
            if kind == "half":
                return
            self.statuses[await status_of(reader)] += 1
            leaves_after = dice.randrange(20) if kind == "leaves" else None
            async for line in reader:
                self.tokens += line.startswith(b"data: {") and b'"text"' in line
                self.statuses[500] += b'"error"' in line  # in a stream that had begun
                if leaves_after is not None and (leaves_after := leaves_after - 1) < 0:
                    return
                if kind == "slow":
                    await asyncio.sleep(SLOW_SECONDS)
        finally:
            writer.close()

    async def swap(self):
        """Have names stand for other adapters."""
        while not self.is_over:
            path = self.folder / f"version{self.swaps % 2}" / f"a{self.swaps % NAMES}"
            body = {"lora_name": path.name, "lora_path": str(path), "load_inplace": True}
            self.statuses[await self.post("/v1/load_lora_adapter", body)] += 1
            self.swaps += 1
            await asyncio.sleep(SWAP_EVERY)

    async def post(self, path, body):
        """The status of a request without a stream."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(body).encode()
        writer.write(head(path, len(data)) + data)
        status = await status_of(reader)
        await reader.read()
        writer.close()
        return status


def head(path, size):
    words = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer admin\r\n"
    return f"{words}Content-Length: {size}\r\n\r\n".encode()


def health_seconds(port, seconds):
    """What answers to /health take, asked again and again for some time; another status than 200 raises."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).read()
        found.append(time.perf_counter() - began)
        time.sleep(HEALTH_EVERY)
    return found


async def status_of(reader):
    return int((await reader.readline()).split()[1])


@contextmanager
def server(folder):
    """A server with adapters under eight names; gives process and port."""
    base = open_base(TINY)
    for version in range(2):
        for number in range(NAMES):
            adapter = make_adapter(base, rank=1 + number, b_size=0.3 + version)
            save_adapter(adapter, folder / f"version{version}" / f"a{number}")
    line = [sys.executable, "-m", "thimble", "serve", "--base", str(TINY), "--port", "0", "--compute", "fp32"]
    line += ["--adapter", str(folder / "version0"), "--admin-key", "admin", "--max-waiting", "1000"]
    line += ["--prefix-cache", "16MB"]  # which is soon full, so that what grows is no cache
    log = folder / "log"
    with log.open("wb") as told:
        process = subprocess.Popen(line, stdout=told, stderr=told, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (found := re.search(r"serving at http://[^:]+:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


def resident_bytes(process):
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


def traffic(seconds):
    """So many seconds of it, then a signal to end."""
    began = time.perf_counter()
    # In a process of its own, so that what the clients do is no delay of the server.
    with (
        tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (process, port),
        ProcessPoolExecutor(1, get_context("spawn")) as watcher,
    ):  # fmt: skip
        watcher.submit(health_seconds, port, 0).result()
        settle, rest = (Traffic(port, Path(folder), seconds * share, watcher) for share in (1 / 3, 2 / 3))
        asyncio.run(settle.run())
        before = resident_bytes(process)
        asyncio.run(rest.run())
        grown = resident_bytes(process) - before
        process.send_signal(signal.SIGTERM)
        ended = process.wait(120)
    statuses, kinds = settle.statuses + rest.statuses, settle.kinds + rest.kinds
    late = float(np.percentile(settle.health + rest.health, 99))
    faults = sum(count for status, count in statuses.items() if status != 200)
    wrong = faults + (late > MOST_HEALTH_SECONDS) + (grown > MOST_GROWN_BYTES) + (ended != 128 + signal.SIGTERM)
    note = (
        f"{STREAMS} streams for {seconds} s: {settle.tokens + rest.tokens:,} tokens, {settle.swaps + rest.swaps:,} "
        f"adapters replaced, {kinds['slow']:,} slow clients, {kinds['leaves'] + kinds['half']:,} that left; {faults} "
        f"faults; /health p99 {late * 1e3:.0f} ms; memory {grown / 1e6:+.1f} MB"
    )
    return Line("traffic on a server", sum(kinds.values()), wrong, time.perf_counter() - began, note)
