"""Pairs: texts that belong together are to lie near each other; measured by finding each one's other half among all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thimble.backends.module_session import ModuleBatch
from thimble.backends.session import StepKey
from thimble.core.retrieval import rank_scores, ranks, spearman_parts
from thimble.data.pooling import MEAN, PLACES
from thimble.data.sentence_tokens import SentenceTokenizer, TokenCounts, Tokens
from thimble.data.sentences import Sentence, contents, folded
from thimble.data.spool import Items
from thimble.training.answers import Answer
from thimble.training.tasks.reading import TRAIN

SPEARMAN = "Spearman"


@dataclass(frozen=True)
class PairRows:
    """Rows of one part of the data, with the tokens of their texts."""

    rows: Items[Sentence]
    tokens: Sequence[Sequence[Tokens]]  # of each text of each row

    @property
    def costs(self) -> list[int]:
        """Tokens of each row, of all its texts together."""
        return [sum(len(text.ids) for text in texts) for texts in self.tokens]


@dataclass(frozen=True)
class PairReading:
    """Pairs of the training and the validation rows."""

    train: PairRows
    valid: PairRows
    tokenizer: SentenceTokenizer
    pooling: str = MEAN
    warnings: Sequence[str] = ()

    loss = "pairs"
    unit = "tokens"

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """The longest text, and how its tokens become one vector."""
        return {"max_tokens": self.tokenizer.most_tokens, "pooling": self.pooling}

    @property
    def costs(self) -> Sequence[int]:
        """Tokens of each training row."""
        return self.train.costs

    @property
    def valid_costs(self) -> Sequence[int]:
        """Tokens of each validation row."""
        return self.valid.costs

    def batch(self, part: str, rows: Sequence[int], key: StepKey | None) -> ModuleBatch:
        """Texts of some rows, each int64 (texts, tokens): all anchors, then what belongs to them, then negatives.

        Targets are `pair` int64 (rows, 2), the places of the two halves of each row, if rows have two; `content` int64
        (texts,), alike for texts that are the same but for case and spaces; `score` float32 (rows,) if rows have one;
        `token` int64 (), which token stands for its text, where it is no mean of all.
        """
        own = self.train if part == TRAIN else self.valid
        places = [(row, side) for side in (0, 1) for row in rows if side < len(own.tokens[row])]
        places += [(row, side) for row in rows for side in range(2, len(own.tokens[row]))]
        found = [own.rows[row] for row in rows]
        by_row = dict(zip(rows, found, strict=True))
        texts = [folded(by_row[row].texts[side]) for row, side in places]
        number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        targets: dict[str, NDArray[Any]] = {"content": np.array([number[text] for text in texts])}
        if len(found[0].texts) > 1:
            targets["pair"] = np.arange(2 * len(rows)).reshape(2, -1).T
        if self.pooling in PLACES:
            targets["token"] = np.array(PLACES[self.pooling])
        if found[0].score is not None:
            targets["score"] = np.array([row.score for row in found], np.float32)
        return ModuleBatch(self.tokenizer.padded([own.tokens[row][side] for row, side in places]), targets, rows)

    def answers(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[Answer]:
        """What each anchor found among all that belongs to any, or how alike the two texts of a scored pair are."""
        asked = [self.valid.rows[row] for row in rows]
        made = np.stack(outputs) if len(outputs) else np.zeros((0, 2, 1), np.float32)
        return _alike(asked, made) if asked and asked[0].score is not None else _found(asked, made)

    def lines(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
        """The embedding of each text."""
        items = [self.valid.rows[row] for row in rows]
        return [
            {"file": item.source, "text": item.texts[0], "embedding": [round(float(value), 7) for value in made]}
            for item, made in zip(items, outputs, strict=True)
        ]

    def extra(self, outputs: Sequence[NDArray[Any]], rows: Sequence[int]) -> Mapping[str, Any]:
        """Among how many candidates each anchor's other half was looked for."""
        return {"candidates": len({contents(self.valid.rows[row])[1] for row in rows})}


def tokens_of(rows: Items[Sentence], tokenizer: SentenceTokenizer, counts: TokenCounts) -> PairRows:
    """The tokens of each text of some pairs, each text alone."""
    return PairRows(rows, [tokenizer.encode(((text,) for text in row.texts), counts) for row in rows])


def _found(asked: Sequence[Sentence], made: NDArray[np.float32]) -> list[Answer]:
    """Answers of retrieval, from the embeddings of the two texts of each row, float32 (rows, 2, width).

    All texts that belong to the same anchor are right, also those that stand in other rows.
    """
    first: dict[str, int] = {}  # of each candidate, the first row that has it
    right: dict[str, list[str]] = {}
    for place, (anchor, other) in enumerate(map(contents, asked)):
        first.setdefault(other, place)
        right.setdefault(anchor, []).append(other)
    number = {text: place for place, text in enumerate(first)}
    candidates = made[list(first.values()), 1]
    expected = [[number[text] for text in right[contents(row)[0]]] for row in asked]
    places = ranks(made[:, 0], candidates, expected)
    texts = [asked[place].texts[1] for place in first.values()]
    nearest = [int((candidates @ own).argmax()) for own in made[:, 0]]
    return [
        Answer(row.texts[0], row.texts[1], texts[near], rank_scores(int(rank)), row.source)
        for row, near, rank in zip(asked, nearest, places, strict=True)
    ]


def _alike(asked: Sequence[Sentence], made: NDArray[np.float32]) -> list[Answer]:
    """Answers of scored pairs: cosines beside the scores, each with what it adds to Spearman's correlation."""
    cosines = (made[:, 0] * made[:, 1]).sum(1)
    parts = spearman_parts(cosines, [row.score or 0.0 for row in asked])
    return [
        Answer(row.asked, f"{row.score:g}", f"{cosine:.3f}", {SPEARMAN: float(part)}, row.source)
        for row, cosine, part in zip(asked, cosines, parts, strict=True)
    ]
