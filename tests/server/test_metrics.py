"""What `/metrics` tells: figures that add up, under the names of vLLM."""

import re

import pytest

from thimble.inference.engine import Engine
from thimble.server.service import CacheRoom, Limits


@pytest.fixture
def figures(server):
    """Read all figures: by name, and with the labels beside the model's behind it."""

    def read():
        lines = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {re.sub(r"{.*}", "", line.rpartition(" ")[0]): float(line.rpartition(" ")[2]) for line in lines}

    return read


def test_the_time_of_a_request_is_divided_into_waiting_reading_and_writing(server, figures):
    before = figures()
    server.chat("how long does this take", model="tickets", max_tokens=5, n=2)
    after = figures()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    names = ("queue_time", "prefill_time", "decode_time", "inference_time")
    assert [grown[f"vllm:request_{name}_seconds_count"] for name in names] == [2] * 4
    queue, prefill, decode, inference = (grown[f"vllm:request_{name}_seconds_sum"] for name in names)
    assert min(queue, prefill, decode) > 0
    assert queue + prefill == pytest.approx(grown["vllm:time_to_first_token_seconds_sum"])
    assert prefill + decode == pytest.approx(inference)
    assert decode == pytest.approx(grown["vllm:inter_token_latency_seconds_sum"])


def test_tokens_of_prompts_that_were_known_are_counted(server, figures):
    text = "a beginning that is long enough to be kept " * 4
    server.chat(text)
    before = figures()
    usage = server.chat(text).usage
    after, name = figures(), "vllm:prompt_tokens_cached_total"
    assert after[name] - before[name] == usage.prompt_tokens_details.cached_tokens > 0


def test_memory_of_keys_and_values_is_told_with_what_of_it_is_kept(run_server, session):
    cache = CacheRoom(4000, 320, 1000)

    def engine():
        return Engine(session, 1, 8, cache.tokens, keeps_prefixes=True, kept_tokens=cache.kept_tokens)

    with run_server(limits=Limits(cache=cache), make_engine=engine) as running:
        rooms = ("kv_cache_bytes", "prefix_cache_bytes", "prefix_cache_max_bytes", "prefix_cache_evicted_tokens_total")

        def figures():
            text = running.http.get("/metrics").text
            return [float(re.search(rf"^thimble:{name}{{[^}}]*}} (\S+)", text, re.M)[1]) for name in rooms]

        most = 320_000
        assert figures() == [0, 0, most, 0]
        running.chat("a beginning", max_tokens=1)
        held, kept, _, evicted = figures()
        assert held == kept > 0 == evicted
        for number in range(40):
            running.chat(f"{number} is another beginning, and long enough to fill some blocks", max_tokens=1)
        held, kept, _, evicted = figures()
        assert held == kept <= most
        assert evicted > 0


def test_a_step_is_counted_before_anybody_hears_of_it(run_server):
    with run_server() as running:
        thread, loads = running.service.engine, []
        post = thread._post

        def note_load(function, *arguments):
            loads.append(thread.load)
            post(function, *arguments)

        thread._post = note_load
        running.chat(max_tokens=1)
        assert [(load.waiting, load.running) for load in loads] == [(0, 0)]
        assert loads[0].unused_tokens > 0


def test_adapters_are_counted_as_they_are_read_and_make_room(run_server):
    with run_server() as running:
        registry = running.service.adapters

        def figure(name):
            return float(re.search(rf"^thimble:{name}{{[^}}]*}} (\S+)", running.http.get("/metrics").text, re.M)[1])

        names = ("adapters", "adapter_loads_total", "adapter_evictions_total", "adapter_resident_bytes")
        assert [figure(name) for name in names] == [2, 0, 0, 0]
        running.chat(model="tickets", max_tokens=1)
        assert [figure(name) for name in names] == [2, 1, 0, registry.resident_bytes]
        registry._most = 1  # byte: there is room for one alone
        running.chat(model="poems", max_tokens=1)
        assert [figure(name) for name in names] == [2, 2, 1, registry.resident_bytes]
        assert registry.resident_bytes > 0
