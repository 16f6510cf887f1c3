"""Small pictures and clips for the tests."""

import numpy as np
import soundfile
from PIL import Image


def write_picture(path, seed=0, size=(12, 10), **options):
    """A picture of random pixels, a different one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_classes(folder, counts, suffix=".png", begin=0):
    """A folder with a folder for each class, as many pictures in it as `counts` says."""
    seed = begin
    for label, count in counts.items():
        for number in range(count):
            write_picture(folder / label / f"{number}{suffix}", seed)
            seed += 1
    return folder


def tone(seconds, rate, hertz=440.0):
    """A sine of half the loudness, float32."""
    at = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * at)).astype(np.float32)


def write_clip(path, seconds=0.2, rate=16000, hertz=440.0, channels=1, **options):
    """A clip of one tone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = tone(seconds, rate, hertz)
    soundfile.write(path, np.stack([samples] * channels, 1), rate, **options)
    return path
