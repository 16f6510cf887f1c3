"""Prepare clips that tell languages apart: letters and syllables spoken in KLettres (Debian's klettres-data, GPL-2).

Usage: python examples/11_languages.py KLETTRES FOLDER, where KLETTRES is usr/share/klettres of the unpacked package.
Letters and syllables that are held out were not heard in training. Each language has hardly more than one speaker: what
is learned may be voices as well as languages.
"""

import shutil
import sys
import zlib
from pathlib import Path

LANGUAGES = ("cs", "da", "de", "en", "es", "fr", "he", "hu", "it", "nl", "pt_BR", "ru")
HELD_OUT = 5  # one in so many

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
counts = {"train": 0, "valid": 0}
for clip in sorted(source.rglob("*.ogg")):
    language, kind = clip.relative_to(source).parts[:2]
    if language in LANGUAGES:
        part = "valid" if zlib.crc32(f"{kind} {clip.stem.lower()}".encode()) % HELD_OUT == 0 else "train"
        place = folder / part / language
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, place / f"{kind}-{clip.name}")
        counts[part] += 1
print(f"{folder}: {counts['train']} clips to learn from, {counts['valid']} held out, in {len(LANGUAGES)} languages")
