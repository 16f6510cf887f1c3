"""`thimble serve` as a user starts it: what it says, what it refuses, and how it ends."""

import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import thimble
from samples import make_adapter
from thimble.commands.serve import ServeReport, _keys, _told, serve
from thimble.config.serve import ServeConfig
from thimble.events import Event, EventLog
from thimble.files.peft import save_adapter
from thimble.models.base import open_base


@pytest.fixture
def runs(tiny_base, tmp_path):
    """A folder with runs: two finished ones, one that is called as the base, one without an adapter, and one of another
    base.
    """
    base = open_base(tiny_base)
    for name in ("tickets-1", "poems-1", "base"):
        save_adapter(make_adapter(base), tmp_path / "runs" / name / "adapter")
    (tmp_path / "runs" / "stopped-1").mkdir()
    other = open_base(tiny_base.replace("smollm2", "qwen3"))
    save_adapter(make_adapter(other), tmp_path / "runs" / "other-1" / "adapter")
    return tmp_path / "runs"


def served(folder, *words, **environment):
    """A server in a process of its own, once it says that it serves."""
    line = [sys.executable, "-m", "thimble", "serve", "--port", "0", "--compute", "fp32", *words]
    process = subprocess.Popen(
        line, cwd=folder, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    told = ""
    while "curl " not in told:
        read = process.stderr.readline()
        assert read, told
        told += read
    return process, told


def test_it_serves_what_lies_under_runs_and_prints_a_line_that_works(tiny_base, runs, tmp_path):
    process, told = served(tmp_path, "--base", tiny_base, "--json")
    try:
        assert "adapters: poems-1, tickets-1" in told
        assert re.search(r"warning: .*other-1", told)
        assert re.search(r"warning: not served: runs/base.* is called as the base is: name it with", told)
        assert "stopped-1" not in told
        curl = next(line for line in told.splitlines() if line.startswith("curl "))
        if shutil.which("curl"):
            answer = subprocess.run(["/bin/sh", "-c", curl], capture_output=True, text=True, timeout=60)
            assert json.loads(answer.stdout)["model"] == "poems-1"
        address = re.search(r"http://[\d.:]+", told)[0]
        with urllib.request.urlopen(address + "/v1/models", timeout=30) as answer:
            names = [model["id"] for model in json.load(answer)["data"]]
        assert names == ["smollm2", "poems-1", "tickets-1"]
    finally:
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    report = json.loads(out)
    assert (report["base"], report["adapters"]) == ("smollm2", ["poems-1", "tickets-1"])
    assert report["requests"] >= 1


def test_keys_come_from_the_environment_and_requests_are_logged(tiny_base, runs, tmp_path):
    options = ("--base", tiny_base, "--adapter", f"mine={runs / 'tickets-1'}", "--log", "log.jsonl")
    cache = ("--cache-type", "int8", "--prefix-cache", "10MB", "--adapter-memory", "3MB")
    process, told = served(tmp_path, *options, *cache, THIMBLE_API_KEY="secret")
    try:
        assert re.search(r"keys and values: int8, [\d.]+ KB a token; up to [\d,]+ tokens \([\d.]+ GB, ", told)
        assert re.search(r"; [\d,]+ of them \(0.01 GB; --prefix-cache\) stay for requests that begin alike", told)
        assert "$THIMBLE_API_KEY" in told
        assert "secret" not in told
        address = re.search(r"http://[\d.:]+", told)[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address + "/v1/models", timeout=30)
        asked = urllib.request.Request(address + "/v1/models", headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["smollm2", "mine"]
        asked = urllib.request.Request(address + "/metrics", headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            told = dict(re.findall(r"^thimble:(\w+_max_bytes)\S* (\S+)$", answer.read().decode(), re.MULTILINE))
        assert 0.9e7 < float(told["prefix_cache_max_bytes"]) <= 1e7
        assert float(told["adapter_resident_max_bytes"]) == 3e6
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["status"] for entry in entries] == [401, 200, 200]


def test_what_was_there_at_the_start_is_not_looked_through_again_while_answers_wait(tiny_base, tmp_path, monkeypatch):
    """A collection of all objects that torch and numba have takes 50 to 150 ms, in which nothing is written."""
    monkeypatch.chdir(tmp_path)  # which has no runs
    passed_over = []

    def should_stop():
        passed_over.append(gc.get_freeze_count())
        return True

    serve(ServeConfig(base=tiny_base, port=0), should_stop=should_stop)
    assert passed_over[-1] > 50_000
    assert gc.get_freeze_count() == 0  # the process may go on, and is what it was


def test_a_log_that_finds_no_room_costs_no_answer():
    events: list[Event] = []
    log, report = EventLog(events.append), ServeReport("", "")
    entry = {"time": 0, "status": 200, "method": "GET", "path": "/", "seconds": 0.1}
    with _told("/dev/full", report, log, events.append) as on_request:
        on_request(entry)
        on_request(entry)
    assert report.requests == 2
    [warning] = log.messages["warning"]
    assert warning.startswith("--log /dev/full: cannot be written any more (No space left on device): requests are")
    assert [event.kind for event in events].count("request") == 2


def test_keys_of_the_environment_are_separated_as_those_of_the_line_are(monkeypatch):
    monkeypatch.setenv("THIMBLE_API_KEY", "one, two,")
    assert _keys("THIMBLE_API_KEY", ()) == ["one", "two"]
    assert _keys("THIMBLE_API_KEY", ("three",)) == ["three"]


def test_without_the_extra_it_says_what_to_install(thimble, tiny_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, out, err = thimble("serve", "--base", tiny_base)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"thimble: thimble serve needs packages .*\(uvicorn\): pip install .*\n", err)


@pytest.mark.parametrize("name", ["smollm2", "smollm2.gguf"])
def test_an_adapter_that_would_hide_behind_the_base_is_refused(thimble, tiny_base, tmp_path, name):
    save_adapter(make_adapter(open_base(tiny_base)), tmp_path / name)
    refused = ("--port", "0", "--log", tmp_path)  # in any case
    code, _, err = thimble("serve", "--base", tiny_base, "--adapter", tmp_path / name, *refused)
    assert code == 2
    assert f"--adapter {tmp_path / name}: {name} is the name of the base: give it one of its own, as in" in err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines can reach that, so it wants an --api-key"),
        (["--port", "70000"], "--port 70000: expected at most 65535"),
        (["--log", "nowhere/requests.jsonl"], "--log nowhere/requests.jsonl: cannot be written (No such file or direc"),
        (["--log", "."], "--log .: cannot be written (Is a directory): name another file"),
        (["--adapter", "nowhere"], "adapter nowhere does not exist"),
        (["--max-running", "0"], "--max-running 0: expected at least 1"),
        (["--adapter-memory", "900TB"], "--adapter-memory 900000000000000: expected at most the memory that is free, "),
        (["--prefix-cache", "900TB"], "--prefix-cache 900000000000000: expected at most the memory that is free, "),
        (["--host", "no.such.host.invalid", "--api-key", "x"], "--host no.such.host.invalid --port 8000: cannot be"),
    ],
)
def test_what_cannot_be_served_is_refused_before_work(thimble, tiny_base, options, told):
    code, out, err = thimble("serve", "--base", tiny_base, *options)
    assert (code, out) == (2, "")
    assert told in err


def test_all_problems_are_told_at_once(thimble, tiny_base):
    _, _, err = thimble("serve", "--base", "nobase", "--host", "0.0.0.0", "--max-waiting", "-1", "--adapter", "no")
    assert all(part in err for part in ("nobase", "--host 0.0.0.0", "--max-waiting -1"))


def test_a_port_that_is_taken_is_told_before_the_base_is_read(thimble, tiny_base):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = thimble("serve", "--base", tiny_base, "--port", port)
    assert code == 2
    assert f"--port {port}: cannot be listened at" in err


def test_a_server_that_is_refused_leaves_no_log(thimble, tiny_base, tmp_path):
    code, _, _ = thimble("serve", "--base", tiny_base, "--log", tmp_path / "log.jsonl", "--max-running", "0")
    assert code == 2
    assert not (tmp_path / "log.jsonl").exists()


def test_it_is_a_function_too(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events, told, stop = [], [], threading.Event()

    def on_event(event):
        events.append(event)
        if "curl" in event.text:
            told.append(time.monotonic())
            stop.set()

    report = thimble.serve(base=tiny_base, port=0, compute="fp32", on_event=on_event, should_stop=stop.is_set)
    assert report.address.startswith("http://127.0.0.1:")
    assert report.requests == 0
    assert time.monotonic() - told[0] < 60
    stages = [event.text for event in events if event.kind == "stage"]
    compiling, serving = (
        next(n for n, text in enumerate(stages) if text.startswith(word)) for word in ("compil", "serv")
    )
    assert compiling < serving
