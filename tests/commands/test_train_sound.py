"""`thimble train` on sound: clips and their transcripts, clips and their classes; adapters that PEFT opens too."""

import csv
import json
import shutil

import numpy as np
import peft
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import thimble
from thimble.backends.torch.clip_inputs import ClipInputs, allow_short_windows
from thimble.backends.torch.written_tokens import token_logits, token_losses, write_tokens
from thimble.data.transcript_tokens import TranscriptTokens
from thimble.errors import BaseModelError, InputError
from thimble.training.tasks.transcripts import goes_in_circles, normalised, score_transcript

PITCHES = {"low": 150, "middle": 600, "high": 2400}
MARKS = ["<|endoftext|>", "<|startoftranscript|>", "<|es|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
LETTERS = [*map(chr, range(97, 123)), "Ġ", "é", ","]
QUICK = {"max_steps": 50, "batch_rows": 8, "learning_rate": 0.01, "max_new_tokens": 12, "valid_split": 0.25}


def write_clip(path, name, number, seconds=None, rate=16_000):
    """A tone of some pitch, with noise."""
    random = np.random.default_rng(number)
    times = np.arange(int((seconds or random.uniform(0.4, 1.6)) * rate)) / rate
    tone = np.sin(2 * np.pi * PITCHES[name] * random.uniform(0.9, 1.1) * times)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * tone + 0.02 * random.standard_normal(len(times)), rate)


def write_table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "transcription"), *rows])


def make_base(folder, kind="WhisperForConditionalGeneration", words=35, **changes):
    """A tiny Whisper with random weights and a tokenizer of letters."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32, "num_mel_bins": 80}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=words, **sizes, bos_token_id=29, eos_token_id=29, pad_token_id=29, decoder_start_token_id=30,
        max_source_positions=300, max_target_positions=32, begin_suppress_tokens=None, init_std=0.2, **changes,
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor(chunk_length=6).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rows = [(f"{name}/{name}-{number}.wav", f"{name.title()}.") for name in PITCHES for number in range(12)]
    for number, (file, text) in enumerate(rows):
        write_clip(folder / file, text[:-1].lower(), number)
    write_table(folder / "metadata.csv", rows)
    return folder


@pytest.fixture(scope="module")
def run(base, clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, thimble.train(clips, base=str(base), out=str(folder), **QUICK)


def test_clips_and_transcripts_become_an_adapter_and_a_report(run):
    folder, report = run
    assert (report.status, report.task, report.metric, report.steps) == ("done", "transcribe", "CER", 50)
    assert report.training_rows + report.validation_rows == 36
    assert report.metrics_after["CER"] < report.metrics_before["CER"]
    assert report.metric_comparisons["CER"]["better"] > report.metric_comparisons["CER"]["worse"]
    assert report.loss_after < report.loss_base
    assert "CER" in report.verdict["text"]
    page = (folder / "report.html").read_text()
    assert "CER" in page
    assert "general text" not in page


def test_peft_opens_the_adapter_and_writes_the_same(run, base, clips):
    folder, report = run
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(base).eval()
    allow_short_windows(model)
    opened = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    tokens, inputs = TranscriptTokens(base, "tiny"), ClipInputs(base, "tiny")
    for line in report.samples:
        [file] = [path for path in clips.rglob("*.wav") if f"({path.name})" in line["asked"]]
        samples, _ = soundfile.read(file, dtype="float32")
        heard = {"input_features": torch.from_numpy(inputs.features(samples)["input_features"][None])}
        written = write_tokens(opened.base_model.model, heard, torch.tensor([tokens.prompt]), 12)
        assert tokens.decode(written[0].tolist())[0] == line["after"]


def test_peft_finds_its_class_and_base_by_the_folder_alone(run):
    folder, _ = run
    model = peft.AutoPeftModel.from_pretrained(folder / "adapter")
    assert type(model.base_model.model).__name__ == "WhisperForConditionalGeneration"


def test_an_adapter_that_peft_trained_hears_in_the_window_of_its_base(base, clips, tmp_path):
    torch.manual_seed(4)
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    found = thimble.generate(clips, adapter=str(tmp_path / "adapter"), out=str(tmp_path / "texts.jsonl"))
    told = "task: transcribe, since it was trained on a WhisperForConditionalGeneration; --task names another"
    assert told in found.messages["decision"]
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    extract = transformers.WhisperFeatureExtractor.from_pretrained(base)
    tokens = TranscriptTokens(base, "tiny")
    for line in lines[::9]:
        samples, rate = soundfile.read(line["file"], dtype="float32")
        heard = extract(samples, sampling_rate=rate, return_tensors="pt")
        written = write_tokens(model.base_model.model, {**heard}, torch.tensor([tokens.prompt]), 32)
        assert line["text"] == tokens.decode(written[0].tolist())[0]


def test_twenty_steps_have_the_losses_of_peft(base, clips):
    """The same A and B, rows and AdamW; PEFT is given whole prompts and labels, as its users write them."""
    tokens, inputs = TranscriptTokens(base, "tiny"), ClipInputs(base, "tiny")
    with (clips / "metadata.csv").open() as file:
        rows = [row for row in csv.DictReader(file)][:8]
    heard = [inputs.features(soundfile.read(clips / row["file_name"], dtype="float32")[0], 200) for row in rows]
    features = {"input_features": torch.from_numpy(np.stack([one["input_features"] for one in heard]))}
    texts = [tokens.encode(row["transcription"]) for row in rows]
    labels = torch.tensor([text + [-100] * (max(map(len, texts)) - len(text)) for text in texts])
    prompt = torch.tensor([tokens.prompt] * 8)
    ours, theirs = (transformers.AutoModelForSpeechSeq2Seq.from_pretrained(base).eval() for _ in range(2))
    allow_short_windows(ours)
    allow_short_windows(theirs)
    thimble.attach(ours, rank=4, alpha=8)
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    with torch.no_grad():
        for path, factors in thimble.adapter_of(ours).layers.items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(torch.from_numpy(factors.A))
    given = torch.cat([prompt, labels[:, :-1].clamp(min=0)], 1)
    whole = torch.cat([torch.full((8, len(tokens.prompt) - 1), -100), labels], 1)

    def losses(model, loss):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
        found = []
        for _ in range(20):
            value = loss(model)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            found.append(value.item())
        return found

    count = (labels != -100).sum()
    mine = losses(ours, lambda model: token_losses(token_logits(model, features, prompt, labels), labels).sum() / count)
    other = losses(theirs, lambda model: model(**features, decoder_input_ids=given, labels=whole).loss)
    np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4)
    assert mine[-1] < mine[0] - 0.1


def test_a_run_that_is_cut_short_ends_as_it_would_have(base, clips, tmp_path):
    quick = {**QUICK, "max_steps": 8, "checkpoint_every_steps": 3}
    whole, steps = thimble.train(clips, base=str(base), out=str(tmp_path / "whole"), **quick), []
    thimble.train(
        clips, base=str(base), out=str(tmp_path / "cut"), **quick, should_stop=lambda: len(steps) == 5,
        on_event=lambda event: steps.append(event) if event.kind == "step" else None,
    )  # fmt: skip
    again = thimble.train(clips, base=str(base), out=str(tmp_path / "cut"), resume=True)
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.loss_after == whole.loss_after


def test_a_run_knows_its_transcripts_again(base, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    steps, cut = [], {**QUICK, "max_steps": 6, "checkpoint_every_steps": 2}
    thimble.train(
        tmp_path / "clips", base=str(base), out=str(tmp_path / "cut"), **cut,
        on_event=lambda event: steps.append(event) if event.kind == "step" else None,
        should_stop=lambda: len(steps) == 3,
    )  # fmt: skip
    table = tmp_path / "clips" / "metadata.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("Low.", "Bass."), encoding="utf-8")
    with pytest.raises(InputError, match="the data"):
        thimble.train(tmp_path / "clips", out=str(tmp_path / "cut"), resume=True)


def test_clips_are_told_apart_by_their_class(clips, tmp_path):
    folder = make_base(tmp_path / "base", "WhisperForAudioClassification", classifier_proj_size=16)
    for name in PITCHES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in (clips / name).iterdir():
            (tmp_path / "data" / name / path.name).write_bytes(path.read_bytes())
    report = thimble.train(
        tmp_path / "data", base=str(folder), out=str(tmp_path / "run"), max_steps=10, batch_rows=8, valid_split=0.25
    )
    assert (report.task, report.loader) == ("classify-audio", "AutoModelForAudioClassification")
    assert report.metrics_after["accuracy"] > 0.6
    opened = transformers.AutoModelForAudioClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    assert peft.PeftModel.from_pretrained(opened, tmp_path / "run" / "adapter")


def test_a_finished_adapter_writes_down_a_folder_of_clips_and_is_measured_beside_its_base(run, clips, tmp_path):
    folder, report = run
    files = ["low/low-1.wav", "high/high-2.wav", "middle/middle-3.wav", "low/low-4.wav"]
    for file in files:
        (tmp_path / "calls" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "calls" / file).write_bytes((clips / file).read_bytes())
    write_clip(tmp_path / "calls" / "long.wav", "low", 0, seconds=7)
    thimble.generate(str(tmp_path / "calls"), out=str(tmp_path / "texts.jsonl"), adapter=str(folder))
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == sorted(str(path) for path in (tmp_path / "calls").rglob("*.wav"))
    assert all(isinstance(line["text"], str) for line in lines)
    measured = thimble.evaluate(str(clips), adapter=str(folder), answers=str(tmp_path / "answers.jsonl"))
    base, adapter = measured.results
    assert adapter.scores["CER"] < base.scores["CER"]
    said = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for line in lines:
        name = f"({line['file'].rpartition('/')[2]})"
        texts = [one["written"] for one in said if name in one["source"] and one["model"] != "base"]
        assert texts in ([], [line["text"]])


# ---- what is wrong with clips, transcripts and bases ----------------------------------------------------------------


def test_clips_that_cannot_be_used_are_named_and_left_out(base, clips, tmp_path):
    rows = [(f"{number}.wav", "low") for number in range(38)]
    for number, (file, _) in enumerate(rows):
        write_clip(tmp_path / "data" / file, "low", number, rate=8_000 if number % 2 else 44_100)
    write_clip(tmp_path / "data" / "long.wav", "low", 0, seconds=5)
    soundfile.write(tmp_path / "data" / "none.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "data" / "silent.wav", np.zeros(8_000), 16_000)
    more = [("long.wav", "low"), ("none.wav", "low"), ("silent.wav", "middle"), ("0.wav", "")]
    write_table(tmp_path / "data" / "metadata.csv", [*rows, *more])
    report = thimble.train(
        tmp_path / "data", base=str(base), out=str(tmp_path / "run"), max_seconds=3, **{**QUICK, "max_steps": 2}
    )
    left_out = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert "takes 5.0 s, and 3 s are heard" in left_out
    assert "has no samples" in left_out
    assert "has no text" in left_out
    assert report.skipped_rows == 3
    assert report.training_rows + report.validation_rows == 39
    assert any("silent" in text for texts in report.messages.values() for text in texts)


def test_transcripts_that_are_longer_than_the_base_can_write_are_refused(base, clips, tmp_path):
    write_clip(tmp_path / "a.wav", "low", 0)
    write_clip(tmp_path / "b.wav", "low", 1)
    write_table(tmp_path / "metadata.csv", [("a.wav", "low " * 20), ("b.wav", "low")])
    with pytest.raises(InputError, match=r"1 transcript has more than the 30 tokens .*metadata.csv line 2"):
        thimble.train(tmp_path, base=str(base), out=str(tmp_path / "run"), **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_recogniser_of_letters_is_refused_by_name_and_transcripts_are_no_classes(clips, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"conv_dim": (8,), "conv_stride": (320,), "conv_kernel": (320,), "num_feat_extract_layers": 1}
    config = transformers.Wav2Vec2Config(
        vocab_size=32, **sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path / "ctc")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "ctc")
    with pytest.raises(
        InputError, match=r"recognisers that give a letter for each moment \(CTC\) are not trained here"
    ):
        thimble.train(clips, base=str(tmp_path / "ctc"), task="transcribe")
    with pytest.raises(InputError, match="what stands in transcription is learned with --task transcribe"):
        thimble.train(clips / "metadata.csv", base=str(tmp_path / "ctc"))


def test_a_base_of_several_languages_wants_to_be_told_which(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 51_865}))
    (tmp_path / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert TranscriptTokens(tmp_path, "many", "es").prompt == (30, 31, 33, 34)
    with pytest.raises(BaseModelError, match="such as --language es; it knows en, es"):
        TranscriptTokens(tmp_path, "many")
    with pytest.raises(BaseModelError, match="--language zz: base many does not know it"):
        TranscriptTokens(tmp_path, "many", "zz")
    with pytest.raises(BaseModelError, match="is told no language; leave it out"):
        TranscriptTokens(base, "one", "es")
    assert TranscriptTokens(base, "one").prompt == (30, 34)


def test_a_text_is_read_back_up_to_its_end(base):
    tokens = TranscriptTokens(base, "tiny")
    assert tokens.decode([*tokens.encode(" low, high "), 5, 5]) == ("low, high", True)
    assert tokens.decode([]) == ("", False)


@pytest.mark.parametrize(
    ("written", "reference", "cer", "wer", "is_exact"),
    [
        ("Una  gallina.", "una gallina", 0.0, 0.0, 1.0),
        ("una galina", "¡Una gallina!", 1 / 11, 1 / 2, 0.0),
        ("", "una gallina", 1.0, 1.0, 0.0),
        ("no no no no", "no", 9 / 2, 3.0, 0.0),
        ("año", "ano", 1 / 3, 1.0, 0.0),
        ("an\N{COMBINING TILDE}o", "año", 0.0, 0.0, 1.0),
    ],
)
def test_errors_are_counted_in_normalised_texts(written, reference, cer, wer, is_exact):
    scores, sizes = score_transcript(written, reference)
    assert scores == {"CER": pytest.approx(cer), "WER": pytest.approx(wer), "exact match": is_exact}
    assert sizes["CER"] == len(normalised(reference))


def test_a_reference_without_letters_has_no_errors():
    assert score_transcript("anything", "...") == ({}, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("una una una una", True), ("a b a b a b a b", True), ("so so good", False), ("", False), ("bye bye bye", False)],
)
def test_texts_that_go_in_circles_are_found(text, expected):
    assert goes_in_circles(text) == expected
