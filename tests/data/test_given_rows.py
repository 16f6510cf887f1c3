"""Rows from Python instead of a file: read as the same rows of a file are, and kept where the run is."""

import itertools
import json
import math
from collections import UserDict
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest

import thimble
from thimble.data import spool
from thimble.data.given_rows import written_rows
from thimble.data.records import read_dataset
from thimble.errors import DataError, DoesNotFitError, InputError

ROWS = [{"prompt": f"say {n} ", "completion": f"{n} it is"} for n in range(12)]


class Pandas:
    """A table as pandas has it: iterated over it gives names of columns, and missing cells are NaN."""

    def __init__(self, rows):
        self.rows, self.columns = rows, sorted({name for row in rows for name in row})

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient):
        assert orient == "records"
        return [{name: row.get(name, math.nan) for name in self.columns} for row in self.rows]


class Polars:
    """A table as polars has it."""

    columns = ("prompt", "completion")

    def to_dicts(self):
        return ROWS


FORMS = {
    "a list": ROWS, "a tuple": tuple(ROWS), "an iterator": None, "other mappings": [UserDict(row) for row in ROWS],
    "pandas": Pandas(ROWS), "polars": Polars(), "pyarrow": pyarrow.Table.from_pylist(ROWS), "splits": {"train": ROWS},
}  # fmt: skip


def records(data):
    with written_rows(data) as folder:
        return [vars(record) for record in read_dataset(folder).train]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_is_read_as_the_file_is(form, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = iter(ROWS) if form == "an iterator" else FORMS[form]
    assert records(data) == [vars(record) for record in read_dataset(tmp_path / "train.jsonl").train]


def test_the_folder_is_there_for_the_work_alone():
    with written_rows(ROWS) as folder:
        assert folder.is_dir()
    assert not folder.parent.exists()


def test_a_list_of_messages_is_a_row():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert [record["messages"] for record in records([chat] * 12)] == [tuple(chat)] * 12


def test_data_that_are_asked_for_by_number_are_rows():
    class Numbered:
        """A data set as torch has it."""

        def __len__(self):
            return len(ROWS)

        def __getitem__(self, number):
            return ROWS[number] if number < len(ROWS) else {}  # which would not end an iteration

    assert len(records(Numbered())) == len(ROWS)


def test_splits_have_the_names_that_files_have():
    with written_rows({"train": ROWS, "validation": ROWS[:2], "test": ROWS[2:3]}) as folder:
        found = read_dataset(folder)
    assert (len(found.train), len(found.valid or ()), len(found.test or ())) == (12, 2, 1)


def test_numbers_dates_and_missing_cells_of_tables_become_json():
    row = {"messages": np.array([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}], object)}
    rows = [{**row, "n": np.int64(3), "w": np.float32(0.5), "when": date(2026, 1, 2), "nothing": math.nan, 5: {1}}]
    with written_rows(rows) as folder:
        line = json.loads((folder / "train.jsonl").read_text())
    assert line["messages"][1]["content"] == "x"
    assert (line["n"], line["w"], line["when"], line["5"]) == (3, 0.5, "2026-01-02", [1])
    assert "nothing" not in line


class Table:
    """What pandas offers of a table."""

    def __init__(self, columns):
        self.columns = columns

    def to_dict(self, orient):
        assert orient == "records"
        return [dict.fromkeys(self.columns, "x")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (5, "the data are of type int: expected a file, a folder, or rows such as"),
        ([], "train.jsonl is empty"),
        (["a.jsonl", "b.jsonl"], "row 1 is of type str"),
        ([ROWS[0], None], "row 2 is of type NoneType"),
        (ROWS[0], "the data are a mapping of prompt, completion, neither rows nor splits of them"),
        ({"prompt": ["a"], "completion": ["b"]}, "a mapping of prompt, completion"),
        ({}, "a mapping of nothing"),
        ({"test": ROWS}, "the data have the splits test and no train"),
        ([{"prompt": "a", "completion": [math.nan]}], "row 1 cannot be written as JSON"),
        ([{"prompt": "a", "answr": "b"}], "train.jsonl line 1"),
        (Table(["prompt", "completion", "prompt"]), "the table names prompt more than once"),
    ],
)
def test_what_are_no_rows_is_refused(data, said):
    with pytest.raises(DataError, match=said):
        records(data)


# ---- in runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"base": tiny_base, "rank": 4, "seq_len": 64, "eval_rows": 0, "compute": "fp32", "eval_every_steps": 0}


def adapter_of(report) -> bytes:
    return (Path(report.adapter) / "adapter_model.safetensors").read_bytes()


def test_a_run_of_rows_is_the_run_of_their_file_and_keeps_them(quick, tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    whole = thimble.train(ROWS, max_steps=2, **quick)
    assert whole.out == "runs/rows-1"
    assert adapter_of(whole) == adapter_of(thimble.train("mine.jsonl", max_steps=2, out="file", **quick))
    assert whole.config["data"] == "runs/rows-1/rows"
    manifest = json.loads(Path("runs/rows-1/manifest.json").read_text())
    assert list(manifest["data"]) == ["runs/rows-1/rows/train.jsonl"]
    assert thimble.plan(config="runs/rows-1/config.yaml", out="again").rows == 11, "its config repeats it"


def test_a_run_of_rows_is_resumed_with_the_same_rows_or_none_but_with_no_others(quick):
    def stopped(out):
        taken: list[int] = []
        note = lambda event: taken.append(1) if event.kind == "step" else None  # noqa: E731
        return thimble.train(iter(ROWS), out=out, on_event=note, should_stop=lambda: bool(taken), max_steps=2, **quick)

    assert stopped("one").status == stopped("two").status == "interrupted"
    with pytest.raises(InputError, match="the rows are not those that the run in one began with"):
        thimble.train(ROWS[:11], out="one", resume=True)
    with_rows, without = thimble.train(ROWS, out="one", resume=True), thimble.train(out="two", resume=True)
    assert (with_rows.steps, without.steps) == (2, 2)
    assert adapter_of(with_rows) == adapter_of(without)


def test_a_refused_run_of_rows_writes_nothing(quick, tmp_path):
    with pytest.raises(InputError, match="--rank 0"):
        thimble.train(ROWS, out="run", **{**quick, "rank": 0})
    assert list(tmp_path.iterdir()) == []


def test_every_command_that_takes_data_takes_rows(quick):
    options = {name: quick[name] for name in ("base", "seq_len", "eval_rows", "compute")}
    assert thimble.plan(ROWS, **quick).rows > 0
    report = thimble.evaluate(ROWS, **options)
    assert (report.data, report.rows) == ("rows", 12)
    assert thimble.inspect(data=ROWS, base=quick["base"]).inits


@pytest.mark.parametrize("use", [lambda rows: records(rows), lambda rows: spooled(rows)], ids=["written", "spooled"])
def test_rows_without_an_end_do_not_fill_the_disk(use, monkeypatch):
    taken = []
    monkeypatch.setattr(spool, "CHECKED_BYTES", 1000)
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda place: taken.append(place) or SimpleNamespace(free=5000))
    with pytest.raises(DoesNotFitError, match=r"has to end\), or name a place with more room with TMPDIR and XDG"):
        use(itertools.islice(itertools.cycle(ROWS), 10_000))
    assert 5 <= len(taken) <= 7, "looked at now and then, and stopped once half of what was free is taken"
    use(itertools.islice(itertools.cycle(ROWS), 20))


def spooled(rows):
    kept = spool.Spool(str.encode, bytes.decode)
    for row in rows:
        kept.append(json.dumps(row))
