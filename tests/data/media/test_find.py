import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from media_files import write_classes, write_clip, write_picture
from thimble.data.media.find import find_media, guess_kind
from thimble.data.media.pictures import read_picture
from thimble.data.media.sound import read_sound
from thimble.errors import DataError


def pairs(items):
    return [(item.source, item.label) for item in items]


def problems_of(path, kind="image", **options):
    with pytest.raises(DataError) as caught:
        find_media(path, kind, **options)
    return caught.value.problems


# --- folders


def test_each_folder_is_a_class(tmp_path):
    data = find_media(write_classes(tmp_path, {"cats": 2, "dogs": 1}), "image")
    assert pairs(data.train) == [("cats/0.png", "cats"), ("cats/1.png", "cats"), ("dogs/0.png", "dogs")]
    assert data.train[0].path == tmp_path / "cats" / "0.png"
    assert data.valid is None
    assert data.labels == ["cats", "dogs"]
    assert len({item.digest for item in data.train}) == 3


def test_folders_called_train_and_val_are_a_split(tmp_path):
    write_classes(tmp_path / "train", {"cats": 2, "dogs": 2})
    write_classes(tmp_path / "val", {"cats": 1, "dogs": 1}, begin=10)
    write_classes(tmp_path / "test", {"dogs": 1}, begin=20)
    data = find_media(tmp_path, "image")
    assert pairs(data.valid) == [("val/cats/0.png", "cats"), ("val/dogs/0.png", "dogs")]
    assert pairs(data.test) == [("test/dogs/0.png", "dogs")]
    assert len(data.train) == 4


def test_a_class_may_be_called_test_where_no_folder_is_called_train(tmp_path):
    data = find_media(write_classes(tmp_path, {"test": 2, "strip": 2}), "image")
    assert data.labels == ["strip", "test"]


def test_a_split_without_training_folder_is_refused(tmp_path):
    write_classes(tmp_path / "test", {"a": 2, "b": 2})
    write_classes(tmp_path / "valid", {"a": 2, "b": 2}, begin=9)
    assert "none called train" in problems_of(tmp_path)[0]


def test_a_label_of_validation_rows_alone_is_left_out(tmp_path):
    write_classes(tmp_path / "train", {"a": 9, "b": 9})
    write_classes(tmp_path / "valid", {"a": 2, "c": 1}, begin=30)
    data = find_media(tmp_path, "image")
    assert [item.label for item in data.valid] == ["a", "a"]
    assert data.skipped.found[0].problems == ('valid/c/0.png: has the label "c", which no training row has',)


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    write_classes(tmp_path, {"cats": 1, "dogs": 1})
    for name in (".DS_Store", "Thumbs.db", "cats/._0.png", "cats/@eaDir/0.png", ".ipynb_checkpoints/a/0.png"):
        write_picture(tmp_path / f"{name}x.png", 5)
        (tmp_path / f"{name}x.png").rename(tmp_path / name)
    data = find_media(tmp_path, "image")
    assert len(data.train) == 2
    assert not any("not used" in text for text in data.told)


def test_files_of_other_kinds_are_told_and_not_used(tmp_path):
    write_classes(tmp_path, {"cats": 1, "dogs": 1})
    (tmp_path / "cats" / "about.txt").write_text("x")
    data = find_media(tmp_path, "image")
    assert "files not used: cats/about.txt" in data.told


def test_pictures_beside_the_classes_are_told(tmp_path):
    write_picture(write_classes(tmp_path, {"cats": 1, "dogs": 1}) / "loose.png", 9)
    assert "1 picture of no class, not used: loose.png" in find_media(tmp_path, "image").told


def test_empty_folders_are_no_classes(tmp_path):
    write_classes(tmp_path, {"cats": 1, "dogs": 1})
    (tmp_path / "birds").mkdir()
    data = find_media(tmp_path, "image")
    assert data.labels == ["cats", "dogs"]
    assert any("birds" in text and "no classes" in text for text in data.warnings)


def test_deeper_folders_belong_to_the_class_on_top(tmp_path):
    write_classes(tmp_path / "cats", {"persian": 1, "siamese": 1})
    write_classes(tmp_path, {"dogs": 1}, begin=5)
    data = find_media(tmp_path, "image")
    assert [item.label for item in data.train] == ["cats", "cats", "dogs"]
    assert any("cats/persian is cats" in text for text in data.told)


def test_a_folder_in_a_folder_is_unwrapped(tmp_path):
    write_classes(tmp_path / "animals", {"cats": 1, "dogs": 1})
    data = find_media(tmp_path, "image")
    assert data.labels == ["cats", "dogs"]
    assert any("reading animals" in text for text in data.told)


def test_links_are_followed_and_a_link_that_leads_back_ends(tmp_path):
    write_classes(tmp_path / "elsewhere", {"dogs": 2})
    write_classes(tmp_path / "data", {"cats": 2}, begin=5)
    (tmp_path / "data" / "dogs").symlink_to(tmp_path / "elsewhere" / "dogs")
    (tmp_path / "data" / "cats" / "again").symlink_to(tmp_path / "data")
    data = find_media(tmp_path / "data", "image")
    assert pairs(data.train)[:2] == [("cats/0.png", "cats"), ("cats/1.png", "cats")]
    assert [item.label for item in data.train].count("cats") == 2


def test_a_broken_link_is_a_file_that_cannot_be_used(tmp_path):
    write_classes(tmp_path, {"cats": 9, "dogs": 9})
    (tmp_path / "cats" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = find_media(tmp_path, "image")
    assert data.skipped.count == 1
    assert "cats/gone.png: cannot be read" in data.skipped.found[0].problems[0]


def test_names_that_are_no_utf8_are_read_and_written_out(tmp_path):
    write_classes(tmp_path, {"cats": 1, "dogs": 1})
    os.rename(tmp_path / "cats" / "0.png", os.fsencode(tmp_path / "cats") + b"/caf\xe9.png")
    data = find_media(tmp_path, "image")
    assert data.train[0].source == r"cats/caf\xe9.png"


def test_a_class_whose_name_is_no_utf8_is_refused(tmp_path):
    write_classes(tmp_path, {"cats": 1, "dogs": 1})
    os.rename(tmp_path / "cats", os.fsencode(tmp_path) + b"/caf\xe9")
    assert "not UTF-8: rename" in problems_of(tmp_path)[0]


def test_one_label_is_nothing_to_tell_apart(tmp_path):
    assert "have one label, 'cats'" in problems_of(write_classes(tmp_path, {"cats": 3}))[0]


def test_pictures_without_classes_are_refused_with_what_is_expected(tmp_path):
    write_picture(tmp_path / "a.png")
    assert "no folder for each class" in problems_of(tmp_path)[0]


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.docx").write_text("x")
    assert "holds no pictures" in problems_of(tmp_path)[0]
    assert "cats/a.docx" in problems_of(tmp_path)[0]


def test_labels_that_are_probably_one_are_told(tmp_path):
    data = find_media(write_classes(tmp_path, {"Cats": 2, "cats": 2, "dogs": 2}), "image")
    assert any("probably one: 'Cats' (2), 'cats' (2)" in text for text in data.warnings)


# --- broken files


def test_a_few_broken_files_are_left_out_and_listed(tmp_path):
    write_classes(tmp_path, {"cats": 10, "dogs": 10})
    whole = (tmp_path / "cats" / "0.png").read_bytes()
    (tmp_path / "cats" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dogs" / "0.png").write_bytes(b"<!doctype html><p>sign in")
    data = find_media(tmp_path, "image")
    assert len(data.train) == 18
    told = [problem for row in data.skipped.found for problem in row.problems]
    assert told[0].startswith("cats/0.png: cannot be decoded whole")
    assert told[1].startswith("dogs/0.png: is a web page")


def test_what_moves_is_silent_or_long_is_used_and_told(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (0, 99)]
    folder = write_classes(tmp_path / "pictures", {"cats": 1, "dogs": 1})
    frames[0].save(folder / "cats" / "a.gif", save_all=True, append_images=frames[1:])
    told = find_media(folder, "image").warnings
    assert "1 file with several frames, of which the first is taken: cats/a.gif" in told
    for label in ("de", "fr"):
        write_clip(tmp_path / "clips" / label / "long.wav", 3.0, 8000, hertz=500 if label == "de" else 300)
    soundfile.write(tmp_path / "clips" / "de" / "silent.wav", np.zeros(800), 8000)
    data = find_media(tmp_path / "clips", "audio", most_seconds=2)
    assert len(data.train) == 3
    assert "2 files longer than 2 seconds, the most that is heard: de/long.wav, fr/long.wav" in data.warnings
    assert "1 file silent from beginning to end: de/silent.wav" in data.warnings


def test_many_broken_files_refuse_the_folder(tmp_path):
    write_classes(tmp_path, {"cats": 4, "dogs": 4})
    for number in range(3):
        (tmp_path / "cats" / f"{number}.png").write_bytes(b"")
    problems = problems_of(tmp_path)
    assert problems[0] == "cats/0.png: is empty: expected a picture (likewise 2 more rows, up to cats/2.png)"
    assert "3 of 8 rows cannot be used" in problems[-1]


def test_strict_refuses_any(tmp_path):
    write_classes(tmp_path, {"cats": 20, "dogs": 20})
    (tmp_path / "cats" / "0.png").write_bytes(b"")
    assert len(problems_of(tmp_path, is_strict=True)) == 1


def test_a_kind_that_is_not_read_says_what_converts_it(tmp_path):
    write_classes(tmp_path, {"cats": 20, "dogs": 20})
    (tmp_path / "cats" / "my photo.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    problem = find_media(tmp_path, "image").skipped.found[0].problems[0]
    assert "is a .heic file, which is not read" in problem
    assert "magick 'my photo.HEIC' 'my photo'.png" in problem


def test_copies_and_contradictions_are_told(tmp_path):
    write_classes(tmp_path, {"cats": 3, "dogs": 3})
    shutil.copy(tmp_path / "cats" / "0.png", tmp_path / "cats" / "copy.png")
    shutil.copy(tmp_path / "cats" / "1.png", tmp_path / "dogs" / "cat.png")
    told = "\n".join(find_media(tmp_path, "image").warnings)
    assert "1 copy of other files (such as cats/0.png, cats/copy.png)" in told
    assert "cats/1.png = dogs/cat.png" in told


def test_copies_across_a_given_split_are_told(tmp_path):
    write_classes(tmp_path / "train", {"cats": 3, "dogs": 3})
    write_classes(tmp_path / "valid", {"cats": 1, "dogs": 1})
    told = "\n".join(find_media(tmp_path, "image").warnings)
    assert "also among the training rows: 2 validation rows (valid/cats/0.png, valid/dogs/0.png)" in told


# --- tables


def write_table(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path):
    """Four pictures in a folder of their own."""
    for number in range(4):
        write_picture(tmp_path / "images" / f"{number}.png", number)
    return tmp_path


def test_a_manifest_names_files_from_its_own_place(pictures):
    table = write_table(pictures / "list.csv", "path,label", "images/0.png,cat", "images/1.png,dog")
    data = find_media(table, "image")
    assert pairs(data.train) == [("list.csv line 2 (0.png)", "cat"), ("list.csv line 3 (1.png)", "dog")]
    assert data.files == (table,)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_metadata_as_datasets_has_it(pictures, suffix):
    rows = [{"file_name": f"{number}.png", "label": "ab"[number % 2]} for number in range(4)]
    file = pictures / "images" / f"metadata{suffix}"
    if suffix == ".csv":
        write_table(file, "file_name,label", *(",".join(row.values()) for row in rows))
    elif suffix == ".jsonl":
        write_table(file, *map(json.dumps, rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table as write_parquet

        write_parquet(pyarrow.Table.from_pylist(rows), file)
    data = find_media(pictures / "images", "image")
    assert [item.label for item in data.train] == ["a", "b", "a", "b"]


def test_metadata_in_each_folder_of_a_split(tmp_path):
    for split, begin in (("train", 0), ("test", 10)):
        for number in range(2):
            write_picture(tmp_path / split / f"{number}.png", begin + number)
        write_table(tmp_path / split / "metadata.csv", "file_name,label", "0.png,a", "1.png,b")
    data = find_media(tmp_path, "image")
    assert [item.path.parent.name for item in data.train] == ["train", "train"]
    assert [item.label for item in data.test] == ["a", "b"]


def test_a_file_that_is_named_without_its_folder_or_suffix_is_found(pictures):
    write_table(pictures / "train.csv", "image_id,label", "0,cat", "1.png,dog", "2,dog")
    data = find_media(pictures / "train.csv", "image")
    assert [item.path.name for item in data.train] == ["0.png", "1.png", "2.png"]
    assert "3 files named without a folder or suffix, found in images" in data.told


def test_a_name_that_several_files_have_is_not_guessed(pictures):
    write_picture(pictures / "other" / "0.png", 9)
    write_table(pictures / "train.csv", "image_id,label", "0,cat", "1,dog")
    assert "may be images/0.png, other/0.png" in problems_of(pictures / "train.csv")[0]


def test_everything_wrong_with_a_manifest_is_told_at_once(pictures):
    write_table(
        pictures / "list.jsonl",
        '{"path": "images/0.png", "label": "cat"}',
        '{"path": "images/gone.png", "label": "cat"}',
        '{"path": "images/1.png"}',
        '{"path": "https://example.org/1.png", "label": "cat"}',
        '{"path": 7, "label": "cat"}',
        '{"path": "images", "label": "cat"}',
        '{"path": "images/2.png", "label": ["cat", "dog"]}',
        "not json",
    )
    told = "\n".join(problems_of(pictures / "list.jsonl"))
    assert "line 2: names images/gone.png, which is not there" in told
    assert "line 3: has no label: expected a column called label" in told
    assert "line 4: path is 'https://example.org/1.png': expected a file on this machine" in told
    assert "line 5: path is 7: expected the path of a picture" in told
    assert "line 6: names images, which is no file" in told
    assert "line 7: label is a list: expected one label" in told
    assert "line 8 is not valid JSON" in told


def test_files_elsewhere_are_read_and_told(pictures, tmp_path_factory):
    elsewhere = write_picture(tmp_path_factory.mktemp("elsewhere") / "x.png", 7)
    write_table(pictures / "lists" / "list.csv", "path,label", f"{elsewhere},cat", "../images/0.png,dog")
    data = find_media(pictures / "lists" / "list.csv", "image")
    assert [item.path.name for item in data.train] == ["x.png", "0.png"]
    assert any("2 rows name a file outside of the folder of the table" in text for text in data.told)


def test_paths_as_windows_writes_them(pictures):
    write_table(pictures / "list.csv", "path,label", r"images\0.png,cat", r"images\1.png,dog")
    assert len(find_media(pictures / "list.csv", "image").train) == 2


def test_columns_may_be_named(pictures):
    write_table(pictures / "list.csv", "what,photo,label", "cat,images/0.png,x", "dog,images/1.png,x")
    data = find_media(pictures / "list.csv", "image", "photo", "what")
    assert [item.label for item in data.train] == ["cat", "dog"]
    told = problems_of(pictures / "list.csv", prompt_column="photos", completion_column="wat")
    assert any(
        "--prompt-column names photos, and no row has such a column (did you mean photo?)" in text for text in told
    )


def test_a_column_may_say_the_split(pictures):
    lines = [f"images/{number}.png,{'ab'[number % 2]},{'train' if number < 3 else 'Test'}" for number in range(4)]
    data = find_media(write_table(pictures / "list.csv", "path,label,split", *lines), "image")
    assert (len(data.train), data.valid, len(data.test)) == (3, None, 1)


def test_a_column_called_split_may_say_something_else(pictures):
    lines = [f"images/{number}.png,{'ab'[number % 2]},{'easy' if number else 'train'}" for number in range(4)]
    data = find_media(write_table(pictures / "list.csv", "path,label,subset", *lines), "image")
    assert len(data.train) == 4


def test_columns_of_a_folder_of_classes_are_refused(tmp_path):
    write_classes(tmp_path, {"cats": 1, "dogs": 1})
    assert "holds no table" in problems_of(tmp_path, prompt_column="path")[0]


def test_a_table_that_names_no_files_leaves_the_folders_as_classes(tmp_path):
    write_classes(tmp_path, {"cats": 1, "dogs": 1})
    write_table(tmp_path / "notes.csv", "author,year", "x,1999")
    data = find_media(tmp_path, "image")
    assert data.labels == ["cats", "dogs"]
    assert "notes.csv: not used, since no column names pictures" in data.told


def test_a_table_whose_first_row_lacks_its_path_is_read_all_the_same(tmp_path):
    write_classes(tmp_path, {"all": 12})
    rows = [f"{number and f'all/{number}.png' or ''},{'ab'[number % 2]}" for number in range(12)]
    write_table(tmp_path / "metadata.csv", "file_name,label", *rows)
    data = find_media(tmp_path, "image")
    assert data.labels == ["a", "b"]
    assert len(data.train) == 11
    assert any("metadata.csv line 2: has no column of paths" in text for text in data.skipped.told())


@pytest.mark.parametrize(
    ("lines", "reason"), [((), "metadata.csv is empty"), (("file_name,label",), "a header and no rows")]
)
def test_a_table_that_holds_no_rows_is_told_where_folders_are_taken(tmp_path, lines, reason):
    write_classes(tmp_path, {"cats": 2, "dogs": 2})
    table = write_table(tmp_path / "metadata.csv", *lines)
    if not lines:
        table.write_text("")
    data = find_media(tmp_path, "image")
    assert data.labels == ["cats", "dogs"]
    assert any("metadata.csv: not used, since" in text and reason in text for text in data.told)


def test_a_table_that_was_passed_over_is_named_where_its_folders_are_no_classes(tmp_path):
    write_classes(tmp_path, {"all": 3})
    write_table(tmp_path / "labels.csv", "id,breed", "1,pug", "2,boxer")
    told = problems_of(tmp_path)
    assert "have one label, 'all'" in told[0]
    assert told[1] == "labels.csv: not used, since no column names pictures."


def test_columns_that_are_not_used_are_told(pictures):
    lines = [f"images/{number}.png,{'ab'[number % 2]},x,{number},{'fold'[number:]}" for number in range(4)]
    data = find_media(write_table(pictures / "list.csv", "path,label,category,year,split", *lines), "image")
    assert data.labels == ["a", "b"]
    assert "columns not used: category, split, year" in data.told
    lines = [f"images/{number}.png,{'ab'[number % 2]},{'train' if number else 'test'}" for number in range(4)]
    data = find_media(write_table(pictures / "list.csv", "path,label,split", *lines), "image")
    assert not any("not used" in text for text in data.told)


def test_an_address_of_a_file_on_this_machine_is_a_path(tmp_path):
    paths = [write_picture(tmp_path / "my pictures" / f"{number}.png", number) for number in range(2)]
    write_table(tmp_path / "list.csv", "path,label", f"{paths[0].as_uri()},cat", f"{paths[1].as_uri()},dog")
    assert "%20" in paths[0].as_uri()
    assert [item.path.name for item in find_media(tmp_path / "list.csv", "image").train] == ["0.png", "1.png"]


def test_labels_that_are_probably_none_or_several_are_told(tmp_path):
    labels = ["cat", "NaN", "dog", "cat;dog", "dog;bird", "cat", "dog", "None"]
    for number in range(8):
        write_picture(tmp_path / "p" / f"{number}.png", number)
    rows = [f"p/{number}.png,{label}" for number, label in enumerate(labels)]
    told = "\n".join(find_media(write_table(tmp_path / "list.csv", "path,label", *rows), "image").warnings)
    assert "labels that may stand for none: 'NaN' (1), 'None' (1)" in told
    assert "labels that may be several in one: 'cat;dog' (1), 'dog;bird' (1)" in told
    classes = {"Lyon, France": 5, "cats and dogs": 5}
    assert not find_media(write_classes(tmp_path / "plain", classes), "image").warnings


def test_labels_that_each_stand_once_are_no_classes(tmp_path):
    for number in range(12):
        write_picture(tmp_path / "p" / f"{number}.png", number)
    rows = [f"p/{number}.png,{number * 0.37:.2f}" for number in range(12)]
    told = problems_of(write_table(tmp_path / "list.csv", "path,label", *rows))
    assert "each of 12 pictures has a label of its own ('0.00', '0.37', '0.74' and 9 more)" in told[0]


def test_a_table_without_paths_says_which_columns_it_has(tmp_path):
    write_table(tmp_path / "train.csv", "number,label", "1,cat", "2,dog")
    for path in (tmp_path, tmp_path / "train.csv"):
        assert "has no column of paths: expected file_name or path" in problems_of(path)[0]
        assert "the columns are number, label" in problems_of(path)[0]


def write_inside(path, column, feature, cells, **more):
    """A Parquet file with files inside, as the hub keeps data sets of pictures and clips."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table as write_parquet

    noted = {"info": {"features": {column: {"_type": feature}}}} if feature else {}
    table = pyarrow.table({column: cells, **more}).replace_schema_metadata({"huggingface": json.dumps(noted)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(table, path)
    return path


def test_pictures_inside_of_a_table_are_what_they_are_as_files(tmp_path):
    files = [write_picture(tmp_path / "files" / f"{number}.png", number) for number in range(3)]
    names = "a/0.png", "1.png", None
    cells = [{"bytes": file.read_bytes(), "path": name} for file, name in zip(files, names, strict=True)]
    table = write_inside(tmp_path / "data" / "train-00000-of-00001.parquet", "image", "Image", cells, label=[3, 4, 3])
    row = f"{table.name} row"
    for path in (table, tmp_path / "data"):
        data = find_media(path, "image")
        assert guess_kind(path) == "image"
        assert pairs(data.train) == [(f"{row} 1 (0.png)", "3"), (f"{row} 2 (1.png)", "4"), (f"{row} 3", "3")]
        assert [item.digest for item in data.train] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        for item, file in zip(data.train, files, strict=True):
            assert (read_picture(item.path, 8) == read_picture(file, 8)).all()
        assert not data.warnings[1:], data.warnings  # of few rows alone


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_clips_inside_of_a_table_are_what_they_are_as_files(tmp_path, suffix):
    files = [write_clip(tmp_path / "files" / f"{number}{suffix}", hertz=200 + number) for number in range(2)]
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = write_inside(tmp_path / "t.parquet", "audio", "Audio", cells, text=["one", "two"])
    assert guess_kind(table) == "audio"
    data = find_media(table, "audio", needed="text")
    assert [(item.text, round(item.seconds, 1)) for item in data.train] == [("one", 0.2), ("two", 0.2)]
    for item, file in zip(data.train, files, strict=True):
        assert (read_sound(item.path, 16000, 1.0) == read_sound(file, 16000, 1.0)).all()


def test_bytes_without_a_note_of_what_they_are_go_by_the_name_of_their_column(tmp_path):
    content = write_picture(tmp_path / "a.png").read_bytes()
    table = write_inside(tmp_path / "t.parquet", "img", "", [content] * 4, label=["a", "b"] * 2)
    assert guess_kind(table) == "image"
    assert len(find_media(table, "image").train) == 4


def test_what_is_wrong_with_a_file_inside_of_a_table_is_told_with_its_row(tmp_path):
    content = write_picture(tmp_path / "a.png").read_bytes()
    cells = [{"bytes": one, "path": name} for one, name in ((content, "a.png"), (content[:60], "b.png"))]
    cells += [None, {"bytes": b"abc", "path": "c.heic"}, {"bytes": None, "path": "gone.png"}]
    table = write_inside(tmp_path / "t.parquet", "image", "Image", cells, label=[*"ababa"])
    told = problems_of(table)
    assert [line.partition(":")[0] for line in told] == [
        "t.parquet row 3", "t.parquet row 5", "t.parquet row 2 (b.png)", "t.parquet row 4 (c.heic)",
        "4 of 5 rows cannot be used",
    ]  # fmt: skip
    assert "has no image: expected a picture in each row" in told[0]
    assert "names gone.png, which is not there" in told[1]
    assert "cannot be decoded whole" in told[2]
    assert "is a .heic file, which is not read" in told[3]


def test_quotes_are_text_in_a_table_with_bars_between_cells(tmp_path):
    """As LJ Speech has it: a cell may begin with a quote that does not end."""
    for number in range(3):
        write_clip(tmp_path / "wavs" / f"LJ-{number}.wav", hertz=200 + number)
    lines = ['LJ-0|"No, he said|"No, he said', "LJ-1|One, two.|One, two.", 'LJ-2|he said "yes"|he said "yes"']
    write_table(tmp_path / "metadata.csv", "file_name|text|normalized_text", *lines)
    data = find_media(tmp_path, "audio", needed="text")
    assert [item.text for item in data.train] == ['"No, he said', "One, two.", 'he said "yes"']
    assert [item.path.name for item in data.train] == ["LJ-0.wav", "LJ-1.wav", "LJ-2.wav"]


def test_a_table_that_was_passed_over_is_named_where_nothing_else_is_found(tmp_path):
    write_picture(tmp_path / "1.png", 1)
    write_picture(tmp_path / "2.png", 2)
    write_table(tmp_path / "labels.csv", "id,breed", "1,pug", "2,boxer")
    told = problems_of(tmp_path)
    assert "holds 2 pictures and no folder for each class" in told[0]
    assert told[1] == "labels.csv: not used, since no column names pictures."


@pytest.mark.parametrize(("cell", "is_refused"), [("\"['a', 'b']\"", True), ('"[0, 2]"', True), ("[PER]", False)])
def test_a_list_of_labels_written_as_text_is_no_label(tmp_path, cell, is_refused):
    for number in range(4):
        write_picture(tmp_path / f"{number}.png", number)
    write_table(tmp_path / "metadata.csv", "file_name,label", "0.png,x", "1.png,x", f"2.png,{cell}", f"3.png,{cell}")
    if is_refused:
        assert "a list: expected one label" in problems_of(tmp_path)[0]
    else:
        assert [item.label for item in find_media(tmp_path, "image").train] == ["x", "x", "[PER]", "[PER]"]


def test_one_class_is_enough_to_measure_on(tmp_path):
    write_classes(tmp_path, {"cats": 3})
    assert len(find_media(tmp_path, "image", is_learned=False).train) == 3


def test_a_path_that_is_nothing_is_refused(tmp_path):
    assert "does not exist" in problems_of(tmp_path / "picturs")[0]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    write_classes(tmp_path, {"cats": 2, "dogs": 2})
    real = os.scandir

    def scandir(place):
        if str(place).endswith("cats"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "cats cannot be read: Permission denied" in problems_of(tmp_path)[0]


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    assert "cannot be" in problems_of(tmp_path / ("x" * 300))[0]


def test_transcripts_as_common_voice_has_them(tmp_path):
    for number in range(3):
        write_clip(tmp_path / "clips" / f"{number}.wav", hertz=300 + 100 * number)
    write_table(tmp_path / "train.tsv", "client_id\tpath\tsentence", *(f"x\t{n}.wav\tclip {n}" for n in range(2)))
    write_table(tmp_path / "dev.tsv", "client_id\tpath\tsentence", "x\t2.wav\tclip 2")
    data = find_media(tmp_path, "audio", needed="text")
    assert [item.text for item in data.train] == ["clip 0", "clip 1"]
    assert [item.text for item in data.valid] == ["clip 2"]
    assert data.train[0].seconds == pytest.approx(0.2)


def test_a_table_of_transcripts_without_names_of_columns_says_so(tmp_path):
    for number in range(2):
        write_clip(tmp_path / "wavs" / f"LJ001-000{number}.wav")
    write_table(tmp_path / "metadata.csv", "LJ001-0000;Printing 1;Printing one", "LJ001-0001;In 2;In two")
    told = "\n".join(problems_of(tmp_path, "audio", needed="text"))
    assert "put a line of names above it" in told


def test_folders_have_no_transcripts(tmp_path):
    write_clip(tmp_path / "a" / "0.wav")
    assert "has no transcripts" in problems_of(tmp_path, "audio", needed="text")[0]


def test_a_path_as_datasets_writes_it(pictures):
    write_table(pictures / "l.jsonl", *(json.dumps({"image": {"path": f"images/{n}.png"}, "label": n}) for n in (0, 1)))
    assert [item.label for item in find_media(pictures / "l.jsonl", "image").train] == ["0", "1"]


# --- files without labels


def test_files_whose_labels_are_to_be_found(tmp_path):
    write_picture(tmp_path / "a.png", 1)
    write_picture(tmp_path / "deep" / "b.png", 2)
    data = find_media(tmp_path, "image", needed="")
    assert pairs(data.train) == [("a.png", None), ("deep/b.png", None)]
    assert pairs(find_media(tmp_path / "a.png", "image", needed="").train) == [("a.png", None)]


@pytest.mark.parametrize(("name", "kind"), [("a.PNG", "image"), ("a.wav", "audio"), ("a.txt", "")])
def test_what_a_folder_holds_is_guessed(tmp_path, name, kind):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_bytes(b"x")
    assert guess_kind(tmp_path) == kind


def test_what_a_table_names_is_guessed(tmp_path):
    assert guess_kind(write_table(tmp_path / "a.csv", "path,label", "x/y.flac,cat")) == "audio"
    assert guess_kind(write_table(tmp_path / "b.csv", "prompt,completion", "hello,cat")) == ""
    assert guess_kind(write_table(tmp_path / "c.tsv", "path\tsentence", "y.mp3\thello")) == "audio"


def test_what_may_be_text_to_learn_from_is_text(tmp_path):
    rows = [{"prompt": "What is it?", "completion": "A cat.", "image": "1.png"}] * 2
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "file": "1.png"}]
    assert guess_kind(write_table(tmp_path / "a.jsonl", *map(json.dumps, rows))) == ""
    assert guess_kind(write_table(tmp_path / "b.jsonl", *map(json.dumps, chat))) == ""
    folder = write_classes(tmp_path / "manual", {"figures": 9})
    write_table(folder / "chapter.md", "Some text.")
    assert guess_kind(folder) == ""
    write_classes(tmp_path / "pets", {"cat": 30, "dog": 30})
    write_table(tmp_path / "pets" / "classes.txt", "cat", "dog")
    assert guess_kind(tmp_path / "pets") == "image"


def test_pictures_beside_a_table_of_names_without_suffix_are_guessed(pictures):
    write_table(pictures / "train.csv", "image_id,label", "0,cat", "1,dog")
    assert guess_kind(pictures) == "image"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of Unix")
def test_a_named_pipe_is_no_picture_and_is_not_waited_for(tmp_path):
    write_classes(tmp_path, {"cats": 10, "dogs": 10})
    os.mkfifo(tmp_path / "cats" / "pipe.png")
    data = find_media(tmp_path, "image")
    assert len(data.train) == 20
    assert "cats/pipe.png: cannot be read: it is no file, but a pipe" in data.skipped.told()[0]


def test_files_for_tests_without_labels_are_no_reason_not_to_train(tmp_path):
    """As contests give them."""
    write_classes(tmp_path / "train", {"cats": 3, "dogs": 3})
    for number in range(5):
        write_picture(tmp_path / "test" / f"{number}.png", 20 + number)
    data = find_media(tmp_path, "image")
    assert (len(data.train), data.test) == (6, None)
    assert "test has no folders of classes, and is not used: test/0.png" in data.warnings[0]
    write_table(tmp_path / "train.csv", "file,label", *(f"train/{kind}/1.png,{kind}" for kind in ("cats", "dogs")))
    write_table(tmp_path / "test.csv", "file", *(f"test/{number}.png" for number in range(5)))
    data = find_media(tmp_path, "image")
    assert (len(data.train), not data.test, data.skipped.count, data.skipped.rows) == (2, True, 0, 2)
    assert "no row for tests can be used (5 rows)" in data.warnings[0]
    assert "test.csv line 2: has no label" in problems_of(tmp_path, is_strict=True)[0]


def test_rows_that_mean_a_piece_of_a_clip_are_refused(tmp_path):
    """As manifests of NeMo have them: what is said in the piece is not what the whole clip says."""
    write_clip(tmp_path / "long.wav", 2)
    rows = [{"audio_filepath": "long.wav", "offset": at / 10, "text": f"word {at}"} for at in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = problems_of(tmp_path / "train.jsonl", "audio", needed="text")
    assert "train.jsonl line 2: has the offset 0.1, so it is a piece of a longer clip" in told[0]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert len(find_media(tmp_path / "train.jsonl", "audio", needed="text").train) == 1


def test_paths_that_lead_nowhere_are_one_problem(tmp_path):
    write_table(tmp_path / "t.csv", "path,label", *(f"data/{letter}.png,{letter}" for letter in "abcd"))
    told = problems_of(tmp_path / "t.csv")
    assert told[0].startswith("t.csv line 2: names data/a.png, which is not there: expected a file in ")
    assert told[0].endswith("write the paths from there (likewise 3 more rows, up to t.csv line 5)")
