"""Texts as encoders read them: token ids with their special tokens, cut at the model's length, in even batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.data.added_tokens import read_settings
from thimble.data.tokenizer import tokenizer_from_folder
from thimble.errors import plural

if TYPE_CHECKING:
    import tokenizers

# Positions of these begin behind the padding token (transformers, `create_position_ids_from_input_ids`).
OFFSET_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "data2vec-text",
    "mpnet",
    "roberta-prelayernorm",
)
NO_LIMIT = 1_000_000  # transformers writes 1e30 where a tokenizer has no length of its own
# Tokens of padding that cost about as much as one more batch: some of many small operations instead of large ones.
BATCH_TOKENS = 48
PADDED_SHARE = 0.05  # of a batch that may be padding, where that is more
UNKNOWN_SHARE = 0.01  # of the tokens: more that the vocabulary does not have is told


class Tokens(NamedTuple):
    """One input of an encoder: a text, or two that are read together."""

    ids: NDArray[np.int32]  # (tokens,)
    kinds: NDArray[np.int32] | None = None  # 0 in the first text, 1 in the second; None for one text


@dataclass
class TokenCounts:
    """What became of some texts."""

    texts: int = 0
    tokens: int = 0
    unknown: int = 0  # tokens that stand for text which the vocabulary does not have
    cut: list[int] = field(default_factory=list)  # tokens lost by each text that was longer than the model reads

    def told(self, most: int) -> list[str]:
        """What of it is worth a warning; `most` is what the model reads."""
        found = []
        if self.cut:
            share = len(self.cut) / self.texts
            found.append(
                f"{plural(len(self.cut), 'text')} of {self.texts:,} ({share:.1%}) longer than {most:,} tokens lost "
                f"{plural(sum(self.cut), 'token')} in all at the end"
            )
        if self.unknown > UNKNOWN_SHARE * self.tokens:
            found.append(
                f"{self.unknown / self.tokens:.1%} of the tokens are unknown to the vocabulary of the base: it was "
                "made for other languages or characters, and cannot tell these apart"
            )
        return found


class SentenceTokenizer:
    """The tokenizer of an encoder's folder, with the special tokens that the model was trained with."""

    def __init__(self, folder: Path, config: Mapping[str, Any], most_tokens: int | None = None) -> None:
        """Open the tokenizer; `config` is the folder's config.json, `most_tokens` what the user allows.

        Args:
            folder: A Hugging Face folder.
            config: Its config.json.
            most_tokens: Longest input, if the user wants it shorter than the model's own.

        Raises:
            BaseModelError: If there is no tokenizer, or it is damaged.
        """
        own = tokenizer_from_folder(folder)
        self._inner: tokenizers.Tokenizer = own.inner
        self._inner.no_padding()
        self.warnings = own.warnings
        lengths = [length for length in (*_lengths(folder, config), most_tokens) if length]
        self.most_tokens: int | None = min(lengths, default=None)
        self.pad_id = _padding(self._inner, own.named_tokens.get("pad_token"), config)
        self._unknown = _id(self._inner, own.named_tokens.get("unk_token"))
        self._has_kinds = (config.get("type_vocab_size") or 0) > 1

    def encode(self, inputs: Iterable[tuple[str, ...]], counts: TokenCounts) -> list[Tokens]:
        """The tokens of inputs, each one text or two that are read together; what became of them is counted."""
        return [self._encode(texts, counts) for texts in inputs]

    def _encode(self, texts: tuple[str, ...], counts: TokenCounts) -> Tokens:
        self._inner.no_truncation()
        found = self._inner.encode(*texts)
        if self.most_tokens and len(found.ids) > self.most_tokens:
            whole = len(found.ids)
            self._inner.enable_truncation(self.most_tokens)
            found = self._inner.encode(*texts)
            counts.cut.append(whole - len(found.ids))
        ids = np.array(found.ids, np.int32)
        counts.texts, counts.tokens = counts.texts + 1, counts.tokens + len(ids)
        counts.unknown += int((ids == self._unknown).sum())
        has_kinds = self._has_kinds and len(texts) > 1
        return Tokens(ids, np.array(found.type_ids, np.int32) if has_kinds else None)

    def padded(self, rows: Sequence[Tokens]) -> dict[str, NDArray[np.int64]]:
        """Rows as arguments of the model, padded at the end to the longest of them: each int64 (rows, tokens)."""
        shape = len(rows), max(len(row.ids) for row in rows)
        ids, mask, kinds = np.full(shape, self.pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row.ids)], mask[place, : len(row.ids)] = row.ids, 1
            if row.kinds is not None:
                kinds[place, : len(row.ids)] = row.kinds
        has_kinds = any(row.kinds is not None for row in rows)
        return {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": kinds} if has_kinds else {})


def _lengths(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Longest inputs by what the folder says: the positions, the tokenizer, and what Sentence Transformers cuts at."""
    positions = config.get("max_position_embeddings") or 0
    if config.get("model_type") in OFFSET_POSITIONS:
        positions -= (config.get("pad_token_id") or 0) + 1
    named = (("tokenizer_config", "model_max_length"), ("sentence_bert_config", "max_seq_length"))
    lengths = [positions, *(read_settings(folder / f"{name}.json").get(key) for name, key in named)]
    return [int(length) for length in lengths if isinstance(length, int | float) and 0 < length < NO_LIMIT]


def _padding(inner: "tokenizers.Tokenizer", token: str | None, config: Mapping[str, Any]) -> int:
    """The id that fills rows up. The config's own comes first: positions of RoBERTa, and the last token by which GPT-2
    and other decoders tell classes apart, are counted by that one. Models without any are filled up with their end.
    """
    named = config.get("pad_token_id"), _id(inner, token), config.get("eos_token_id")
    ids = (found[0] if isinstance(found, list) and found else found for found in named)
    return next((found for found in ids if type(found) is int and found >= 0), 0)


def _id(inner: "tokenizers.Tokenizer", token: str | None) -> int | None:
    """The id of a token, if there is one."""
    found: int | None = inner.token_to_id(token) if token is not None else None
    return found


def even_batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Numbers of rows in batches of about the same length, the longest first, so that hardly anything is padding.

    A batch ends where its padding would come to more than another batch costs, or its tokens, padding among them, to
    more than `most_tokens`.

    >>> even_batches([3, 90, 4, 88], 1000)
    [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    padding = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        longest = lengths[batches[-1][0]] if batches else 0
        tokens = longest * (len(batches[-1]) + 1) if batches else 0
        padding += longest - lengths[number]
        if not batches or tokens > most_tokens or padding > max(BATCH_TOKENS, PADDED_SHARE * tokens):
            batches.append([])
            padding = 0
        batches[-1].append(number)
    return batches
