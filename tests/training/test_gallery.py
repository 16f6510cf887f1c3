from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from media_files import write_clip, write_picture
from thimble.data.media.items import Item
from thimble.training.answers import Answer
from thimble.training.gallery import make_gallery
from thimble.training.tasks.labels import label_details


def answers(words, references):
    return [
        Answer(f"{n}", right, said, {}, f"{n}") for n, (said, right) in enumerate(zip(words, references, strict=True))
    ]


def facts(task, media, has_labels=True):
    return SimpleNamespace(task=task, media=media, metric=SimpleNamespace(has_labels=has_labels))


def test_pictures_that_changed_come_first_and_one_that_is_gone_is_left_out(tmp_path):
    media = {f"{n}": write_picture(tmp_path / f"{n}.png", n) for n in range(4)}
    media["1"].unlink()
    before, after = answers("aabb", "abba"), answers("abab", "abba")
    shown = make_gallery(facts("classify-image", media), None, before, after)
    assert [one.source for one in shown] == ["2", "3", "0"]
    assert (shown[0].reference, shown[0].before, shown[0].after) == ("b", "b", "a")
    assert all(one.uri.startswith("data:image/") for one in shown)


def test_transcripts_play_the_clips_of_the_samples(tmp_path):
    media = {f"{n}": write_clip(tmp_path / f"{n}.wav") for n in range(4)}
    report = SimpleNamespace(samples=[{"asked": "2"}, {"asked": "0"}])
    shown = make_gallery(facts("transcribe", media, False), report, answers("xxxx", "abcd"), answers("abcx", "abcd"))
    assert [one.source for one in shown] == ["0", "2"]
    assert all(one.is_clip for one in shown)


@pytest.mark.parametrize("task", ["text", "classify-text", "embed", "classify-image"])
def test_without_media_or_without_an_end_nothing_is_shown(task):
    after = [] if task == "classify-image" else answers("a", "a")
    assert make_gallery(facts(task, {}), None, answers("a", "a"), after) == []


def test_details_of_labels_are_those_of_the_rows():
    random = np.random.default_rng(0)
    numbers = random.integers(0, 2, 200)
    items = [Item(Path("x"), "x", "ab"[number]) for number in numbers]
    outputs = list(random.standard_normal((200, 2)) + 3 * np.eye(2)[numbers])
    found = label_details(outputs, items, ["a", "b"])
    assert found["calibration"]["rows"] == 200
    assert found["thresholds"]["name"] == ("a" if (numbers == 0).sum() < 100 else "b")
    assert label_details(outputs[:10], items[:10], ["a", "b"]) == {}
    assert label_details(outputs, [Item(Path("x"), "x")] * 200, ["a", "b"]) == {}
