"""Rows of text for encoders, opened: sentences with labels, whose label is to be found, and pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import StepKey
from thimble.config.train import TrainConfig
from thimble.data.columns import NamedColumns
from thimble.data.pooling import pooling_of
from thimble.data.sentence_split import split_sentences
from thimble.data.sentence_tokens import SentenceTokenizer, TokenCounts, Tokens
from thimble.data.sentences import (
    CLASSIFY,
    EMBED,
    Sentence,
    SentenceData,
    contents,
    read_sentences,
    two_labels,
)
from thimble.data.spool import Chosen, Items
from thimble.errors import BaseModelError, DataError, listing, plural
from thimble.models.module_base import ModuleBase
from thimble.training.tasks.labels import LabelAnswers, measured_rows, rows_of_labels, targets
from thimble.training.tasks.pairs import PairReading, tokens_of
from thimble.training.tasks.reading import TRAIN, Classes, TaskRows, digest_of, first_of_each


@dataclass(frozen=True)
class TextReading(LabelAnswers):
    """Sentences of the training and the validation rows, whose label is to be found."""

    train: Items[Sentence]
    valid: Items[Sentence]
    labels: Sequence[str]  # the classes: their places are the numbers that the head gives
    tokenizer: SentenceTokenizer
    train_tokens: Sequence[Tokens]
    valid_tokens: Sequence[Tokens]
    warnings: Sequence[str] = ()

    loss = "labels"
    unit = "tokens"

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """The longest input."""
        return {"max_tokens": self.tokenizer.most_tokens}

    @property
    def costs(self) -> Sequence[int]:
        """Tokens of each training row."""
        return [len(row.ids) for row in self.train_tokens]

    @property
    def valid_costs(self) -> Sequence[int]:
        """Tokens of each validation row."""
        return [len(row.ids) for row in self.valid_tokens]

    def batch(self, part: str, rows: Sequence[int], key: StepKey | None) -> ModuleBatch:
        """Tokens int64 (rows, tokens), and classes int64 (rows,)."""
        items, tokens = (self.train, self.train_tokens) if part == TRAIN else (self.valid, self.valid_tokens)
        inputs = self.tokenizer.padded([tokens[row] for row in rows])
        return ModuleBatch(inputs, targets([items[row] for row in rows], self.labels), rows)

    def lines(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
        """The label of each text, and how likely the module finds it."""
        lines = super().lines(outputs, rows)
        return [{"text": self.valid[row].asked, **line} for row, line in zip(rows, lines, strict=True)]


# ---- opened ---------------------------------------------------------------------------------------------------------


def open_texts(config: TrainConfig) -> TaskRows:
    """Read the labelled texts of a run and hold some out; raises DataError with every problem."""
    found, train, valid = _read(config, CLASSIFY)
    twice = two_labels(train)
    warnings = [
        f"{plural(len(twice), 'training row')} with the text of another and another label, of which one at least is "
        f"wrong: {listing((f'{one} and {other}' for one, other in twice), 3)}"
    ] * bool(twice)
    found = replace(found, warnings=(*found.warnings, *warnings))
    return rows_of_labels(found, train, valid, config, _text_reading)


def measured_texts(config: TrainConfig, classes: Classes, needs_answers: bool) -> TaskRows:
    """Read texts to be told by a finished adapter, with their labels if they are needed."""
    found = read_sentences(config.data, CLASSIFY, config.strict, NamedColumns.of(config), needs_answers)
    items = found.test or found.valid or found.train
    return measured_rows(found, items, classes, config.data, _text_reading)


def measured_pairs(config: TrainConfig, classes: Classes, needs_answers: bool) -> TaskRows:
    """Read pairs to measure a finished adapter on, or texts alone to be embedded by it."""
    found = read_sentences(config.data, EMBED, config.strict, NamedColumns.of(config), needs_answers)
    items = found.test or found.valid or found.train
    if len(items) > 1 and (scores := {row.score for row in items} - {None}) and len(scores) == 1:
        raise DataError(
            f"{config.data}: all {len(items):,} rows to measure on have the score {scores.pop():g}, so they say no "
            "order (test files of benchmarks have none): name a file of other rows, such as that for validation"
        )
    return TaskRows(
        labels=(), sources=[row.source for row in items], digest=_digest(items),
        reading=partial(_pair_reading, Chosen(items, ()), items), files=found.files, unseen=first_of_each(items),
        skipped=found.skipped, told=found.told, warnings=found.warnings,
    )  # fmt: skip


def open_pairs(config: TrainConfig) -> TaskRows:
    """Read the pairs of a run and hold some out; raises DataError with every problem."""
    found, train, valid = _read(config, EMBED)
    learned = {content for row in train for content in contents(row)}
    known = frozenset(number for number, row in enumerate(valid) if not learned.isdisjoint(contents(row)))
    return TaskRows(
        labels=(), sources=[row.source for row in valid], digest=_digest(train, valid),
        reading=partial(_pair_reading, train, valid), files=found.files, has_valid_part=found.valid is not None,
        known=known, unseen=[number for number in first_of_each(valid) if number not in known], skipped=found.skipped,
        told=found.told,
        warnings=found.warnings,
    )  # fmt: skip


def _read(config: TrainConfig, task: str) -> tuple[SentenceData, Items[Sentence], Items[Sentence]]:
    """The rows of a run, and which of them are learned from and which are held out."""
    found = read_sentences(config.data, task, config.strict, NamedColumns.of(config))
    if found.valid is not None:
        return found, found.train, found.valid
    train, held = split_sentences(found.train, config.valid_split, config.seed)
    return found, Chosen(found.train, train), Chosen(found.train, held)


def _digest(*parts: Items[Sentence]) -> str:
    """Hash of rows with what is to be learned of them."""
    return digest_of((repr(row.texts), (row.label, row.score)) for part in parts for row in part)


def _text_reading(
    train: Items[Sentence], valid: Items[Sentence], labels: Sequence[str], base: ModuleBase, config: TrainConfig
) -> TextReading:
    tokenizer, counts = open_tokenizer(base, config.seq_len), TokenCounts()
    tokens = [tokenizer.encode((row.texts for row in part), counts) for part in (train, valid)]
    return TextReading(train, valid, labels, tokenizer, *tokens, _warnings(tokenizer, counts))


def _pair_reading(train: Items[Sentence], valid: Items[Sentence], base: ModuleBase, config: TrainConfig) -> PairReading:
    tokenizer, counts = open_tokenizer(base, config.seq_len), TokenCounts()
    parts = [tokens_of(part, tokenizer, counts) for part in (train, valid)]
    pooling, told = pooling_of(base.path, base.name)
    pooling = base.preprocessing.get("pooling", pooling)  # a finished adapter goes on as it was trained
    return PairReading(*parts, tokenizer, pooling, (*told, *_warnings(tokenizer, counts)))


def open_tokenizer(base: ModuleBase, most_tokens: int | None) -> SentenceTokenizer:
    """The tokenizer of a base; `most_tokens` is the longest input that the user allows."""
    if base.function:
        raise BaseModelError(
            f"base {base.name} is a function of your own, which has no tokenizer: for texts, name a Hugging Face folder"
        )
    return SentenceTokenizer(base.path, base.config, most_tokens)


def _warnings(tokenizer: SentenceTokenizer, counts: TokenCounts) -> tuple[str, ...]:
    return (*tokenizer.warnings, *counts.told(tokenizer.most_tokens or 0))
