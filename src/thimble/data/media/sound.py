"""Sound as one channel of samples at one rate, whatever it is stored as."""

import struct
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.data.media.inside import MediaFile, open_media
from thimble.data.sources.kinds import other_kind
from thimble.errors import DataError, MissingPackageError, install_line

BLOCK_FRAMES = 1 << 16  # read at a time: a header may claim any length
RATES = (1_000, 768_000)  # samples a second that are taken for sound
HEAD_BYTES = 512
MOST_CHUNKS = 64  # of a WAV, before its sound
UNKNOWN_BYTES = 0x7FFF0000  # what programs write for the length of a WAV that goes through a pipe, or more
LOUDEST = 100.0  # of floats, which are between -1 and 1 but for some peaks


class Heard(NamedTuple):
    """What a clip is, once it was decoded."""

    seconds: float  # of the whole file
    is_silent: bool  # whether all samples that were decoded are 0


def read_sound(path: MediaFile, rate: int, most_seconds: float) -> NDArray[np.float32]:
    """The beginning of a clip as one channel: the mean of all channels, resampled.

    Args:
        path: The file; its content says what it is, not its name.
        rate: Samples a second of the result.
        most_seconds: What is longer is cut off there.

    Returns:
        (samples,), between -1 and 1 as files of whole numbers are; of any number of bits.

    Raises:
        DataError: It cannot be decoded, has no samples, or some that are no numbers; says so without the path.
    """
    samples, own_rate, _ = _decoded(path, most_seconds)
    if own_rate == rate:
        return samples
    import soxr

    resampled = np.ascontiguousarray(soxr.resample(samples, own_rate, rate), np.float32)
    return resampled if len(resampled) else samples[:1]


def listen_to(path: MediaFile, most_seconds: float) -> Heard:
    """Decode what would be used of a clip to see that it can be; raises a DataError if not."""
    samples, rate, frames = _decoded(path, most_seconds)
    return Heard(frames / rate, not samples.any())


def _decoded(path: MediaFile, most_seconds: float) -> tuple[NDArray[np.float32], int, int]:
    """Samples as they are stored, (frames,), samples a second, and how many frames the whole file has."""
    try:
        import soundfile
    except ImportError as error:
        raise MissingPackageError(f"sound is read with soundfile. Install it with: {install_line('models')}") from error
    try:
        stored = open_media(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    with stored:
        head = stored.read(HEAD_BYTES)
        if not head:
            raise DataError("is empty: expected a clip")
        _check_whole(stored, head)
        stored.seek(0)
        try:
            # By the number of the open file, where there is one: names need not be UTF-8.
            opened = stored.fileno() if isinstance(path, Path) else stored
            with soundfile.SoundFile(opened, closefd=False) as file:
                return _mono(file, most_seconds), file.samplerate, file.frames
        except soundfile.LibsndfileError as error:
            raise DataError(_refused(head, str(error.error_string))) from error


def _check_whole(stored: IO[bytes], head: bytes) -> None:
    """Raise a DataError if a WAV holds less sound than it says, which libsndfile takes without a word."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return
    end, place = stored.seek(0, 2), 12
    for _ in range(MOST_CHUNKS):
        stored.seek(place)
        if len(chunk := stored.read(8)) < 8:
            return
        name, size = struct.unpack("<4sI", chunk)
        place += 8
        if name == b"data":
            if size < UNKNOWN_BYTES and end - place < 0.99 * size:  # some programs count wrong by a few bytes
                raise DataError(
                    f"is cut off: it says that it holds {size:,} bytes of sound, and has {end - place:,}: fetch or "
                    "save it again"
                )
            return
        place += size + size % 2


def _refused(head: bytes, reason: str) -> str:
    if head[4:8] == b"ftyp":
        return "is MP4 or M4A inside, which is not read: convert it first, as with ffmpeg -i IN OUT.wav"
    what = other_kind(head)
    return (
        f"is {what}" if what else f"is no sound that can be read ({reason.rstrip('.')}): expected WAV, FLAC, Ogg or MP3"
    )


def _mono(file: Any, most_seconds: float) -> NDArray[np.float32]:
    rate = file.samplerate
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(f"has {rate:,} samples a second: expected {RATES[0]:,} to {RATES[1]:,}")
    left, blocks = int(most_seconds * rate), []
    while left > 0 and len(block := file.read(min(left, BLOCK_FRAMES), dtype="float32", always_2d=True)):
        blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(1))
        left -= len(block)
    if not blocks:
        raise DataError("has no samples: expected at least one")
    samples = np.concatenate(blocks)
    if not np.isfinite(samples).all():
        raise DataError(f"has {np.count_nonzero(~np.isfinite(samples)):,} samples that are NaN or Inf: save it again")
    if (loudest := float(np.abs(samples).max())) > LOUDEST:
        raise DataError(
            f"has samples of up to {loudest:,.0f}: expected floats between -1 and 1; divide them by 32,768 if they "
            "were whole numbers of 16 bits, and save it again"
        )
    return samples
