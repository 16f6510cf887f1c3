"""Clips whose words are to be written down: what is said of them becomes text, judged by its errors."""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import StepKey
from thimble.config.train import TrainConfig
from thimble.data.media.find import find_media
from thimble.data.media.items import Item, MediaData, split_items
from thimble.data.transcript_tokens import TranscriptTokens
from thimble.errors import DataError, MissingPackageError, install_line, listing, plural
from thimble.models.module_base import ModuleBase
from thimble.training.answers import Answer, mean_scores
from thimble.training.tasks.clips import ClipRows, KeptClips, clip_inputs
from thimble.training.tasks.reading import TRAIN, Classes, TaskRows, digest_of, first_of_each, known_rows

NORMALISATION = "small letters, without punctuation and symbols, one space between words"
IGNORED = -100  # a label that is not compared
REPEATS = 4  # times that a word or two stand one after the other, from which on it is called a loop


@dataclass(frozen=True)
class TranscriptReading(ClipRows):
    """Clips of the training and the validation rows, with what is said in them."""

    tokens: TranscriptTokens
    most_tokens: int  # that are written of a clip

    loss = "tokens"

    def batch(self, part: str, rows: Sequence[int], key: StepKey | None) -> ModuleBatch:
        """Features of clips; `prompt` int64 (rows, given tokens), `most` int64 (rows,), and of clips with a transcript
        its `labels` int64 (rows, tokens).
        """
        side = 0 if part == TRAIN else 1
        texts = [self.items[side][row].text for row in rows]
        targets = {
            "prompt": np.array([self.tokens.prompt] * len(rows), np.int64),
            "most": np.full(len(rows), self.most_tokens, np.int64),
        }
        if all(text is not None for text in texts):
            targets["labels"] = _filled([self.tokens.encode(str(text)) for text in texts])
        return ModuleBatch(self.clips[side].batch(rows), targets, rows)

    def answers(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[Answer]:
        """What was written of each clip, with its errors."""
        return [self._answer(made, self.valid[row]) for made, row in zip(outputs, rows, strict=True)]

    def _answer(self, made: NDArray[Any], item: Item) -> Answer:
        written, _ = self.tokens.decode(made.tolist())
        scores, sizes = score_transcript(written, item.text) if item.text else ({}, {})
        return Answer(item.source, item.text or "", written, scores, item.source, sizes=sizes)

    def lines(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
        """The file of each clip and what is said in it, beside the transcript that it has."""
        found = []
        for made, item in zip(outputs, (self.valid[row] for row in rows), strict=True):
            text, has_end = self.tokens.decode(made.tolist())
            line = {"file": str(item.path), "text": text, **({} if has_end else {"cut_off": True})}
            found.append({**line, **({"expected": item.text} if item.text else {})})
        return found

    def extra(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> Mapping[str, Any]:
        """Errors over all clips, and how many texts are empty, go round in circles or were cut off."""
        answers = self.answers(outputs, rows)
        return {
            "normalisation": NORMALISATION, **mean_scores(answers),
            "characters": int(sum(answer.sizes.get("CER", 0) for answer in answers)),
            "empty": sum(not answer.written for answer in answers),
            "in circles": sum(goes_in_circles(answer.written) for answer in answers),
            "cut off": sum(not self.tokens.decode(made.tolist())[1] for made in outputs),
        }  # fmt: skip


def _filled(texts: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Tokens of texts, (rows, tokens), filled up with labels that are not compared."""
    labels = np.full((len(texts), max(map(len, texts))), IGNORED, np.int64)
    for row, tokens in enumerate(texts):
        labels[row, : len(tokens)] = tokens
    return labels


# ---- errors ---------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """A text as errors are counted in it; see NORMALISATION. Accents stay: they are part of words."""
    text = unicodedata.normalize("NFC", text).lower()
    marks = (" " if unicodedata.category(letter)[0] in "PSZC" else letter for letter in text)
    return " ".join("".join(marks).split())


def score_transcript(written: str, reference: str) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of one text: CER and WER, and whether it is exactly right; with the characters and words of the reference.

    A reference of punctuation alone has no characters to err in, and no figures.
    """
    try:
        import jiwer
    except ImportError:
        raise MissingPackageError(
            f"errors of transcripts are counted with jiwer, which is not installed: run {install_line('models')}"
        ) from None
    said, expected = normalised(written), normalised(reference)
    if not expected:
        return {}, {}
    scores = {"CER": float(jiwer.cer(expected, said)), "WER": float(jiwer.wer(expected, said))}
    sizes = {"CER": float(len(expected)), "WER": float(len(expected.split()))}
    return {**scores, "exact match": float(said == expected)}, sizes


def goes_in_circles(text: str) -> bool:
    """Whether a word, or a few of them, stands again and again without end, as a recogniser does that is lost."""
    words = normalised(text).split()
    for length in (1, 2, 3, 4, 5, 6):
        for start in range(len(words) - length * REPEATS + 1):
            piece = words[start : start + length]
            if words[start : start + length * REPEATS] == piece * REPEATS:
                return True
    return False


# ---- rows -----------------------------------------------------------------------------------------------------------


def open_transcripts(config: TrainConfig) -> TaskRows:
    """Find the clips of a run with their transcripts, and hold some out; raises DataError with every problem."""
    found = find_media(
        Path(config.data), "audio", config.prompt_column, config.completion_column, "text", config.strict,
        config.max_seconds,
    )  # fmt: skip
    train, valid = (_heard_whole(part, config.max_seconds, found) for part in (found.train, found.valid or ()))
    found.skipped.check()
    if found.valid is None:
        train, valid = split_items(train, config.valid_split, config.seed)
    if not train:
        raise DataError(f"{config.data}: no clip is left to learn from", *found.skipped.told())
    known = known_rows(train, valid)
    return TaskRows(
        labels=(), sources=[item.source for item in valid],
        digest=digest_of((item.digest, item.text) for item in (*train, *valid)),
        reading=partial(_transcript_reading, train, valid), files=found.files, has_valid_part=found.valid is not None,
        known=known, unseen=[number for number in first_of_each(valid) if number not in known], skipped=found.skipped,
        told=(*found.told, *_known_texts(train, valid)), warnings=found.warnings,
        media={item.source: item.path for item in valid},
    )  # fmt: skip


def measured_transcripts(config: TrainConfig, classes: Classes, needs_answers: bool) -> TaskRows:
    """The clips that a finished adapter is asked about: those for tests, else those for validation, else all."""
    needed = "text" if needs_answers else ""
    columns = config.prompt_column, config.completion_column
    found = find_media(Path(config.data), "audio", *columns, needed, config.strict, config.max_seconds)
    items = found.test or found.valid or found.train
    if needs_answers:
        items = _heard_whole(items, config.max_seconds, found)
        found.skipped.check()
    long = [item.source for item in items if item.seconds > config.max_seconds]
    warnings = [
        f"{plural(len(long), 'clip takes', 'clips take')} more than {config.max_seconds:g} s, and the beginning alone "
        f"is written down: {listing(long, 3)}; cut such clips into pieces"
    ] * bool(long)
    return TaskRows(
        labels=(), sources=[item.source for item in items],
        digest=digest_of((item.digest, item.text) for item in items),
        reading=partial(_transcript_reading, (), items), files=found.files, unseen=first_of_each(items),
        skipped=found.skipped, told=found.told, warnings=(*found.warnings, *warnings),
        media={item.source: item.path for item in items},
    )  # fmt: skip


def _heard_whole(items: Sequence[Item], most: float, found: MediaData) -> list[Item]:
    """Clips that are heard to their end: of a longer one, the transcript would say more than is heard."""
    for item in items:
        if item.seconds > most:
            found.skipped.add(
                item.source, f"takes {item.seconds:.1f} s, and {most:g} s are heard: cut it with its transcript"
            )
    return [item for item in items if item.seconds <= most]


def _known_texts(train: Sequence[Item], valid: Sequence[Item]) -> list[str]:
    texts = Counter(normalised(item.text or "") for item in train)
    known = sum(texts[normalised(item.text or "")] > 0 for item in valid)
    return [
        f"{plural(known, 'validation clip says', 'validation clips say')} what a training clip says too"
    ] * bool(known)  # fmt: skip


def _transcript_reading(
    train: Sequence[Item], valid: Sequence[Item], base: ModuleBase, config: TrainConfig
) -> TranscriptReading:
    inputs = clip_inputs(base)
    tokens = TranscriptTokens(base.path, base.name, config.language or base.preprocessing.get("language"))
    long = [item.source for item in (*train, *valid) if len(tokens.encode(item.text or "")) > tokens.most]
    if long:
        raise DataError(
            f"{plural(len(long), 'transcript has', 'transcripts have')} more than the {tokens.most} tokens that base "
            f"{base.name} writes of a clip ({listing(long, 5)}): cut the clips shorter, with their transcripts"
        )
    clips = KeptClips(train, inputs, config.max_seconds), KeptClips(valid, inputs, config.max_seconds)
    # A finished adapter writes as many tokens as it did in its run.
    most = min(config.max_new_tokens, base.preprocessing.get("max_new_tokens", tokens.most), tokens.most)
    told = {"max_seconds": config.max_seconds, "max_new_tokens": most}
    told |= {"language": tokens.language} if tokens.language else {}
    return TranscriptReading((train, valid), clips, told, tokens, most)
