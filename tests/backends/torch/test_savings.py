"""What is computed once or not at all, against the reference, which computes everything for every row."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samples import make_adapter
from thimble.backends.reference import ReferenceSession
from thimble.backends.session import Objective, StepKey, Work
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.session import TorchSession
from thimble.core.method import Method
from thimble.core.metrics import LossSum
from thimble.data.batches import micro_batches, pack, shares
from thimble.data.encode import IGNORED, Row
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

GGUF = Path(__file__).parents[2] / "fixtures" / "gguf"
FAMILIES = ("smollm2", "qwen2", "smollm3", "gemma2", "gemma3", "llama_bias", "phi3_longrope")
EXECUTION, KEY, LEARN = ExecutionPlan("dense"), StepKey(seed=5, step=3), Objective()


def make_rows(prefixes=(60, 60, 60, 40, 40, 0), own=50, learned=8, seed=0):
    """Rows of one system text, with the same question behind it in some; of each row the last tokens are targets."""
    random = np.random.default_rng(seed)
    shared, rows = random.integers(3, 290, max(prefixes)), []
    for number, prefix in enumerate(prefixes):
        ids = np.concatenate([shared[:prefix], random.integers(3, 290, own)]).astype(np.int32)
        labels = np.append(ids[1:], IGNORED).astype(np.int32)
        labels[: len(ids) - 1 - learned] = IGNORED
        rows.append(Row(ids, labels, f"row {number}"))
    return rows


def seen_tokens(monkeypatch):
    """How many tokens each forward pass runs through the blocks and returns, from here on."""
    seen, hidden = [], Decoder.hidden

    def watched(self, ids, forward):
        result = hidden(self, ids, forward)
        seen.append((len(ids), len(result)))
        return result

    monkeypatch.setattr(Decoder, "hidden", watched)
    return seen


def check_gradients(base, work, method, monkeypatch):
    """Compare the gradient of a step with that of the reference, and with the engine's own without any saving."""
    adapter = make_adapter(base)
    session, reference = TorchSession(base, "fp32", "dense"), ReferenceSession(base)
    found, exact = (
        one.gradient(one.start(adapter, method), work, LEARN, EXECUTION, KEY) for one in (session, reference)
    )
    assert_same(found, exact, 3e-5)
    pack_all = Decoder.pack
    monkeypatch.setattr(TorchSession, "shares_prefixes", False)
    monkeypatch.setattr(Decoder, "pack", lambda self, segments, *more: pack_all(self, segments, *more[:2]))
    assert_same(found, session.gradient(session.start(adapter, method), work, LEARN, EXECUTION, KEY))


def assert_same(found, expected, precision=1e-5):
    assert found.loss.tokens == expected.loss.tokens
    assert found.loss.nats == pytest.approx(expected.loss.nats, rel=precision)
    assert np.linalg.norm(found.flat - expected.flat) < precision * np.linalg.norm(expected.flat)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_is_computed_once_and_gradients_stay(family, monkeypatch):
    base, rows = open_base(GGUF / f"{family}.gguf"), make_rows()
    seen = seen_tokens(monkeypatch)
    check_gradients(base, Work([[pack(rows)]], 48), Method(), monkeypatch)
    whole = sum(len(row.ids) for row in rows)
    saved = 2 * 60 + 40 if base.spec.shares_prefixes else 0
    assert [tokens for tokens, _ in seen] == [whole - saved, whole]


def test_with_dropout_nothing_is_shared_for_it_is_drawn_for_each_row(monkeypatch):
    base, rows = open_base(GGUF / "smollm2.gguf"), make_rows()
    seen = seen_tokens(monkeypatch)
    check_gradients(base, Work([[pack(rows)]], 48), Method(dropout=0.3), monkeypatch)
    assert seen[0][0] == sum(len(row.ids) for row in rows)


@pytest.mark.parametrize("method", [Method(), Method(dropout=0.3)], ids=["plain", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_block_ends_where_there_are_labels_and_gradients_stay(family, method, monkeypatch):
    base, rows = open_base(GGUF / f"{family}.gguf"), make_rows(prefixes=[0] * 12, own=70, learned=5)
    seen = seen_tokens(monkeypatch)
    check_gradients(base, Work([[pack(rows)]], 60), method, monkeypatch)
    assert seen == [(840, 256), (840, 896)]


@pytest.mark.parametrize("checkpointed", [1, 99])
def test_the_savings_bear_checkpointing(checkpointed):
    base, rows = open_base(GGUF / "smollm2.gguf"), make_rows(prefixes=[60] * 12)
    session = TorchSession(base, "fp32", "dense")
    state, work = session.start(make_adapter(base), Method()), Work([[pack(rows)]], 96)
    plain = session.gradient(state, work, LEARN, EXECUTION, KEY)
    again = session.gradient(state, work, LEARN, replace(EXECUTION, checkpointed_blocks=checkpointed), KEY)
    assert_same(again, plain)


def test_a_loss_is_that_of_every_row_alone(monkeypatch):
    base, rows = open_base(GGUF / "smollm2.gguf"), make_rows()
    session = TorchSession(base, "fp32", "dense")
    adapter = session.load(make_adapter(base))
    alone = sum(session.losses(adapter, [pack([row]) for row in rows], EXECUTION), LossSum())
    seen = seen_tokens(monkeypatch)
    (together,) = session.losses(adapter, micro_batches(rows, 1024, shares_prefixes=True), EXECUTION)
    assert (together.tokens, together.nats) == (alone.tokens, pytest.approx(alone.nats, rel=1e-6))
    assert seen[0][0] == sum(len(row.ids) for row in rows) - 2 * 60 - 40


def test_shares_of_a_step_make_the_same_gradient_however_they_are_cut():
    base, rows = open_base(GGUF / "smollm2.gguf"), make_rows(prefixes=[60, 40] * 4)
    session = TorchSession(base, "fp32", "dense")
    state, found = session.start(make_adapter(base), Method()), []
    for count, most in ((1, 2048), (2, 250), (3, 120)):
        work = Work(shares(rows, count, most, shares_prefixes=True), 64)
        found.append(session.gradient(state, work, LEARN, EXECUTION, KEY))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


# ---- features below the lowest adapted block ------------------------------------------------------------------------


def of_a_middle_block(base):
    """An adapter on one block, and its number."""
    number = base.spec.num_layers // 2
    return make_adapter(base, only=f"layers.{number}."), number


def add_features(session, state, rows, file):
    features = session.new_features(state, file, sum(len(row.ids) for row in rows))
    list(session.add_features(features, micro_batches(rows, 256, None, session.shares_prefixes), EXECUTION))
    return features


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_whose_features_are_known_begin_at_the_lowest_adapter(family, compute, monkeypatch, tmp_path):
    base, rows = open_base(GGUF / f"{family}.gguf"), make_rows()
    adapter, lowest = of_a_middle_block(base)
    session = TorchSession(base, compute, "dense")
    state, work = session.start(adapter, Method()), Work([[pack(rows)]], 48)
    expected = session.gradient(state, work, LEARN, EXECUTION, KEY)
    with (tmp_path / "features").open("w+b") as file:
        features, ran, block = add_features(session, state, rows, file), set(), Decoder.block
        monkeypatch.setattr(Decoder, "block", lambda self, one, *more: ran.add(one.number) or block(self, one, *more))
        found = session.gradient(state, work._replace(features=features), LEARN, EXECUTION, KEY)
    assert ran == set(range(lowest, base.spec.num_layers))
    assert_same(found, expected, 1e-5 if compute == "fp32" else 2e-2)


@pytest.mark.parametrize("damage", ["zeros", "short", "other rows"])
def test_features_that_are_damaged_or_of_other_rows_are_computed_again(damage, tmp_path):
    base, rows = open_base(GGUF / "smollm2.gguf"), make_rows()
    session = TorchSession(base, "fp32", "dense")
    state, work = session.start(of_a_middle_block(base)[0], Method()), Work([[pack(rows)]], 48)
    expected = session.gradient(state, work, LEARN, EXECUTION, KEY)
    with (tmp_path / "features").open("w+b", buffering=0) as file:
        features = add_features(session, state, make_rows(seed=1) if damage == "other rows" else rows, file)
        size = file.seek(0, 2)
        if damage == "zeros":
            file.seek(size // 2)
            file.write(bytes(100))
        if damage == "short":
            file.truncate(size // 2)
        found = session.gradient(state, work._replace(features=features), LEARN, EXECUTION, KEY)
    assert found.flat.tobytes() == expected.flat.tobytes()


def test_features_that_the_disk_has_no_room_for_are_refused(monkeypatch, tmp_path):
    base = open_base(GGUF / "smollm2.gguf")
    session = TorchSession(base, "fp32", "dense")
    state = session.start(of_a_middle_block(base)[0], Method())
    with (tmp_path / "features").open("w+b") as file, pytest.raises(OSError, match="GB are free on the disk"):
        session.new_features(state, file, 1 << 50)
