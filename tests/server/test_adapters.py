"""Adapters that are found, loaded, replaced and removed, also while they are asked."""

import shutil
import threading

import pytest

from samples import make_adapter
from thimble.errors import Problems
from thimble.files.peft import save_adapter
from thimble.server.adapters import find_adapters

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture
def folder(model, tmp_path):
    for name in ("runs/a-1/adapter", "runs/b-1/adapter", "plain"):
        save_adapter(make_adapter(model.base, b_size=0.5), tmp_path / name)
    (tmp_path / "runs" / "empty").mkdir()
    return tmp_path


def test_adapters_have_the_names_of_their_folders_or_those_that_are_given(folder):
    runs = folder / "runs"
    problems = Problems()
    given = [str(runs), f"mine={runs / 'a-1'}", str(folder / "plain"), str(runs / "b-1" / "adapter")]
    found = find_adapters(given[:3], problems)
    assert {name: path.removeprefix(str(folder)) for name, path in found.items()} == {
        "a-1": "/runs/a-1", "b-1": "/runs/b-1", "mine": "/runs/a-1", "plain": "/plain",
    }  # fmt: skip
    assert list(find_adapters(given[3:], problems)) == ["b-1"]
    assert problems.found == []


def test_a_folder_may_be_called_as_no_adapter_can_be(folder):
    """`thimble train "my data.jsonl"` makes runs/my data-1."""
    places = ("my data-1", "モデル-2", "-x", "été (1)", "!")
    for name in places:
        shutil.copytree(folder / "plain", folder / "odd" / name)
    problems = Problems()
    found = find_adapters([str(folder / "odd")], problems)
    assert problems.found == []
    assert sorted(found) == ["2", "adapter", "my-data-1", "t-1-", "x"]
    shutil.copytree(folder / "plain", folder / "odd" / "my-data-1")
    find_adapters([str(folder / "odd")], problems)
    assert "there is another one called my-data-1" in problems.found[0]


def test_a_name_that_none_can_have_is_refused_before_anything_is_read(folder):
    for name in ("my tickets", "base", "x/y"):
        problems = Problems()
        find_adapters([f"{name}={folder / 'plain'}"], problems)
        assert f"{name!r} is no name for an adapter" in problems.found[0]


def test_what_is_no_adapter_and_a_name_that_is_there_twice_are_told(folder):
    problems = Problems()
    find_adapters([str(folder / "nowhere"), str(folder / "runs" / "empty")], problems)
    assert len(problems.found) == 2
    find_adapters([f"x={folder / 'plain'}", f"x={folder / 'runs' / 'a-1'}"], problems)
    assert "another one called x" in problems.found[-1]


def test_an_adapter_is_loaded_replaced_and_removed_while_the_server_runs(server, folder):
    first, second = folder / "plain", folder / "runs" / "a-1"
    assert server.post(LOAD, {"lora_name": "new", "lora_path": str(first)}, **ADMIN).status_code == 200
    assert "new" in [model.id for model in server.client.models.list()]
    before = server.chat(model="new")
    again = server.post(LOAD, {"lora_name": "new", "lora_path": str(second)}, **ADMIN)
    assert (again.status_code, again.json()["error"]["param"]) == (409, "lora_name")
    change = {"lora_name": "new", "lora_path": str(second), "load_inplace": True}
    assert server.post(LOAD, change, **ADMIN).status_code == 200
    after = server.chat(model="new")
    assert after.choices[0].message.content != before.choices[0].message.content
    assert after.system_fingerprint != before.system_fingerprint
    assert after.usage.prompt_tokens_details.cached_tokens == 0  # what the other one had read is not used
    assert server.post(UNLOAD, {"lora_name": "new"}, **ADMIN).status_code == 200
    assert server.post("/v1/completions", {"prompt": "x", "model": "new"}).status_code == 404
    assert server.post(UNLOAD, {"lora_name": "new"}, **ADMIN).status_code == 404


def test_an_answer_goes_on_with_the_adapter_it_began_with(server, folder):
    first, second = folder / "plain", folder / "runs" / "a-1"
    server.post(LOAD, {"lora_name": "swapped", "lora_path": str(first)}, **ADMIN)
    whole = server.chat(model="swapped", max_tokens=120).choices[0].message.content
    text, stream = "", server.chat(model="swapped", max_tokens=120, stream=True)
    for number, chunk in enumerate(stream):
        if number == 3:
            change = {"lora_name": "swapped", "lora_path": str(second), "load_inplace": True}
            assert server.post(LOAD, change, **ADMIN).status_code == 200
        text += chunk.choices[0].delta.content or ""
    assert text == whole
    server.post(UNLOAD, {"lora_name": "swapped"}, **ADMIN)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_path": "/nowhere"},
        {"lora_path": "\u0000"},
        {"lora_path": "../../etc"},
        {"lora_name": "smollm2"},
        {"lora_name": "base"},
        {"lora_name": "a/../b"},
        {"lora_name": ""},
    ],
)
def test_what_cannot_be_loaded_changes_nothing(server, folder, change):
    names = server.service.adapters.names
    body = {"lora_name": "bad", "lora_path": str(folder / "plain"), **change}
    answer = server.post(LOAD, body, **ADMIN)
    assert answer.status_code == 400, answer.text
    assert server.service.adapters.names == names


def test_an_adapter_of_another_base_is_refused_with_the_layer_that_does_not_fit(server, model, tmp_path):
    from pathlib import Path

    from thimble.models.base import open_base

    other = open_base(Path(str(model.base.path)).with_name("qwen3.gguf"))
    save_adapter(make_adapter(other), tmp_path / "other")
    answer = server.post(LOAD, {"lora_name": "other", "lora_path": str(tmp_path / "other")}, **ADMIN)
    assert answer.status_code == 400
    assert "does not belong to" in answer.json()["error"]["message"]


def test_adapters_are_added_up_with_weights(server):
    def ask(*lora):
        return server.chat(extra_body={"lora": list(lora)}, max_tokens=20).choices[0].message.content

    whole = ask({"id": "tickets"})
    assert ask({"id": "tickets", "scale": 0.5}) != whole
    assert ask({"id": "tickets"}, {"id": "poems", "scale": 0.5}) != whole
    assert ask({"id": "tickets"}, {"id": "poems", "scale": 0}) == whole
    twice = server.post("/v1/completions", {"prompt": "x", "lora": [{"id": "tickets"}, {"id": 0}]})
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "lora")


def test_different_adapters_asked_at_once_say_what_each_says_alone(server):
    names = ["smollm2", "tickets", "poems"] * 3
    alone = {name: server.chat("all at once", model=name, max_tokens=40).choices[0].message.content for name in names}
    said = {}

    def ask(place, name):
        said[place] = server.chat("all at once", model=name, max_tokens=40).choices[0].message.content

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said[place] for place in range(len(names))] == [alone[name] for name in names]


def test_the_figures_name_what_is_in_use(server):
    server.chat(model="tickets", max_tokens=3)
    text = server.http.get("/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "request_success_total", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket", "prefix_cache_hits_total",
    ):  # fmt: skip
        assert f"vllm:{name}" in text, name
    assert 'vllm:lora_requests_info{max_lora="' in text
    assert 'finished_reason="length"' in text
