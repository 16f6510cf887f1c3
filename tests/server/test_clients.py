"""Clients that leave, that do not read, that send half of what they should, and that are too many."""

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

import served
from thimble.inference.engine import Engine
from thimble.inference.request import Token
from thimble.inference.sampling import SamplingOptions
from thimble.server import engine_thread, run, sending
from thimble.server.engine_thread import EngineThread, Heard, Stream
from thimble.server.service import Limits

LONG = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 900, "ignore_eos": True}


def opened_with(server, body, path="/v1/chat/completions", rcvbuf=None):
    """A connection over which a request was sent."""
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.socket()
    if rcvbuf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


class CountingEngine(Engine):
    """An engine that counts its steps and notes when it was told to forget."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps, self.cancelled, self.tokens = 0, [], 0
        self.pause = 0.0

    def step(self):
        self.steps += 1
        time.sleep(self.pause)
        told = super().step()
        self.tokens += len(told)
        return told

    def cancel(self, number):
        self.cancelled.append((number, self.steps))
        super().cancel(number)


class HeldEngine(Engine):
    """An engine that begins no step before it may, however slow the machine is that asks it meanwhile."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.may_go_on = threading.Event()

    def step(self):
        self.may_go_on.wait(served.SECONDS)
        return super().step()


@pytest.fixture
def counted(run_server, session):
    """A server whose engine counts; not too fast, so that there is something to leave."""
    engines = []

    def make_engine():
        engines.append(CountingEngine(session, 1, 8))
        engines[-1].pause = 0.005
        return engines[-1]

    with run_server(make_engine=make_engine) as running:
        running.engines = engines
        yield running


@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_answer_whose_client_left_is_forgotten(counted, is_streamed, wait_until):
    engine = counted.engines[0]
    connection = opened_with(counted, {**LONG, "stream": is_streamed, "n": 2})
    wait_until(lambda: engine.tokens >= 6)
    connection.close()
    wait_until(lambda: len(engine.cancelled) == 2)
    wait_until(lambda: engine.is_idle)
    assert engine.tokens < 1800
    wait_until(lambda: counted.log)  # the last that is done
    assert counted.service.engine.requests == 0
    (entry,) = counted.log
    assert (entry["is_gone"], entry["finish"]) == (True, "abort,abort")
    assert entry["status"] == (200 if is_streamed else 499)


@pytest.mark.parametrize("turns", range(4))
def test_one_that_leaves_in_the_moment_in_which_a_token_comes_is_noticed(turns):
    """What waits for the token is cancelled so many turns of the event loop after it came."""

    async def is_noticed():
        stream = Stream(EngineThread(lambda: SimpleNamespace(load=None), 1), 1, time.monotonic() + 60)
        place = stream.add(None, SamplingOptions(9), None)
        waiting = asyncio.create_task(stream.next(60))
        for _ in range(3):
            await asyncio.sleep(0)
        stream.put(Heard(place, Token(1, 5)))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_over = waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
        return was_over or waiting.cancelled()

    assert asyncio.run(is_noticed())


def test_one_that_leaves_while_its_request_waits_is_forgotten_too(counted, wait_until):
    connections = [opened_with(counted, {**LONG, "n": 8}) for _ in range(2)]
    wait_until(lambda: counted.service.engine.requests == 16)
    for connection in connections:
        connection.close()
    wait_until(lambda: counted.service.engine.requests == 0)
    wait_until(lambda: counted.engines[0].is_idle)


def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(run_server, session, monkeypatch, wait_until):
    monkeypatch.setattr(engine_thread, "MOST_BUFFERED", 50)
    monkeypatch.setattr(sending, "UNREAD_SECONDS", 1000.0)  # which is not what drops it
    with run_server() as running:
        slow = opened_with(running, {**LONG, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}, rcvbuf=2048)
        assert running.chat(max_tokens=30).usage.completion_tokens == 30
        wait_until(lambda: running.service.engine.requests == 0)
        slow.close()


def test_a_client_that_takes_nothing_at_all_is_left(run_server, monkeypatch, wait_until):
    monkeypatch.setattr(sending, "UNREAD_SECONDS", 0.3)
    with run_server() as running:
        slow = opened_with(running, {**LONG, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}, rcvbuf=2048)
        wait_until(lambda: any(entry.get("path") == "/v1/chat/completions" for entry in running.log))
        assert running.service.engine.requests == 0
        slow.close()


def test_places_are_limited_and_free_again(counted, wait_until):
    service = counted.service
    service.engine._most_requests = 4
    connection = opened_with(counted, {**LONG, "n": 3})
    wait_until(lambda: service.engine.requests == 3)
    answer = counted.post("/v1/chat/completions", {**LONG, "n": 2})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    connection.close()
    wait_until(lambda: service.engine.requests == 0)
    assert counted.post("/v1/chat/completions", {**LONG, "n": 2, "max_tokens": 2}).status_code == 200


def test_an_answer_ends_when_its_time_is_over(run_server, session, wait_until):
    def make_engine():
        engine = CountingEngine(session, 1, 8)
        engine.pause = 0.05
        return engine

    with run_server(limits=Limits(seconds=2.0), make_engine=make_engine) as running:
        # What is compiled at first use takes longer than an answer may.
        wait_until(lambda: "choices" in running.post("/v1/chat/completions", {**LONG, "max_tokens": 1}).json())
        answer = running.post("/v1/chat/completions", LONG).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 1 <= answer["usage"]["completion_tokens"] < 100
        text = running.post("/v1/chat/completions", {**LONG, "stream": True}).text
        assert '"finish_reason":"length"' in text
        assert text.endswith("data: [DONE]\n\n")


def test_a_request_that_never_began_is_asked_to_come_again(run_server, session):
    engine = HeldEngine(session, 1, 8)
    with run_server(limits=Limits(seconds=0.2), make_engine=lambda: engine) as running:
        answer = running.post("/v1/chat/completions", LONG)
        engine.may_go_on.set()
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")


def test_an_engine_that_fails_is_told_of_and_begins_anew(counted, wait_until):
    engine = counted.engines[0]
    engine.pause = 0.02
    connection = opened_with(counted, {**LONG, "stream": True})
    wait_until(lambda: engine.tokens >= 2)

    def fail():
        raise MemoryError("no room")

    engine.step = fail
    data = b""
    while b"[DONE]" not in data:
        data += connection.recv(65536)
    assert b"MemoryError: no room" in data
    wait_until(lambda: len(counted.engines) == 2)
    assert counted.chat(max_tokens=3).usage.completion_tokens == 3
    assert counted.http.get("/health").status_code == 200


def test_an_engine_that_failed_is_replaced_before_anybody_hears_of_it(counted):
    """Who asks for figures right after finds none of those that were left."""
    thread, loads, post = counted.service.engine, [], counted.service.engine._post
    thread._post = lambda *what: (loads.append((len(counted.engines), thread.load.running)), post(*what))

    def fail():
        raise MemoryError("no room")

    counted.engines[0].step = fail
    assert counted.post("/v1/chat/completions", LONG).status_code == 500
    assert loads == [(2, 0)]


def test_one_that_cannot_be_replaced_is_told_too_and_takes_no_more(counted, wait_until, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda what: None)

    def fail():
        raise MemoryError("no room")

    counted.service.engine._make_engine = counted.engines[0].step = fail
    answer = counted.post("/v1/chat/completions", LONG)
    assert (answer.status_code, "no room" in answer.text) == (500, True)
    wait_until(lambda: counted.http.get("/health").status_code == 503)
    answer = counted.post("/v1/chat/completions", LONG)
    assert (answer.status_code, "start the server again" in answer.text) == (503, True)


def test_an_engine_that_fails_between_steps_leaves_nobody_waiting(counted, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda what: None)

    def fail(*what):
        raise MemoryError("no room")

    counted.engines[0].add = fail
    answer = counted.post("/v1/chat/completions", LONG)
    assert (answer.status_code, "no room" in answer.text) == (500, True)
    assert counted.post("/v1/chat/completions", LONG).status_code == 503


def test_half_a_request_is_not_waited_for_without_end(run_server, monkeypatch):
    monkeypatch.setattr(sending, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(run, "HEAD_SECONDS", 0.3)
    with run_server() as running:
        host, port = running.address.removeprefix("http://").split(":")
        for sent, expected in ((b"POST /v1/completions HTT", b""), (b"", b"")):
            with socket.create_connection((host, int(port)), timeout=5) as half:
                half.sendall(sent)
                assert half.recv(1000) == expected
        with socket.create_connection((host, int(port)), timeout=5) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
            assert half.recv(1000).startswith(b"HTTP/1.1 408")
        with socket.create_connection((host, int(port)), timeout=5) as kept:
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
            data = kept.recv(1000)
            while more := kept.recv(1000):
                data += more
            assert data.startswith(b"HTTP/1.1 200")


def test_health_answers_while_many_are_answered(counted, wait_until):
    connections = [opened_with(counted, {**LONG, "stream": True}) for _ in range(8)]
    wait_until(lambda: counted.engines[0].tokens > 20)
    for _ in range(20):
        assert counted.http.get("/health", timeout=20).status_code == 200
    for connection in connections:
        connection.close()


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_a_server_that_stops_ends_what_was_begun_and_begins_nothing(run_server, session, wait_until):
    engine = HeldEngine(session, 1, 8)
    with run_server(make_engine=lambda: engine, drain_seconds=served.SECONDS) as running:
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(running.post("/v1/chat/completions", {**LONG, "max_tokens": 40}))
        )
        asking.start()
        wait_until(lambda: running.service.engine.requests == 1)
        running.is_stopping = True
        wait_until(lambda: running.service.is_draining)
        late = running.post("/v1/chat/completions", LONG)
        assert (late.status_code, late.headers["retry-after"]) == (503, "10")
        assert running.http.get("/ready").status_code == 503
        assert running.http.get("/health").status_code == 200
        engine.may_go_on.set()
        asking.join(served.SECONDS)
        assert answers[0].json()["usage"]["completion_tokens"] == 40
        running.thread.join(served.SECONDS)
        assert not running.thread.is_alive()


def test_a_server_that_cannot_wait_says_so_to_those_it_leaves(run_server, session, wait_until):
    def make_engine():
        engine = CountingEngine(session, 1, 8)
        engine.pause = 0.02
        return engine

    with run_server(make_engine=make_engine, drain_seconds=0.2) as running:
        connection = opened_with(running, {**LONG, "stream": True})
        wait_until(lambda: running.service.engine.requests == 1)
        running.is_stopping = True
        data = b""
        while more := connection.recv(65536):
            data += more
        assert b"the server stops" in data
        assert b"[DONE]" in data
