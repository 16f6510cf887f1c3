"""Adapters of other tasks than text that PEFT itself trained: no notes of Thimble's, the same logits as in PEFT."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers

import thimble
from encoders import TOPICS, sentences, write_encoder, write_rows
from media_files import write_picture
from thimble.errors import InputError

SIZE = 16


def train_a_little(model, batch, steps=3):
    """A few steps, so that B is not zero and the head is another one."""
    torch.manual_seed(1)
    optimiser = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 0.05)
    for _ in range(steps):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def tokens_of(encoder, texts):
    return transformers.AutoTokenizer.from_pretrained(encoder)(texts, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def topics(encoder, tmp_path_factory):
    """A classifier of texts, as PEFT's users train it: the folder, and the model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    model = peft.get_peft_model(model, config)
    texts = [row["text"] for row in sentences()][::4]
    labels = torch.tensor([list(TOPICS).index(row["label"]) for row in sentences()][::4])
    model = train_a_little(model, {**tokens_of(encoder, texts), "labels": labels})
    folder = tmp_path_factory.mktemp("topics") / "adapter"
    model.save_pretrained(folder)
    return folder, model


def test_a_classifier_of_texts_says_what_it_says_in_peft(topics, encoder, tmp_path):
    folder, model = topics
    rows = sentences()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    thimble.generate(data, adapter=str(folder), out=str(tmp_path / "labels.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows)
    with torch.no_grad():
        for row, line in list(zip(rows, lines, strict=True))[::17]:
            theirs = model(**tokens_of(encoder, [row["text"]])).logits.softmax(1)[0]
            np.testing.assert_allclose(list(line["probabilities"].values()), theirs.numpy(), atol=2e-6)
            assert list(line["probabilities"]) == ["animal", "colour", "tool"]


def test_it_is_measured_and_what_was_taken_for_granted_is_told(topics, tmp_path):
    folder, _ = topics
    report = thimble.evaluate(write_rows(tmp_path / "rows.jsonl", sentences()), adapter=str(folder))
    assert [result.name for result in report.results] == [str(folder)]  # the base has no head to compare with
    assert any("task: classify-text, since PEFT calls it SEQ_CLS" in text for text in report.messages["decision"])
    [warning] = [text for text in report.messages["warning"] if "order of the alphabet" in text]
    assert "0 animal, 1 colour, 2 tool" in warning


def test_a_language_says_nothing_for_texts(topics, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    with pytest.raises(InputError, match="--language es: says nothing for --task classify-text, only for transcribe"):
        thimble.evaluate(data, adapter=str(topics[0]), language="es")


@pytest.mark.parametrize("command", ["evaluate", "generate", "merge"])
def test_a_task_without_an_adapter_is_refused_in_words(command, topics, tmp_path):
    words = [] if command == "merge" else [write_rows(tmp_path / "rows.jsonl", sentences())]
    out = {} if command == "evaluate" else {"out": str(tmp_path / "x.jsonl")}
    with pytest.raises(InputError, match="no adapter is given: name its folder"):
        getattr(thimble, command)(*words, task="classify-text", **out)


def test_other_numbers_of_labels_are_refused(topics, tmp_path):
    folder, _ = topics
    rows = [row for row in sentences() if row["label"] != "tool"]
    with pytest.raises(InputError, match="has 2 labels .*tells 3 apart: write them into id2label"):
        thimble.evaluate(write_rows(tmp_path / "rows.jsonl", rows), adapter=str(folder))


def test_labels_that_are_numbers_are_those_of_the_head(topics, tmp_path):
    folder, _ = topics
    rows = [{**row, "label": str(list(TOPICS).index(row["label"]))} for row in sentences() if row["label"] != "colour"]
    report = thimble.evaluate(write_rows(tmp_path / "rows.jsonl", rows), adapter=str(folder))
    assert report.rows == 80
    assert not any("alphabet" in text for text in report.messages["warning"])


def test_merging_it_gives_a_model_that_transformers_opens(topics, encoder, tmp_path):
    folder, model = topics
    thimble.merge(str(folder), out=str(tmp_path / "merged"))
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = tokens_of(encoder, ["the cat dog cow .", "red"])
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_inspect_tells_what_it_is_for(topics):
    report = thimble.inspect(str(topics[0]))
    assert any("PEFT's SEQ_CLS" in text for text in report.messages["note"])
    assert len(report.updates) == 4


def test_embeddings_are_those_of_peft(encoder, tmp_path):
    torch.manual_seed(2)
    model = transformers.AutoModel.from_pretrained(encoder)
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    texts = ["the cat .", "red", "a saw hammer drill ."]
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    thimble.generate(data, adapter=str(tmp_path / "adapter"), out=str(tmp_path / "made.npy"))
    batch = tokens_of(encoder, texts)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    np.testing.assert_allclose(np.load(tmp_path / "made.npy"), theirs.numpy(), atol=1e-5)


# ---- pictures -------------------------------------------------------------------------------------------------------


def write_vit(folder, labels=()):
    """A tiny ViT, with a head for these labels, or none."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=SIZE,
        patch_size=4, initializer_range=0.2, id2label=dict(enumerate(labels)) or None,
    )  # fmt: skip
    kind = transformers.ViTForImageClassification if labels else transformers.ViTModel
    kind(config).save_pretrained(folder)
    prepared = {
        "resample": 2,
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", **prepared})
    )
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for number, label in enumerate(["cat", "dog"] * 8):
        write_picture(folder / label / f"{number}.png", number, (3 * SIZE, 2 * SIZE))
    return folder


def test_a_classifier_of_pictures_has_the_labels_of_its_base(shapes, tmp_path):
    base = write_vit(tmp_path / "vit", ["dog", "cat"])
    model = transformers.ViTForImageClassification.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    report = thimble.evaluate(shapes, adapter=str(tmp_path / "adapter"))
    assert [result.name for result in report.results] == ["base", str(tmp_path / "adapter")]
    thimble.generate(shapes, adapter=str(tmp_path / "adapter"), out=str(tmp_path / "labels.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert list(lines[0]["probabilities"]) == ["dog", "cat"]
    _compare_pictures(lines, shapes, model)


def _compare_pictures(lines, shapes, model, resample=2):
    from PIL import Image

    for line in lines[::5]:
        picture = Image.open(shapes / line["file"]).convert("RGB").resize((SIZE, SIZE), resample)
        pixels = np.asarray(picture, np.float32) / 255
        batch = torch.from_numpy((pixels - 0.5) / 0.25).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            theirs = model(pixel_values=batch).logits.softmax(1)[0]
        np.testing.assert_allclose(list(line["probabilities"].values()), theirs.numpy(), atol=1e-5)


def test_a_head_of_its_own_is_taken_from_modules_to_save(shapes, tmp_path):
    base = write_vit(tmp_path / "vit")
    torch.manual_seed(3)
    model = transformers.ViTForImageClassification.from_pretrained(base, num_labels=2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["classifier"])
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    thimble.generate(shapes, adapter=str(tmp_path / "adapter"), out=str(tmp_path / "labels.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert list(lines[0]["probabilities"]) == ["LABEL_0", "LABEL_1"]  # nobody names them
    report = thimble.evaluate(shapes, adapter=str(tmp_path / "adapter"))
    assert {line["label"] for line in report.results[0].labels["labels"]} == {"cat", "dog"}
    _compare_pictures(lines, shapes, model)


def test_a_head_that_nobody_kept_is_refused(shapes, tmp_path):
    base = write_vit(tmp_path / "vit")
    model = transformers.ViTForImageClassification.from_pretrained(base, num_labels=2)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="the adapter holds no classifier, nor does base vit"):
        thimble.evaluate(shapes, adapter=str(tmp_path / "adapter"))


# ---- what is asked for ----------------------------------------------------------------------------------------------


def changed(topics, place, **fields):
    """The folder of the classifier of texts, with other fields in its config."""
    shutil.copytree(topics[0], place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return str(place)


def test_an_adapter_that_names_no_task_is_known_by_its_layers(topics, encoder, tmp_path):
    copy = changed(topics, tmp_path / "adapter", task_type=None, auto_mapping=None)
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    report = thimble.evaluate(data, adapter=copy)
    told = "task: classify-text, since its layers are those of a BertForSequenceClassification; --task names another"
    assert told in report.messages["decision"]
    with pytest.raises(InputError, match="--task classify-image: base .* is a bert, which transformers opens for"):
        thimble.evaluate(data, adapter=copy, task="classify-image")


def test_a_model_of_the_users_own_needs_the_task_by_name(shapes, tmp_path):
    program = tmp_path / "mine.py"
    program.write_text(
        "import torch\n\ndef build():\n    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 8), torch.nn.Linear(8, 2))\n"
        "    net.preprocessing = {'size': 16}\n    return net\n"
    )
    scope = {}
    exec(program.read_text(), scope)
    model = scope["build"]()
    thimble.attach(model, ["1"], rank=2, train_also=["2"])
    with torch.no_grad():
        model[1].lora.B.fill_(0.1)
    thimble.save_adapter(thimble.adapter_of(model), tmp_path / "adapter")
    asked = {"adapter": str(tmp_path / "adapter"), "base": f"{program}:build"}
    with pytest.raises(InputError, match="nor does a function of your own: add --task"):
        thimble.evaluate(shapes, **asked)
    assert thimble.evaluate(shapes, **asked, task="classify-image").rows == 16


def test_a_base_that_is_not_here_is_asked_for_and_never_fetched(topics, tmp_path):
    copy = changed(topics, tmp_path / "adapter", base_model_name_or_path="owner/encoder")
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    with pytest.raises(InputError, match="owner/encoder, is not found: name .*--base owner/encoder, which fetches it"):
        thimble.evaluate(data, adapter=copy)


@pytest.mark.parametrize("kind", ["TOKEN_CLS", "SEQ_2_SEQ_LM"])
def test_tasks_that_thimble_does_not_have_are_refused(topics, tmp_path, kind):
    copy = changed(topics, tmp_path / "adapter", task_type=kind)
    data = write_rows(tmp_path / "rows.jsonl", sentences())
    with pytest.raises(InputError, match=f"says {kind}, which of its base, a bert, Thimble does not run"):
        thimble.evaluate(data, adapter=copy)


# ---- the other way round --------------------------------------------------------------------------------------------


def test_peft_finds_the_class_and_the_base_of_a_run_on_pictures(shapes, tmp_path):
    base, out = write_vit(tmp_path / "vit"), str(tmp_path / "run")
    thimble.train(shapes, base=str(base), out=out, rank=2, max_steps=3, learning_rate=0.01, valid_split=0.25)
    thimble.generate(shapes, adapter=out, out=str(tmp_path / "labels.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    model = peft.AutoPeftModel.from_pretrained(f"{out}/adapter", num_labels=2).eval()
    assert type(model.base_model.model).__name__ == "ViTForImageClassification"
    assert lines[0]["label"] in ("cat", "dog")
    _compare_pictures(lines, shapes, model, resample=3)  # what the run itself did


def test_what_peft_wrote_is_saved_again_as_it_was(topics, tmp_path):
    again = [tmp_path / name for name in ("once", "twice")]
    for source, folder in zip((topics[0], again[0]), again, strict=True):
        thimble.save_adapter(thimble.load_adapter(source), folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again[0] / name).read_bytes() == (again[1] / name).read_bytes()
    assert json.loads((again[0] / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
