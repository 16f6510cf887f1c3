"""A server on a loopback port, with a tiny base that has a chat template, and two adapters."""

import asyncio
import dataclasses
import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from fixtures.tiny_tokenizers import CHATML
from samples import make_adapter
from thimble.backends.torch.session import TorchSession
from thimble.data.model import open_model
from thimble.data.template import ChatTemplate
from thimble.files.peft import save_adapter
from thimble.inference.engine import Engine
from thimble.server.adapters import ServedAdapters
from thimble.server.engine_thread import EngineThread
from thimble.server.gate import LOOPBACK, Keys
from thimble.server.routes import make_app
from thimble.server.run import address_of, listen, serve
from thimble.server.service import Limits, Service

TINY = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"
CONTEXT = 1024
LIMITS = Limits()


@pytest.fixture(scope="session")
def model():
    """The tiny base as an instruct model with a longer context."""
    model = open_model(str(TINY))
    base = dataclasses.replace(model.base, spec=dataclasses.replace(model.base.spec, max_positions=CONTEXT))
    tokenizer = model.tokenizer
    template = ChatTemplate(CHATML, tokenizer.bos_token, tokenizer.eos_token)
    return dataclasses.replace(model, base=base, template=template)


@pytest.fixture(scope="session")
def session(model):
    return TorchSession(model.base, "fp32", "file")


@pytest.fixture(scope="session")
def adapter_folders(model, tmp_path_factory):
    """Two adapters that change what the base says."""
    folders = {}
    for name, rank in (("tickets", 4), ("poems", 2)):
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(make_adapter(model.base, rank=rank, b_size=0.5), folders[name])
    return folders


class Running:
    """A server that runs, and ways to ask it."""

    def __init__(self, service, address):
        self.service, self.address, self.app = service, address, None
        self.log = []
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=address, timeout=60)
        self.is_stopping = False

    def post(self, path, body, **headers):
        return self.http.post(path, content=body if isinstance(body, bytes) else json.dumps(body), headers=headers)

    def chat(self, text="say it", **options):
        options = {"model": "smollm2", "temperature": 0, "max_tokens": 12, **options}
        return self.client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)

    def complete(self, prompt="the cat", **options):
        options = {"model": "smollm2", "temperature": 0, "max_tokens": 12, **options}
        return self.client.completions.create(prompt=prompt, **options)


@pytest.fixture(scope="session")
def run_server(model, session, adapter_folders):
    """Start a server: `with run_server(keys=..., limits=...) as running`."""

    @contextmanager
    def start(keys=((), ("admin",)), limits=LIMITS, hosts=LOOPBACK, drain_seconds=5, make_engine=None):
        def engine():
            return Engine(session, 1, 8, cache_tokens=20_000, keeps_prefixes=True)

        adapters = ServedAdapters(session, model.base)
        for name, folder in adapter_folders.items():
            adapters.put(name, str(folder))
        service = Service(model, EngineThread(make_engine or engine, limits.requests), adapters, limits, seed=0)
        opened = listen("127.0.0.1", 0)
        running, is_ready = Running(service, address_of(opened)), threading.Event()
        running.app = make_app(service, Keys(*keys), hosts, running.log.append)

        def on_ready():
            running.loop = asyncio.get_running_loop()
            is_ready.set()

        thread = threading.Thread(
            target=serve, args=(running.app, service, opened, lambda: running.is_stopping, on_ready, drain_seconds)
        )
        thread.start()
        assert is_ready.wait(30)
        running.thread = thread
        try:
            yield running
        finally:
            running.is_stopping = True
            thread.join(30)
            assert not thread.is_alive()

    return start


@pytest.fixture(scope="session")
def server(run_server):
    """A server that most tests share."""
    with run_server() as running:
        yield running


@pytest.fixture
def wait_until():
    """Wait for something that another thread brings about."""

    def wait(is_so, seconds=10):
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.01)

    return wait
