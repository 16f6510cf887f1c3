"""Pictures and clips with what is to be learned of them, and how some are held out."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thimble.core.labels import FEW_ROWS, UNBALANCED_SHARE, AnswerCounts
from thimble.data.media.inside import MediaFile
from thimble.data.records import MAX_VALIDATION_ROWS, Skipped
from thimble.errors import listing, plural

_NO_LABEL = {"nan", "none", "null", "n/a", "na", "#n/a", "<na>", "-", "?"}  # in small letters
_SEVERAL = re.compile("[,;|]")


@dataclass(frozen=True)
class Item:
    """One picture or clip.

    Attributes:
        path: The file, or that which lies in a row.
        source: Where it is named, for people: "cats/3.png", "manifest.csv line 4".
        label: Its class, if it has one.
        text: Its transcript, if it has one.
        digest: Hash of the bytes of the file, hexadecimal: the same for copies.
        seconds: How long a clip takes; 0 for pictures.
    """

    path: MediaFile
    source: str
    label: str | None = None
    text: str | None = None
    digest: str = ""
    seconds: float = 0.0

    @property
    def asked(self) -> str:
        """What people are shown of it beside its answer."""
        return self.source


@dataclass(frozen=True)
class MediaData:
    """All pictures or clips of a folder or manifest, each decoded once to see that it can be."""

    train: Sequence[Item]
    valid: Sequence[Item] | None  # None: the data say no split; `split_items` makes one
    skipped: Skipped  # what could not be used
    told: tuple[str, ...]  # what was done, such as files that are not used
    warnings: tuple[str, ...] = ()  # what may be wrong
    test: Sequence[Item] | None = None
    files: tuple[Path, ...] = ()  # manifests that were read

    @property
    def labels(self) -> list[str]:
        """The classes of the training rows, sorted: their places are the numbers that a head gives."""
        return sorted({item.label for item in self.train if item.label is not None})


def split_items(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Hold a share of the items of every label out, so that what was learned can be measured on others.

    Copies of a file land on the same side, and so do clips of one text where most texts are different: to know them
    by heart would look like skill. Which ones are held out depends on their contents and the seed, not on their
    order. Each label keeps at least one item to learn from. Both sides keep the given order; at least one item is held
    out if two differ and the share is above 0, at most MAX_VALIDATION_ROWS.
    """
    groups = _groups(items)
    wanted = min(max(1, round(share * len(items))), MAX_VALIDATION_ROWS) if share > 0 and len(groups) > 1 else 0
    by_label: dict[str, list[list[int]]] = {}
    for key in sorted(groups, key=lambda key: _digest(seed, key)):
        by_label.setdefault(items[groups[key][0]].label or "", []).append(groups[key])
    held: set[int] = set()
    for label, count in _shares(by_label, wanted).items():
        taken = 0
        for group in by_label[label][1:]:  # the first is learned from
            if taken < count and (not taken or taken + len(group) <= count):
                held.update(group)
                taken += len(group)
    train = [item for number, item in enumerate(items) if number not in held]
    return train, [items[number] for number in sorted(held)]


def _groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """Numbers of items that belong on one side: copies of a file, and clips of one text unless few texts recur."""
    texts = {item.text for item in items if item.text is not None}
    by_text = 2 * len(texts) > len(items)
    first: dict[str, str] = {}  # the key of a text, of the first file that has it, and the other way round
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        names = [f"file {item.digest or item.path}", *([f"text {item.text}"] if by_text and item.text else [])]
        keys = {first[name] for name in names if name in first} or {names[0]}
        key = min(keys)
        for other in keys - {key}:
            groups[key] += groups.pop(other)
            first |= {name: key for name, of in first.items() if of == other}
        groups.setdefault(key, []).append(number)
        first |= dict.fromkeys(names, key)
    return groups


def _shares(by_label: dict[str, list[list[int]]], wanted: int) -> dict[str, int]:
    """How many items of each label are held out: as its share of all is, by largest remainders."""
    sizes = {label: sum(map(len, groups)) for label, groups in by_label.items()}
    room = {label: sizes[label] - len(groups[0]) for label, groups in by_label.items()}
    exact = {label: wanted * size / sum(sizes.values()) for label, size in sizes.items()}
    counts = {label: min(int(exact[label]), room[label]) for label in sizes}
    order = sorted(sizes, key=lambda label: (counts[label] > 0, counts[label] - exact[label], label))
    for label in order:  # those that would have none first
        if sum(counts.values()) < wanted and counts[label] < room[label]:
            counts[label] += 1
    return counts


def _digest(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogateescape")).digest()


def oddities(train: Sequence[Item], valid: Sequence[Item]) -> list[str]:
    """What may spoil what is learned: copies, labels that are probably one, with hardly any items, or unbalanced."""
    told = _copies(train, valid)
    counts = Counter(item.label for item in train if item.label is not None)
    if not counts:
        return told
    for group in AnswerCounts(counts.total(), counts).alike():
        names = listing((f"{name!r} ({counts[name]:,})" for name in group), 5)
        told.append(f"labels that differ in case, spaces or end marks alone, and are probably one: {names}")
    told += _odd_labels(counts)
    few = [f"{label!r} ({count})" for label, count in sorted(counts.items()) if count < FEW_ROWS]
    if few:
        told.append(f"labels with fewer than {FEW_ROWS} rows, too few to learn one from: {listing(few, 6)}")
    label, most = counts.most_common(1)[0]
    if len(counts) > 1 and most > UNBALANCED_SHARE * counts.total():
        told.append(
            f"{most / counts.total():.0%} of the rows have the label {label!r}: whoever always says it is right as "
            "often, so look at recall and F1 of the others, give more rows of them, or try --class-weights balanced"
        )
    return told


def _odd_labels(counts: Counter[str]) -> list[str]:
    """Labels that are words for none, and labels that list several, of which one stands elsewhere too."""
    parts = {label: [part.strip() for part in _SEVERAL.split(label)] for label in counts}
    places = Counter(part for inside in parts.values() for part in set(inside))
    several = [label for label, inside in parts.items() if len(inside) > 1 and any(places[part] > 1 for part in inside)]
    empty = [label for label in counts if label.lower() in _NO_LABEL]
    kinds = (
        (empty, "may stand for none", "if they do, leave these cells empty, and the rows are left out"),
        (several, "may be several in one", "each is learned as a class of its own"),
    )
    return [
        f"labels that {what}: {listing(f'{label!r} ({counts[label]:,})' for label in sorted(labels))}; {then}"
        for labels, what, then in kinds if labels
    ]  # fmt: skip


def _copies(train: Sequence[Item], valid: Sequence[Item]) -> list[str]:
    """Files of the same bytes: with different labels, on both sides of a split, or merely twice."""
    told, learned = [], _by_digest(train)
    answers = {digest: {(item.label, item.text) for item in items} for digest, items in learned.items()}
    if torn := [learned[digest] for digest, found in answers.items() if len(found) > 1]:
        shown = listing((" = ".join(item.source for item in items[:2]) for items in torn), 3)
        told.append(f"{plural(len(torn), 'file')} with different labels in several places, same bytes: {shown}")
    if known := [item.source for item in valid if item.digest in learned]:
        told.append(
            f"also among the training rows: {plural(len(known), 'validation row')} ({listing(known, 3)}), where memory "
            "is enough to do well"
        )
    if twice := sum(len(items) - 1 for digest, items in learned.items() if len(answers[digest]) == 1):
        shown = next(items for digest, items in learned.items() if len(items) > 1 and len(answers[digest]) == 1)
        told.append(
            f"{plural(twice, 'copy', 'copies')} of other files (such as {listing(item.source for item in shown[:2])}): "
            "copies are learned twice and stay on one side of the split"
        )
    return told


def _by_digest(items: Iterable[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.digest, []).append(item)
    return found
