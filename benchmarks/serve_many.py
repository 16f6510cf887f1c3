"""A thousand adapters on one server against eight: speed, memory, and adapters that are loaded while it answers.

    python benchmarks/serve_many.py [--registered 1000] [--rounds 3] [--requests 64]

Two servers of Thimble with adapters of rank 1 on every linear layer, asked in turns by 8 streams, each of which asks
again as soon as it is answered. Adapters are drawn by Zipf's law (the k-th in proportion to 1/k), so that on the large
one many are read from their files meanwhile. Then each of the adapters answers once, and what memory the servers have
beyond the adapters that they keep is compared. At last adapters of rank 16 come and are replaced while 7 streams write.
Serve_table.py writes what was found.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from serve_engine import draw_adapter
from serve_table import RATE, keep
from servers import Texts, thimble, worst

from thimble.data.model import open_model
from thimble.files.peft import save_adapter
from thimble.models.base import default_base

FEW, STREAMS, PROMPT, ANSWER, LOADS = 8, 8, 121, 128, 10
RANK, LOADED_RANK = 1, 16
RESIDENT = "thimble:adapter_resident_bytes"


async def zipf(server, prompts, seed):
    """Answers to prompts by 8 streams, each to the next prompt once it has the last one."""
    random, waiting = np.random.default_rng(seed), iter(prompts)
    shares = 1 / np.arange(1, server.adapters + 1)

    async def stream():
        for prompt in waiting:
            await server.ask(prompt, ANSWER, int(random.choice(server.adapters, p=shares / shares.sum())))

    began = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return {RATE: len(prompts) * ANSWER / (time.perf_counter() - began)}


async def use_all(server):
    """Have each adapter answer once, 8 at a time."""
    waiting = iter(range(server.adapters))

    async def stream():
        for number in waiting:
            await server.ask([1, 2, 3], 1, number)

    await asyncio.gather(*(stream() for _ in range(STREAMS)))


def beyond(server):
    """Memory beyond what the kept adapters have, in MB."""
    return (server.resident_bytes - server.figure(RESIDENT)) / 1e6


async def hot_loads(server, prompts, folders):
    """Load adapters under one name in turn while others are used; what that takes, and the gaps between tokens."""
    begun = [asyncio.Event() for _ in prompts]
    asked = [
        asyncio.create_task(server.ask(one, 3 * ANSWER, number, others=event))
        for number, (one, event) in enumerate(zip(prompts, begun, strict=True))
    ]
    await asyncio.gather(*(event.wait() for event in begun))
    took, spans = [], []
    for number in range(LOADS):
        began = time.perf_counter()
        body = {"lora_name": "hot", "lora_path": str(folders[number % 2]), "load_inplace": True}
        took.append(await server.post("/v1/load_lora_adapter", body))
        spans.append((began, time.perf_counter()))
        await asyncio.sleep(0.3)
    found = [gap for one in await asyncio.gather(*asked) for gap in zip(one.times, one.times[1:], strict=False)]
    beside = [end - start for start, end in found if any(start < last and end > first for first, last in spans)]
    others = [end - start for start, end in found if not any(start < last and end > first for first, last in spans)]
    return {
        "median load, ms": 1e3 * statistics.median(took), "longest load, ms": 1e3 * max(took),
        "median gap between tokens, ms": 1e3 * statistics.median(others),
        "p99 gap, ms": 1e3 * worst(others, 99), "longest gap beside a load, ms": 1e3 * max(beside),
    }  # fmt: skip


async def measure(few, many, texts, options, folders):
    """All of it; gives loads by name and server."""
    found = {}

    def note(load, server, told):
        found.setdefault(load, {}).setdefault(server, []).append(told)
        print(f"{load}, {server}: {json.dumps(told)}", flush=True)

    load = f"8 streams, Zipf traffic on {many.adapters:,} adapters of rank {RANK}"
    for number in range(options.rounds + 1):
        prompts = texts.draw(PROMPT, options.requests if number else STREAMS)
        for server in (few, many) if number % 2 else (many, few):
            told = await zipf(server, prompts, number)
            if number:  # nothing is measured of what either does once
                note(load, "thimble" if server is many else f"thimble with {FEW}", told)
    for server in (few, many):
        await use_all(server)
    memory = f"{many.adapters:,} adapters of rank {RANK}, each was used"
    note(memory, "thimble", {"MB beyond the adapters kept": beyond(many)})
    note(memory, f"thimble with {FEW}", {"MB beyond the adapters kept": beyond(few)})
    for _ in range(options.rounds):
        told = await hot_loads(many, texts.draw(PROMPT, STREAMS - 1), folders)
        note(f"7 streams, adapters of rank {LOADED_RANK} are loaded", "thimble", told)
    return found


def drawn(spec, folder, names, rank):
    """Adapters in folders of these names."""
    for seed, name in enumerate(names):
        save_adapter(draw_adapter(spec, seed, rank), folder / name)
    return [folder / name for name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64, help="answers a round")
    options = parser.parse_args()
    opened = open_model(str(default_base()))
    base = opened.base
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        all_of_them = drawn(base.spec, folder, [f"a{number}" for number in range(options.registered)], RANK)
        hot = drawn(base.spec, folder, ["hot0", "hot1"], LOADED_RANK)
        few = stack.enter_context(thimble(base, all_of_them[:FEW], folder, "thimble with few"))
        many = stack.enter_context(thimble(base, all_of_them, folder, "thimble with many"))
        found = asyncio.run(measure(few, many, Texts(opened.tokenizer), options, hot))
    keep(base.name, found, {})


if __name__ == "__main__":
    main()
