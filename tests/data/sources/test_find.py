"""Which files of a folder are read: as datasets saves them, as the hub's client leaves them, as people lay them out."""

import errno
import json
import os

import pytest

from thimble.data.records import read_dataset
from thimble.data.sources import layout
from thimble.errors import DataError

ROWS = [{"prompt": f"say {number}", "completion": str(number)} for number in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "prompt,completion\n" + "".join(f"say {number},{number}\n" for number in range(6))
CARD = "---\nlicense: mit\n---\n# Rows\n"


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_arrow(path, rows, keep=None):
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if keep else pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)


def card(configs):
    return f"---\nlicense: mit\nconfigs:\n{configs}---\n# Rows\n"


def counts(folder):
    data = read_dataset(folder)
    return tuple(len(records) if records is not None else 0 for records in (data.train, data.valid, data.test))


def refusal(folder):
    with pytest.raises(DataError) as caught:
        read_dataset(folder)
    return " ".join(caught.value.problems)


# --- save_to_disk


def save(folder, rows, shards=1, **state):
    """What `Dataset.save_to_disk` writes."""
    size = -(-len(rows) // shards)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        write_arrow(folder / name, rows[number * size : (number + 1) * size])
    listed = [{"filename": name} for name in names]
    (folder / "state.json").write_text(
        json.dumps({"_data_files": listed, "_split": None, "_format_type": None, **state})
    )
    features = {key: {"dtype": "string", "_type": "Value"} for key in rows[0]}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features, "description": "", "citation": ""}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_data_set_is_read(tmp_path, shards):
    data = read_dataset(save(tmp_path / "mine", ROWS, shards))
    assert [record.prompt for record in data.train] == [row["prompt"] for row in ROWS]
    assert (data.notes, data.warnings, data.name) == ((), (), "mine")
    assert data.train[0].source == f"data-00000-of-0000{shards}.arrow row 1"


def test_saved_splits_are_read(tmp_path):
    for split, count in (("train", 6), ("test", 2), ("validation", 1)):
        save(tmp_path / split, ROWS[:count])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test", "validation"]}))
    assert counts(tmp_path) == (6, 1, 2)
    assert read_dataset(tmp_path).train[0].source == "train/data-00000-of-00001.arrow row 1"


def save_splits(folder, *splits):
    for split in splits:
        save(folder / split, ROWS)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


def test_splits_of_other_names_are_placed_if_there_is_no_doubt(tmp_path):
    assert counts(save_splits(tmp_path / "a", "train_sft", "test_sft")) == (6, 0, 6)
    data = read_dataset(save_splits(tmp_path / "b", "english"))
    assert (len(data.train), data.notes) == (6, ("the only split, english, is the training data",))
    data = read_dataset(save_splits(tmp_path / "c", "train", "unsupervised", "dev"))
    assert (len(data.train), len(data.valid), data.notes) == (6, 6, ("splits not used: unsupervised",))


def test_splits_that_may_all_be_meant_are_refused_with_what_to_type(tmp_path):
    folder = save_splits(tmp_path / "a", "train_sft", "train_gen", "test_sft")
    assert (
        f"train_gen, train_sft may be for training: name what to learn from, as in: thimble train {folder}/train_gen"
        in refusal(folder)
    )
    folder = save_splits(tmp_path / "b", "english", "french")
    assert (
        "has the splits english, french, and none is called train: name what to learn from, as in: "
        f"thimble train {folder}/english" in refusal(folder)
    )


def test_a_selection_of_rows_that_an_old_version_saved_is_honoured(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    folder = save(tmp_path, ROWS, 2, _indices_data_files=[{"filename": "indices.arrow"}])
    write_arrow(
        folder / "indices.arrow", pyarrow.table({"indices": pyarrow.array([4, 0, 2], pyarrow.uint64())}), keep=True
    )
    assert [record.prompt for record in read_dataset(folder).train] == ["say 4", "say 0", "say 2"]


def test_a_part_of_a_file_that_an_old_version_saved_is_honoured(tmp_path):
    folder = save(tmp_path, ROWS)
    listed = [{"filename": "data-00000-of-00001.arrow", "skip": 1, "take": 2}]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed}))
    assert [record.prompt for record in read_dataset(folder).train] == ["say 1", "say 2"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "state.json is damaged"), ("[]", "state.json is damaged: expected a JSON object"),
        ("{}", "state.json lists no data files"), ('{"_data_files": []}', "state.json lists no data files"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "state.json lists gone.arrow, not found there: copy"),
        ('{"_data_files": [{"filename": "../secret.arrow"}]}', "not found there"),
        ('{"_data_files": 3}', "lists no data"),
    ],
)  # fmt: skip
def test_a_saved_folder_that_is_damaged_is_refused(tmp_path, state, message):
    write(tmp_path, {"secret.arrow": b"x", "mine/state.json": state})
    assert message in refusal(tmp_path / "mine")


def test_a_split_that_was_not_copied_is_told(tmp_path):
    save(tmp_path / "train", ROWS)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert "lists the splits train, test, and test is not there, with its state.json: copy the whole fold" in refusal(
        tmp_path
    )


def test_the_cache_of_load_dataset_is_read_without_what_map_left(tmp_path):
    folder = tmp_path / "me___mine" / "default" / "0.0.0" / "abc"
    for name in ("mine-train-00000-of-00002", "mine-train-00001-of-00002", "mine-test", "cache-1234567890abcdef"):
        write_arrow(folder / f"{name}.arrow", ROWS)
    (folder / "dataset_info.json").write_text("{}")
    assert counts(folder) == (12, 0, 6)
    assert counts(tmp_path / "me___mine") == (12, 0, 6)


# --- as the hub's client leaves a data set


def test_the_rows_below_a_card_are_read_and_not_the_card(tmp_path):
    hidden = {
        ".gitattributes": "*.parquet",
        ".cache/huggingface/download/data/train.jsonl.metadata": "x",
        "LICENSE": "MIT",
    }
    rows = {f"data/train-0000{part}-of-00002.jsonl": LINES for part in (0, 1)}
    write(
        tmp_path,
        {"README.md": CARD, "dataset_infos.json": "{}", "data/test-00000-of-00001.jsonl": LINES, **rows, **hidden},
    )
    data = read_dataset(tmp_path)
    assert (len(data.train), len(data.test), data.format) == (12, 6, "prompt and completion")
    assert data.notes == ("files not used: README.md",)
    assert data.train[0].source == "data/train-00000-of-00002.jsonl line 1"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/0000.jsonl", "test/0000.jsonl"], (6, 0, 6)),
        (["default/train/0.jsonl", "default/validation/0.jsonl"], (6, 6, 0)),
        (["default/partial-train/0000.jsonl"], (6, 0, 0)),
        (["data/train-00000-of-00001-b513d9e388d56453.jsonl"], (6, 0, 0)),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "README.md"], (12, 0, 6)), (["data/all.jsonl"], (6, 0, 0)),
        (["train.jsonl", "validation/a.jsonl"], (6, 6, 0)), (["math/a.jsonl", "law/b.jsonl"], (12, 0, 0)),
        (["alpaca_train.jsonl", "alpaca_eval.jsonl"], (6, 6, 0)), (["math.jsonl", "math_test.jsonl"], (6, 0, 6)),
        (["train.jsonl", "train.jsonl.gz", "test.jsonl.gz"], (6, 0, 6)),
        (["train.jsonl", "train.csv", "test.csv"], (6, 0, 6)), (["a.csv", "a.jsonl", "b.csv"], (12, 0, 0)),
        (["training.jsonl", "testing.jsonl"], (6, 0, 6)),
        (["my_trainset.jsonl", "TestData.jsonl", "devset.jsonl"], (6, 6, 6)),
        (["a_train.jsonl", "b_train.jsonl"], (12, 0, 0)),
        (["train.jsonl", "._train.jsonl", "~$train.csv", "__MACOSX/._train.jsonl", ".DS_Store"], (6, 0, 0)),
    ],
)  # fmt: skip
def test_splits_are_known_by_names_of_files_and_folders_and_nothing_is_read_twice(tmp_path, names, expected):
    write(
        tmp_path, {name: TABLE if name.endswith(".csv") else CARD if name.endswith(".md") else LINES for name in names}
    )
    assert counts(tmp_path) == expected


def test_the_same_rows_in_another_format_are_told(tmp_path):
    write(tmp_path, {"train.csv": TABLE, "train.jsonl": LINES, "extra/notes.jsonl": LINES})
    assert read_dataset(tmp_path).notes == (
        "the same data in another format, not used: train.csv",
        "files not used: extra/notes.jsonl",
    )


def test_links_to_folders_are_followed_and_none_leads_in_a_circle(tmp_path):
    write(tmp_path, {"disk/train.jsonl": LINES, "disk/valid.jsonl": LINES, "set/README.md": CARD})
    (tmp_path / "set" / "data").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "set")
    assert counts(tmp_path / "set") == (6, 6, 0)


def test_a_folder_below_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    write(tmp_path, {"data/train.jsonl": LINES, "more/b.jsonl": LINES})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="more cannot be opened: Permission denied"):
        read_dataset(tmp_path)


def test_a_file_and_what_it_was_unpacked_from_are_read_once_and_told(tmp_path):
    write(tmp_path, {"a.jsonl": LINES, "a.jsonl.gz": LINES, "b.jsonl.gz": LINES})
    data = read_dataset(tmp_path)
    assert (len(data.train), data.notes) == (12, ("packed twins of files beside them, not used: a.jsonl.gz",))
    write(tmp_path / "texts", {"a.txt": "A", "a.txt.gz": "A"})
    assert len(read_dataset(tmp_path / "texts").train) == 1


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["en/train.jsonl", "fr/train.jsonl"], "en, fr"), (["csv/train.csv", "json/train.json"], "csv, json"),
        (["csv/all.csv", "jsonl/all.jsonl"], "csv, jsonl"), (["en/train/0.jsonl", "fr/train/0.jsonl"], "en, fr"),
    ],
)  # fmt: skip
def test_several_data_sets_are_refused_with_what_to_type(tmp_path, names, folders):
    write(tmp_path, dict.fromkeys(names, ""))
    first = folders.partition(",")[0]
    assert (
        f"{tmp_path} holds several data sets, in {folders}: name one of them, as in: thimble train {tmp_path}/{first}"
        in refusal(tmp_path)
    )


def test_a_split_that_is_there_in_part_is_warned_of(tmp_path):
    write(tmp_path, {"README.md": CARD, "data/train-00001-of-00003.jsonl": LINES})
    assert read_dataset(tmp_path).warnings == (
        "train is there in part: 1 of 3 files; if that is not meant, fetch the others",
    )


def test_a_card_that_names_its_files_is_followed(tmp_path):
    configs = "- data_files:\n  - split: train\n    path: data/good-*\n  - split: test\n    path: [t.jsonl]\n"
    write(
        tmp_path, {"README.md": card(configs), "data/good-1.jsonl": LINES, "data/train.jsonl": LINES, "t.jsonl": LINES}
    )
    data = read_dataset(tmp_path)
    assert [record.source for record in (data.train[0], data.test[0])] == ["data/good-1.jsonl line 1", "t.jsonl line 1"]
    assert len(data.train) == 6


@pytest.mark.parametrize(
    "files", ["a.jsonl", "[a.jsonl]", "{train: a.jsonl}", "[{split: train, path: a.jsonl}]", "./a.*"]
)
def test_a_card_may_name_its_files_in_any_of_the_forms_of_the_hub(tmp_path, files):
    write(
        tmp_path, {"README.md": card(f"- config_name: x\n  data_files: {files}\n"), "a.jsonl": LINES, "b.jsonl": LINES}
    )
    assert counts(tmp_path) == (6, 0, 0)


def test_a_card_of_several_data_sets_says_what_to_type(tmp_path):
    configs = "- config_name: en\n  data_files: en/*.jsonl\n- config_name: fr\n  data_files: fr.jsonl\n"
    write(tmp_path, {"README.md": card(configs), "en/a.jsonl": LINES, "fr.jsonl": LINES})
    assert f"describes several data sets: en ({tmp_path}/en), fr ({tmp_path}/fr.jsonl)" in refusal(tmp_path)
    assert counts(tmp_path / "en") == counts(tmp_path / "fr.jsonl") == (6, 0, 0)
    write(tmp_path, {"README.md": card(configs.replace("fr\n", "fr\n  default: true\n"))})
    assert read_dataset(tmp_path).notes == ("README.md describes several data sets: fr is read, not en",)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (
            card("- data_files: data/train-*\n"),
            "does not hold the files of train (data/train-*), which its README.md lists",
        ),
        (card("- data_files: ../secret.jsonl\n"), "'../secret.jsonl' as data, which lies outside of its folder"),
        (card("- data_files: /etc/passwd\n"), "which lies outside of its folder"),
        (card("- data_files: 'https://example.com/a.csv'\n"), "which lies outside of its folder"),
        (card("- data_files: '**.jsonl'\n"), "a pattern that is not understood"),
        (card("- data_files: a.zip\n"), "It is an archive: unpack it first"),
        ("---\na: [\n---\n", "front matter that is not YAML"),
    ],
)
def test_a_card_that_cannot_be_followed_is_refused(tmp_path, front, message):
    write(tmp_path / "mine", {"README.md": front, "a.zip": "x"})
    write(tmp_path, {"secret.jsonl": LINES})
    assert message in refusal(tmp_path / "mine")


@pytest.mark.parametrize(
    "front", [CARD, card("- 3\n"), "---\nconfigs: x\n---\n", "---\n- a\n---\n", "# no front matter\n"]
)
def test_a_card_that_names_no_files_leaves_it_to_their_names(tmp_path, front):
    write(tmp_path, {"README.md": front, "data/train.jsonl": LINES})
    assert counts(tmp_path) == (6, 0, 0)


@pytest.mark.parametrize("name", ["README.md", "LICENSE.txt", "CHANGELOG.md", "readme.txt"])
def test_a_folder_that_only_tells_about_data_is_refused(tmp_path, name):
    write(tmp_path, {name: "About", ".gitattributes": "x"})
    assert "holds no data: expected .jsonl" in refusal(tmp_path)
    assert f"{name}: about data, and none itself" in refusal(tmp_path)


def test_an_archive_or_a_spreadsheet_in_a_folder_is_named_with_what_to_do(tmp_path):
    write(tmp_path, {"README.md": CARD, "data.zip": b"PK"})
    assert "data.zip is an archive: unpack it first, and name the folder." in refusal(tmp_path)


def test_a_download_that_was_cut_off_is_told(tmp_path):
    rest = ".cache/huggingface/download/data/train.jsonl.abc.incomplete"
    write(tmp_path, {"README.md": CARD, rest: "x"})
    assert "a download was cut off (1 unfinished file, such as train.jsonl.abc.incomplete)" in refusal(tmp_path)
    write(tmp_path, {"data/train.jsonl": LINES})
    assert read_dataset(tmp_path).warnings[0].startswith("a download was cut off")


def test_the_folder_of_the_hubs_cache_stands_for_its_snapshot(tmp_path):
    folder = write(tmp_path / "datasets--me--mine", {"blobs/1": LINES, "blobs/2": LINES * 2, "refs/main": "abc123"})
    for snapshot, blob in (("abc123", "1"), ("def456", "2")):
        (folder / "snapshots" / snapshot / "data").mkdir(parents=True)
        os.symlink(f"../../../blobs/{blob}", folder / "snapshots" / snapshot / "data" / "train.jsonl")
    data = read_dataset(folder)
    assert (len(data.train), data.notes) == (6, ("reading snapshot abc123 of datasets--me--mine",))
    assert counts(folder / "snapshots" / "def456") == (12, 0, 0)
    (folder / "blobs" / "1").unlink()
    assert "is a link to a file that is not there: the download is not complete" in refusal(folder)


def test_a_cache_without_a_snapshot_is_refused(tmp_path):
    for name in ("blobs", "snapshots"):
        (tmp_path / name).mkdir()
    assert "holds no snapshot: the download is not complete" in refusal(tmp_path)


def test_a_folder_of_very_many_files_is_no_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "MOST_FILES", 10)
    write(tmp_path, {f"{number}.txt": "x" for number in range(11)})
    assert "holds more than 10 files: name the folder of the data itself" in refusal(tmp_path)


TWICE = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    "configs",
    [
        "- config_name: *a29\n  data_files: a.jsonl\n",
        "- data_files:\n  - split: *a29\n    path: a.jsonl\n",
        "- &me [*me]\n",
    ],
)
def test_a_card_of_aliases_takes_no_memory(tmp_path, configs):
    write(tmp_path, {"README.md": f"---\n{TWICE}configs:\n{configs}---\n", "a.jsonl": LINES})
    assert "README.md begins with front matter that is not YAML" in refusal(tmp_path)


@pytest.mark.parametrize("value", ['!!int ""', "!!bool x", "!!timestamp x", "2020-99-99", "!!python/name:os.system x"])
def test_values_of_a_card_that_are_not_asked_for_may_be_anything(tmp_path, value):
    front = f"---\nx: {value}\nconfigs:\n- data_files: a.jsonl\n---\n"
    write(tmp_path, {"README.md": front, "a.jsonl": LINES, "b.jsonl": LINES})
    assert counts(tmp_path) == (6, 0, 0)


def test_a_saved_folder_of_no_splits_is_damaged(tmp_path):
    write(tmp_path, {"dataset_dict.json": '{"splits": []}'})
    assert "is damaged: expected the names of splits" in refusal(tmp_path)


@pytest.mark.parametrize("bound", ["skip", "take"])
@pytest.mark.parametrize("value", ["a", -1, [1], True])
def test_what_a_saved_folder_takes_of_a_file_is_a_number_of_rows(tmp_path, bound, value):
    write_arrow(tmp_path / "data.arrow", [{"prompt": "a", "completion": "b"}] * 3)
    state = {"_data_files": [{"filename": "data.arrow", bound: value}]}
    write(tmp_path, {"state.json": json.dumps(state)})
    assert f"is damaged: {value!r} is no number of rows" in refusal(tmp_path)


def test_a_folder_with_a_space_in_its_name_can_be_typed_as_told(tmp_path):
    folder, files = tmp_path / "my data", ("en.jsonl", "fr.jsonl")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}\n" for name in files)
    write(folder, {"README.md": card(configs), **dict.fromkeys(files, LINES)})
    assert f"thimble train '{folder}/en.jsonl'" in refusal(folder)


def test_a_link_to_nowhere_says_where_it_leads(tmp_path):
    (tmp_path / "mine.jsonl").symlink_to("gone/train.jsonl")
    assert "mine.jsonl is a link to gone/train.jsonl, which does not exist" in refusal(tmp_path / "mine.jsonl")


@pytest.mark.parametrize(
    "name", ["owner/rows", "https://huggingface.co/datasets/owner/rows", "hf://datasets/owner/rows"]
)
def test_a_data_set_of_the_hub_is_refused_with_how_to_fetch_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    told = refusal(name)
    assert "hf download owner/rows --repo-type dataset" in told
    assert "near it" not in told


@pytest.mark.parametrize("name", ["https://example.org/a/b/rows.jsonl", "s3://bucket/rows.jsonl"])
def test_an_address_is_refused_as_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    told = refusal(name)
    assert "nothing is fetched" in told
    assert "download" in told


@pytest.mark.parametrize("name", ["rows/*.jsonl", "part-?.jsonl"])
def test_a_pattern_of_names_is_refused_with_what_to_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "name the folder" in refusal(name)


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["train.parquet", "train.arrow", "train.csv", "train.tsv"])
@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS, indent=1)], ids=["lines", "array"])
def test_json_under_the_name_of_another_kind_is_read_as_json(tmp_path, text, name, is_folder):
    write(tmp_path, {name: text})
    data = read_dataset(tmp_path if is_folder else tmp_path / name)
    assert len(data.train) == 6
    assert any(f"{name} holds" in note and "JSON" in note for note in data.notes)


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.json"])
def test_parquet_under_the_name_of_another_kind_is_read_as_parquet(tmp_path, name, is_folder):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    data = read_dataset(tmp_path if is_folder else tmp_path / name)
    assert len(data.train) == 6
    assert any(f"{name} holds Parquet" in note for note in data.notes)


def test_a_table_of_text_under_the_name_of_parquet_is_not_to_be_fetched_again(tmp_path):
    write(tmp_path, {"train.parquet": "prompt,completion\na,b\n"})
    with pytest.raises(DataError, match="begins with text: call it what it is"):
        read_dataset(tmp_path / "train.parquet")


def test_standard_input_is_answered_with_what_to_do():
    with pytest.raises(DataError, match="save it to a file, and name that"):
        read_dataset("-")
