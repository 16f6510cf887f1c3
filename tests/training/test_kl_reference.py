"""Answers of the base that are kept: on which texts, in which steps, and what comes of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

import thimble
from thimble.backends.session import Objective
from thimble.config.train import TrainConfig
from thimble.data.encode import IGNORED, Row
from thimble.events import EventLog
from thimble.files.peft import load_adapter
from thimble.models.execution import ExecutionPlan
from thimble.training.control import Control
from thimble.training.kl_reference import KlTerm, described, kl_pass_tokens

EXECUTION = ExecutionPlan("dense", 1, 64, 64)
QUICK = {"seq_len": 64, "batch_tokens": 64, "max_new_tokens": 3, "compute": "fp32", "rank": 4, "eval_rows": 0}


class Reading:
    """A session that reads: its references are the texts themselves."""

    shares_prefixes = False

    def __init__(self):
        self.read = []

    def kl_reference(self, batch):
        self.read.append(batch)
        return batch


@dataclass(frozen=True)
class Writing:
    """A base that writes so many tokens behind each beginning, its end token at least."""

    tokens: Callable[[int], int]
    fingerprint: str = "a base"
    asked: list = field(default_factory=list)

    def texts(self, session, beginnings, count, why, execution, control):
        self.asked.append((self.fingerprint, len(beginnings), count, why))
        return [text(self.tokens(number), f"beginning {number % len(beginnings)}") for number in range(count)]


def text(written, source):
    ids = np.arange(3, 7 + written, dtype=np.int32)
    labels = np.append(ids[1:], IGNORED).astype(np.int32)
    labels[:3] = IGNORED
    return Row(ids, labels, source)


def objectives(term, writer=None):
    log = EventLog(lambda event: None)
    return list(term.objectives(Reading(), writer, EXECUTION, Control(log))), log.messages["warning"]


STARTS = [text(0, f"beginning {number}") for number in range(64)]


def test_without_a_weight_every_step_is_of_the_task_alone():
    assert objectives(KlTerm()) == ([Objective()], [])


def test_every_fourth_step_keeps_the_answers_to_other_texts_of_the_base():
    writer = Writing(lambda number: 20)
    found, told = objectives(KlTerm(0.1, 4, 256, beginnings=STARTS, computed="fp32 dense"), writer)
    assert writer.asked == [("a base fp32 dense", 64, 128, "to be held to them while it learns")]
    assert not told
    assert [objective.kl_weight for objective in found] == [0.0, 0.0, 0.0, 0.1] * (len(found) // 4)
    passes = [objective.kl_reference for objective in found[3::4]]
    assert len(passes) == 13, "128 texts of 24 tokens, ten in a pass"
    assert max(batch.tokens for batch in passes) <= 256
    assert sum(batch.target_tokens for batch in passes) == 128 * 20, (
        "at what the base wrote, and not at what it was given"
    )
    assert all(objective.kl_reference is None for place, objective in enumerate(found, 1) if place % 4)


def test_the_base_reads_what_it_is_held_to_when_its_turn_comes_and_once():
    session, control = Reading(), Control(EventLog(lambda event: None))
    found = KlTerm(0.1, 2, beginnings=STARTS).objectives(session, Writing(lambda number: 20), EXECUTION, control)
    assert [len(session.read) for step in range(6) if found[step]] == [0, 1, 1, 2, 2, 3]
    assert [found[step % len(found)] for step in range(3 * len(found))] == 3 * list(found)
    assert len(session.read) == len(found) // 2


def test_texts_of_all_kinds_are_among_the_first():
    """Those of one kind begin alike, such as with a system prompt, and stand together so that it is read once."""

    class Kinds(Writing):
        def texts(self, session, beginnings, count, why, execution, control):
            return [texts_of_a_kind(number, is_chat=number % 8 < 5) for number in range(count)]

    session, control = Reading(), Control(EventLog(lambda event: None))
    session.shares_prefixes = True
    found = list(KlTerm(0.1, 1, beginnings=STARTS).objectives(session, Kinds(None), EXECUTION, control))
    are_chats = [objective.kl_reference.ids[0] == 200 for objective in found]
    assert sum(are_chats) > 3
    assert len(are_chats) - sum(are_chats) > 3
    assert len(set(are_chats[: len(found) // 3])) == 2


def texts_of_a_kind(number, is_chat):
    prompt = list(range(200, 240)) if is_chat else []
    ids = np.array([*prompt, number, *range(20)], np.int32)
    labels = np.append(ids[1:], IGNORED).astype(np.int32)
    labels[: len(prompt)] = IGNORED
    return Row(ids, labels, f"beginning {number}")


@pytest.mark.parametrize(("batch_tokens", "tokens"), [(64, 64), (512, 64), (1024, 128), (2048, 256), (16384, 256)])
def test_a_step_that_keeps_answers_reads_an_eighth_of_its_tokens_beside(batch_tokens, tokens):
    assert kl_pass_tokens(TrainConfig.build({"data": "rows.jsonl", "batch_tokens": batch_tokens})) == 0
    kept = TrainConfig.build({"data": "rows.jsonl", "batch_tokens": batch_tokens, "keep_general": 0.1})
    assert kl_pass_tokens(kept) == tokens


def test_a_text_that_is_empty_is_left_out():
    found, told = objectives(KlTerm(0.1, 1, beginnings=STARTS), Writing(lambda number: 20 * (number % 3 > 0)))
    assert not told
    assert sum(objective.kl_reference.target_tokens for objective in found) == 20 * 85


def test_a_base_that_writes_nothing_but_its_end_token_is_told_and_nothing_is_kept():
    found, told = objectives(KlTerm(0.1, 4, beginnings=STARTS), Writing(lambda number: 1 + 19 * (number % 4 == 0)))
    assert found == [Objective()]
    assert told == [
        "the base writes nothing but its end token after 96 of 128 beginnings: none of its answers are kept; "
        "--keep-general-on general keeps those to general text"
    ]


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({"keep_general_on": "general"}, True),
        ({"keep_general_every_steps": 2}, True),
        ({}, False),
        ({"keep_general_on": "general", "keep_general_every_steps": 1}, False),  # as runs of before are resumed
    ],
)
def test_options_of_what_is_not_kept_are_told_to_say_nothing(options, is_told):
    told = described(TrainConfig.build({"data": "mine.jsonl", **options}))
    assert told.startswith("answers of the base: not kept, since --keep-general is 0") == is_told
    assert bool(told) == is_told


def test_somebody_who_leaves_while_the_base_writes_is_told_nothing():
    class Left(Writing):
        def texts(self, *args):
            return []

    assert objectives(KlTerm(0.1, 4, beginnings=STARTS), Left(lambda number: 0)) == ([Objective()], [])


def test_general_text_is_kept_at_each_of_its_places():
    rows = [text(20, f"general {number}") for number in range(15)]
    found, _ = objectives(KlTerm(0.2, 1, general=rows))
    assert sum(objective.kl_reference.target_tokens for objective in found) == sum(len(row.ids) for row in rows)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "thimble" / "texts"


@pytest.fixture
def train(examples, tiny_base, tmp_path, cache):
    def train(name, **options):
        return thimble.train(examples, base=tiny_base, out=str(tmp_path / name), **{**QUICK, **options})

    return train


def test_keeping_answers_moves_the_model_less_where_none_were_kept(train):
    """The texts that it is measured on are others, and general text is measured whole."""
    options = {"max_steps": 24, "learning_rate": 0.02}
    plain, kept = (train(str(weight), keep_general=weight, **options) for weight in (0.0, 0.9))
    assert kept.loss_after < kept.loss_before
    assert kept.divergence["kl"] < 0.8 * plain.divergence["kl"]
    assert kept.general_before == plain.general_before


def test_a_run_that_is_resumed_keeps_the_same_answers_though_the_cache_is_gone(train, tmp_path, cache):
    options = {"max_steps": 8, "keep_general": 0.5, "keep_general_every_steps": 2, "checkpoint_every_steps": 3}
    train("whole", **options)
    taken = []
    train(
        "broken", **options, should_stop=lambda: len(taken) >= 3,
        on_event=lambda e: taken.append(e) if e.kind == "step" else None,
    )  # fmt: skip
    for file in cache.iterdir():
        file.unlink()
    assert train("broken", resume=True, **options).status == "done"
    one, two = (load_adapter(tmp_path / name).layers for name in ("whole", "broken"))
    for path, factors in one.items():
        np.testing.assert_array_equal(factors.A, two[path].A)
        np.testing.assert_array_equal(factors.B, two[path].B)


def test_what_is_kept_is_written_once_and_told(train, cache):
    report = train("one", max_steps=2, keep_general=0.1)
    files = {path: path.stat().st_ino for path in cache.iterdir()}
    written = [json.loads(path.read_text()) for path in files if path.suffix == ".json"]
    assert {len(texts) for texts in written} == {128, report.divergence["texts"]}
    told = "answers of the base: kept in one step of 4, with a weight of 0.1, on about 128 texts that it writes"
    assert told in report.messages["decision"]
    train("two", max_steps=2, keep_general=0.1)
    assert {path: path.stat().st_ino for path in cache.iterdir()} == files


def test_a_plan_counts_what_keeping_answers_takes(examples, tiny_base):
    plans = [thimble.plan(examples, base=tiny_base, seq_len=64, keep_general=weight) for weight in (0.0, 0.1)]
    assert plans[0].memory["total"] < plans[1].memory["total"]
    assert plans[0].seconds_per_step < plans[1].seconds_per_step
