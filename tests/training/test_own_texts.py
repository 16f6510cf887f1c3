"""Texts that the base wrote: written once, kept by what they depend on, and what is measured on them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import thimble
from run_reports import full_report
from thimble.core.metrics import Divergence
from thimble.data.encode import IGNORED, Row
from thimble.events import EventLog
from thimble.models.execution import ExecutionPlan
from thimble.report.forgetting import moved
from thimble.training import own_texts
from thimble.training.control import Control

QUICK = {"seq_len": 64, "batch_tokens": 128, "max_steps": 3, "max_new_tokens": 3, "compute": "fp32", "rank": 4}
EXECUTION = ExecutionPlan("dense", 1, 64, 64)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "thimble" / "texts"


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"say {n}", "completion": f"{n} {n}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def train(base, data, out, **options):
    return thimble.train(data, base=base, out=str(out), valid_split=0.3, eval_rows=2, **QUICK | options)


def test_a_run_tells_how_far_it_moved_on_texts_that_are_written_once(tiny_base, data, tmp_path, cache):
    first = train(tiny_base, data, tmp_path / "one", learning_rate=0.02)
    (file,), (answers,) = cache.glob("*.json"), cache.glob("*.npz")
    texts = json.loads(file.read_text())
    assert len(texts) == first.divergence["texts"] >= 100
    assert 0 < sum(map(len, texts)) == first.divergence["places"]
    assert len({tuple(ids) for ids in texts}) > 0.8 * len(texts), "each is drawn from a stream of its own"
    assert first.divergence["kl_low"] < first.divergence["kl"] < first.divergence["kl_high"]
    assert first.divergence["same_low"] < first.divergence["same"] < 1
    inodes = {path: path.stat().st_ino for path in (file, answers)}
    again = train(tiny_base, data, tmp_path / "two", learning_rate=0.02)
    assert again.divergence == first.divergence
    assert {path: path.stat().st_ino for path in cache.iterdir()} == inodes
    far = train(tiny_base, data, tmp_path / "three", learning_rate=0.1)
    assert far.divergence["kl"] > first.divergence["kl"]


@pytest.mark.parametrize("damage", ["[]", "no json", "[[1]]", '[["a"]]', "null"])
def test_texts_that_are_damaged_are_written_again(tiny_base, data, tmp_path, cache, damage):
    first = train(tiny_base, data, tmp_path / "one")
    (file,) = cache.glob("*.json")
    whole = file.read_text()
    file.write_text(damage if damage != "[[1]]" else json.dumps([[10**9], *json.loads(whole)[1:]]))
    assert train(tiny_base, data, tmp_path / "two").divergence == first.divergence
    assert file.read_text() == whole


def test_without_a_place_to_keep_them_they_are_written_each_time(tiny_base, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert train(tiny_base, data, tmp_path / "one").divergence["texts"] >= 100


def test_a_text_ends_with_the_last_token_that_anything_is_asked_of(tiny_base, data, tmp_path, cache, monkeypatch):
    read = []

    def measure(session, adapter, texts, execution, control, path):
        read.extend(texts)
        return {}

    monkeypatch.setattr("thimble.training.tasks.text.measure_divergence", measure)
    train(tiny_base, data, tmp_path / "run")
    assert len(read) >= 100
    assert all(row.labels[-1] != IGNORED for row in read)
    assert all((row.labels[:-1] == row.ids[1:])[row.labels[:-1] != IGNORED].all() for row in read)
    written = json.loads(next(cache.iterdir()).read_text())
    assert [row.labels[row.labels != IGNORED].tolist() for row in read] == written


# ---- what is measured -----------------------------------------------------------------------------------------------


class Moved:
    """A session that has moved each row by so much."""

    shares_prefixes = False

    def __init__(self, nats):
        self.nats = nats

    def divergences(self, adapter, batches, execution, known=None):
        for batch in batches:
            yield [Divergence(self.nats(int(n)) * 5, 4, 5) for n in batch.numbers]


class Condensing(Moved):
    """One that keeps what its base, which is told by a number, says of each row."""

    def __init__(self, base, width=3):
        super().__init__(lambda n: 0.1)
        self.base, self.width, self.computed = base, width, 0

    def load(self, adapter):
        return adapter

    def divergences(self, adapter, batches, execution, known=None):
        for batch in batches:
            for start, end in zip(batch.starts, batch.starts[1:], strict=False):
                row, places = (batch.ids[start:end], batch.labels[start:end]), int(end - start) - 1
                if known.get(*row) is None:
                    self.computed += 1
                    mean = np.zeros((places, self.width), np.float32)
                    known.put(*row, (mean, np.full(places, self.base), np.zeros(places, np.int32)))
        return super().divergences(adapter, batches, execution)


def test_what_the_base_says_is_computed_once_and_again_if_it_says_otherwise(tmp_path):
    rows = [Row(row.ids + number, row.labels, row.source) for number, row in enumerate(texts())]

    def computed(session):
        log = EventLog(lambda event: None)
        path = tmp_path / "folder" / "answers.npz"
        assert own_texts.measure_divergence(session, None, rows, EXECUTION, Control(log), path)
        return session.computed

    assert computed(Condensing(1.0)) == 40
    assert computed(Condensing(1.0)) == 1, "one, to see that it is still the same"
    assert computed(Condensing(1.1)) == 41
    assert computed(Condensing(1.1)) == 1
    assert computed(Condensing(1.1, width=4)) == 41
    (tmp_path / "folder" / "answers.npz").write_bytes(b"no file of arrays")
    assert computed(Condensing(1.1, width=4)) == 40
    assert computed(Condensing(1.1, width=4)) == 1


def texts(count=40, tokens=6, starts=20):
    ids = np.arange(tokens, dtype=np.int32)
    labels = np.append(ids[1:], IGNORED).astype(np.int32)
    return [Row(ids, labels, f"beginning {n % starts}") for n in range(count)]


def measured(session, rows):
    log = EventLog(lambda event: None)
    found = own_texts.measure_divergence(session, None, rows, EXECUTION, Control(log), Path("no such file"))
    return found, log.messages["warning"]


def test_texts_of_one_beginning_count_as_one():
    random = np.random.default_rng(0)
    of = random.exponential(0.1, 20)
    found, told = measured(Moved(lambda n: of[n % 20]), texts(400))
    assert not told
    assert found["kl"] == pytest.approx(of.mean())
    assert found["same"] == pytest.approx(0.8)
    half = (found["kl_high"] - found["kl_low"]) / 2
    assert half == pytest.approx(2.09 * of.std(ddof=1) / 20**0.5, rel=0.25), "not as of 400 independent ones"


@pytest.mark.parametrize(
    "rows",
    [
        [replace(row, labels=np.where(row.labels == 1, 1, IGNORED).astype(np.int32)) for row in texts()],
        texts(starts=3),
        [],
    ],
    ids=["end tokens", "few beginnings", "none"],
)
def test_a_base_that_writes_too_little_tells_nothing(rows):
    found, told = measured(Moved(lambda n: 0.1), rows)
    assert found == {}
    has_ends = bool(rows) and rows[0].target_tokens == 1
    why = (
        "the base writes nothing but its end token after 40 of 40 beginnings"
        if has_ends
        else "the base wrote texts from"
    )
    assert told[0].startswith(why)
    assert told[0].endswith("what it forgets is measured on general text alone")


def test_what_is_not_finite_is_no_measurement():
    found, told = measured(Moved(lambda n: np.nan if n == 7 else 0.1), texts())
    assert found == {}
    assert "NaN or Inf" in told[0]


def test_what_was_measured_is_told_with_its_intervals():
    found, _ = measured(Moved(lambda n: 0.02 + 0.001 * (n % 20)), texts())
    shown, sentence = moved(full_report(divergence=found))
    assert shown.startswith("80")
    assert sentence.startswith("Of 200 places in 40 texts that the base wrote")
    assert "0.0295 nats a token (95 % interval: 0.0" in sentence
    assert moved(full_report()) == ("", "")
