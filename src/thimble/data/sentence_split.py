"""Which rows for encoders are learned from and which are held out, so that what was learned is measured on others."""

import hashlib
import json

from thimble.data.records import MAX_VALIDATION_ROWS
from thimble.data.sentences import Sentence, contents
from thimble.data.spool import Items


def split_sentences(rows: Items[Sentence], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows to learn from, and of those held out, so that what was learned is measured on other texts.

    Rows of one label are held out in its share. Rows to be labelled that hold the same texts, and pairs that have a
    text in common, also by way of others, stay on one side. A row's side depends on its content, the seed and the other
    contents, not on its place. At most MAX_VALIDATION_ROWS are held out.
    """
    groups: dict[int, list[int]] = {}
    for number, group in enumerate(_groups(rows)):
        groups.setdefault(group, []).append(number)
    by_label: dict[str | None, list[list[int]]] = {}
    for numbers in groups.values():
        by_label.setdefault(rows[numbers[0]].label, []).append(numbers)
    share = min(share, MAX_VALIDATION_ROWS / max(1, len(rows)))
    held: set[int] = set()
    for of_label in by_label.values():
        wanted = round(share * sum(map(len, of_label)))
        for numbers in sorted(of_label, key=lambda numbers: _digest(rows[numbers[0]], seed)):
            if len(numbers) <= wanted:
                held.update(numbers)
                wanted -= len(numbers)
    return [number for number in range(len(rows)) if number not in held], sorted(held)


def _groups(rows: Items[Sentence]) -> list[int]:
    """The group of each row, by the number of its first row: rows that must not be parted."""
    first: dict[str, int] = {}  # of each content, the first row
    parent = list(range(len(rows)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    for number, row in enumerate(rows):
        for content in contents(row):
            one, other = sorted((root(number), root(first.setdefault(content, number))))
            parent[other] = one
    return [root(number) for number in range(len(rows))]


def _digest(row: Sentence, seed: int) -> bytes:
    return hashlib.sha256(json.dumps([seed, row.texts, row.label]).encode()).digest()
