import numpy as np
import pytest
import soundfile

from media_files import tone, write_clip
from thimble.data.media.sound import listen_to, read_sound
from thimble.errors import DataError


@pytest.mark.parametrize(
    ("suffix", "options", "most"),
    [(".wav", {"subtype": "PCM_16"}, 1e-4), (".wav", {"subtype": "PCM_24"}, 1e-6), (".wav", {"subtype": "FLOAT"}, 1e-7),
     (".wav", {"subtype": "PCM_U8"}, 0.01), (".wav", {"subtype": "ULAW"}, 0.02), (".flac", {}, 1e-4),
     (".ogg", {}, 0.05), (".mp3", {}, 0.05)],
)  # fmt: skip
def test_samples_are_those_that_were_written(tmp_path, suffix, options, most):
    path = write_clip(tmp_path / f"a{suffix}", 0.5, **options)
    found, wanted = read_sound(path, 16000, 30), tone(0.5, 16000)
    inner = slice(2000, 6000)  # what is lossy rings at the ends
    assert found.dtype == np.float32
    assert np.abs(found[inner] - wanted[inner]).max() < most


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 192000])
def test_any_rate_becomes_the_one_wanted(tmp_path, rate):
    found = read_sound(write_clip(tmp_path / "a.wav", 1.0, rate, subtype="FLOAT"), 16000, 30)
    assert len(found) == 16000
    assert np.abs(found - tone(1.0, 16000))[1000:-1000].max() < 1e-3


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_become_their_mean(tmp_path, channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1600, channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    assert np.abs(read_sound(tmp_path / "a.wav", 16000, 30) - samples.mean(1)).max() < 1e-6


def test_only_the_beginning_of_a_long_clip_is_read(tmp_path):
    path = write_clip(tmp_path / "a.wav", 3.0)
    assert len(read_sound(path, 16000, 1.5)) == 24000
    assert listen_to(path, 1.5).seconds == pytest.approx(3.0)


def test_silence_is_noticed(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    assert listen_to(tmp_path / "a.wav", 30).is_silent
    assert not listen_to(write_clip(tmp_path / "b.wav"), 30).is_silent


@pytest.mark.parametrize(
    ("samples", "message"),
    [(np.zeros(0), "has no samples"), (np.array([0.1, np.nan, 0.2, np.inf]), "2 samples that are NaN or Inf")],
)
def test_clips_without_sound_are_refused(tmp_path, samples, message):
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(DataError, match=message):
        read_sound(tmp_path / "a.wav", 16000, 30)


@pytest.mark.parametrize("is_padded", [False, True])
def test_a_wav_that_is_cut_off_is_refused(tmp_path, is_padded):
    path = write_clip(tmp_path / "a.wav", 1, subtype="PCM_16")
    content = path.read_bytes()
    if is_padded:  # as broadcasters put notes before the sound
        content = content[:12] + b"bext" + (603).to_bytes(4, "little") + bytes(604) + content[12:]
    path.write_bytes(content)
    assert len(read_sound(path, 16000, 30)) == 16000
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="is cut off: it says that it holds 32,000 bytes of sound, and has 1"):
        read_sound(path, 16000, 30)
    with pytest.raises(DataError, match="is cut off"):
        listen_to(path, 0.1)


def test_floats_that_are_no_samples_between_one_and_minus_one_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.1, 16000) * 32768, 16000, subtype="FLOAT")
    with pytest.raises(DataError, match="samples of up to 16,384: expected floats between -1 and 1; divide them by"):
        read_sound(tmp_path / "a.wav", 16000, 30)
    soundfile.write(tmp_path / "b.wav", tone(0.1, 16000) * 3, 16000, subtype="FLOAT")  # loud, as some files are
    assert read_sound(tmp_path / "b.wav", 16000, 30).max() > 1


def test_a_clip_shorter_than_one_sample_of_the_rate_keeps_one(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(1, 0.5, np.float32), 96000, subtype="FLOAT")
    assert read_sound(tmp_path / "a.wav", 16000, 30).tolist() == [0.5]


def test_a_rate_that_is_none_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 10)
    with pytest.raises(DataError, match="has 10 samples a second"):
        read_sound(tmp_path / "a.wav", 16000, 30)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0\0\0 ftypM4A ", "MP4 or M4A"),
        (b"%PDF-1.4", "is a PDF"),
        (b"words", "expected WAV, FLAC"),
    ],
)
def test_what_is_no_sound_says_what_it_is(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_sound(tmp_path / "a.wav", 16000, 30)


def test_a_header_that_claims_hours_costs_nothing(tmp_path):
    path = write_clip(tmp_path / "a.wav", 0.1, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\x7f"  # RIFF and data sizes
    path.write_bytes(content)
    assert len(read_sound(path, 16000, 36000)) == 1600
