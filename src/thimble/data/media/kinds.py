"""Files of pictures and sound by their names: which are read, which are not and what to convert them with."""

import os

from thimble.data.media.inside import MediaFile
from thimble.errors import as_word

IMAGE, AUDIO = "image", "audio"
NOUNS = {IMAGE: ("picture", "pictures"), AUDIO: ("clip", "clips")}
SUFFIXES = {
    IMAGE: (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm",
        ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".mpo", ".qoi", ".tga",
    ),
    AUDIO: (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf",
            ".w64", ".rf64"),
}  # fmt: skip
EXPECTED = {IMAGE: ".jpg, .png, .webp, .gif, .bmp or .tif", AUDIO: ".wav, .flac, .ogg, .opus or .mp3"}
_TO_PNG = "convert it first, as with ImageMagick: magick {name} {stem}.png"
_TO_WAV = "convert it first, as with: ffmpeg -i {name} {stem}.wav"
_REFUSED = {
    IMAGE: dict.fromkeys(
        (".heic", ".heif", ".svg", ".psd", ".eps", ".ai", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf",
         ".rw2", ".jxl", ".ico", ".xcf", ".exr", ".hdr"), _TO_PNG,
    ),
    AUDIO: dict.fromkeys(
        (".m4a", ".aac", ".wma", ".amr", ".webm", ".mp4", ".m4b", ".mka", ".mkv", ".mov", ".3gp", ".ac3", ".ra",
         ".ape", ".wv", ".dsf", ".mpc", ".spx"), _TO_WAV,
    ),
}  # fmt: skip
_LEFT_BY_OTHERS = {"thumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "__pycache__", "$recycle.bin"}


def is_hidden(name: str) -> bool:
    """Whether systems and programs keep a file or folder for themselves: .DS_Store, Thumbs.db, @eaDir."""
    return name.startswith((".", "~$")) or name.lower() in _LEFT_BY_OTHERS


def is_media(name: str, kind: str) -> bool:
    """Whether a name says a picture (or a clip), of a kind that is read or of one that is not."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in SUFFIXES[kind] or suffix in _REFUSED[kind]


def refusal(path: MediaFile, kind: str) -> str:
    """What to do about a file of a kind that is not read; nothing if it may be."""
    way = _REFUSED[kind].get(path.suffix.lower(), "")
    if not way:
        return ""
    told = way.format(name=as_word(path.name), stem=as_word(path.stem))
    return f"is a {path.suffix.lower()} file, which is not read: {told}"
