import itertools

import pytest

from stress.csv_files import ENCODINGS, ENDS, QUOTING, SEPARATORS, differences, read_table, write_table
from thimble.data.records import read_dataset
from thimble.errors import DataError

ROWS = [
    ["prompt", "completion", "note"],
    ["Größe?", "3,50 € für 1.234,5", ""],
    ["a, b; c\td | e", 'he said "yes"', "7"],
    ["two\nlines", "don’t; stop", "C:\\dir"],
    ["état", "Straße", ""],
    ["", "", ""],
    ["-", " spaced ", "0"],
]


def read(folder, content, name="mine.csv"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_dataset(folder / name)


def pairs(data):
    return [(record.prompt, record.completion) for record in data.train]


def refusal(folder, content, name="mine.csv"):
    with pytest.raises(DataError) as caught:
        read(folder, content, name)
    return caught.value.problems[0]


# --- dialects


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", SEPARATORS, ids=["comma", "semicolon", "tab", "bar"])
def test_a_table_is_read_as_the_csv_module_reads_it_with_the_right_dialect(tmp_path, separator, encoding):
    wrong = []
    for quoting, end, has_line in itertools.product(QUOTING, ENDS, (False, True)):
        # Before Python 3.13 the csv module does not quote line ends that are not its own.
        breaks = end == "\n" or quoting in ("all", "backslash")
        rows = [[cell if breaks else cell.replace("\n", " ") for cell in row] for row in ROWS]
        table = write_table(rows, separator, encoding, quoting, end, has_line)
        (tmp_path / "mine.csv").write_bytes(table.content)
        wrong += [found for found in [differences(table, read_table(tmp_path / "mine.csv"))] if found]
    assert wrong == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt;completion;\na;b;\nc;d\n", [("a", "b"), ("c", "d")]),
        ("prompt,completion\na,b,,\nc,d,\n", [("a", "b"), ("c", "d")]),
        ("\n\nprompt,completion\n\na,b\n,\n", [("a", "b")]),
        ('"sep=;"\r\nprompt;completion\r\na,b;c\r\n', [("a,b", "c")]),
        ("sep=\t\nprompt\tcompletion\na,b\tc\n", [("a,b", "c")]),
        ('prompt, completion\nhi, "a, b"\n', [("hi", "a, b")]),
        ("'prompt','completion'\n'it''s, a','b'\n", [("it's, a", "b")]),
        ('prompt,completion\n"he said \\"hi\\" \\frac",C:\\dir\n', [('he said "hi" \\frac', "C:\\dir")]),
        ("prompt;completion\na, b;c, d\ne, f, g;h\n", [("a, b", "c, d"), ("e, f, g", "h")]),
        ("prompt,completion\na;b;c,d\ne;f,g;h\n", [("a;b;c", "d"), ("e;f", "g;h")]),
        ("\ufeff\ufeffprompt,completion\na,b\n", [("a", "b")]),
        ("prompt,completion\na,b\n\ufeffc,d\n", [("a", "b"), ("c", "d")]),
        ("Unnamed: 0;prompt;completion\n0;a;b\n", [("a", "b")]),
    ],
)
def test_what_spreadsheets_and_programs_write_is_understood(tmp_path, content, expected):
    assert pairs(read(tmp_path, content)) == expected


def test_a_tab_separated_file_may_have_quotes_in_its_text(tmp_path):
    data = read(tmp_path, 'prompt\tcompletion\n"Hello" he said\tyes\nx\ty, z\n', "mine.tsv")
    assert pairs(data) == [('"Hello" he said', "yes"), ("x", "y, z")]


def test_one_column_needs_no_separator(tmp_path):
    data = read(tmp_path, 'text\nOne; two\n"a, b"\n')
    assert [record.text for record in data.train] == ["One; two", "a, b"]


def test_a_column_without_a_name_is_told_and_not_used(tmp_path):
    data = read(tmp_path, ",prompt,completion\n0,a,b\n1,c,d\n")
    assert pairs(data) == [("a", "b"), ("c", "d")]
    assert any("Unnamed: 0" in note for note in (*data.notes, *data.warnings))


def test_the_dialect_is_told_unless_it_is_the_usual_one(tmp_path):
    assert read(tmp_path, "prompt,completion\na,b\n").notes == ()
    assert read(tmp_path, "prompt;completion\na;b\n").notes == ("mine.csv is read with semicolons between cells",)


def test_cells_may_be_long_and_the_dialect_is_found_all_the_same(tmp_path):
    long = "a, b; c " * 50_000
    assert pairs(read(tmp_path, f'prompt;completion\n"{long}";x\ny;z\n')) == [(long, "x"), ("y", "z")]


def test_rows_far_below_are_numbered_by_their_lines(tmp_path):
    data = read(tmp_path, "sep=;\n\n" + "prompt;completion\n" + 'a;"b\nc"\n' * 2000)
    assert data.train[1999].source == "mine.csv line 4002"


# --- refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,completion,prompt\na,b,c\n", "mine.csv line 1 names prompt more than once"),
        ("1,what is 2+2,4\n2,hi,ho\n", 'mine.csv line 1 has "1" where the name of a column should be'),
        ('{"text": 1},b\nc,d\n', 'mine.csv line 1 has "{"text": 1}" where the name of a column should be'),
        ("prompt;completion\na;b;c\n", "mine.csv line 2 has 3 cells: expected 2, as in the header"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, content, message):
    assert refusal(tmp_path, content).startswith(message)


def test_a_nul_character_is_no_text(tmp_path):
    data = read(tmp_path, "prompt,completion\n" + "a,b\n" * 20 + "a\0,b\n")
    assert data.skipped.told() == ["mine.csv line 22 holds a NUL character, which no text has: take it away."]


# --- encodings that are not Unicode


def test_windows_1252_is_read_with_a_warning_that_shows_its_words(tmp_path):
    data = read(tmp_path, "prompt;completion\r\nGröße?;3,50 €\r\n".encode("cp1252"))
    assert pairs(data) == [("Größe?", "3,50 €")]
    assert data.warnings[0].startswith(
        'mine.csv is not UTF-8 and is read as Windows-1252, where it holds "Größe?", "€"'
    )
    assert data.warnings[0].endswith("iconv -f ENCODING -t UTF-8 mine.csv > mine-utf8.csv")


@pytest.mark.parametrize(
    "text",
    [
        "Élève créée à Noël, « où êtes-vous… » l’œuvre", "¿Cuándo será mañana? El niño comió piñas", 
        "don’t say “hello”",
        "São João não é ação",
        "Smørrebrød på Ålesund, fjäll", "Þetta er íslenska, það ferð", "30 m² und 5 m³ bei 20 °C",
        "GRÖSSE MÜLLER ÜBER ÄRGER", "Übermäßige „Größe“ – 5 €",
    ],
)  # fmt: skip
def test_western_languages_are_told_from_others(tmp_path, text):
    data = read(tmp_path, f'prompt,completion\n"{text}",x\n'.encode("cp1252"))
    assert pairs(data) == [(text, "x")]


@pytest.mark.parametrize(
    ("encoding", "name", "text"),
    [
        ("cp1251", "CP1251", "Привет, как дела? Хорошо"), ("koi8_r", "KOI8-R", "Привет, как дела? Хорошо"),
        ("cp1253", "CP1253", "Καλημέρα κόσμε"), ("cp932", "SHIFT_JIS", "日本語のテキスト、質問と答え"),
        ("gbk", "GB18030", "你好，世界，问题和答案"), ("cp950", "BIG5", "你好，世界，問題和答案"),
        ("cp949", "EUC-KR", "안녕하세요 세계 질문과 답"), ("mac_roman", "MACINTOSH", "Größe für Müller, don’t, Noël"),
        ("cp850", "CP850", "Größe für Müller, schön"), ("cp1250", "CP1250", "Zażółć gęślą jaźń, mała łódka"),
        ("cp1254", "CP1254", "Şişli'de ığdır çağrı güneş"),
        ("iso8859_2", "ISO-8859-2", "Zażółć gęślą jaźń, mała łódka"),
        ("cp1255", "CP1255", "שלום עולם"), ("cp1256", "CP1256", "مرحبا بالعالم"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_other_encodings_are_refused_with_what_they_would_read(tmp_path, encoding, name, text, suffix):
    problem = refusal(tmp_path, f'prompt;completion\n"{text}";x\n'.encode(encoding), f"mine.{suffix}")
    assert problem.startswith(f"mine.{suffix} line 2 is neither UTF-8 nor Windows-1252")
    assert f"as {name} it holds" in problem
    assert next(word for word in text.split() if not word.isascii()).strip(",，、?")[:8] in problem
    assert f" -t UTF-8 mine.{suffix} > mine-utf8.{suffix}" in problem


def test_a_file_of_several_encodings_is_refused(tmp_path):
    content = "prompt,completion\nfür,größer\n".encode() + "für,größer\n".encode("cp1252")
    assert refusal(tmp_path, content).startswith("mine.csv line 3 is not UTF-8, and other lines are")


def test_a_wrong_byte_late_in_a_large_file_is_found_before_rows_are_taken(tmp_path):
    content = b"prompt,completion\n" + b"a,%s\n" % (b"b" * 1000) * 1500 + "für,größer\n".encode("cp1252")
    assert len(read(tmp_path, content).warnings) == 1


def test_a_text_that_is_a_table_is_told(tmp_path):
    content = "prompt\tcompletion\r\nGröße\tx\r\n".encode("utf-16")
    assert read(tmp_path, content, "mine.txt").warnings == (
        "mine.txt looks like a table with tabs between cells and is read as one text: to read rows, call it .tsv",
    )
    assert read(tmp_path, content, "mine.tsv").train[0].prompt == "Größe"
    assert read(tmp_path, "\tindented\n\ttoo\n", "mine.txt").warnings == ()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("\n".join('{"prompt": "a", "completion": "b"}' for _ in range(3)), ".jsonl"),
        ('{"text": "one line"}\n', ".jsonl"),
        ('[\n {"prompt": "a", "completion": "b"}\n]\n', ".json"),
        ("prompt,completion\na,b\nc,d\n", ".csv"),
        ("question;answer\na;b\n", ".csv"),
    ],
)
def test_a_text_that_holds_rows_is_told(tmp_path, content, kind):
    (warning,) = read(tmp_path, content, "mine.txt").warnings
    assert warning.startswith("mine.txt looks like ")
    assert warning.endswith(f"to read rows, call it {kind}")


@pytest.mark.parametrize(
    "content",
    [
        "{x} is a set.\n",
        "[1] A note.\n",
        '{"json": 1}\nis how it is written\n',
        "Well, then\nhe said, and left\n",
        "text\n",
    ],
)
def test_a_text_that_holds_no_rows_is_not(tmp_path, content):
    assert read(tmp_path, content, "mine.txt").warnings == ()


def test_spaces_behind_the_commas_of_the_header_are_no_part_of_the_cells(tmp_path):
    data = read(tmp_path, "id, prompt, completion\n1, say a, a\n2, say b, b\n")
    assert [(record.prompt, record.completion) for record in data.train] == [("say a", "a"), ("say b", "b")]
    assert "mine.csv is read without the spaces behind commas" in data.notes
    kept = read(tmp_path, "prompt,completion\nsay a, a\nsay b, b\n")  # whose header has none: they may be meant
    assert [record.completion for record in kept.train] == [" a", " b"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_that_is_repeated_is_no_row_and_told(tmp_path, mark):
    """As programs leave it that append to a table, and as cat does."""
    part = f"{mark}prompt,completion\r\na,b\r\n"
    data = read(tmp_path, part * 3)
    assert pairs(data) == [("a", "b")] * 3
    assert data.notes == ("mine.csv repeats its header 2 times, first in line 3: these lines are no rows",)


def test_a_single_column_may_hold_its_own_name(tmp_path):
    assert [record.text for record in read(tmp_path, "text\nthe\ntext\n").train] == ["the", "text"]


def test_a_header_further_down_in_another_order_is_refused(tmp_path):
    assert refusal(tmp_path, "prompt,completion\na,b\ncompletion,prompt\nd,c\n") == (
        "mine.csv line 3 is a header with the columns in another order than line 1: expected one table. Write the rows "
        "below it to a file of their own."
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,completion\na,\n", "mine.csv line 2: completion is missing: expected text"),
        ("text,note\n,a\n", "mine.csv line 2: text is missing: expected text"),
    ],
)
def test_an_empty_cell_is_told_as_one_and_not_as_a_table_of_other_columns(tmp_path, content, expected):
    assert refusal(tmp_path, content) == expected
