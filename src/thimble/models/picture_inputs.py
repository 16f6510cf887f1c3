"""How a base takes pictures: their size, and what is taken off and divided by, as its preprocessing says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thimble.errors import BaseModelError
from thimble.models.module_base import AS_BASE

USUAL_SIZE = 224  # pixels of a side
USUAL_MEAN = USUAL_STD = (0.5, 0.5, 0.5)  # values from -1 to 1
MOST_SIZE = 4096
BICUBIC, MOST_RESAMPLE = 3, 5  # of Pillow


@dataclass(frozen=True)
class PictureInputs:
    """What a picture becomes: (value / 255 - mean) / std for each channel, in a square."""

    size: int  # pixels of a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = BICUBIC  # how it is resized, as Pillow numbers it
    warnings: tuple[str, ...] = ()  # what of the base's own way is not done so
    is_grey: bool = False  # whether the base takes one channel

    def as_data(self) -> dict[str, Any]:
        """It as plain data, by the names of `preprocessor_config.json`."""
        found = {"size": self.size, "image_mean": list(self.mean), "image_std": list(self.std)}
        return found | ({"num_channels": 1} if self.is_grey else {})


def picture_inputs(said: Mapping[str, Any], base: str, size: int | None = None) -> PictureInputs:
    """Read preprocessing, as a folder or a module of the user's own says it.

    Args:
        said: By the names of `preprocessor_config.json`; `mean` and `std` are taken for `image_mean` and `image_std`,
            and `num_channels` is that of `config.json`.
        base: Name of the base, for messages.
        size: That the user wants instead.

    Returns:
        The inputs.

    Raises:
        BaseModelError: If a value is none that can be used.
    """
    is_plain = said.get("do_normalize") is False
    mean = (0.0, 0.0, 0.0) if is_plain else _three(said, ("image_mean", "mean"), USUAL_MEAN, base)
    std = (1.0, 1.0, 1.0) if is_plain else _three(said, ("image_std", "std"), USUAL_STD, base)
    if min(std) <= 0:
        raise BaseModelError(f"base {base} divides pictures by {std}: expected numbers above 0")
    channels = said.get("num_channels", 3)
    if channels not in (1, 3):
        raise BaseModelError(f"base {base} takes pictures of {channels!r:.20} channels: expected 3 (RGB) or 1 (grey)")
    side = size or _size(said, base)
    if not said.get(AS_BASE):
        return PictureInputs(side, mean, std, is_grey=channels == 1)
    resample = said.get("resample", BICUBIC)
    is_known = type(resample) is int and 0 <= resample <= MOST_RESAMPLE
    sides = said.get("size")
    is_cut = bool(said.get("do_center_crop")) or isinstance(sides, Mapping) and "shortest_edge" in sides
    warnings = (
        f"base {base} cuts the middle out of pictures, and here both sides are resized to {side} pixels: what is no "
        "square looks otherwise than it did to the adapter; cut it before",
    ) * is_cut
    return PictureInputs(side, mean, std, resample if is_known else BICUBIC, warnings, channels == 1)


def _three(said: Mapping[str, Any], names: tuple[str, ...], usual: tuple[float, float, float], base: str) -> Any:
    name = next((name for name in names if name in said), "")
    value = said.get(name, usual)
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not all(isinstance(x, int | float) and math.isfinite(x) for x in values):
        raise BaseModelError(f"base {base} has the {name} {value!r:.60}: expected three numbers, one a channel")
    return tuple(map(float, values))


def _size(said: Mapping[str, Any], base: str) -> int:
    """The side of a picture: that of the middle that is cut out, where there is one."""
    value: Any = said.get("crop_size") if said.get("do_center_crop") else None
    value = value or said.get("size", said.get("image_size", USUAL_SIZE))
    if isinstance(value, Mapping):
        sides = {value.get("height"), value.get("width")} - {None} or {value.get("shortest_edge")}
        value = sides.pop() if len(sides) == 1 else value
    if isinstance(value, list | tuple) and len({*value}) == 1:
        value = value[0]
    if type(value) is not int or not 8 <= value <= MOST_SIZE:
        raise BaseModelError(
            f"base {base} takes pictures of the size {value!r:.60}: expected a square of 8 to {MOST_SIZE} pixels a "
            "side; name one with --image-size"
        )
    return value
