"""Prepare the speech demo: spoken Spanish names of Tux Paint's stamps (Debian's tuxpaint-stamps-default, GPL-2).

Usage: python examples/09_spanish.py STAMPS FOLDER, where STAMPS is usr/share/tuxpaint/stamps of the unpacked package.
The folder then holds the clips and metadata.csv. Names are written in small letters and without full stops.
"""

import csv
import re
import sys
from pathlib import Path

LETTERS, SUFFIX = range(3, 41), "_desc_es.ogg"


def spanish(path):
    """The Spanish line of a stamp's names; nothing if it has none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = next((line.partition("=")[2] for line in lines if line.startswith("es.utf8=")), "")
    return re.sub(r"[.!¡¿?…\"«»“”]", "", found.partition("(")[0]).strip().lower()


stamps, folder = Path(sys.argv[1]), Path(sys.argv[2])
(folder / "clips").mkdir(parents=True, exist_ok=True)
with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
    table = csv.writer(file)
    table.writerow(["file_name", "transcription"])
    seen = set()
    for clip in sorted(stamps.rglob(f"*{SUFFIX}")):
        text = spanish(clip.with_name(clip.name.removesuffix(SUFFIX) + ".txt"))
        if len(text) in LETTERS and (content := clip.read_bytes()) not in seen:  # some stamps share a clip
            seen.add(content)
            name = "_".join(clip.relative_to(stamps).parts)
            (folder / "clips" / name).write_bytes(content)
            table.writerow([f"clips/{name}", text])
print(f"{folder / 'metadata.csv'}: {len(seen)} clips with their Spanish names")
