"""How well a tokenizer knows the language of a text, which tells how much of it the base has read."""

import re
from collections.abc import Iterable, Sequence

from thimble.data.records import general_records
from thimble.data.rows import Record
from thimble.data.tokenizer import Tokenizer

LEAST_LETTERS = 200  # to say anything
MOST_RECORDS = 200  # looked at, evenly spread
MOST_LETTERS = 200_000
# Runs of letters with their combining marks: numbers, brackets and the like take many tokens in every language.
WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f\u0900-\u0dff\u0e31-\u0e4e])*")
IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # says about as much as three letters


def token_ratio(records: Sequence[Record], tokenizer: Tokenizer) -> float:
    """How many times as many tokens the words of the records take as English words do; 0 if there are too few words.

    What is asked and what is answered are looked at apart, for the one may be in English and the other not; the higher
    ratio counts.
    """
    english = _tokens_per_letter(map(_all_texts, general_records()), tokenizer)
    chosen = [records[number] for number in _spread(len(records))]
    asked = _tokens_per_letter((_texts(record, False) for record in chosen), tokenizer)
    answered = _tokens_per_letter((_texts(record, True) for record in chosen), tokenizer)
    return max(asked, answered) / english if english else 0.0


def _spread(count: int) -> Iterable[int]:
    """Numbers of at most MOST_RECORDS records."""
    most = min(count, MOST_RECORDS)
    return (int((number + 0.5) * count / most) for number in range(most))


def _texts(record: Record, is_answer: bool) -> list[str]:
    """What the model is to write, or what it is asked."""
    if record.text is not None:
        return [record.text] if is_answer else []
    if record.messages is None:
        return [(record.completion if is_answer else record.prompt) or ""]
    turns = (turn for turn in record.messages if turn["role"] in (("assistant",) if is_answer else ("user", "system")))
    return [content for turn in turns if isinstance(content := turn.get("content"), str)]


def _all_texts(record: Record) -> list[str]:
    return [*_texts(record, False), *_texts(record, True)]


def _tokens_per_letter(records: Iterable[list[str]], tokenizer: Tokenizer) -> float:
    """Tokens of all words, by letters; 0 if there are too few. Words in capitals are taken as small ones."""
    letters = tokens = 0
    for texts in records:
        words = (word for text in texts for word in WORD.findall(text))
        joined = " ".join(word.lower() if word.isupper() else word for word in words)
        letters += len(joined) + 2 * len(IDEOGRAPH.findall(joined))
        tokens += len(tokenizer.encode(joined, special=False)) if joined else 0
        if letters > MOST_LETTERS:
            break
    return tokens / letters if letters >= LEAST_LETTERS else 0.0
