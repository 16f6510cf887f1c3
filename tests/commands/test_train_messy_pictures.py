"""`thimble train` on a folder as people have them: what is broken is named and left out, the rest is learned from."""

import json
import shutil

import pytest

import thimble
from media_files import write_classes
from thimble.errors import InputError

MODEL = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model.preprocessing = {"size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return model
"""


@pytest.fixture
def model(tmp_path):
    (tmp_path / "my_model.py").write_text(MODEL)
    return f"{tmp_path / 'my_model.py'}:build"


@pytest.fixture
def messy(tmp_path):
    folder = write_classes(tmp_path / "pets", {"cat": 30, "dog": 30})
    content = (folder / "cat" / "3.png").read_bytes()
    (folder / "cat" / "3.png").write_bytes(content[: len(content) // 2])
    (folder / "dog" / "phone.HEIC").write_bytes(b"x")
    shutil.copy(folder / "cat" / "1.png", folder / "cat" / "1 (copy).png")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    return folder


def test_what_is_broken_is_told_listed_and_left_out(messy, model, tmp_path):
    report = thimble.train(messy, base=model, out=str(tmp_path / "run"), max_steps=1)
    assert (report.status, report.skipped_rows) == ("done", 2)
    assert report.training_rows + report.validation_rows == 60
    told = "\n".join(report.messages["warning"])
    assert "2 of 62 rows cannot be used and are left out (--strict refuses them): cat/3.png: cannot be decoded" in told
    assert "1 copy of other files" in told
    assert "files not used: notes.txt" in "\n".join(report.messages["note"])
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["cat/3.png", "dog/phone.HEIC"]


def test_strict_refuses_them_with_what_is_wrong_elsewhere(messy, model, tmp_path):
    with pytest.raises(InputError) as refused:
        thimble.train(messy, base=model, out=str(tmp_path / "run"), max_steps=1, strict=True, batch_tokens=9)
    told = str(refused.value)
    assert "cat/3.png: cannot be decoded whole" in told
    assert "dog/phone.HEIC: is a .heic file" in told
    assert "--batch-tokens 9" in told
    assert not (tmp_path / "run").exists()


def test_a_folder_that_lost_a_class_is_refused(messy, model, tmp_path):
    shutil.rmtree(messy / "dog")
    with pytest.raises(InputError, match="one label, 'cat'"):
        thimble.train(messy, base=model, out=str(tmp_path / "run"), max_steps=1, task="classify-image")
