"""Adapters by name: read when used, out of memory when there is no room, and never another one than was asked for."""

import gc
import shutil
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from samples import IDS, make_adapter
from thimble.backends.torch.adapters import OBJECT_BYTES
from thimble.backends.torch.decode_step import DecodeStep
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.errors import AdapterError
from thimble.exports.gguf_adapter import write_gguf_adapter
from thimble.files.peft import save_adapter
from thimble.inference import adapters as registry_file
from thimble.inference.adapters import AdapterRegistry, UnknownAdapterError, blend
from thimble.inference.engine import Engine
from thimble.inference.sampling import SamplingOptions
from thimble.models.base import open_base

TINY = Path(__file__).parents[1] / "fixtures" / "gguf" / "smollm2.gguf"
BASE = open_base(TINY)


@pytest.fixture(scope="module")
def session():
    return TorchSession(BASE, "fp32", "dense")


@pytest.fixture
def folder(tmp_path):
    """Three adapters: a folder, a run folder, and one of another rank."""
    for name, rank in (("red", 2), ("green/adapter", 3), ("blue", 4)):
        save_adapter(make_adapter(BASE, rank=rank), tmp_path / name)
    (tmp_path / "notes.txt").write_text("no adapter")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def registry(session, folder):
    made = AdapterRegistry(session, BASE)
    made.add_folder(folder)
    return made


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read."""
    found, read = [], registry_file.load_fitting
    monkeypatch.setattr(
        registry_file, "load_fitting", lambda path, base: (found.append(Path(path).name), read(path, base))[1]
    )
    return found


def logits(session, adapter):
    return session.logits(IDS[:9], adapter)


def test_a_folder_is_listed_at_once_and_read_when_used(session, folder, reads):
    registry = AdapterRegistry(session, BASE)
    assert registry.add_folder(folder) == registry.names == ["blue", "green", "red"]
    assert reads == []
    first = registry.get("green")
    assert registry.get("green") is first
    assert reads == ["green"]
    assert not np.array_equal(logits(session, first), logits(session, session.load(None)))


def test_the_base_is_there_without_any_adapter(session, registry):
    for name in ("base", {}, {"base": 1.0}, {"red": 0.0}):
        np.testing.assert_array_equal(logits(session, registry.get(name)), logits(session, session.load(None)))


def test_an_unknown_name_is_told_with_those_there_are(registry):
    with pytest.raises(
        UnknownAdapterError, match="there is no adapter yellow here: choose from base, blue, green, red"
    ):
        registry.get("yellow")
    with pytest.raises(UnknownAdapterError):
        registry.remove("yellow")


@pytest.mark.parametrize("name", ["", "base", "../red", "a/b", "a:b", "x" * 129, "-a", "a b"])
def test_a_name_that_cannot_be_asked_for_is_refused(registry, folder, name):
    with pytest.raises(AdapterError, match="no name for an adapter"):
        registry.load(name, folder / "red")


def test_two_adapters_of_one_name_are_refused(session, folder):
    write_gguf_adapter(make_adapter(BASE), BASE, folder / "red.gguf")
    with pytest.raises(AdapterError, match="have one name, 'red'"):
        AdapterRegistry(session, BASE).add_folder(folder)


def test_gguf_adapters_are_the_same_as_folders(session, tmp_path):
    adapter = make_adapter(BASE)
    save_adapter(adapter, tmp_path / "one")
    write_gguf_adapter(adapter, BASE, tmp_path / "two.gguf")
    shutil.copy(TINY, tmp_path / "a_base.gguf")
    registry = AdapterRegistry(session, BASE)
    assert registry.add_folder(tmp_path) == ["one", "two"]
    np.testing.assert_allclose(
        logits(session, registry.get("two")), logits(session, registry.get("one")), atol=1e-5
    )  # fmt: skip


def test_memory_is_bounded_and_what_is_unused_for_longest_goes(session, folder, reads):
    sizes = {
        name: session.prepare(make_adapter(BASE, rank=rank)).resident_bytes for name, rank in (("red", 2), ("blue", 4))
    }
    registry = AdapterRegistry(session, BASE, resident_bytes=sizes["red"] + sizes["blue"])
    registry.add_folder(folder)
    for name in ("red", "blue", "red", "green", "red", "blue"):
        registry.get(name)
        assert registry.resident_bytes <= sizes["red"] + sizes["blue"]
    assert reads == ["red", "blue", "green", "blue"]
    assert (registry.loads, registry.evictions) == (4, 2)
    small = AdapterRegistry(session, BASE, resident_bytes=1)
    small.add_folder(folder)
    small.get("red")
    small.get("blue")
    assert small.resident_bytes == sizes["blue"]


def test_an_adapter_that_does_not_fit_is_an_error_and_changes_nothing(session, registry, folder, tmp_path):
    layers = make_adapter(BASE).layers
    path, factors = next(iter(layers.items()))
    save_adapter(Adapter({**layers, path.replace("layers.0", "layers.9"): factors}), tmp_path / "foreign")
    save_adapter(Adapter({path: replace(factors, A=factors.A[:, :-1])}), tmp_path / "narrow")
    before = registry.get("red")
    for name in ("foreign", "narrow"):
        with pytest.raises(AdapterError, match="does not belong to smollm2.gguf"):
            registry.load("red", tmp_path / name)
        registry.add("late", tmp_path / name)
        with pytest.raises(AdapterError, match="does not belong to smollm2.gguf"):
            registry.get("late")
    assert registry.get("red") is before


def test_the_first_adapters_are_read_ahead_as_far_as_they_take_so_much_memory(session, registry, folder, reads):
    registry.read_ahead(most_bytes=0)
    assert reads == []
    registry.read_ahead(most_bytes=session.prepare(make_adapter(BASE, rank=4)).resident_bytes + 1)
    assert reads == ["blue", "green"]  # the second one goes beyond
    (folder / "red" / "adapter_model.safetensors").write_bytes(b"damaged")
    registry.read_ahead()  # nobody asked for it
    with pytest.raises(AdapterError, match="red"):
        registry.get("red")


def test_what_a_first_answer_would_look_up_of_an_adapter_is_there_once_it_is_read(session, registry, monkeypatch):
    found, gather = [], DecodeStep._gather
    monkeypatch.setattr(DecodeStep, "_gather", lambda step, one: (found.append(one), gather(step, one))[1])
    active = registry.get("red")
    assert found == [active]
    engine = Engine(session)
    engine.add(IDS[:9], SamplingOptions(3), active)
    while not engine.is_idle:
        engine.step()
    assert found == [active]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_adapter_in_use_takes_its_numbers_once(folder, compute):
    """Not once more as it was trained, nor with B both ways round."""
    session = TorchSession(BASE, compute, "dense")
    registry = AdapterRegistry(session, BASE)
    registry.add_folder(folder)
    active = registry.get("red")
    numbers = sum(factors.A.size + factors.B.size for factors in make_adapter(BASE, rank=2).layers.values())
    size = numbers * (4 if compute == "fp32" else 2)
    assert active.resident_bytes == size + OBJECT_BYTES * len(active.layers)
    engine = Engine(session)
    engine.add(IDS, SamplingOptions(3), active)  # a prompt that large products read, and single tokens
    while not engine.is_idle:
        engine.step()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors_within(active)}
    assert sum(held.values()) == size


def _tensors_within(one):
    """All tensors that can be reached from an object by way of its attributes, lists and dicts."""
    todo, seen = [one], {}
    while todo:
        one = todo.pop()
        if id(one) not in seen and not isinstance(one, type | types.ModuleType | types.FunctionType):
            seen[id(one)] = one
            todo += [] if isinstance(one, torch.Tensor) else gc.get_referents(one)
    return [one for one in seen.values() if isinstance(one, torch.Tensor)]


def test_a_name_that_is_loaded_again_stands_for_the_new_contents(session, registry, folder):
    before = registry.get("red")
    other = make_adapter(BASE, rank=5)
    save_adapter(other, folder / "red_2")
    after = registry.load("red", folder / "red_2")
    assert registry.get("red") is after
    assert after.identity == session.load(other).identity != before.identity


def test_requests_finish_on_the_version_they_began_with(session, registry, folder):
    save_adapter(make_adapter(BASE, rank=5, b_size=0.5), folder / "red_2")
    engine, options = Engine(session, cache_tokens=4000, keeps_prefixes=True), SamplingOptions(12)
    old = registry.get("red")
    alone = {name: _answer(Engine(session), name, options) for name in (old, session.load(make_adapter(BASE)))}
    number, written = engine.add(IDS[:9], options, registry.get("red")), []
    for step in range(14):
        if step == 3:
            registry.load("red", folder / "red_2")
        if step == 5:
            registry.remove("red")
        written += [token.id for token in engine.step() if token.request == number and token.id is not None]
    assert written == alone[old]
    registry.add("red", folder / "red_2")
    new = registry.get("red")
    assert _answer(engine, new, options) == _answer(Engine(session), new, options) != alone[old]


def _answer(engine, adapter, options):
    engine.add(IDS[:9], options, adapter)
    return [token.id for _ in range(99) if not engine.is_idle for token in engine.step() if token.id is not None]


def test_a_removed_adapter_is_gone(registry):
    registry.get("red")
    registry.remove("red")
    assert registry.names == ["blue", "green"]
    with pytest.raises(UnknownAdapterError):
        registry.get("red")


def test_adapters_are_blended_as_the_sum_of_what_each_adds(session, registry, reads):
    weights = {"red": 0.5, "blue": -1.5}
    active = registry.get(weights)
    assert registry.get(dict(reversed(weights.items()))) is active
    assert sorted(reads) == ["blue", "red"]
    path = next(iter(BASE.spec.linear_shapes()))
    dense = 0
    for name, weight in weights.items():
        factors = session.load(registry_file.load_fitting(registry.path(name), BASE)).export().layers[path]
        dense = dense + weight * factors.scale * factors.B @ factors.A
    blended = active.layers[path]
    np.testing.assert_allclose(blended.scale * blended.B @ blended.A, dense, atol=1e-5)


def test_a_single_adapter_can_have_a_weight(session, registry):
    half = registry.get({"red": 0.5})
    whole = registry.get({"red": 1.0})
    for path, factors in whole.layers.items():
        assert half.layers[path].scale == 0.5 * factors.scale
    assert registry.get("red").identity != registry.get({"red": 0.5}).identity


def test_dora_is_neither_added_nor_scaled():
    plain = make_adapter(BASE)
    layers = {path: replace(f, magnitude=np.ones(len(f.B), np.float32)) for path, f in plain.layers.items()}
    dora = replace(plain, layers=layers)
    assert blend({"d": dora}, {"d": 1.0}) is dora
    with pytest.raises(AdapterError, match="no other weight than 1"):
        blend({"d": dora}, {"d": 0.5})
    with pytest.raises(AdapterError, match="lengths do not add up"):
        blend({"d": dora, "p": plain}, {"d": 1.0, "p": 1.0})


def test_what_many_threads_ask_for_is_read_once(registry, reads):
    found = []
    threads = [threading.Thread(target=lambda: found.append(registry.get("green"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == ["green"]
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
