"""Transcripts as corpora of speech come: no table with names of columns, but files that say the text of each clip.

LibriSpeech has `84-121123.trans.txt` in the folder of the clips, Kaldi `wav.scp` and `text`, LJ Speech and lists for
training voices lines with bars (`LJ001-0001|Printing, ...`), VCTK and many others a .txt for each clip.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from thimble.data.media.folders import walk
from thimble.data.media.items import Item
from thimble.data.media.kinds import AUDIO, is_media
from thimble.data.media.manifests import Place
from thimble.data.records import Skipped
from thimble.data.sources.packed import unpacked
from thimble.data.sources.raw import Told
from thimble.data.sources.splits import label_of, meaning_of
from thimble.data.sources.text import strict_lines
from thimble.errors import DataError, escaped, listing

MOST_LISTS = 50  # files on top whose first line is looked at
_LISTS = (".csv", ".txt")


class Spoken(NamedTuple):
    """What is said in a clip, and where that is written."""

    clip: str  # its name or path, as it is written there
    text: str
    file: Path  # that says it
    line: int
    path: Path | None = None  # of the clip, if it is known


class Corpus:
    """The folder of a corpus, or one of its files, and its clips."""

    def __init__(self, path: Path, skipped: Skipped, told: Told) -> None:
        self._path, self._root = path, path if path.is_dir() else path.parent
        self._skipped, self._told = skipped, told
        self._places: dict[Path, Place] = {}
        self.files: list[Path] = []  # that list clips and were read

    def listed(self) -> dict[str, list[Item]]:
        """The clips of files that list them, by split; none if the corpus has no such files."""
        files = list(walk(self._path)) if self._path.is_dir() else [self._path]
        names = {file.name for file in files}
        if found := [file for file in files if file.name.endswith(".trans.txt")]:
            return self._items(spoken for file in found for spoken in self._lines(file, None))
        if {"wav.scp", "text"} <= names:
            return self._items(self._by_kaldi([file.parent for file in files if file.name == "wav.scp"]))
        tops = [file for file in files if file.parent == self._root and file.suffix.lower() in _LISTS]
        lists = [file for file in tops if self._is_list(file)] if len(tops) <= MOST_LISTS else []
        return self._items(spoken for file in lists for spoken in self._lines(file, "|"))

    def beside(self) -> dict[str, list[Item]]:
        """The clips that have a text of the same name, beside them or elsewhere in the corpus; none if no clip has."""
        files = list(walk(self._path)) if self._path.is_dir() else []
        texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
        normal = [file for file in files if file.name.lower().endswith(".normalized.txt")]  # as LibriTTS has it
        texts |= {file.with_suffix("").with_suffix(""): file for file in normal}
        only: dict[str, Path | None] = {}  # the only text of a name
        for file in texts.values():
            only[file.stem] = None if file.stem in only else file
        pairs = [
            (clip, texts.get(clip.with_suffix("")) or only.get(clip.stem))
            for clip in files
            if is_media(clip.name, AUDIO)
        ]
        if not any(text for _, text in pairs):
            return {}
        if lacking := [self._shown(clip) for clip, text in pairs if not text]:
            self._told.note(f"clips without a text of their name, not used: {listing(lacking, 3)}")
        return self._items(self._whole(clip, text) for clip, text in pairs if text)

    def _items(self, found: Iterator[Spoken]) -> dict[str, list[Item]]:
        """The clips by split, as folders and files are called; where none is for training, those of the only split."""
        splits: dict[str, list[Item]] = {}
        for spoken in found:
            self._skipped.rows += 1
            source = f"{self._shown(spoken.file)} line {spoken.line}"
            try:
                path = self._clip(spoken)
            except DataError as error:
                self._skipped.add(source, *error.problems)
                continue
            label = label_of(spoken.file.relative_to(self._root), spoken.file.stem)
            item = Item(path, f"{source} ({escaped(path.name)})", text=spoken.text)
            splits.setdefault(meaning_of(label) or "train", []).append(item)
        if splits and self.files:
            self._told.note(f"transcripts of {listing(map(self._shown, self.files), 3)}")
        if splits and "train" not in splits:
            if len(splits) > 1:
                raise DataError(
                    f"{self._path} has clips for {listing(sorted(splits))}, and none for training: name the folder "
                    "or file of one of them, to use it alone."
                )
            return {"train": next(iter(splits.values()))}
        return splits

    def _clip(self, spoken: Spoken) -> Path:
        if not spoken.text:
            raise DataError(f"has no text for {spoken.clip[:200]!r}: expected one in each line")
        if spoken.path:
            return spoken.path
        folder = spoken.file.parent
        place = self._places.setdefault(folder, Place(folder, AUDIO))
        path = place.find(spoken.clip) or self._places.setdefault(self._root, Place(self._root, AUDIO)).find(
            spoken.clip
        )
        if path is None or not path.is_file():
            raise DataError(f"names {spoken.clip[:200]}, which is not there: expected a clip in {self._shown(folder)}")
        return path

    def _lines(self, file: Path, mark: str | None) -> Iterator[Spoken]:
        """The lines of a file: a clip, a mark or white space, its text; between bars, the last that is no number."""
        self.files.append(file)
        for number, line in strict_lines(partial(unpacked, file, self._shown(file)), self._shown(file), self._told):
            if not line.strip():
                continue
            clip, *cells = [cell.strip() for cell in (line.split(mark) if mark else line.split(None, 1))]
            texts = [cell for cell in cells if cell and not (mark and cell.replace(".", "").isdecimal())]
            yield Spoken(clip, texts[-1] if texts else "", file, number)

    def _by_kaldi(self, folders: list[Path]) -> Iterator[Spoken]:
        for folder in folders:
            if (folder / "segments").is_file():
                raise DataError(
                    f"{folder / 'segments'} takes utterances from within longer clips, which is not done here: cut "
                    "the clips first, as with Kaldi's extract-segments, and list the pieces in wav.scp."
                )
            paths = {spoken.clip: spoken.text for spoken in self._lines(folder / "wav.scp", None)}
            if command := next((path for path in paths.values() if path.endswith("|")), None):
                raise DataError(
                    f"{folder / 'wav.scp'} has commands for clips ({command[:80]!r}), and none is run: write the "
                    "clips into files first, as with Kaldi's wav-copy, and list those."
                )
            for spoken in self._lines(folder / "text", None):
                yield spoken._replace(clip=paths.get(spoken.clip, spoken.clip))

    def _is_list(self, file: Path) -> bool:
        """Whether the first line of a file names a clip, and a text behind a bar."""
        try:
            first = next(self._lines(file, "|"), None)
            self.files.pop()
            return first is not None and bool(first.text) and self._clip(first).is_file()
        except DataError:
            return False

    def _whole(self, clip: Path, file: Path) -> Spoken:
        """A clip, and all that the file of its name says."""
        lines = strict_lines(partial(unpacked, file, self._shown(file)), self._shown(file), self._told)
        return Spoken(clip.name, " ".join(" ".join(line.split()) for _, line in lines).strip(), file, 1, clip)

    def _shown(self, path: Path) -> str:
        return escaped(path.relative_to(self._root).as_posix())
