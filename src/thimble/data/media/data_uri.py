"""Pictures and clips made small, as data URIs for a page that is complete in itself."""

import base64
import io

import numpy as np

from thimble.data.media.inside import MediaFile
from thimble.data.media.pictures import open_picture
from thimble.data.media.sound import read_sound

SIDE = 96  # pixels of the longer side
QUALITY = 80  # of a JPEG
PLAYED_RATE = 16_000  # samples a second
PLAYED_SECONDS = 8.0


def picture_uri(path: MediaFile, side: int = SIDE) -> str:
    """A picture, its longer side at most `side` pixels, as JPEG, or as PNG where that is smaller: a drawing, a digit.

    A DataError says why it cannot be decoded, without the path.
    """
    picture = open_picture(path, side)
    picture.thumbnail((side, side))
    files = []
    for kind, options in (("jpeg", {"quality": QUALITY}), ("png", {"optimize": True})):
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        files.append((len(stream.getvalue()), kind, stream.getvalue()))
    _, kind, content = min(files)
    return _uri(f"image/{kind}", content)


def clip_uri(path: MediaFile) -> str:
    """The first PLAYED_SECONDS of a clip as MP3, which every browser plays; as WAV where libsndfile writes none.

    A DataError says why it cannot be decoded, without the path.
    """
    import soundfile

    samples = np.clip(read_sound(path, PLAYED_RATE, PLAYED_SECONDS), -1, 1)
    kind, name = ("MP3", "mpeg") if "MP3" in soundfile.available_formats() else ("WAV", "wav")
    stream = io.BytesIO()
    soundfile.write(stream, samples, PLAYED_RATE, format=kind)
    return _uri(f"audio/{name}", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
