"""`thimble train` on texts: labels and pairs, on a tiny BERT, with adapters that PEFT opens."""

import json
import shutil

import numpy as np
import pytest

import thimble
from encoders import VOCABULARY, pairs, sentences, write_encoder, write_rows, write_tokenizer
from thimble.errors import InputError
from thimble.report.words import FROZEN_WITH_HEAD
from thimble.training.checkpoint import BEFORE

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def topics(base, tmp_path_factory):
    """A run on labelled texts: its folder, its report and what it told."""
    out, told = tmp_path_factory.mktemp("runs") / "topics", []
    data = write_rows(out.parent / "rows.jsonl", sentences())
    report = thimble.train(
        data, base=base, task="classify-text", out=out, rank=4, learning_rate=1e-3, max_steps=40, valid_split=0.4,
        on_event=told.append,
    )  # fmt: skip
    return out, report, [getattr(event, "text", "") for event in told]


@pytest.fixture(scope="module")
def found(base, tmp_path_factory):
    """A run on pairs, given as rows."""
    out = tmp_path_factory.mktemp("runs") / "pairs"
    told = []
    report = thimble.train(
        pairs(), base=base, task="embed", out=out, rank=4, learning_rate=5e-3, epochs=8, valid_split=0.5,
        on_event=told.append,
    )  # fmt: skip
    return out, report, [getattr(event, "text", "") for event in told]


def test_labels_of_texts_are_learned_from_a_head_on_the_frozen_model(topics):
    _, report, told = topics
    assert report.task == "classify-text"
    assert report.unit == "tokens"
    assert report.metrics_after["accuracy"] > report.metrics_before["accuracy"] > 0.4
    assert report.loss_after < report.loss_base
    assert report.loss_train_after < report.loss_train_before
    assert any(text.startswith("head: a logistic regression") for text in told)
    assert any(text.startswith("labels: 3 different answers") for text in told)


def test_other_halves_of_pairs_are_found_further_up(found):
    _, report, told = found
    assert report.task == "embed"
    assert list(report.metrics_before) == ["MRR", "recall@1", "recall@5", "recall@10"]
    assert report.metrics_rows == 12
    assert not any("pooler" in text for text in told)
    assert report.loss_train_after < report.loss_train_before


def test_peft_gives_the_same_logits(topics, base):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    out, _, _ = topics
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    model = peft.PeftModel.from_pretrained(model, out / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    answers = json.loads((out / "report.json").read_text())["samples"]
    labels = json.loads(_notes(out)["labels"])
    with torch.no_grad():
        for answer in answers:
            logits = model(**tokenizer(answer["asked"], return_tensors="pt")).logits[0]
            assert labels[int(logits.argmax())] == answer["after"]


def test_peft_opens_it_by_its_folder_alone(topics, tmp_path):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    out, _, _ = topics
    thimble.generate(write_rows(tmp_path / "a.jsonl", sentences()), out=tmp_path / "found.jsonl", adapter=[out])
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(out / "adapter", num_labels=3).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    with torch.no_grad():
        for line in lines[::19]:
            theirs = model(**tokenizer(line["text"], return_tensors="pt")).logits.softmax(1)[0]
            np.testing.assert_allclose(list(line["probabilities"].values()), theirs.numpy(), atol=2e-6)


def _notes(out):
    from safetensors import safe_open

    with safe_open(out / "adapter" / "adapter_model.safetensors", "np") as file:
        return file.metadata()


def test_peft_gives_the_same_embeddings(found, base):
    peft, torch, transformers = (pytest.importorskip(name) for name in ("peft", "torch", "transformers"))
    out, _, _ = found
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), out / "adapter").eval()
    ours = thimble_embeddings(out, base, ["the cat .", "red"])
    tokens = transformers.AutoTokenizer.from_pretrained(base)(["the cat .", "red"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def thimble_embeddings(out, base, texts):
    import torch
    from transformers import AutoModel

    from thimble.backends.torch.module_losses import LOSSES
    from thimble.data.sentence_tokens import SentenceTokenizer, TokenCounts

    model = AutoModel.from_pretrained(base, add_pooling_layer=False).eval()
    thimble.attach(model, adapter=out / "adapter")
    tokenizer = SentenceTokenizer(base, json.loads((base / "config.json").read_text()))
    rows = tokenizer.padded(tokenizer.encode([(text,) for text in texts], TokenCounts()))
    inputs = {name: torch.from_numpy(values) for name, values in rows.items()}
    with torch.no_grad():
        return LOSSES["pairs"].output(model, inputs, {}).numpy()


def test_the_task_is_told_by_the_base_and_the_columns(base, tmp_path):
    from thimble.config.train import TrainConfig
    from thimble.events import EventLog, ignore
    from thimble.training.task_choice import choose_task

    for rows, task in ((sentences(), "classify-text"), (pairs(), "embed")):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        config = TrainConfig(data=str(data), base=str(base))
        assert choose_task(config, EventLog(ignore)) == task


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 224}, "classify-image"),
        ({"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "num_channels": 3},
         "classify-image"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True,
          "vocab_size": 51865, "num_mel_bins": 80}, "transcribe"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"], "vocab_size": 32, "conv_stride": [5]},
         "classify-audio"),
        ({"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522}, "classify-text"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {},
          "image_size": 896}, "text"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000}, "text"),
    ],
)  # fmt: skip
def test_a_base_that_takes_no_text_tells_the_task_where_the_data_do_not(tmp_path, config, task):
    from thimble.config.train import TrainConfig
    from thimble.events import EventLog, ignore
    from thimble.training.task_choice import choose_task

    (tmp_path / "config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "rows.jsonl", [{"x": 1}])
    assert choose_task(TrainConfig(data=str(data), base=str(tmp_path)), EventLog(ignore)) == task


def test_all_that_is_wrong_is_told_at_once(base, tmp_path):
    rows = [{"text": "a", "label": "x"}] * 20
    with pytest.raises(InputError) as raised:
        thimble.train(write_rows(tmp_path / "a.jsonl", rows), base=base, task="classify-text", image_size=32)
    assert "--image-size 32: says nothing for --task classify-text" in str(raised.value)
    assert "has the one label 'x'" in str(raised.value)


def test_texts_need_a_tokenizer(tmp_path):
    program = tmp_path / "mine.py"
    program.write_text(
        "import torch\n\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))\n"
    )
    data = write_rows(tmp_path / "a.jsonl", sentences())
    with pytest.raises(InputError, match="is a function of your own, which has no tokenizer"):
        thimble.train(data, base=f"{program}:build", task="classify-text")


def test_scored_pairs_are_measured_by_the_order_of_their_cosines(base, tmp_path):
    words = [row["text"].split()[-2] for row in sentences()][::3]
    rows = [
        {"sentence1": f"the {one} .", "sentence2": f"a {other}", "score": float(place % 5)}
        for place, (one, other) in enumerate(zip(words, words[7:] + words[:7], strict=True))
    ]
    report = thimble.train(
        write_rows(tmp_path / "a.jsonl", rows), base=base, task="embed", out=tmp_path / "run", rank=4, max_steps=3,
        learning_rate=5e-3, valid_split=0.3,
    )  # fmt: skip
    assert list(report.metrics_after) == ["Spearman"]
    assert -1 <= report.metrics_before["Spearman"] <= 1


def write_pooling(folder, kind):
    """What Sentence Transformers notes beside an encoder."""
    (folder / "1_Pooling").mkdir()
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{kind}": True}))


@pytest.mark.parametrize(("kind", "place"), [("cls_token", 0), ("lasttoken", -1)])
def test_embeddings_are_pooled_as_the_base_notes_it(base, tmp_path, kind, place):
    import peft
    import torch
    import transformers

    shutil.copytree(base, tmp_path / "base")
    write_pooling(tmp_path / "base", kind)
    thimble.train(
        pairs(), base=tmp_path / "base", task="embed", out=tmp_path / "run", rank=4, max_steps=2, learning_rate=5e-3
    )
    texts = ["the cat .", "red", "saw axe hammer drill"]
    data = write_rows(tmp_path / "new.jsonl", [{"text": text} for text in texts])
    made = [line["embedding"] for line in thimble.generate(data, adapter=str(tmp_path / "run"))]
    model = transformers.AutoModel.from_pretrained(base).eval()
    model = peft.PeftModel.from_pretrained(model, tmp_path / "run" / "adapter").eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    for text, own in zip(texts, made, strict=True):
        ids = torch.tensor([tokenizer.backend_tokenizer.encode(text).ids])
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0, place]
        np.testing.assert_allclose(own, hidden / hidden.norm(), atol=1e-5)


def test_a_run_of_before_goes_on_with_the_mean(base, tmp_path):
    """Earlier releases took the mean, whatever a base notes, and did not say so in what a run began with."""
    shutil.copytree(base, tmp_path / "base")
    options = {"base": tmp_path / "base", "task": "embed", "rank": 4, "max_steps": 4, "checkpoint_every_steps": 1}
    data = write_rows(tmp_path / "pairs.jsonl", pairs())
    whole = thimble.train(data, out=tmp_path / "whole", **options)
    steps = []
    cut = thimble.train(
        data, out=tmp_path / "cut", **options, should_stop=lambda: len(steps) == 2,
        on_event=lambda event: steps.append(event) if event.kind == "step" else None,
    )  # fmt: skip
    assert (whole.status, cut.status) == ("done", "interrupted")
    before = tmp_path / "cut" / BEFORE
    noted = json.loads(before.read_text())
    assert noted["origin"].pop("pooling") == "mean"
    before.write_text(json.dumps(noted))
    write_pooling(tmp_path / "base", "cls_token")
    thimble.train(data, out=tmp_path / "cut", resume=True)
    ours, theirs = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")
    )
    assert ours == theirs


def test_pairs_that_stand_in_several_rows_are_measured_as_one(base, tmp_path):
    rows = pairs()
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", rows[:12])
    write_rows(data / "valid.jsonl", rows[12:] * 2)
    report = thimble.train(data, base=base, task="embed", out=tmp_path / "run", rank=4, max_steps=1)
    assert report.status == "done"
    assert 0 < report.metrics_before["MRR"] <= 1


def test_numbers_that_are_amounts_are_refused_as_labels(base, tmp_path):
    rows = [{"text": f"the {row['text']}", "label": number / 7} for number, row in enumerate(sentences()[:40])]
    with pytest.raises(InputError, match="numbers for labels, 40 different ones .* no task estimates amounts"):
        thimble.train(write_rows(tmp_path / "a.jsonl", rows), base=base, task="classify-text")


def test_a_decoder_without_padding_tells_texts_of_any_length_apart(base, tmp_path):
    """GPT-2 finds the last token of a row by the padding that its config names, and names none."""
    import torch
    import transformers

    from thimble.backends.torch.open_module import open_module
    from thimble.data.sentence_tokens import SentenceTokenizer, TokenCounts
    from thimble.models.module_base import open_module_base

    config = transformers.GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2")
    opened = open_module(open_module_base(tmp_path / "gpt2"), "classify-text", ("a", "b"))
    tokenizer = SentenceTokenizer(tmp_path / "gpt2", json.loads((tmp_path / "gpt2" / "config.json").read_text()))
    rows = tokenizer.encode([("the cat dog",), ("red",), ("saw hammer drill .",)], TokenCounts())
    inputs = {name: torch.from_numpy(array) for name, array in tokenizer.padded(rows).items()}
    with torch.no_grad():
        together = opened.module(**inputs).logits
        alone = [opened.module(torch.from_numpy(row.ids[None].astype("int64"))).logits[0] for row in rows]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)
    report = thimble.train(
        write_rows(tmp_path / "rows.jsonl", sentences()), base=tmp_path / "gpt2", task="classify-text",
        out=tmp_path / "run", rank=4, max_steps=1,
    )  # fmt: skip
    assert report.status == "done"


def test_the_merged_model_says_that_a_text_has_one_label(topics, base, tmp_path):
    """Else pipelines of transformers would read the logits of a base for several labels as such."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    out, _, _ = topics
    thimble.merge(adapter=str(out), base=str(copy), out=str(tmp_path / "merged"))
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["problem_type"] == "single_label_classification"
    assert merged["id2label"] == {"0": "animal", "1": "colour", "2": "tool"}


# ---- finished adapters ----------------------------------------------------------------------------------------------


def test_generate_gives_each_text_its_label_and_how_likely_it_is(topics, tmp_path):
    out, report, _ = topics
    data = write_rows(
        tmp_path / "new.jsonl", [{"text": "the cat dog cow ."}, {"text": "red blue"}, {"text": "saw axe"}]
    )
    thimble.generate(data, out=tmp_path / "answers.jsonl", adapter=[out])
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["the cat dog cow .", "red blue", "saw axe"]
    assert {line["label"] for line in lines} <= {"animal", "colour", "tool"}
    for line in lines:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["probability"] == max(line["probabilities"].values())


def test_evaluate_measures_labels_beside_the_frozen_model_with_its_head(topics, tmp_path):
    out, report, _ = topics
    found = thimble.evaluate(write_rows(tmp_path / "rows.jsonl", sentences()), adapter=[out])
    frozen, trained = found.results
    assert (frozen.name, trained.name) == (FROZEN_WITH_HEAD, str(out))
    assert trained.scores["accuracy"] > frozen.scores["accuracy"]


def test_evaluate_measures_retrieval_beside_the_base(found, tmp_path):
    out, report, _ = found
    measured = thimble.evaluate(write_rows(tmp_path / "rows.jsonl", pairs()), adapter=[out])
    bare, trained = measured.results
    assert (bare.name, trained.name) == ("base", str(out))
    assert trained.scores["MRR"] > bare.scores["MRR"]


@pytest.mark.parametrize("name", ["vectors.jsonl", "vectors.npy"])
def test_generate_embeds_texts(found, base, tmp_path, name):
    out, _, _ = found
    data = write_rows(tmp_path / "new.jsonl", [{"text": "the cat ."}, {"text": "red"}])
    thimble.generate(data, out=tmp_path / name, adapter=[out])
    if name.endswith("npy"):
        made = np.load(tmp_path / name)
        assert made.dtype == np.float32
    else:
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [line["text"] for line in lines] == ["the cat .", "red"]
        made = np.array([line["embedding"] for line in lines])
    np.testing.assert_allclose(made, thimble_embeddings(out, base, ["the cat .", "red"]), atol=1e-5)
