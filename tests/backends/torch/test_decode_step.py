"""The compiled step against the forward pass of whole rows, and against itself: bit for bit, whatever stands beside."""

from pathlib import Path

import numpy as np
import pytest
import torch

from families import FAMILIES, GGUF_FILES, make_hf_folder
from thimble.backends.session import ForwardRow, Objective, Pass, StepKey, Work
from thimble.backends.torch import decode_step, gang
from thimble.backends.torch.decode_step import DecodeStep
from thimble.backends.torch.session import TorchSession
from thimble.core.adapter import Adapter
from thimble.core.lowrank import Factors
from thimble.core.method import Method
from thimble.data.batches import pack
from thimble.data.encode import Row
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"
IDS = np.random.default_rng(1).integers(3, 290, 40).astype(np.int32)  # longer than every window
READ = 11  # tokens of IDS that are read as a prompt


def open_session(file="llama_wide_mixed", compute="fp32", store="file", decode="float"):
    return TorchSession(open_base(GGUF / f"{file}.gguf"), compute, store, decode=decode)


def row_of(session, tokens, position, active, request=0):
    size = session.new_cache().block_tokens
    blocks = -(-len(IDS) // size)
    return ForwardRow(tokens, tuple(range(request * blocks, (request + 1) * blocks)), position, len(IDS), active, True)


def begun(session, active, requests=1):
    """A cache in which some requests have read the beginning of IDS."""
    cache = session.new_cache()
    cache.reserve(requests * -(-len(IDS) // cache.block_tokens))
    rows = [row_of(session, READ, 0, active, request)._replace(is_written=False) for request in range(requests)]
    session.forward([Pass(IDS[:READ], [row], []) for row in rows], cache, 1)
    return cache


def step_of(session):
    assert DecodeStep.can_run(session.decoder)
    return session._step


def continued(session, active=None, at_once=40):
    """Logits after each token of IDS behind the prompt, so many read at once."""
    active = active or session.load(None)
    cache, found = begun(session, active), []
    for start in range(READ, len(IDS), at_once):
        part = IDS[start : start + at_once]
        row = row_of(session, len(part), start, active)
        found.append(step_of(session).run(Pass(part, [row], range(len(part))), cache))
    return np.concatenate(found)


def adapter_of(session, rank=3, has_magnitude=False, seed=0):
    rng = np.random.default_rng(seed)
    layers = {}
    for number, layer in enumerate(session.layers):
        if number % 5 == seed % 5:
            continue
        rows, columns = layer.shape
        a, b = (rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
        magnitude = rng.uniform(0.5, 2, rows).astype(np.float32) if has_magnitude else None
        layers[layer.path] = Factors(a, b, 1.5, magnitude)
    return Adapter(layers)


def assert_near(found, expected, tolerance):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_continues_as_if_it_had_read_everything(name, tmp_path):
    session = TorchSession(open_base(make_hf_folder(name, tmp_path)), "fp32", "dense")
    assert_near(continued(session), session.logits(IDS)[READ:], 2e-5)


@pytest.mark.parametrize("file", GGUF_FILES)
def test_every_file_continues_as_if_it_had_read_everything(file):
    session = open_session(file)
    assert_near(continued(session), session.logits(IDS)[READ:], 2e-5)


@pytest.mark.parametrize("store", ["file", "dense"])
def test_bfloat16_bases_stay_near_the_file(store):
    session = open_session(compute="bf16", store=store)
    assert_near(continued(session), open_session().logits(IDS)[READ:], 0.05)


@pytest.mark.parametrize("has_magnitude", [False, True])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_adapters_change_what_they_change_in_a_whole_pass(has_magnitude, compute):
    session = open_session(compute=compute)
    active = session.load(adapter_of(session, has_magnitude=has_magnitude))
    expected = session.logits(IDS, active)[READ:]
    assert np.abs(expected - session.logits(IDS)[READ:]).max() > 0.1 * np.abs(expected).max()
    assert_near(continued(session, active), expected, 5e-5 if compute == "fp32" else 0.05)


@pytest.mark.parametrize("decode", ["float", "int8"])
def test_a_token_does_not_depend_on_how_many_are_read_with_it(decode):
    session = open_session(decode=decode)
    active = session.load(adapter_of(session))
    one_by_one = continued(session, active, at_once=1)
    for at_once in (2, 4, 7, 29):
        assert np.array_equal(continued(session, active, at_once), one_by_one)


def read(session, sizes, active=None, labels=None):
    """Logits after each token of IDS, read as a prompt in pieces of some sizes, in order; and the loss of the last."""
    cache, found, at = session.new_cache(), [], 0
    cache.reserve(-(-len(IDS) // cache.block_tokens))
    for size in sizes:
        row = row_of(session, size, at, active or session.load(None))._replace(is_written=False)
        own = None if labels is None else labels[at : at + size]
        [(logits, loss)] = session.forward([Pass(IDS[at : at + size], [row], range(size), own)], cache, 2)
        found.append(logits)
        at += size
    return np.concatenate(found), loss


def test_a_prompt_in_whole_numbers_is_the_same_in_any_pieces():
    session = open_session("llama_q8_0", decode="int8")
    active = session.load(adapter_of(session))
    one_by_one, _ = read(session, [1] * len(IDS), active)
    for sizes in ([40], [33, 7], [2, 31, 7], [8] * 5):
        assert np.array_equal(read(session, sizes, active)[0], one_by_one)


def test_a_long_prompt_in_whole_numbers_goes_through_the_blocks_in_parts(monkeypatch):
    session = open_session("llama_q8_0", decode="int8")
    at_once, _ = read(session, [len(IDS)])
    monkeypatch.setattr(decode_step, "MOST_TOKENS", 16)
    assert np.array_equal(read(session, [len(IDS)])[0], at_once)


def test_prompts_beside_answers_in_whole_numbers_do_not_change_them():
    session = open_session("llama_q8_0", decode="int8")
    active = session.load(None)
    cache, row = begun(session, active, requests=2), row_of(session, 1, READ, active)
    beside = row_of(session, 20, READ, active, request=1)._replace(is_written=False)
    ids = np.concatenate([IDS[READ : READ + 1], IDS[READ : READ + 20]])
    [(both, _)] = session.forward([Pass(ids, [row, beside], [0, 20])], cache, 1)
    alone, _ = read(session, [READ + 20])
    assert np.array_equal(both, alone[[READ, READ + 19]])


def test_logits_are_those_of_the_tokens_that_are_asked_for(monkeypatch):
    monkeypatch.setattr(decode_step, "MOST_TOKENS", 16)
    session = open_session("llama_q8_0", decode="int8")
    every, _ = read(session, [len(IDS)])
    cache, row = session.new_cache(), row_of(session, len(IDS), 0, session.load(None))
    cache.reserve(len(row.blocks))
    for ends in ([0], [5, 17, 39], []):
        [(logits, _)] = session.forward([Pass(IDS, [row], ends)], cache, 1)
        assert np.array_equal(logits, every[ends])


@pytest.mark.parametrize(("file", "labels"), [("llama_q8_0", IDS), ("llama_wide_mixed", None)])
def test_losses_are_measured_in_float_and_so_are_prompts_where_weights_are_not_in_blocks(file, labels):
    (exact, loss), (found, same) = (read(open_session(file, decode=x), [40], None, labels) for x in ("float", "int8"))
    assert np.array_equal(found, exact)
    assert same == loss


@pytest.mark.parametrize("decode", ["float", "int8"])
def test_requests_with_different_adapters_do_not_see_one_another(decode):
    session = open_session(decode=decode)
    actives = [session.load(adapter_of(session, rank, seed=rank)) for rank in (1, 4)] + [session.load(None)]
    cache = begun(session, actives[0], requests=5)
    rows = [row_of(session, 1 + request % 2, READ, actives[request % 3], request) for request in range(5)]
    ids = np.concatenate([IDS[request : request + row.tokens] for request, row in enumerate(rows)])
    together, at = step_of(session).run(Pass(ids, rows, range(len(ids))), cache), 0
    for row in rows:
        alone = step_of(session).run(Pass(ids[at : at + row.tokens], [row], range(row.tokens)), cache)
        assert np.array_equal(together[at : at + row.tokens], alone)
        at += row.tokens


@pytest.mark.parametrize("decode", ["float", "int8"])
def test_the_number_of_threads_changes_nothing(decode, monkeypatch):
    session = open_session(decode=decode)
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(gang, "usable_threads", lambda threads=threads: threads)
        found.append(continued(session, at_once=3))
    assert np.array_equal(*found)


def test_the_forms_of_whole_numbers_give_the_same_logits(monkeypatch):
    best = continued(open_session(decode="int8"))
    form_of = decode_step.form_of
    monkeypatch.setattr(
        decode_step, "form_of", lambda dtype, is_int8: "plain" if form_of(dtype, is_int8) != "float" else "float"
    )
    assert np.array_equal(continued(open_session(decode="int8")), best)


def test_quantised_activations_stay_near_float_and_differ():
    exact, found = continued(open_session()), continued(open_session(decode="int8"))
    assert 0 < np.abs(found - exact).max() <= 0.05 * np.abs(exact).max()


def test_weights_that_are_not_in_blocks_know_no_quantised_activations():
    for store in ("dense", "file"):
        exact, found = (continued(open_session("llama", store=store, decode=decode)) for decode in ("float", "int8"))
        assert np.array_equal(found, exact)


def test_a_step_follows_an_adapter_in_training():
    session = open_session()
    method = Method()
    state = session.start(adapter_of(session, has_magnitude=True), method)
    batch = pack([Row(IDS, IDS, "")])
    for _ in range(2):
        assert_near(continued(session, state.active), session.logits(IDS, state.active)[READ:], 5e-5)
        gradient = session.gradient(state, Work([[batch]], len(IDS)), Objective(), ExecutionPlan("file"), StepKey(0, 0))
        state = session.apply(state, gradient, 0.1)
    assert_near(continued(session, state.active), session.logits(IDS, state.active)[READ:], 5e-5)


def test_stores_that_the_step_cannot_read_are_left_alone():
    assert not DecodeStep.can_run(open_session(store="int8").decoder)
    session = open_session()
    session.decoder.stream()
    assert not DecodeStep.can_run(session.decoder)


def test_nan_is_not_hidden():
    session = open_session(decode="int8")
    active = session.load(adapter_of(session))
    next(iter(active.layers.values())).B.fill_(torch.nan)
    assert np.isnan(continued(session, active)[:, 0]).all()
