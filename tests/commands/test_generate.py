"""`thimble generate` on a tiny base: one answer a row, in the order of the rows, and none lost or made twice."""

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import thimble
from samples import make_adapter
from thimble import cli
from thimble.data.answers import AnswerFile
from thimble.errors import ConfigError, InputError
from thimble.files.peft import save_adapter
from thimble.models.base import open_base

QUICK = {"compute": "fp32", "max_new_tokens": 5}
FLAGS = ("--compute", "fp32", "--max-new-tokens", "5")
LONG = "the list is on it and the others are in it. " * 20


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    """Thirty prompts, some of them the same, every third with an answer of its own."""
    rows = [{"prompt": f"say {n % 20}", **({"completion": f"{n}!"} if n % 3 == 0 else {})} for n in range(30)]
    return write_rows(tmp_path / "mine.jsonl", rows)


@pytest.fixture
def options(tiny_base):
    return {"base": tiny_base, **QUICK}


def test_every_row_has_a_line_in_the_order_of_the_rows(thimble, prompts, tiny_base, tmp_path):
    code, out, _ = thimble("generate", prompts, "--base", tiny_base, "--out", "a.jsonl", *FLAGS, "--json")
    report, lines = json.loads(out), read_lines(tmp_path / "a.jsonl")
    assert (code, report["status"], report["rows"], report["answered"], report["unanswered"]) == (0, "done", 30, 30, 0)
    assert [line["row"] for line in lines] == list(range(1, 31))
    assert [line["prompt"] for line in lines] == [f"say {n % 20}" for n in range(30)]
    assert [line.get("reference") for line in lines] == [f"{n}!" if n % 3 == 0 else None for n in range(30)]
    assert lines[0]["source"] == "mine.jsonl line 1"
    assert all(isinstance(line["answer"], str) and line["finish_reason"] in ("stop", "length") for line in lines)
    assert report["completion_tokens"] == sum(line["completion_tokens"] for line in lines)
    assert report["prompt_tokens"] == sum(line["prompt_tokens"] for line in lines)
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_a_row_gets_the_answer_that_a_conversation_gives_it_alone(prompts, options):
    answers = thimble.generate(prompts, **options)
    talk = thimble.chat(temperature=0, **options)
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert [answer.text for answer in answers] == [talk.ask(text, keep=False) for text in asked]
    assert [answer.row for answer in answers] == list(range(1, 31))


def test_sampled_answers_depend_on_the_seed_and_the_row_and_on_no_neighbour(options):
    drawn = {"temperature": 1.5, "top_p": 1.0, **options}
    answers = [answer.text for answer in thimble.generate(["Hello"] * 6, **drawn)]
    assert len(set(answers)) > 3
    assert [answer.text for answer in thimble.generate(["Hello", LONG[:150], "Hello"], **drawn)][::2] == answers[:3:2]
    assert [answer.text for answer in thimble.generate(["Hello"] * 6, seed=1, **drawn)] != answers
    assert thimble.chat(**drawn).ask("Hello") == answers[0]


def test_rows_from_python_are_texts_and_mappings_of_any_form(options):
    rows = ["Hello", {"question": "Hello", "answer": "So."}, {"messages": [{"role": "user", "content": "Hello"}]}]
    answers = thimble.generate(rows, **options)
    assert len({answer.text for answer in answers}) == 1
    assert [answer.reference for answer in answers] == [None, "So.", None]
    assert answers[1].source == "row 2"
    assert thimble.generate(iter(rows), **options) == answers


def test_an_adapter_and_a_system_prompt_change_the_answers(options, tiny_base, tmp_path):
    save_adapter(make_adapter(open_base(tiny_base), b_size=0.3), tmp_path / "adapter")
    plain = thimble.generate(["Hello"], **options)[0]
    adapted = thimble.generate(["Hello"], adapter=[str(tmp_path / "adapter")], **options)[0]
    guided = thimble.generate(["Hello", {"prompt": "Hello", "system": "Be brief."}], system="Be kind.", **options)
    assert adapted.text != plain.text
    assert guided[0].prompt_tokens > plain.prompt_tokens
    assert guided[0].text != guided[1].text  # a row's own system text comes first


def test_a_table_has_the_separators_of_the_file_of_prompts_so_its_spreadsheet_opens_it(thimble, tiny_base, tmp_path):
    flags = ("--base", tiny_base, *FLAGS)
    for mark, name in ((";", "in.csv"), ("\t", "in.tsv"), (",", "other.csv")):
        (tmp_path / name).write_text(f'prompt{mark}topic\n"Why{mark} or, not?"{mark}a\nHello{mark}b\n')
        assert thimble("generate", name, "--out", f"{name}.out.csv", *flags)[0] == 0
        wanted = ";" if mark == ";" else ","  # a .csv with tabs is none
        lines = (tmp_path / f"{name}.out.csv").read_text("utf-8-sig").splitlines()
        assert lines[0] == wanted.join(
            ["prompt", "topic", "answer", *"finish_reason prompt_tokens completion_tokens".split()]
        )
        assert next(csv.reader(lines[1:], delimiter=wanted))[:2] == [f"Why{mark} or, not?", "a"]


def test_text_that_is_continued_and_not_asked_is_told_unless_it_was_named_so(thimble, tiny_base, tmp_path):
    (tmp_path / "in.csv").write_text("id,text\n1,My card was charged twice.\n")
    flags = ("--base", tiny_base, "--overwrite", "--out", "a.csv", *FLAGS)
    _, _, err = thimble("generate", "in.csv", *flags)
    assert "1 row of plain text: it is continued as it stands, not answered" in err
    assert "--prompt-column text" in err
    for named in ("--prompt-column", "--text-column"):
        assert "plain text" not in thimble("generate", "in.csv", named, "text", *flags)[2]


def test_a_table_keeps_the_columns_of_the_user_with_the_answer_beside_them(thimble, tiny_base, tmp_path):
    (tmp_path / "in.csv").write_text('queue,prompt,answer\n"a,b",Why?,So.\n,"two\nlines",\n')
    code, _, _ = thimble("generate", "in.csv", "--base", tiny_base, "--out", "out.csv", *FLAGS)
    content = (tmp_path / "out.csv").read_bytes()
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    assert (code, content[:3]) == (0, b"\xef\xbb\xbf")
    assert list(rows[0]) == [
        "queue", "prompt", "answer", "model_answer", "finish_reason", "prompt_tokens", "completion_tokens",
    ]  # fmt: skip
    assert [row["prompt"] for row in rows] == ["Why?", "two\nlines"]
    assert [row["answer"] for row in rows] == ["So.", ""]
    texts = [answer.text for answer in thimble_generate(tmp_path / "in.csv", tiny_base)]
    assert [row["model_answer"] for row in rows] == texts


def thimble_generate(data, base):
    return thimble.generate(data, base=base, **QUICK)


def test_names_and_other_columns_of_a_row_are_carried_over(options, tmp_path):
    rows = [{"custom_id": "t-1", "prompt": "Hello", "queue": {"name": "north"}}, {"prompt": "Hello"}]
    thimble.generate(rows, out=tmp_path / "a.jsonl", **options)
    lines = read_lines(tmp_path / "a.jsonl")
    assert (lines[0]["custom_id"], lines[0]["columns"]) == ("t-1", {"queue": {"name": "north"}})
    assert "columns" not in lines[1]


# ---- rows that cannot be answered, and prompts beyond the context ----------------------------------------------------


def bad_rows(path: Path) -> Path:
    write_rows(path, [{"prompt": f"say {n}"} for n in range(40)])
    with path.open("a") as file:
        file.write('{"ticket": "x"}\n' + json.dumps({"prompt": LONG}) + "\n{broken\n")
    return path


def test_rows_without_an_answer_say_why_and_the_others_are_answered(thimble, tiny_base, tmp_path):
    bad_rows(tmp_path / "mine.jsonl")
    code, out, err = thimble("generate", "mine.jsonl", "--base", tiny_base, "--out", "a.jsonl", *FLAGS)
    lines = read_lines(tmp_path / "a.jsonl")
    assert (code, len(lines), [line["row"] for line in lines[40:]]) == (0, 43, [41, 42, 43])
    assert [line["finish_reason"] for line in lines[40:]] == ["error"] * 3
    assert all(line["answer"] is None for line in lines[40:])
    assert "the columns are ticket" in lines[40]["error"]
    assert "tokens: the context of the base is 128" in lines[41]["error"]
    assert "not valid JSON" in lines[42]["error"]
    assert "3 of 43 rows cannot be answered" in err
    assert "mine.jsonl line 42: the prompt has" in err
    assert "40 of 43 rows answered, 3 cannot be" in out


def test_strict_refuses_them_and_rows_that_are_all_of_another_form_are_refused_anyway(thimble, tiny_base, tmp_path):
    bad_rows(tmp_path / "mine.jsonl")
    code, out, err = thimble("generate", "mine.jsonl", "--base", tiny_base, "--out", "a.jsonl", "--strict", *FLAGS)
    assert (code, out) == (2, "")
    assert all(f"mine.jsonl line {n}" in err for n in (41, 42, 43))
    write_rows(tmp_path / "other.jsonl", [{"ticket": "x"}] * 3)
    code, _, err = thimble("generate", "other.jsonl", "--base", tiny_base, "--out", "a.jsonl", *FLAGS)
    assert code == 2
    assert "the columns are ticket: expected messages, prompt" in err
    assert not list(tmp_path.glob("a.jsonl*"))


def test_a_long_conversation_is_answered_without_its_oldest_turns(options, tmp_path):
    turns = [{"role": role, "content": "the others are on the list"} for role in ("user", "assistant")]
    long = [{"role": "system", "content": "Be kind."}, *turns * 9, {"role": "user", "content": "And?"}]
    short = [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "And?"}]
    events = []
    answers = thimble.generate([{"messages": long}, {"messages": short}], on_event=events.append, **options)
    assert [answer.left_out for answer in answers] == [16, 0]
    assert answers[0].prompt_tokens + 5 <= 128
    [warning] = [event.text for event in events if event.kind == "warning"]
    assert "1 conversation longer than the context of the base (128 tokens)" in warning
    assert "first row 1" in warning
    kept = [long[0], *long[1 + answers[0].left_out :]]
    assert thimble.generate([{"messages": kept}], **options)[0].text == answers[0].text


def test_an_answer_ends_with_the_context_at_the_latest(options):
    events = []
    many = {**options, "max_new_tokens": 4000}
    [answer] = thimble.generate(["Hello"], on_event=events.append, **many)
    assert answer.finish_reason == "stop" or answer.prompt_tokens + answer.completion_tokens == 128
    assert any("room for fewer than --max-new-tokens 4000" in event.text for event in events)


# ---- the file: refused, interrupted, resumed -------------------------------------------------------------------------


def test_an_answer_file_that_exists_is_refused_with_what_to_type(thimble, prompts, tiny_base, tmp_path):
    words = ("generate", prompts, "--base", tiny_base, "--out", "a.jsonl", *FLAGS)
    (tmp_path / "a.jsonl").write_text("precious")
    code, _, err = thimble(*words)
    assert (code, (tmp_path / "a.jsonl").read_text()) == (2, "precious")
    assert "--out a.jsonl exists: name another file, or add --overwrite to replace it" in err
    code, _, err = thimble(*words, "--resume")
    assert (code, (tmp_path / "a.jsonl").read_text()) == (2, "precious")
    assert "a.jsonl.run.json says what the answers are made with, and is missing" in err
    assert thimble(*words, "--overwrite")[0] == 0
    assert len(read_lines(tmp_path / "a.jsonl")) == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine.jsonl",), "--out is not given: name the file for the answers, such as --out answers.jsonl"),
        (("mine.jsonl", "--out", "a.txt"), "--out a.txt: expected a name that ends with .jsonl or .csv"),
        (("mine.jsonl", "--out", "mine.jsonl", "--overwrite"), "--out mine.jsonl is the file of the prompts"),
        (("mine.jsonl", "--out", "a.jsonl", "--resume", "--overwrite"), "--resume --overwrite: give one of them"),
        (("mine.jsonl", "--out", "a.jsonl", "--adapter", "x", "--adapter", "y"), "give one; each answers into a file"),
        (("--out", "a.jsonl"), "no prompts are given: name a file of them, as in: thimble generate prompts.jsonl"),
        (("absent.jsonl", "--out", "a.jsonl"), "absent.jsonl does not exist"),
        (("empty.txt", "--out", "a.jsonl"), "empty.txt holds no prompts: expected at least one"),
        (("mine.jsonl", "--out", "a.jsonl", "--top-p", "0"), "--top-p 0: expected a share above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    thimble, prompts, tiny_base, tmp_path, words, message
):
    (tmp_path / "empty.txt").write_text("\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = thimble("generate", *words, "--base", tiny_base, *FLAGS)
    assert (code, out) == (2, "")
    assert message in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def stop_after(answers: int):
    """Ask for a stop when so many rows have been answered."""
    seen = []

    def on_event(event):
        if event.kind == "progress" and event.text.startswith("rows answered"):
            seen.append(event.data["done"])

    return {"on_event": on_event, "should_stop": lambda: bool(seen) and seen[-1] >= answers}


@pytest.mark.parametrize(("kind", "drawn"), [("jsonl", {"temperature": 1.2}), ("csv", {})], ids=["jsonl", "csv"])
def test_an_interrupted_run_goes_on_by_the_command_it_tells_and_ends_in_the_same_bytes(
    prompts, options, tmp_path, monkeypatch, capsys, drawn, kind
):
    monkeypatch.setattr("thimble.inference.batch.MOST_KNOWN", 4)
    monkeypatch.setattr(cli.signal, "signal", lambda *a: None)
    whole, parts = tmp_path / f"whole.{kind}", tmp_path / "a folder" / f"parts.{kind}"
    thimble.generate(prompts, out=whole, **drawn, **options)
    first = thimble.generate(prompts, out=parts, **drawn, **options, **stop_after(7))
    assert (first.status, first.out, parts.exists()) == ("interrupted", f"{parts}.partial", False)
    assert 7 <= first.answered < 30
    words = shlex.split(first.go_on)
    assert (words[0], words[-1], cli.main([*words[1:], "--json"])) == ("thimble", "--resume", 0)
    second = json.loads(capsys.readouterr().out)
    assert (second["status"], second["answered_before"], second["answered"]) == ("done", first.answered, 30)
    assert parts.read_bytes() == whole.read_bytes()
    again = thimble.generate(prompts, out=parts, resume=True, **drawn, **options)
    assert (again.status, again.answered, again.completion_tokens) == ("done", 30, 0)


KILLED = """
import os, signal, sys
from thimble import cli
from thimble.data.answers import AnswerFile
add, count = AnswerFile.add, [0]
def add_some(self, line):
    count[0] += 1
    if count[0] == 8:  # in the middle of a line
        self._stream.write(b'{"row": 9, "source": "mi')
        self._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, line)
AnswerFile.add = add_some
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_without_a_lost_or_doubled_row(thimble, prompts, tiny_base, tmp_path):
    words = ["generate", str(prompts), "--base", tiny_base, "--out", str(tmp_path / "a.jsonl"), *FLAGS]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "a.jsonl.partial").read_bytes().splitlines()) == 8
    assert not (tmp_path / "a.jsonl").exists()
    code, _, err = thimble(*words)
    assert code == 2
    assert "an interrupted run left a.jsonl.partial: add --resume to go on with it, or --overwrite" in err
    code, out, err = thimble(*words, "--resume")
    assert (code, "resumed: 7 rows of 30 in the file already" in err) == (0, True)
    assert "30 of 30 rows answered, 7 of them before" in out
    assert thimble(*words[:4], "--out", "b.jsonl", *FLAGS)[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_answers_are_not_continued_by_another_run(prompts, options, tmp_path, monkeypatch):
    monkeypatch.setattr("thimble.inference.batch.MOST_KNOWN", 4)
    save_adapter(make_adapter(open_base(options["base"])), tmp_path / "adapter")
    other_rows = write_rows(tmp_path / "other.jsonl", [{"prompt": "say more"}] * 30)
    out, given = tmp_path / "a.jsonl", {"data": prompts, **options}
    thimble.generate(out=out, **given, **stop_after(1))
    before = (tmp_path / "a.jsonl.partial").read_bytes()
    for change, message in (
        ({"temperature": 0.5}, "--temperature was 0.0, is now 0.5"),
        ({"seed": 3}, "--seed was 0, is now 3"),
        ({"system": "Be kind."}, "--system was None, is now Be kind."),
        ({"data": other_rows}, "prompts was"),
        ({"base": str(Path(options["base"]).with_name("qwen2.gguf"))}, "base was smollm2.gguf"),
        ({"adapter": [str(tmp_path / "adapter")]}, "adapter was none"),
    ):
        with pytest.raises(InputError, match=f"made otherwise .*{message}"):
            thimble.generate(out=out, resume=True, **{**given, **change})
        assert (tmp_path / "a.jsonl.partial").read_bytes() == before


def test_a_resumed_run_does_not_say_that_the_user_asked_for_a_dtype(thimble, prompts, tiny_base, tmp_path):
    flags = ("generate", prompts, "--base", tiny_base, "--out", "a.jsonl", "--max-new-tokens", "2")
    assert thimble(*flags)[0] == 0
    said = thimble(*flags, "--resume")[2]
    assert ", as in the answers there are" in said
    assert "was asked for" not in said


def test_a_resumed_run_that_never_began_begins_and_says_so(thimble, prompts, tiny_base):
    code, _, err = thimble("generate", prompts, "--base", tiny_base, "--out", "a.jsonl", "--resume", *FLAGS)
    assert (code, "nothing to resume: all rows are answered now" in err) == (0, True)


def test_two_processes_do_not_write_one_file(tmp_path):
    one, other = (AnswerFile(str(tmp_path / "a.jsonl")) for _ in range(2))
    one.begin({})
    with pytest.raises(ConfigError, match="another process is writing it"):
        other.go_on()
    one.close()
    assert other.go_on() == set()
    other.close()


@pytest.mark.parametrize(
    "tail", [b"", b"{", b'{"row": 3', b'{"row": 3}', b"\x00\x00\x00\n", b"[]\n", b'{"row": "x"}\n']
)
def test_a_line_that_was_cut_off_is_taken_away(tmp_path, tail):
    file = AnswerFile(str(tmp_path / "a.jsonl"))
    file.begin({})
    file.add({"row": 2, "answer": "caf\u00e9 \u2028 \ud800"})
    file.add({"row": 1, "answer": ""})
    file.close()
    with file.partial.open("ab") as stream:
        stream.write(tail)
    again = AnswerFile(str(tmp_path / "a.jsonl"))
    assert again.go_on() == {1, 2}
    again.add({"row": 3})
    assert [json.loads(again.line(row))["row"] for row in (1, 2, 3)] == [1, 2, 3]
    again.close()
    assert len(file.partial.read_bytes().splitlines()) == 3


def test_a_list_without_prompts_is_refused(options):
    with pytest.raises(InputError, match="the list of rows holds no prompts"):
        thimble.generate([], **options)


def test_many_prompts_may_be_empty_or_too_long_but_not_all(options):
    answers = thimble.generate([LONG, "Hello", LONG, "", {"prompt": ""}], **options)
    assert [answer.finish_reason for answer in answers] == ["error", "length", "error", "error", "error"]
    with pytest.raises(InputError, match=r"row 1: the prompt has .*likewise 1 more row, up to row 2"):
        thimble.generate([LONG, LONG], **options)


def test_one_row_alone_is_no_list_of_rows(options):
    with pytest.raises(InputError, match="the rows are one object with prompt: expected a list of rows"):
        thimble.generate({"prompt": "Hello"}, **options)


def test_a_table_of_pandas_is_answered_row_by_row(options):
    class Table:  # as a DataFrame, which says NaN where nothing is
        itertuples = None

        def to_dict(self, kind):
            assert kind == "records"
            return [{"prompt": "Hello", "completion": float("nan")}, {"prompt": "Hello", "completion": "So."}]

    answers = thimble.generate(Table(), **options)
    assert [answer.reference for answer in answers] == [None, "So."]


def test_columns_are_named_as_for_training_and_the_answer_need_not_be_there(options):
    rows = [{"ticket": "Hello", "queue": "north"}, {"ticket": "Hello", "queue": ""}]
    plain = thimble.generate(["Hello"], **options)[0]
    for names in ({"prompt_column": "ticket"}, {"prompt_template": "{ticket}"}):
        assert [answer.text for answer in thimble.generate(rows, **names, **options)] == [plain.text] * 2
    named = thimble.generate(rows, prompt_column="ticket", completion_column="queue", **options)
    assert [answer.reference for answer in named] == ["north", None]
    continued = thimble.generate(rows, text_column="ticket", **options)[0]
    assert continued.prompt_tokens < plain.prompt_tokens
    with pytest.raises(InputError, match="--prompt-column names tikcet, and no row has such a column"):
        thimble.generate(rows, prompt_column="tikcet", **options)
    with pytest.raises(InputError, match="named with --prompt-column"):
        thimble.generate([{"ticket": "Hello"}], **options)


def test_rows_are_asked_as_the_run_that_trained_the_adapter_asked_them(tmp_path, tiny_base):
    save_adapter(make_adapter(open_base(tiny_base)), tmp_path / "run" / "adapter")
    template = "{Frage} ({Thema})"
    (tmp_path / "run" / "config.yaml").write_text(
        json.dumps({"data": "mine.csv", "prompt_template": template, "completion_column": "Antwort"})
    )
    (tmp_path / "new.csv").write_text("Frage;Thema\nWas ist das?;Tiere\nUnd das?;Pflanzen\n")
    given = {"base": tiny_base, "adapter": [str(tmp_path / "run")], **QUICK}
    report = thimble.generate(str(tmp_path / "new.csv"), out=str(tmp_path / "a.jsonl"), **given)
    assert [line["prompt"] for line in read_lines(tmp_path / "a.jsonl")] == [
        "Was ist das? (Tiere)",
        "Und das? (Pflanzen)",
    ]
    assert any(f"--prompt-template '{template}'" in text for text in report.messages["decision"])
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "Why?"}])
    report = thimble.generate(str(other), out=str(tmp_path / "b.jsonl"), **given)
    assert [line["prompt"] for line in read_lines(tmp_path / "b.jsonl")] == ["Why?"]
    assert any(
        "1 row without the columns that the adapter was trained on" in text for text in report.messages["warning"]
    )
    report = thimble.generate(str(tmp_path / "new.csv"), out=str(tmp_path / "c.jsonl"), prompt_column="Frage", **given)
    assert [line["prompt"] for line in read_lines(tmp_path / "c.jsonl")] == ["Was ist das?", "Und das?"]
