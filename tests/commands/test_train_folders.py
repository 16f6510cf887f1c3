"""Hugging Face folders as bases of tasks other than text: opened in the class of the task, and refused by name."""

import json

import numpy as np
import pytest
import torch

import thimble
from thimble.errors import InputError

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
Image = pytest.importorskip("PIL.Image")
SIZE = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Dark and bright noise, in a folder each."""
    folder = tmp_path_factory.mktemp("light")
    random = np.random.default_rng(0)
    for label, most in (("dark", 150), ("bright", 255), ("black", 60)):
        (folder / label).mkdir()
        for number in range(16):
            picture = random.integers(0, most, size=(SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT without a head, as pretraining leaves it."""
    folder = tmp_path_factory.mktemp("bases") / "vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=SIZE, patch_size=8
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    values = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


QUICK = {"max_steps": 6, "batch_rows": 8, "valid_split": 0.25, "learning_rate": 0.01, "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def run(pictures, vit, tmp_path_factory):
    return thimble.train(pictures, base=str(vit), out=str(tmp_path_factory.mktemp("runs") / "vit"), **QUICK)


def test_peft_opens_the_adapter_on_the_class_that_the_card_names(run, pictures, vit, tmp_path):
    card = (tmp_path / run.adapter / "README.md").read_text()
    assert "AutoModelForImageClassification" in card
    torch.manual_seed(1)
    base = transformers.AutoModelForImageClassification.from_pretrained(vit, num_labels=3)
    model = peft.PeftModel.from_pretrained(base, run.adapter).eval()
    thimble.generate(pictures, adapter=run.out, out=str(tmp_path / "said.jsonl"))
    labels = ["black", "bright", "dark"]
    for line in map(json.loads, (tmp_path / "said.jsonl").read_text().splitlines()[::7]):
        picture = np.asarray(Image.open(pictures / line["file"]), np.float32)
        pixels = torch.from_numpy(((picture / 255 - 0.5) / 0.25).transpose(2, 0, 1)[None])
        shares = model(pixel_values=pixels).logits.softmax(1)[0].tolist()
        assert [line["probabilities"][label] for label in labels] == pytest.approx(shares, abs=1e-4)


def test_a_merged_folder_says_what_base_and_adapter_say(run, vit, tmp_path):
    report = thimble.merge(run.out, out=str(tmp_path / "merged"))
    assert (report.wrote, report.loader) == ("base", "AutoModelForImageClassification")
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    base = transformers.AutoModelForImageClassification.from_pretrained(vit, num_labels=3)
    expected = peft.PeftModel.from_pretrained(base, run.adapter).eval()(pixel_values=pixels).logits
    merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(pixel_values=pixels).logits, expected, atol=1e-5)
    assert merged.config.id2label == {0: "black", 1: "bright", 2: "dark"}


def test_plan_measures_the_module_and_writes_nothing(pictures, vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = thimble.plan(pictures, base=str(vit), **QUICK)
    assert (report.task, report.unit, report.steps, report.rows) == ("classify-image", "pixels", 6, 36)
    assert report.memory["activations"] > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="--machine"):
        thimble.plan(pictures, base=str(vit), machine="cores=4", **QUICK)


def copied(vit, target, **changes):
    target.mkdir()
    for path in vit.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((vit / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_folders_that_cannot_be_opened_are_refused_with_the_reason(pictures, vit, tmp_path):
    def told(base):
        with pytest.raises(InputError) as refused:
            thimble.train(pictures, base=str(base), out=str(tmp_path / "run"), task="classify-image", **QUICK)
        return str(refused.value)

    pickled = copied(vit, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "convert them to safetensors" in told(pickled)
    assert "code of its own" in told(copied(vit, tmp_path / "code", model_type="mine", auto_map={"AutoModel": "x.Y"}))
    assert "model_type" in told(copied(vit, tmp_path / "unknown", model_type="nobody_knows"))
    assert "AutoModelForImageClassification" in told(copied(vit, tmp_path / "bert", model_type="bert"))
    assert "no base is given" in str(pytest.raises(InputError, thimble.train, pictures, **QUICK).value)
    assert not (tmp_path / "run").exists()
