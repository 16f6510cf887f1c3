"""Sound in, text out: features, short windows, losses and greedy decoding are those of transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.generation.utils import GenerationMixin

import thimble
from thimble.backends.torch.clip_inputs import ClipInputs, allow_short_windows
from thimble.backends.torch.written_tokens import IGNORED, token_logits, token_losses, write_tokens
from thimble.errors import BaseModelError

END, START, PLAIN = 60, 61, 62  # tokens that the tiny models end, begin and go on with
PROMPT = (START, PLAIN)


def tiny_whisper(kind="WhisperForConditionalGeneration", **changes):
    """A Whisper with random weights, whose texts differ from clip to clip."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 24, "num_mel_bins": 80}
    special = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END, "decoder_start_token_id": START}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=64, max_target_positions=24, init_std=0.6, **sizes, **special, **changes
    )
    return getattr(transformers, kind)(config).eval()


def clip(seconds, seed=0, rate=16_000):
    """Three tones and noise, float32 (samples,)."""
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * pitch * times) for pitch in random.uniform(80, 3000, 3))
    return (0.2 * tones + 0.02 * random.standard_normal(len(times))).astype(np.float32)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return ClipInputs(folder, "tiny")


def stacked(inputs, clips):
    return {"input_features": torch.from_numpy(np.stack([inputs.features(one)["input_features"] for one in clips]))}


# ---- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "frames"), [(0.001, 100), (0.7, 100), (1.0, 100), (1.01, 200), (3.5, 400), (31, 3000)]
)
def test_a_window_is_the_whole_seconds_of_a_clip_up_to_those_of_the_model(inputs, seconds, frames):
    assert inputs.frames(seconds) == frames
    assert inputs.features(clip(seconds))["input_features"].shape == (80, frames)


@pytest.mark.parametrize(
    "samples", [clip(1.3), np.zeros(9_000, np.float32), clip(31)], ids=["tones", "silence", "long"]
)
def test_features_are_those_of_openai_in_the_window(inputs, samples):
    """log-mel as openai/whisper computes it (audio.py), from PyTorch's own operations."""
    found = inputs.features(samples)["input_features"]
    window = torch.from_numpy(np.pad(samples, (0, found.shape[1] * 160))[: found.shape[1] * 160])
    power = torch.stft(window, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    bands = torch.from_numpy(transformers.WhisperFeatureExtractor().mel_filters).float().T @ power
    log = bands.clamp(min=1e-10).log10()
    expected = (log.maximum(log.max() - 8) + 4) / 4
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_clip_has_the_same_features_whatever_stands_beside_it_and_each_time(inputs):
    first, again = (inputs.features(clip(0.9))["input_features"] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_wav2vec2_gets_normalised_samples_and_a_mask_of_what_is_there(tmp_path):
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    extractor.save_pretrained(tmp_path)
    made, samples = ClipInputs(tmp_path, "w2v").features(clip(0.75)), clip(0.75)
    assert made["input_values"].shape == made["attention_mask"].shape == (16_000,)
    assert made["attention_mask"].sum() == len(samples)
    expected = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    np.testing.assert_allclose(made["input_values"][: len(samples)], expected, atol=1e-5)
    assert not made["input_values"][len(samples) :].any()


def test_a_spectrogram_transformer_gets_the_frames_that_it_always_has(tmp_path):
    transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=16).save_pretrained(tmp_path)
    opened = ClipInputs(tmp_path, "ast")
    assert opened.most_seconds == 1.28
    assert {opened.features(clip(seconds))["input_values"].shape for seconds in (0.2, 1.0, 5.0)} == {(128, 16)}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "expected preprocessor_config.json"), ({"image_processor_type": "ViTImageProcessor"}, "sound")],
)
def test_a_folder_that_does_not_say_how_sound_is_made_ready_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match=words):
        ClipInputs(tmp_path, "none")


# ---- windows --------------------------------------------------------------------------------------------------------


def test_a_short_window_is_that_of_a_model_whose_positions_are_cut(inputs):
    model, cut = tiny_whisper(), tiny_whisper()
    encoder = cut.model.encoder
    encoder.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:100].detach().clone())
    cut.config.max_source_positions = 100
    allow_short_windows(model)
    heard = stacked(inputs, [clip(1.7), clip(1.2, 1)])
    given = {**heard, "decoder_input_ids": torch.tensor([PROMPT, PROMPT])}
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, cut(**given).logits, rtol=0, atol=0)
    assert model.config.max_source_positions == model.model.encoder.embed_positions.num_embeddings == 1500


def test_a_window_that_is_too_long_is_refused_as_ever_and_the_next_call_is_fine(inputs):
    model = tiny_whisper(max_source_positions=50)
    allow_short_windows(model)
    with pytest.raises(ValueError, match="expects the mel input features to be of length 100"):
        model.get_encoder()(**stacked(inputs, [clip(1.5)]))
    assert model.get_encoder()(**stacked(inputs, [clip(0.5)])).last_hidden_state.shape == (1, 50, 24)


# ---- texts ----------------------------------------------------------------------------------------------------------


def labels_of(*texts):
    most = max(map(len, texts))
    return torch.tensor([[*text, *[IGNORED] * (most - len(text))] for text in texts])


@pytest.fixture(scope="module")
def heard(inputs):
    return stacked(inputs, [clip(0.4 + 0.1 * n, n) for n in range(5)])


def test_the_loss_is_that_of_transformers_where_prompts_are_not_learned(heard):
    model = tiny_whisper()
    allow_short_windows(model)
    labels = labels_of([5, 6, END], [7, END], [8, 9, 10, 11, END], [END], [3, 3, END])
    prompt = torch.tensor([PROMPT] * 5)
    found = token_losses(token_logits(model, heard, prompt, labels), labels)
    given = torch.cat([prompt, labels[:, :-1].clamp(min=0)], 1)
    whole = torch.cat([torch.full((5, 1), IGNORED), labels], 1)  # as transformers' own labels stand
    theirs = model(**heard, decoder_input_ids=given, labels=whole).loss
    torch.testing.assert_close(found.sum() / (labels != IGNORED).sum(), theirs, rtol=0, atol=1e-5)


def test_a_row_has_the_same_loss_alone(heard):
    model = tiny_whisper()
    allow_short_windows(model)
    labels = labels_of([5, 6, END], [7, END], [8, 9, 10, 11, END], [END], [3, 3, END])
    with torch.no_grad():
        together = token_losses(token_logits(model, heard, torch.tensor([PROMPT] * 5), labels), labels)
        for row in range(5):
            one, own = {"input_features": heard["input_features"][row : row + 1]}, labels[row : row + 1]
            alone = token_losses(token_logits(model, one, torch.tensor([PROMPT]), own), own)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"suppress_tokens": [1, 5, 9], "begin_suppress_tokens": [END, 20]}])
@pytest.mark.parametrize("most", [1, 6, 100])
def test_what_is_written_is_what_generate_writes(heard, settings, most):
    model = tiny_whisper()
    allow_short_windows(model)
    model.generation_config.update(**settings)
    prompt = torch.tensor([PROMPT] * 5)
    found = write_tokens(model, heard, prompt, most)
    expected = GenerationMixin.generate(
        model, **heard, decoder_input_ids=prompt, do_sample=False, max_new_tokens=min(most, 22)
    )[:, 2:]  # fmt: skip
    ended = [row.tolist().index(END) if END in row else len(row) for row in expected]
    assert len({tuple(row) for row in expected.tolist()}) > 1, "the clips are to differ"
    assert found.shape == expected.shape
    for row, end in enumerate(ended):
        assert found[row, : end + 1].tolist() == expected[row, : end + 1].tolist()


def test_models_with_masks_and_other_decoders_write_too(tmp_path):
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
    config = transformers.Speech2TextConfig(
        vocab_size=64, d_model=16, **sizes, encoder_attention_heads=2, decoder_attention_heads=2, input_channels=1,
        conv_channels=16, input_feat_per_channel=80, eos_token_id=END, pad_token_id=1, decoder_start_token_id=START,
        init_std=0.6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Speech2TextForConditionalGeneration(config).eval()
    frames = torch.randn(3, 60, 80)
    mask = torch.ones(3, 60, dtype=torch.int64)
    mask[1, 30:] = 0
    heard, prompt = {"input_features": frames, "attention_mask": mask}, torch.tensor([[START]] * 3)
    labels = labels_of([5, 6, END], [7, END], [8, 9, END])
    logits = token_logits(model, heard, prompt, labels)
    given = torch.cat([prompt, labels[:, :-1].clamp(min=0)], 1)
    whole = model(**heard, decoder_input_ids=given).logits
    torch.testing.assert_close(logits, whole[labels != IGNORED])
    found = write_tokens(model, heard, prompt, 8)
    expected = model.generate(**heard, decoder_input_ids=prompt, do_sample=False, max_new_tokens=8, num_beams=1)[:, 1:]
    for ours, theirs in zip(found.tolist(), expected.tolist(), strict=True):
        end = ours.index(END) + 1 if END in ours else len(ours)
        assert ours[:end] == theirs[:end]


def test_an_adapter_is_in_what_is_written_and_off_it_is_not(heard):
    model = tiny_whisper()
    allow_short_windows(model)
    prompt = torch.tensor([PROMPT] * 5)
    before = write_tokens(model, heard, prompt, 8)
    found = thimble.attach(model, rank=2, init="gaussian")
    for layer in found.lora.values():
        nn.init.normal_(layer.B, std=0.5, generator=torch.Generator().manual_seed(1))
    assert write_tokens(model, heard, prompt, 8).tolist() != before.tolist()
    with thimble.adapter_off(model):
        assert write_tokens(model, heard, prompt, 8).tolist() == before.tolist()
