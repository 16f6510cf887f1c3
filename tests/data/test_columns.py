"""Columns that the user names, and the line that says how."""

import contextlib
import datetime
import decimal
import math
import shlex

import pytest

from thimble.config.train import TrainConfig
from thimble.data.columns import NamedColumns
from thimble.data.records import read_dataset
from thimble.data.rows import RowReader, parse_row
from thimble.errors import DataError


def read(row, **named):
    return RowReader(NamedColumns(**named)).parse(row, "").record


def problem(row, **named):
    with pytest.raises(DataError) as caught:
        read(row, **named)
    return "\n".join(caught.value.problems)


def refusal(*rows, **named):
    reader = RowReader(NamedColumns(**named))
    for row in rows:
        with contextlib.suppress(DataError):
            reader.parse(row, "")
    with pytest.raises(DataError) as caught:
        reader.check()
    return "\n".join(caught.value.problems)


def test_named_columns_are_prompt_and_completion():
    record = read({"Frage": "Wie?", "Antwort": "So.", "Nr": 1}, prompt="Frage", completion="Antwort")
    assert [message["content"] for message in record.messages] == ["Wie?", "So."]
    assert (record.prompt, record.completion) == ("Wie?", "So.")


@pytest.mark.parametrize("name", ["Text der Mail", "text_der_mail", "TEXT-DER-MAIL", "textDerMail"])
def test_a_name_fits_in_any_spelling(name):
    assert read({"Text der Mail": "x"}, text=name).text == "x"


def test_an_exact_name_wins_and_an_ambiguous_one_is_refused():
    assert read({"a b": "x", "A_B": "y"}, text="A_B").text == "y"
    assert "may mean a b, A_B: name it exactly" in problem({"a b": "x", "A_B": "y"}, text="AB")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("About {subject}: {the body}", "About S: B"),
        ("{{{subject}}}", "{S}"),
        (r"{subject}\n\n{the body}\t\\n", "S\n\nB\t\\n"),
        ("{ SUBJECT }{n}", "S7"),
        ("{subject}{missing}{none}", "S"),
        ("{it.inner}", "I"),
        ("{a:b!r}", "odd"),
        ("{subject}{subject}", "SS"),
        ("{subject} {system}", "S Y"),
    ],
)
def test_a_template_is_filled_from_columns(template, prompt):
    row = {"subject": "S", "the body": "B", "n": 7, "none": None, "it": {"inner": "I"}, "a:b!r": "odd", "system": "Y"}
    messages = read({**row, "reply": "R"}, template=template, completion="reply").messages
    assert [(turn["role"], turn["content"]) for turn in messages if turn["role"] != "system"] == [
        ("user", prompt), ("assistant", "R"),
    ]  # fmt: skip
    assert len(messages) == 2 + ("system" not in template)  # which stands in the prompt already, or in front


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (3, "3"), (0, "0"), (-1.5, "-1.5"), (3.0, "3.0"), (1e30, "1e+30"), (True, "true"), (False, "false"),
        (datetime.date(2024, 5, 1), "2024-05-01"), (decimal.Decimal("1.50"), "1.50"), ("x", "x"),
    ],
)  # fmt: skip
def test_cells_of_named_columns_become_text(cell, text):
    assert read({"q": "x", "a": cell}, prompt="q", completion="a").completion == text
    assert read({"q": cell, "a": "x"}, prompt="q", completion="a").prompt == text


@pytest.mark.parametrize("cell", [None, "", " ", math.nan])
def test_an_empty_completion_is_no_example(cell):
    assert "a is empty: expected the text to learn" in problem({"q": "x", "a": cell}, prompt="q", completion="a")


@pytest.mark.parametrize("cell", [[1, 2], {"a": 1}, b"x"], ids=str)
def test_cells_that_are_no_text_are_refused(cell):
    assert "a is " in problem({"q": "x", "a": cell}, prompt="q", completion="a")


def test_one_label_in_a_list_is_that_label():
    """As Doccano and other programs for labelling write it, which allow for several."""
    row = {"id": 1, "text": "fine", "label": ["good"]}
    assert read(row, prompt="text", completion="label").completion == "good"
    with pytest.raises(DataError) as caught:
        parse_row(row, "")
    assert "to learn the label of a text, add --prompt-column text --completion-column label; to learn the text" in str(
        caught.value
    )


def test_messages_may_stand_in_named_columns():
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    messages = read(
        {"prompt": "q", "chosen": [ask, answer], "rejected": []}, prompt="prompt", completion="chosen"
    ).messages
    assert messages == (ask, answer)


def test_what_is_not_named_is_told():
    row = {"question": "q", "context": "c", "answer": "a", "note": {"en": "x", "de": "y"}}
    left = RowReader(NamedColumns("note.en", "answer")).parse(row, "").left
    assert left.filled == ["question", "context", "note.de"]


# --- columns that are not there


def test_a_column_that_no_row_has_is_told_once_with_near_names():
    rows = [{"Frage": "a", "Antwort": "b", "x\ny": "c"}] * 3
    assert refusal(*rows, prompt="Frge", completion="Antwort") == (
        "--prompt-column names Frge, and no row has such a column (did you mean Frage?): "
        r"the columns are Frage, Antwort, x\ny"
    )
    found = refusal(*rows, template="{Frag} {antwrt}", completion="Ergebnis").splitlines()
    assert [line.partition(",")[0] for line in found] == [
        "--completion-column names Ergebnis", "--prompt-template names Frag", "--prompt-template names antwrt",
    ]  # fmt: skip


def test_a_column_that_some_rows_lack_is_empty_there(tmp_path):
    path = tmp_path / "mails.jsonl"
    path.write_text('{"s": "S", "r": "1"}\n{"s": "T", "b": "B", "r": "2"}\n')
    data = read_dataset(path, is_strict=True, named=NamedColumns(template="{s}|{b}", completion="r"))
    assert [record.prompt for record in data.train] == ["S|", "T|B"]


def test_a_file_without_a_named_column_is_refused(tmp_path):
    path = tmp_path / "mails.csv"
    path.write_text("Frage,Antwort\n" + "a,b\n" * 20)
    with pytest.raises(DataError) as caught:
        read_dataset(path, named=NamedColumns("Frage", "Antwrt"))
    assert len(caught.value.problems) == 1


# --- the line that is suggested


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"Frage": "a", "Antwort": "b"}, "--prompt-column Frage --completion-column Antwort"),
        ({"Antwort": "b", "Frage": "a"}, "--prompt-column Frage --completion-column Antwort"),
        ({"left": "a", "right": "b", "id": "7"}, "--prompt-column left --completion-column right"),
        ({"mail": "a", "stars": 4}, "--prompt-column mail --completion-column stars"),
        (
            {"subject": "a", "the body": "b", "reply": "c"},
            r"--prompt-template '{subject}\n\n{the body}' --completion-column reply",
        ),
        ({"it's": "a", "b c": "d"}, """--prompt-column 'it'"'"'s' --completion-column 'b c'"""),
        ({"-x": "a", "y": "b"}, "--prompt-column=-x --completion-column y"),
        ({"source": "a", "target": "b"}, "--prompt-column source --completion-column target"),
        ({"content": "a", "url": "b"}, "--text-column content"),
        ({"translation": {"en": "a", "de": "b"}}, "--prompt-column translation.en --completion-column translation.de"),
        (
            {"premise": "a", "hypothesis": "b", "label": 1},
            r"--prompt-template '{premise}\n\n{hypothesis}' --completion-column label",
        ),
        ({"质问": "a", "回答": "b"}, "--prompt-column '质问' --completion-column '回答'"),
    ],
)
def test_unknown_columns_are_answered_with_the_options_that_name_them(row, options):
    with pytest.raises(DataError) as caught:
        parse_row(row, "")
    (text,) = caught.value.problems
    assert text.endswith(f"if yours have other names, add {options}")
    assert all(key in text for key in row)
    words = [word for part in shlex.split(options) for word in part.split("=", 1)]
    given = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)
    }
    config = TrainConfig.build({"data": "x", **given})
    assert config.problems == ()
    assert RowReader(NamedColumns.of(config)).parse(row, "").record


@pytest.mark.parametrize(
    "row", [{"a": 1}, {"a": None}, {"x" * 200: "a", "b\x1b[2J": "c", "d{": "e"}, {"id": "3"}], ids=str
)
def test_what_cannot_be_typed_or_is_no_text_is_not_suggested(row):
    with pytest.raises(DataError) as caught:
        parse_row(row, "")
    assert "\x1b" not in caught.value.problems[0]
    assert "--prompt" not in caught.value.problems[0]
