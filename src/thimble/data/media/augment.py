"""Pictures changed a little at random, so that a model learns what stays: a function of seed, step and row."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

MOST_SHIFT = 1 / 8  # of a side
LEAST_AREA = 0.64  # of the picture that a crop keeps
NOISE = 5.0  # standard deviation, of 255
LIGHT = 0.2  # brighter or darker by at most this share

Picture = NDArray[np.uint8]


def augment(picture: Picture, names: Sequence[str], key: tuple[int, int, int]) -> Picture:
    """Change a picture by the named ways, in the order of CHANGES.

    Args:
        picture: (size, size, 3).
        names: Keys of CHANGES.
        key: Seed, step and row: the same key makes the same change, whatever runs beside it.

    Returns:
        (size, size, 3).
    """
    for place, (name, change) in enumerate(CHANGES.items()):
        if name in names:  # each way has a stream of its own: one more name leaves the others as they are
            picture = change(picture, np.random.Generator(np.random.Philox(np.random.SeedSequence((*key, place)))))
    return np.ascontiguousarray(picture)


def _flip(picture: Picture, random: np.random.Generator) -> Picture:
    """Left and right changed, in half of the cases."""
    return picture[:, ::-1] if random.random() < 0.5 else picture


def _shift(picture: Picture, random: np.random.Generator) -> Picture:
    """Moved by up to an eighth of a side each way; the edge is repeated."""
    rows, columns = (
        np.clip(np.arange(side) + round((2 * random.random() - 1) * MOST_SHIFT * side), 0, side - 1)
        for side in picture.shape[:2]
    )
    return picture[rows[:, None], columns]


def _crop(picture: Picture, random: np.random.Generator) -> Picture:
    """A square of 64 to 100 % of the area, brought to the size of the picture (bilinear)."""
    side = np.sqrt(LEAST_AREA + (1 - LEAST_AREA) * random.random())
    pixels = picture.astype(np.float32)
    for axis in (0, 1):
        count = picture.shape[axis]
        begin = random.random() * (1 - side) * count
        at = np.clip(begin + (np.arange(count) + 0.5) * side - 0.5, 0, count - 1)
        low = np.minimum(at.astype(np.intp), max(count - 2, 0))
        weight = np.expand_dims((at - low).astype(np.float32), tuple(other for other in range(3) if other != axis))
        pixels = pixels.take(low, axis) * (1 - weight) + pixels.take(np.minimum(low + 1, count - 1), axis) * weight
    return np.rint(pixels).astype(np.uint8)


def _light(picture: Picture, random: np.random.Generator) -> Picture:
    """Brighter or darker."""
    share = np.float32(1 + LIGHT * (2 * random.random() - 1))
    return np.clip(np.rint(picture * share), 0, 255).astype(np.uint8)


def _noise(picture: Picture, random: np.random.Generator) -> Picture:
    """Gaussian noise on every channel."""
    noise = random.standard_normal(picture.shape, np.float32)
    return np.clip(np.rint(picture + np.float32(NOISE) * noise), 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    "flip": _flip, "crop": _crop, "shift": _shift, "light": _light, "noise": _noise,
}  # fmt: skip
