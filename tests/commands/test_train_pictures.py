"""`thimble train` on folders of pictures: the head first, then LoRA and head, with the report of every run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import thimble
from thimble.errors import InputError
from thimble.files.peft import load_adapter

SIZE = 12
MODEL = '''
"""A small network for pictures, as a user would write it."""

import torch
from torch import nn


class Net(nn.Module):
    preprocessing = {"size": 12, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU())
        self.classifier = nn.Linear(16, 5)

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def build():
    torch.manual_seed(7)
    return Net()
'''


def draw(kind, number):
    """A bar that stands or lies, or a square, in a noisy picture."""
    random = np.random.default_rng(number)
    picture = random.integers(0, 120, size=(SIZE, SIZE, 3), dtype=np.uint8)
    row, column = random.integers(2, SIZE - 4, size=2)
    rows, columns = {"lying": (1, 6), "standing": (6, 1), "square": (3, 3)}[kind]
    picture[row : row + rows, column : column + columns] = 255
    return Image.fromarray(picture)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for kind in ("lying", "standing", "square"):
        (folder / kind).mkdir()
        for number in range(40):
            draw(kind, number).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "my_model.py"
    path.write_text(MODEL)
    return f"{path}:build"


QUICK = {"max_steps": 12, "batch_rows": 16, "valid_split": 0.25, "learning_rate": 0.01}


def test_a_folder_of_pictures_becomes_an_adapter_and_a_report(pictures, model, tmp_path):
    report = thimble.train(pictures, base=model, out=str(tmp_path / "run"), **QUICK)
    assert (report.status, report.task, report.steps) == ("done", "classify-image", 12)
    assert (report.training_rows, report.validation_rows) == (90, 30)
    assert report.metrics_rows == 30
    assert 0 <= report.metrics_before["accuracy"] <= 1
    assert report.loss_after < report.loss_base
    folded = "convolutions: 3 train channels last, 1 of them with the frozen norm behind folded in"
    assert folded in report.messages["decision"]
    assert report.labels["training_rows"] == {"lying": 30, "square": 30, "standing": 30}
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written["task"] == "classify-image"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "general text" not in page
    assert page.count('<img src="data:image/') == 24
    assert "24 of 30 validation rows" in page
    assert "--seq-len" not in page
    assert "frozen model with a trained head" in page
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert sorted(config["target_modules"]) == ["blocks.0", "blocks.2"]


def test_a_run_that_is_cut_short_ends_as_it_would_have(pictures, model, tmp_path):
    whole = thimble.train(pictures, base=model, out=str(tmp_path / "whole"), checkpoint_every_steps=5, **QUICK)
    steps = []
    cut = thimble.train(
        pictures, base=model, out=str(tmp_path / "cut"), checkpoint_every_steps=5, **QUICK,
        on_event=lambda event: steps.append(event) if event.kind == "step" else None,
        should_stop=lambda: len(steps) == 7,
    )  # fmt: skip
    assert (whole.status, cut.status) == ("done", "interrupted")
    with pytest.raises(InputError, match="--store int8: the run to resume began with dense"):
        thimble.train(pictures, base=model, out=str(tmp_path / "cut"), resume=True, store="int8")
    again = thimble.train(pictures, base=model, out=str(tmp_path / "cut"), resume=True)
    assert again.status == "done"
    ours, theirs = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert ours == theirs
    assert again.loss_after == whole.loss_after


def test_pictures_inside_of_a_table_make_the_adapter_that_files_make(pictures, model, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    files = sorted(pictures.rglob("*.png"))
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pyarrow.table({"image": cells, "label": [file.parent.name for file in files]})
    write_table(table, tmp_path / "train.parquet")
    made = []
    for data, name in ((pictures, "files"), (tmp_path / "train.parquet", "table")):
        report = thimble.train(data, base=model, out=str(tmp_path / name), **{**QUICK, "max_steps": 3})
        assert report.validation_rows == 30
        made.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]
    assert (tmp_path / "table" / "report.html").read_text().count('<img src="data:image/') == 24
    [line, *others] = thimble.generate(tmp_path / "train.parquet", adapter=str(tmp_path / "table"))
    assert line["file"] == f"train.parquet row 1 ({files[0].name})"
    assert len(others) == 119


def test_a_module_that_fails_on_its_pictures_is_told_with_its_line(pictures, tmp_path):
    program = tmp_path / "grey.py"
    program.write_text(MODEL.replace("nn.Conv2d(3, 8", "nn.Conv2d(1, 8").replace("[0.5, 0.5, 0.5]", "0.5"))
    with pytest.raises(InputError) as refused:
        thimble.train(pictures, base=f"{program}:build", out=str(tmp_path / "run"), **QUICK)
    assert "base grey.py:build fails on what it is given, which is pixel_values (1, 3, 12, 12)" in str(refused.value)
    assert re.search(r"grey.py line \d+ \(return self.classifier\(", str(refused.value))
    program.write_text(program.read_text().replace('{"size"', '{"num_channels": 1, "size"'))
    assert thimble.train(pictures, base=f"{program}:build", out=str(tmp_path / "run"), **QUICK).status == "done"


def test_options_that_say_nothing_for_pictures_are_refused_together(pictures, model, tmp_path):
    with pytest.raises(InputError) as refused:
        thimble.train(
            pictures, base=model, out=str(tmp_path / "run"), batch_tokens=100, keep_general=0.5, targets="nope",
            remeasure=True,
        )  # fmt: skip
    told = str(refused.value)
    assert "--batch-tokens 100: says nothing for --task classify-image" in told
    assert "--keep-general 0.5" in told
    assert "--remeasure: says nothing for --task classify-image, only for text; leave it out" in told
    assert "'nope', which no module" in told
    assert not (tmp_path / "run").exists()


@pytest.fixture
def uneven(pictures, tmp_path):
    """Forty pictures of one shape, four of each of two others."""
    for kind, count in (("lying", 40), ("standing", 4), ("square", 4)):
        for number in range(count):
            (tmp_path / "uneven" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures / kind / f"{number}.png", tmp_path / "uneven" / kind)
    return tmp_path / "uneven"


@pytest.mark.parametrize("targets", ["all-linear", "blocks.2"])  # with the second, features are kept
def test_class_weights_reach_the_head_and_the_steps(uneven, model, tmp_path, targets):
    options = {**QUICK, "learning_rate": 1e-3, "valid_split": 0.0, "targets": targets, "max_steps": 2}
    told, heads, losses = {}, {}, {}
    for weights in ("none", "balanced"):
        out = tmp_path / weights
        report = thimble.train(uneven, base=model, out=str(out), class_weights=weights, **options)
        told[weights] = [text for text in report.messages["decision"] if text.startswith("class weights")]
        heads[weights] = load_adapter(out / "adapter").replaced["classifier.bias"]
        losses[weights] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert told == {"none": [], "balanced": ["class weights: 0.4 lying, 4 square, 4 standing"]}
    assert heads["balanced"][1:].sum() - heads["balanced"][0] > heads["none"][1:].sum() - heads["none"][0]
    assert losses["balanced"] != losses["none"]


def test_class_weights_say_nothing_where_there_are_no_classes(pictures, tmp_path):
    with pytest.raises(InputError, match="--class-weights balanced: says nothing for --task embed, only for classify"):
        thimble.plan(pictures, base="nowhere", task="embed", class_weights="balanced")


def test_what_the_frozen_beginning_makes_is_kept_and_changes_nothing(pictures, model, tmp_path):
    runs = {"kept": {}, "read once": {"max_steps": 5}, "changed": {"augment": "shift"}}
    steady = {
        "targets": "blocks.2",
        "schedule": "constant",
        "warmup_steps": 0,
        "adam_beta2": 0.99,
        "learning_rate": 1e-3,
    }
    reports, losses = {}, {}
    for name, options in runs.items():
        out = tmp_path / name
        reports[name] = thimble.train(pictures, base=model, out=str(out), **{**QUICK, **steady, **options})
        losses[name] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [text for text in reports["kept"].messages["decision"] if "run once over the training rows" in text]
    assert told == [
        "the first 2 blocks of module blocks: run once over the training rows; "
        "what comes of it is kept on disk meanwhile"
    ]
    assert not any("run once" in text for text in reports["read once"].messages["decision"])
    assert losses["kept"][:5] == pytest.approx(losses["read once"], abs=1e-5)
    assert any("--augment changes its inputs" in text for text in reports["changed"].messages["note"])


@pytest.fixture(scope="module")
def run(pictures, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    answers = folder / "answers.jsonl"
    return thimble.train(pictures, base=model, out=str(folder / "run"), answers=str(answers), **QUICK)


def test_its_speed_is_that_of_pictures_everywhere(run):
    from thimble.report.terminal import render_train

    out = Path(run.out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["rows"] for line in lines} == {16, 10}  # of 90 rows six steps make an epoch
    assert run.rows_per_second == pytest.approx(sum(line["rows"] for line in lines) / run.seconds)
    assert "pictures/s, " in render_train(run)
    page = (out / "report.html").read_text()
    assert "Pictures per second" in page
    assert "Pixels per second" not in page


def test_a_plan_counts_the_weights_of_the_module(pictures, model):
    from thimble.report.terminal import render_plan

    plan = thimble.plan(pictures, base=model, **QUICK)
    convolutions, norm, head = 8 * 27 + 16 * 8 + 16 + 16 * 16 + 16, 4 * 8, 16 * 3 + 3
    assert plan.memory["weights"] == 4 * (convolutions + norm + head) + 8  # and the counter of the norm
    assert plan.memory["process"] > 0
    assert plan.rows_per_second > 0
    shown = render_plan(plan)
    assert "classify-image: 90 pictures\n" in shown
    assert "pictures/s, " in shown


def test_options_that_say_nothing_for_a_finished_adapter_are_refused_together(run, pictures, tmp_path):
    with pytest.raises(InputError) as refused:
        thimble.evaluate(pictures, adapter=run.out, metric="exact", eval_rows=5, compute="bf16")
    told = str(refused.value)
    assert "--metric exact: says nothing for --task classify-image" in told
    assert "--eval-rows 5" in told
    assert "--compute bf16: only for text" in told
    with pytest.raises(InputError) as refused:
        thimble.generate(pictures, adapter=run.out, out=str(tmp_path / "x.jsonl"), temperature=0.5, decode="int8")
    assert "--temperature 0.5" in str(refused.value)
    assert "--decode int8" in str(refused.value)
    with pytest.raises(InputError, match="--weight is for several adapters: leave it out"):
        thimble.merge(run.out, out=str(tmp_path / "merged"), weight=[0.5])
    assert not (tmp_path / "merged").exists()


def test_it_is_evaluated_beside_the_frozen_model_with_its_head(run, pictures, tmp_path):
    answers = [json.loads(line) for line in (Path(run.out).parent / "answers.jsonl").read_text().splitlines()]
    for answer in answers:  # the pictures that were held out
        (tmp_path / answer["source"]).parent.mkdir(exist_ok=True)
        shutil.copy(pictures / answer["source"], tmp_path / answer["source"])
    report = thimble.evaluate(tmp_path, adapter=run.out)
    assert [result.name for result in report.results] == ["the frozen model with a trained head", run.out]
    head, lora = report.results
    assert report.rows == len(answers) == 30
    assert (head.loss, lora.loss) == pytest.approx((run.loss_base, run.loss_after), abs=1e-6)
    assert lora.scores == run.metrics_after
    assert lora.loss_comparison["rows"] == lora.metric_comparisons["accuracy"]["rows"] == 30
    assert lora.labels["rows"] == 30


def test_a_run_that_has_ended_goes_by_its_data_wherever_they_lie(run, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "moved")
    again = thimble.train(tmp_path / "moved", out=run.out, resume=True)
    assert (again.status, again.loss_after) == ("done", run.loss_after)
    (tmp_path / "moved" / "lying" / "0.png").unlink()
    with pytest.raises(InputError, match="DATA .*moved: the run in .*, which has ended, was made with others"):
        thimble.train(tmp_path / "moved", out=run.out, resume=True)


def test_a_folder_is_labelled_picture_by_picture(run, pictures, tmp_path):
    out = tmp_path / "labels.jsonl"
    report = thimble.generate(pictures, adapter=run.out, out=str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert (report.status, report.answered, len(lines)) == ("done", 120, 120)
    for line in lines:
        assert line["probabilities"][line["label"]] == line["probability"] == max(line["probabilities"].values())
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    told = sum(line["label"] == line["file"].split("/")[0] for line in lines)
    assert told / 120 == pytest.approx(thimble.evaluate(pictures, adapter=run.out).results[1].scores["accuracy"])


def test_a_file_that_cannot_be_decoded_is_counted_and_told_where_a_label_would_be(run, pictures, tmp_path):
    folder = tmp_path / "unknown"
    folder.mkdir()
    for number in range(12):
        shutil.copy(pictures / "lying" / f"{number}.png", folder)
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:80])
    report = thimble.generate(folder, adapter=run.out, out=str(tmp_path / "labels.jsonl"))
    assert (report.rows, report.answered, report.unanswered) == (13, 12, 1)
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines if "label" not in line] == ["cut.png"]
    assert "cannot be decoded whole" in lines[-1]["error"]
    assert "1 of 13 rows cannot be used" in str(report.messages["warning"])
    shutil.copytree(folder, tmp_path / "known" / "lying")
    shutil.copytree(pictures / "square", tmp_path / "known" / "square")
    found = thimble.evaluate(tmp_path / "known", adapter=run.out)
    assert "1 of 53 rows cannot be used" in str(found.messages["warning"])
    shutil.copytree(folder, tmp_path / "one" / "lying")
    assert thimble.evaluate(tmp_path / "one", adapter=run.out).rows == 12


@pytest.mark.parametrize(("command", "options"), [("chat", {}), ("export", {"out": "x.gguf"}), ("serve", {})])
def test_commands_for_text_refuse_it_by_name(run, command, options):
    named = {"adapter": run.out} if command in ("chat", "serve") else {}
    with pytest.raises(InputError, match="was trained for classify-image"):
        getattr(thimble, command)(*([] if named else [run.out]), **named, **options)
