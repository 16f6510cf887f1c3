"""A server in a thread of this process: a tiny base that has a chat template, two adapters, and ways to ask it."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import httpx
import openai

from fixtures.tiny_tokenizers import CHATML
from samples import make_adapter
from thimble.backends.torch.session import TorchSession
from thimble.data.model import open_model
from thimble.data.template import ChatTemplate
from thimble.files.peft import save_adapter
from thimble.inference.adapters import AdapterRegistry
from thimble.inference.engine import Engine
from thimble.server.engine_thread import EngineThread
from thimble.server.gate import LOOPBACK, Keys
from thimble.server.routes import make_app
from thimble.server.run import address_of, listen, serve
from thimble.server.service import Limits, Service

TINY = Path(__file__).parent / "fixtures" / "gguf" / "smollm2.gguf"
CONTEXT, CACHE_TOKENS = 1024, 20_000
LIMITS = Limits()
SECONDS = 180  # until a test gives up


def tiny_model():
    """The tiny base as an instruct model with a longer context."""
    model = open_model(str(TINY))
    base = dataclasses.replace(model.base, spec=dataclasses.replace(model.base.spec, max_positions=CONTEXT))
    tokenizer = model.tokenizer
    template = ChatTemplate(CHATML, tokenizer.bos_token, tokenizer.eos_token)
    return dataclasses.replace(model, base=base, template=template)


def tiny_session(model):
    return TorchSession(model.base, "fp32", "file")


def save_adapters(model, folder: Path) -> dict[str, Path]:
    """Two adapters that change what the base says."""
    for name, rank in (("tickets", 4), ("poems", 2)):
        save_adapter(make_adapter(model.base, rank=rank, b_size=0.5), folder / name)
    return {name: folder / name for name in ("tickets", "poems")}


class Running:
    """A server that runs, and ways to ask it."""

    def __init__(self, service, address, app, log):
        self.service, self.address, self.app, self.log = service, address, app, log
        self.http = httpx.Client(base_url=address, timeout=SECONDS)
        self.is_stopping = False
        self.loop = self.thread = None

    @cached_property
    def client(self):
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    def post(self, path, body, **headers):
        return self.http.post(path, content=body if isinstance(body, bytes) else json.dumps(body), headers=headers)

    def chat(self, text="say it", **options):
        options = {"model": "smollm2", "temperature": 0, "max_tokens": 12, **options}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)

    def complete(self, prompt="the cat", **options):
        options = {"model": "smollm2", "temperature": 0, "max_tokens": 12, **options}
        return self.client.completions.create(prompt=prompt, **options)

    async def ask(self, path: str, data: bytes) -> tuple[int, bytes]:
        """Status and body of what it answers to a POST, without a network; to be awaited in its loop."""
        told = {"status": 0, "body": b""}
        given = iter([{"type": "http.request", "body": data, "more_body": False}])

        async def receive():
            return next(given, None) or await asyncio.Future()  # the client stays

        async def send(message):
            told["status"] = message.get("status", told["status"])
            told["body"] += message.get("body", b"")

        headers = [(b"host", b"localhost"), (b"authorization", b"Bearer admin")]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "",
            "scheme": "http", "query_string": b"", "headers": headers, "http_version": "1.1",
            "asgi": {"version": "3.0"},
        }  # fmt: skip
        await self.app(scope, receive, send)
        return told["status"], told["body"]


@contextmanager
def started(
    model, session, adapters, keys=((), ("admin",)), limits=LIMITS, hosts=LOOPBACK, drain_seconds=5, make_engine=None
) -> Iterator[Running]:
    """Start a server, and stop it in the end."""

    def engine():
        return Engine(session, 1, 8, cache_tokens=CACHE_TOKENS, keeps_prefixes=True)

    registry = AdapterRegistry(session, model.base)
    for name, folder in adapters.items():
        registry.add(name, folder)
    service = Service(model, EngineThread(make_engine or engine, limits.requests), registry, limits, seed=0)
    opened, log = listen("127.0.0.1", 0), []
    app = make_app(service, Keys(*keys), hosts, log.append)
    running, is_ready = Running(service, address_of(opened), app, log), threading.Event()

    def on_ready():
        running.loop = asyncio.get_running_loop()
        is_ready.set()

    arguments = (app, service, opened, lambda: running.is_stopping, on_ready, drain_seconds)
    running.thread = threading.Thread(target=serve, args=arguments)
    running.thread.start()
    try:
        assert is_ready.wait(SECONDS)
        yield running
    finally:
        running.is_stopping = True
        running.thread.join(SECONDS)
        assert not running.thread.is_alive()
