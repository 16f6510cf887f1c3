"""Rows for text encoders: which columns are read, what is refused, and how rows are split."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from thimble.config.train import TrainConfig
from thimble.data.columns import NamedColumns
from thimble.data.sentence_split import split_sentences
from thimble.data.sentences import Sentence, SentenceReader, guess_task, read_sentences, task_of, two_labels
from thimble.errors import DataError
from thimble.training.tasks.reading import Classes
from thimble.training.tasks.sentences import measured_pairs


def parsed(task, row, **named):
    return SentenceReader(task, NamedColumns(**named)).parse(row, "a line").record


@pytest.mark.parametrize(
    ("row", "texts", "label"),
    [
        ({"text": "a b", "label": "x"}, ("a b",), "x"),
        ({"Sentence": "a b", "Label": 3}, ("a b",), "3"),
        ({"text": "a", "label": True, "id": 7}, ("a",), "true"),
        ({"premise": "a", "hypothesis": "b", "label": "entails"}, ("a", "b"), "entails"),
        ({"sentence2": "b", "sentence1": "a", "label": 1}, ("a", "b"), "1"),
        ({"question": "a", "sentence": "b", "label": 0, "idx": 1}, ("a", "b"), "0"),
        ({"utterance": "a", "intent": "buy"}, ("a",), "buy"),
        ({"prompt": "a", "completion": "x"}, ("a",), "x"),
        ({"text": "a", "category": "sport"}, ("a",), "sport"),
    ],
)
def test_columns_of_labelled_texts(row, texts, label):
    found = parsed("classify-text", row)
    assert (found.texts, found.label, found.score) == (texts, label, None)


@pytest.mark.parametrize(
    ("row", "texts", "score"),
    [
        ({"anchor": "a", "positive": "b"}, ("a", "b"), None),
        ({"anchor": "a", "positive": "b", "negative": "c"}, ("a", "b", "c"), None),
        ({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}, ("a", "b", "c", "d"), None),
        ({"query": "a", "pos": ["b"], "neg": ["c", "d"]}, ("a", "b", "c", "d"), None),
        ({"question": "a", "answer": "b"}, ("a", "b"), None),
        ({"sentence1": "a", "sentence2": "b", "score": "0.5"}, ("a", "b"), 0.5),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, ("a", "b"), 1.0),
        ({"prompt": "a", "completion": "b"}, ("a", "b"), None),
    ],
)
def test_columns_of_pairs(row, texts, score):
    found = parsed("embed", row)
    assert (found.texts, found.score, found.label) == (texts, score, None)


def test_columns_that_the_user_names():
    named = {"prompt": "Betreff", "completion": "Art"}
    assert parsed("classify-text", {"Betreff": "kaputt", "Art": 2}, **named).label == "2"
    template = {"template": "{Betreff}: {Text}", "completion": "Art"}
    assert parsed("embed", {"Betreff": "a", "Text": "b", "Art": "c"}, **template).texts == ("a: b", "c")


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("classify-text", {"text": "a", "label": None}, "label is missing: expected a label"),
        ("classify-text", {"text": "a", "label": -1}, "label is -1, which data sets write where there is no label"),
        ("classify-text", {"text": " ", "label": "x"}, "text is empty: expected text"),
        ("classify-text", {"text": "a", "label": ["x", "y"]}, "label is a list: expected one label a row"),
        ("classify-text", {"text": "a", "label": "['x', 'y']"}, "label is a list: expected one label a row"),
        ("classify-text", {"body": "a", "kind": "x"}, "add --prompt-column and --completion-column"),
        ("classify-text", ["a"], "the row is a list: expected an object"),
        ("embed", {"anchor": "a", "positive": ""}, "positive is empty: expected text"),
        ("embed", {"text": "a"}, "the columns are text: --task embed expects one of the forms anchor and positive"),
        ("embed", {"premise": "a", "hypothesis": "b", "label": "neutral"}, "add --task classify-text"),
        ("embed", {"anchor": "a", "positive": "b", "negative": "c", "score": 1}, "a score and a negative"),
        ("embed", {"anchor": "a", "positive": "b", "score": "nan"}, 'score is "nan": expected a number'),
    ],
)
def test_rows_that_are_refused(task, row, problem):
    with pytest.raises(DataError) as raised:
        parsed(task, row)
    assert problem in str(raised.value)


def test_all_problems_of_a_row_are_told_at_once():
    with pytest.raises(DataError) as raised:
        parsed("classify-text", {"premise": "", "hypothesis": 3, "label": ""})
    assert len(raised.value.problems) == 3


def test_the_task_that_columns_are_made_for():
    assert task_of(["text", "label", "id"]) == "classify-text"
    assert task_of(["premise", "hypothesis", "label"]) == "classify-text"
    assert task_of(["anchor", "positive", "negative"]) == "embed"
    assert task_of(["sentence1", "sentence2", "score"]) == "embed"
    assert task_of(["messages"]) == "" == task_of(["text"])


def test_labels_with_fractions_of_two_texts_are_scores(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": label, "idx": 0} for label in (5.0, 3.8, 0.25)]
    assert guess_task(write(tmp_path / "stsb.jsonl", rows)) == "embed"
    (tmp_path / "stsb.csv").write_text("sentence1,sentence2,label\na,b,5.000\na,b,3.800\n")
    assert guess_task(tmp_path / "stsb.csv") == "embed"
    assert guess_task(write(tmp_path / "ints.jsonl", [{**row, "label": float(n)} for n, row in enumerate(rows)])) == (
        "classify-text"
    )
    one = [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]
    assert guess_task(write(tmp_path / "one.jsonl", one)) == "classify-text"


def test_classes_of_inference_are_no_scores(tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "label": n % 3} for n in range(9)]
    with pytest.raises(DataError, match="the labels are 0, 1 and 2, as data sets of inference number their classes"):
        read_sentences(write(tmp_path / "nli.jsonl", rows), "embed")
    scored = [{"premise": "a", "hypothesis": "b", "score": n % 3} for n in range(9)]
    assert read_sentences(write(tmp_path / "scored.jsonl", scored), "embed").train[2].score == 2
    graded = [{"sentence1": "a", "sentence2": "b", "label": n % 5} for n in range(9)]
    assert read_sentences(write(tmp_path / "graded.jsonl", graded), "embed").train[4].score == 4


def test_a_table_without_names_of_columns_is_told_of_them(tmp_path):
    (tmp_path / "a.csv").write_text("good film,pos\nbad film,neg\n" * 3)
    with pytest.raises(DataError, match="if that is a first row and no names, put a line of names above it"):
        read_sentences(tmp_path / "a.csv", "classify-text")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_read_with_what_cannot_be_used_told(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2, "mood": "good"} for n in range(20)] + [{"text": "a", "label": None}]
    data = read_sentences(write(tmp_path / "a.jsonl", rows), "classify-text")
    assert (len(data.train), data.valid, data.format) == (20, None, "text and label")
    assert data.train[3] == Sentence(("t3",), "1", None, "a.jsonl line 4")
    assert [row.source for row in data.skipped.found] == ["a.jsonl line 21"]
    assert any("mood (20 rows)" in warning for warning in data.warnings)


def test_names_of_labels_in_parquet_are_read(tmp_path):
    feature = {"info": {"features": {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"text": ["a", "b"], "label": [1, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    data = read_sentences(tmp_path / "train.parquet", "classify-text")
    assert [row.label for row in data.train] == ["good", "bad"]


def test_scores_are_in_every_row_or_in_none(tmp_path):
    rows = [{"anchor": "a", "positive": "b", "score": 1}, {"anchor": "a", "positive": "b"}]
    with pytest.raises(DataError, match="a.jsonl line 1 has a score and a.jsonl line 2 has none"):
        read_sentences(write(tmp_path / "a.jsonl", rows), "embed")


def test_rows_of_a_label_are_held_out_in_its_share_and_equal_texts_stay_together():
    rows = [Sentence((f"text {n // 2}",), "many" if n < 80 else "few", None, str(n)) for n in range(100)]
    train, held = split_sentences(rows, 0.2, seed=1)
    assert sorted([*train, *held]) == list(range(100))
    assert [sum(rows[number].label == label for number in held) for label in ("many", "few")] == [16, 4]
    assert not {rows[number].texts for number in train} & {rows[number].texts for number in held}
    assert split_sentences(rows, 0.2, seed=2)[1] != held == split_sentences(rows, 0.2, seed=1)[1]


def test_a_row_has_its_side_wherever_it_stands():
    rows = [Sentence((f"text {n}",), str(n % 2), None, str(n)) for n in range(40)]
    held = {rows[number].texts for number in split_sentences(rows, 0.25, 0)[1]}
    assert held == {rows[::-1][number].texts for number in split_sentences(rows[::-1], 0.25, 0)[1]}


def test_pairs_that_have_a_text_in_common_by_way_of_others_stay_on_one_side():
    pairs = [("a", "1"), ("b", "1"), ("B ", "2"), ("c", "3"), ("d", "4"), ("e", "5"), ("f", "6"), ("g", "7")]
    rows = [Sentence(pair) for pair in pairs]
    for seed in range(8):
        held = set(split_sentences(rows, 0.4, seed)[1])
        assert held & {0, 1, 2} in (set(), {0, 1, 2})
        assert len(held) == 3


def test_one_label_in_a_list_is_that_label(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "t{n}", "label": ["{n % 2}"]}}\n' for n in range(12)))
    assert {row.label for row in read_sentences(tmp_path / "a.jsonl", "classify-text").train} == {"0", "1"}


def test_texts_with_two_labels_are_found():
    rows = [Sentence(("a",), "x", None, "1"), Sentence((" A",), "y", None, "2"), Sentence(("b",), "x", None, "3")]
    assert two_labels(rows) == [("1", "2")]


def test_texts_alone_are_enough_where_nothing_is_learned():
    def parsed_alone(task, row, **named):
        return SentenceReader(task, NamedColumns(**named), needs_answers=False).parse(row, "a line").record

    assert parsed_alone("classify-text", {"text": "a"}) == Sentence(("a",), None, None, "a line")
    assert parsed_alone("classify-text", {"text": "a", "label": "x"}).label == "x"
    assert parsed_alone("classify-text", {"premise": "a", "hypothesis": "b"}).texts == ("a", "b")
    assert parsed_alone("embed", {"question": "a", "answer": "b"}).texts == ("a",)
    assert parsed_alone("embed", {"answer": "b"}).texts == ("b",)
    assert parsed_alone("embed", {"Frage": "a"}, prompt="Frage", completion="Antwort").texts == ("a",)
    with pytest.raises(DataError, match="the columns are mood: expected one of the forms text; question; prompt"):
        parsed_alone("embed", {"mood": "a"})


@pytest.mark.parametrize("row", [{"text": "c", "label": -1}, {"text": "c"}])
def test_a_test_file_without_labels_is_passed_over(tmp_path, row):
    """As GLUE has them on the hub, and contests: training needs none."""
    write(tmp_path / "train.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    write(tmp_path / "test.jsonl", [row] * 5)
    found = read_sentences(tmp_path, "classify-text")
    assert (len(found.train), len(found.test), found.skipped.count) == (2, 0, 0)
    assert "no row for tests can be used (5 rows)" in found.warnings[0]
    with pytest.raises(DataError, match="test.jsonl line 1"):
        read_sentences(tmp_path, "classify-text", is_strict=True)


def test_rows_to_measure_on_that_all_have_one_score_are_refused(tmp_path):
    """As the test part of GLUE's STS-B: a correlation with them is none."""
    row = {"sentence1": "a", "sentence2": "b", "label": -1.0}
    path = write(tmp_path / "test.jsonl", [row, {**row, "sentence2": "c"}])
    with pytest.raises(DataError, match="all 2 rows to measure on have the score -1, so they say no order"):
        measured_pairs(TrainConfig(data=str(path)), Classes(()), True)
    assert len(measured_pairs(TrainConfig(data=str(path)), Classes(()), False).sources) == 2
