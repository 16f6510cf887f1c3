"""What a base makes of texts is kept, so that an adapter can be compared with it without running it again."""

from pathlib import Path

import numpy as np
import pytest

from samples import make_adapter
from thimble.backends.known_answers import KnownAnswers
from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.session import TorchSession
from thimble.data.batches import micro_batches, pack
from thimble.data.encode import IGNORED, Row
from thimble.models.base import open_base
from thimble.models.execution import ExecutionPlan

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf"
EXECUTION = ExecutionPlan("dense")


def make_rows(count=6):
    random = np.random.default_rng(0)
    shared, rows = random.integers(3, 290, 30), []
    for number in range(count):
        ids = np.concatenate([shared[: 30 * (number < 4)], random.integers(3, 290, 12 + number)]).astype(np.int32)
        labels = np.append(ids[1:], 7).astype(np.int32)
        labels[: len(ids) - 5 - number] = IGNORED
        rows.append(Row(ids, labels, f"row {number}"))
    return rows


def measured(session, adapter, rows, known=None, most=1024):
    batches = micro_batches(rows, most, shares_prefixes=session.shares_prefixes)
    found = zip(batches, session.divergences(adapter, batches, EXECUTION, known), strict=True)
    by_row = {int(n): each for batch, part in found for n, each in zip(batch.numbers, part, strict=True)}
    return [by_row[number] for number in range(len(rows))]


def tokens_run(monkeypatch):
    """How many tokens run through the blocks, pass by pass."""
    seen, hidden = [], Decoder.hidden
    monkeypatch.setattr(
        Decoder, "hidden", lambda self, ids, forward: seen.append(len(ids)) or hidden(self, ids, forward)
    )
    return seen


def check_alike(found, expected, precision):
    assert [(each.same, each.places) for each in found] == [(each.same, each.places) for each in expected]
    assert [each.nats for each in found] == pytest.approx([each.nats for each in expected], rel=precision, abs=1e-5)


@pytest.mark.parametrize(("compute", "precision"), [("fp32", 1e-4), ("bf16", 1e-3)])
def test_the_divergence_is_the_same_and_the_base_runs_once(compute, precision, monkeypatch):
    base, rows = open_base(GGUF / "smollm2.gguf"), make_rows()
    session = TorchSession(base, compute, "dense")
    active = session.load(make_adapter(base))
    expected, known = measured(session, active, rows), KnownAnswers()
    assert sum(each.nats for each in expected) > 0.01
    seen = tokens_run(monkeypatch)
    check_alike(measured(session, active, rows, known), expected, precision)
    first = len(seen)
    check_alike(measured(session, active, rows[::-1], known)[::-1], expected, precision)
    assert (first, len(seen) - first) == (2, 1), "the second time the adapter runs alone"
    other = make_rows(7)
    check_alike(measured(session, active, other, known, most=64), measured(session, active, other, most=64), precision)


def test_a_model_that_is_the_base_is_no_distance_from_it():
    base, rows = open_base(GGUF / "smollm2.gguf"), make_rows()
    session, known = TorchSession(base, "fp32", "dense"), KnownAnswers()
    for _ in range(2):
        found = measured(session, session.load(None), rows, known)
        assert all(0 <= each.nats < 1e-5 * each.places and each.same == each.places for each in found)


def test_of_soft_capped_logits_nothing_is_kept():
    base, rows = open_base(GGUF / "gemma2.gguf"), make_rows()
    session, known = TorchSession(base, "fp32", "dense"), KnownAnswers()
    active = session.load(make_adapter(base))
    assert measured(session, active, rows, known) == measured(session, active, rows)
    assert not known.is_changed


def test_a_row_without_labels_is_kept_too():
    base = open_base(GGUF / "smollm2.gguf")
    session, known = TorchSession(base, "fp32", "dense"), KnownAnswers()
    (row, *_) = make_rows()
    rows = [Row(row.ids, np.full_like(row.labels, IGNORED), ""), row]
    active = session.load(make_adapter(base))
    for _ in range(2):
        nothing, found = measured(session, active, rows, known)
        assert (nothing.nats, nothing.places) == (0.0, 0)
        assert found.places == row.target_tokens


# ---- on disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    base = open_base(GGUF / "smollm2.gguf")
    session, known, rows = TorchSession(base, "fp32", "dense"), KnownAnswers(), make_rows()
    measured(session, session.load(make_adapter(base)), rows, known)
    known.write(tmp_path / "folder" / "answers.npz")
    return tmp_path / "folder" / "answers.npz", known, rows


def test_what_is_read_is_what_was_written(kept):
    path, known, rows = kept
    again = KnownAnswers.read(path)
    assert not again.is_changed
    for row in rows:
        for one, other in zip(again.get(row.ids, row.labels), known.get(row.ids, row.labels), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    assert again.agrees_with(known)


def test_answers_are_those_of_the_row_and_its_labels(kept):
    path, _, (row, *_) = kept
    known = KnownAnswers.read(path)
    assert known.get(row.ids, np.where(row.labels == row.labels[-1], IGNORED, row.labels)) is None
    assert known.get(row.ids[1:], row.labels[1:]) is None


def test_a_damaged_file_holds_nothing(kept):
    path, _, (row, *_) = kept
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [b"", whole[:100], whole[:-30], b"[]", bytes(len(whole))]
    for place in random.integers(0, len(whole), 40):
        damaged.append(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    expected = KnownAnswers.read(path).get(row.ids, row.labels)
    for content in damaged:
        path.write_bytes(content)
        found = KnownAnswers.read(path).get(row.ids, row.labels)
        assert found is None or all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    path.unlink()
    assert KnownAnswers.read(path).get(row.ids, row.labels) is None


def test_answers_of_another_base_do_not_agree(kept):
    _, known, rows = kept
    base = open_base(GGUF / "smollm2.gguf")
    session, other = TorchSession(base, "fp32", "dense"), KnownAnswers()
    moved = session.load(make_adapter(base))
    measured(session, moved, rows[:1], other)
    assert known.agrees_with(other)
    mean, offset, likeliest = other.get(rows[0].ids, rows[0].labels)
    wrong = KnownAnswers()
    wrong.put(rows[0].ids, rows[0].labels, (mean, offset + 0.1, likeliest))
    assert not known.agrees_with(wrong)
    assert pack(rows[:1]).target_tokens == len(offset)
