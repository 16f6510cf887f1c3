"""Pictures as arrays of one size, whatever they are stored as."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from thimble.data.media.inside import MediaFile, open_media
from thimble.data.sources.kinds import other_kind
from thimble.errors import DataError, MissingPackageError, install_line

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 89_478_485  # of one picture, as Pillow has it: a file of some bytes may claim any size
MOST_BYTES = 1 << 28  # of one file
# Not all that Pillow opens: some formats start other programs (EPS), or hold no picture as a camera makes it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "TGA")


def read_picture(path: MediaFile, size: int, resample: int = 3) -> NDArray[np.uint8]:
    """A picture as RGB, resized to a square, without keeping the ratio of its sides.

    It is turned as its EXIF says, laid on white where it is transparent, and taken from its first frame if it moves.
    16 bits become 8 by dividing by 257; grey, palettes and CMYK become RGB as Pillow has it, without colour profiles.

    Args:
        path: The file; its content says what it is, not its name.
        size: Pixels of a side of the result.
        resample: How it is resized, as Pillow numbers it: 2 is bilinear, 3 bicubic.

    Returns:
        (size, size, 3).

    Raises:
        DataError: It cannot be decoded whole, or claims more than MOST_PIXELS; says what is wrong, without the path.
    """
    from PIL import Image

    picture = open_picture(path, size)
    return np.asarray(picture.resize((size, size), Image.Resampling(resample)), np.uint8)


def open_picture(path: MediaFile, size: int) -> "Image.Image":
    """A picture as RGB and upright, at least `size` pixels a side if it has so many; raises as `read_picture` does."""
    return _rgb(_loaded(_opened(content_of(path)), size))


def is_animated(content: bytes) -> bool:
    """Decode a picture to see that it can be, and whether it moves; raises a DataError if it cannot."""
    picture = _opened(content)
    moves = getattr(picture, "is_animated", False) and picture.format != "MPO"  # of which the first is the photo
    _loaded(picture, 1)
    return moves


def to_pixels(
    picture: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float], is_grey: bool = False
) -> NDArray[np.float32]:
    """A picture as a network takes it: channels first, (x / 255 - mean) / std.

    Args:
        picture: (height, width, 3).
        mean: Of each channel, between 0 and 1.
        std: Of each channel.
        is_grey: Whether the three become one, weighed as Pillow does (ITU-R 601), with the first mean and std.

    Returns:
        (3, height, width), or (1, height, width) of grey.
    """
    if is_grey:
        from PIL import Image

        picture, mean, std = np.asarray(Image.fromarray(picture).convert("L"))[..., None], mean[:1], std[:1]
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    shift = (-np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32)
    return np.ascontiguousarray((picture * scale + shift).transpose(2, 0, 1))


def content_of(path: MediaFile) -> bytes:
    """The bytes of a picture; a DataError, without the path, if it cannot be read or is too large to be one."""
    try:
        with open_media(path) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise DataError(f"is larger than {MOST_BYTES >> 20} MB: expected a picture; make it smaller")
    return content


def _opened(content: bytes) -> "Image.Image":
    """The picture, of which only the head was read."""
    if not content:
        raise DataError("is empty: expected a picture")
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError(
            f"pictures are read with Pillow. Install it with: {install_line('models')}"
        ) from error
    try:
        Image.init()
        picture = Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError:
        raise DataError(_too_large("")) from None
    except Exception as error:  # whatever a damaged file makes a decoder raise
        what = _other_picture(content[:512]) or other_kind(content[:512])
        raise DataError(
            f"is {what}" if what else "is no picture that can be read: it is damaged, or of another kind"
        ) from error
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise DataError(_too_large(f"{width:,} x {height:,} pixels, "))
    return picture


def _other_picture(head: bytes) -> str:
    """What a picture of a kind that is not read is, whatever its name says."""
    if head[4:8] == b"ftyp":
        return "HEIC inside, as phones save it, which is not read: convert it first, as with magick IN OUT.png"
    return "SVG inside, which is not read: convert it first, as with magick IN OUT.png" if b"<svg" in head else ""


def _too_large(size: str) -> str:
    return f"claims {size}more than {MOST_PIXELS // 10**6} million pixels: make it smaller"


def _loaded(picture: "Image.Image", size: int) -> "Image.Image":
    """The picture with its pixels, turned upright; a JPEG that is far larger than needed is decoded at a fraction."""
    from PIL import ImageOps

    try:
        picture.draft(None, (2 * size, 2 * size))  # keeps at least this size; of other formats it does nothing
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:
        raise DataError(f"cannot be decoded whole ({_reason(error)}): fetch or save it again") from error


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def _rgb(picture: "Image.Image") -> "Image.Image":
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        deep = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise DataError("holds floating-point numbers, whose white is not known: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    try:
        return picture.convert("RGB")
    except ValueError as error:
        raise DataError(f"is stored as {picture.mode}, which does not become RGB: save it as RGB") from error
