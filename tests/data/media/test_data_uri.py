import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from media_files import write_clip, write_picture
from thimble.data.media.data_uri import clip_uri, picture_uri


def content(uri):
    return io.BytesIO(base64.b64decode(uri.partition(",")[2]))


def test_a_photo_is_a_small_jpeg_of_the_same_shape(tmp_path):
    uri = picture_uri(write_picture(tmp_path / "a.png", size=(400, 300)))
    assert uri.startswith("data:image/jpeg;base64,")
    assert Image.open(content(uri)).size == (96, 72)
    assert len(uri) < 20_000


def test_a_drawing_is_a_png_with_its_own_pixels(tmp_path):
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "a.png")
    uri = picture_uri(tmp_path / "a.png")
    assert uri.startswith("data:image/png;base64,")
    assert Image.open(content(uri)).size == (28, 28)


@pytest.mark.parametrize(("seconds", "played"), [(0.5, 0.5), (20.0, 8.0)])
def test_a_clip_is_cut_and_can_be_played(tmp_path, seconds, played):
    uri = clip_uri(write_clip(tmp_path / "a.wav", seconds, 44100))
    samples, rate = soundfile.read(content(uri))
    assert rate == 16000
    assert len(samples) / rate == pytest.approx(played, abs=0.2)
    assert len(uri) < 200_000


def test_without_mp3_a_clip_is_a_wav(tmp_path, monkeypatch):
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": ""})
    uri = clip_uri(write_clip(tmp_path / "a.wav"))
    assert uri.startswith("data:audio/wav")
    assert soundfile.info(content(uri)).frames == 3200
