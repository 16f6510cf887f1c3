"""Answers that are labels: whether they are, and how well each label is found."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from thimble.core.significance import sign_test, wilson
from thimble.errors import listing

MOST_LABELS = 100  # different ones; more are rather names or numbers
LONGEST_LABEL = 80  # characters, on one line
LEAST_EXAMPLES = 10  # rows: of fewer nobody can say
LEAST_REPEATS = 3  # rows a label, on average
LEAST_SHARE = 0.9  # of the rows have an answer that another row has too
MOST_COUNTED = 1000  # different answers; from there on they are no labels
FEW_ROWS = 5  # to learn a label from
UNBALANCED_SHARE = 0.9  # of one label: what always gives that one is right as often
MOST_STEPS = 10  # different labels with fractions that may be steps of a scale, such as half stars
OTHER = "(other)"  # an answer that is none of the labels


def are_amounts(labels: Collection[str]) -> bool:
    """Whether labels are amounts to be estimated and no classes: numbers, some with a fraction, and many different.

    >>> are_amounts(["0.5", "1.0", "1.5"]), are_amounts([f"{n / 7:.3f}" for n in range(20)])
    (False, True)
    """
    try:
        numbers = {float(label) for label in labels}
    except ValueError:
        return False
    return len(numbers) > MOST_STEPS and any(number % 1 for number in numbers if math.isfinite(number))


def label_of(answer: str) -> str:
    """An answer as it is compared: without white space at its ends, and JSON whatever the order of its keys."""
    text = answer.strip()
    if text[:1] in ("{", "["):
        try:
            return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
    return text


@dataclass
class AnswerCounts:
    """How often rows have the same short answer; takes little memory whatever the rows are."""

    rows: int = 0  # that have an answer
    found: Counter[str] = field(default_factory=Counter)  # short answers; of very many different ones the first

    def add(self, answer: str) -> None:
        """Count the answer of a row."""
        self.rows += 1
        if len(answer) > 2 * LONGEST_LABEL:
            return
        label = label_of(answer)
        is_short = 0 < len(label) <= LONGEST_LABEL and "\n" not in label
        if is_short and (label in self.found or len(self.found) < MOST_COUNTED):
            self.found[label] += 1

    def __add__(self, other: "AnswerCounts") -> "AnswerCounts":
        return AnswerCounts(self.rows + other.rows, self.found + other.found)

    @property
    def are_labels(self) -> bool:
        """Whether the answers are a few short texts that repeat."""
        repeated = sum(count for count in self.found.values() if count > 1)
        return (
            self.rows >= LEAST_EXAMPLES
            and 2 <= len(self.found) <= min(MOST_LABELS, self.rows / LEAST_REPEATS)
            and repeated >= LEAST_SHARE * self.rows
        )

    @property
    def labels(self) -> list[str]:
        """The labels, the most frequent first."""
        return sorted(self.found, key=lambda label: (-self.found[label], label))

    @property
    def is_always_the_same(self) -> bool:
        """Whether every row has the same answer."""
        return self.rows >= LEAST_EXAMPLES and list(self.found.values()) == [self.rows]

    def alike(self) -> list[list[str]]:
        """Labels that differ in case, spaces or end marks only, and are probably meant to be the same."""
        groups: dict[str, list[str]] = {}
        for label in self.labels:
            groups.setdefault(" ".join(label.casefold().rstrip(".!;:,").split()), []).append(label)
        return [group for group in groups.values() if len(group) > 1]


def balanced(counts: AnswerCounts, labels: Sequence[str]) -> list[float]:
    """What a row of each label counts, so that all labels count the same: rows / (labels · rows of the label)."""
    return [counts.rows / (len(labels) * counts.found[label]) for label in labels]


def describe(counts: AnswerCounts, whose: str) -> str:
    """Labels with their rows and the share of the most frequent one, in one line."""
    shown = listing((f"{label} ({counts.found[label]:,})" for label in counts.labels), 6)
    share = f"always writing the first is right in {counts.found[counts.labels[0]] / counts.rows:.0%}"
    return f"labels: {len(counts.found)} different answers in {whose}: {shown}; {share}"


def oddities(learned: AnswerCounts, held: AnswerCounts) -> list[str]:
    """What may spoil labels: hardly any rows, nearly all of one kind, never learned, or probably the same.

    `learned` counts the training rows and is empty where they are not known; `held` counts the validation rows.
    """
    whole, told = learned + held, []
    if whole.is_always_the_same:
        return [f"all {whole.rows:,} rows have the same answer, {whole.labels[0]!r}: there is nothing to tell apart"]
    if not whole.are_labels:
        return []
    first = whole.labels[0]
    share = whole.found[first] / whole.rows
    if share > UNBALANCED_SHARE:
        told.append(
            f"{share:.0%} of the rows have the label {first!r}: whoever always writes it is right as often, so look at "
            "recall and F1 of the others, and give more rows of them"
        )
    for group in whole.alike():
        names = listing((f"{name!r} ({whole.found[name]:,})" for name in group), 5)
        told.append(f"labels that differ in case, spaces or end marks alone, and are probably one: {names}")
    if not learned.rows:
        return told
    few = [f"{label!r} ({learned.found[label]})" for label in whole.labels if 0 < learned.found[label] < FEW_ROWS]
    if few:
        told.append(f"labels with fewer than {FEW_ROWS} training rows, too few to learn one from: {listing(few, 6)}")
    if unseen := [repr(label) for label in held.labels if not learned.found[label]]:
        told.append(f"labels of validation rows that no training row has: {listing(unseen, 6)}")
    if held.rows and (unasked := [repr(label) for label in learned.labels if not held.found[label]]):
        told.append(f"labels without a validation row, whose answers are not measured: {listing(unasked, 6)}")
    return told


def stratified(labels: Sequence[str], most: int) -> list[int]:
    """Numbers of at most `most` rows, in order, drawn from every label as evenly as their shares allow.

    Each label has at least one row while there is room, the most frequent first; rows of a label are spread evenly.
    """
    rows: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        rows.setdefault(label, []).append(number)
    if len(labels) <= most:
        return list(range(len(labels)))
    order = sorted(rows, key=lambda label: (-len(rows[label]), rows[label][0]))[:most]
    share = dict.fromkeys(order, 1)
    for _ in range(most - len(order)):  # the label furthest behind its share gets the next row
        open_labels = [label for label in order if share[label] < len(rows[label])]
        share[max(open_labels, key=lambda label: len(rows[label]) / (share[label] + 0.5))] += 1
    chosen: list[int] = []
    for label in order:
        numbers, count = rows[label], share[label]
        chosen += [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]
    return sorted(chosen)


@dataclass(frozen=True)
class LabelScore:
    """How well one label is found; a share without anything to divide by is 0, as in scikit-learn.

    Attributes:
        label: The label.
        rows: Rows with this label that were answered (its support).
        written: Rows for which it was written.
        right: Rows with this label for which it was written.
        precision: right / written.
        recall: right / rows.
        f1: 2 right / (rows + written).
    """

    label: str
    rows: int
    written: int
    right: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class LabelScores:
    """How well labels are found.

    Attributes:
        rows: Rows answered.
        accuracy: Share of them with the right label.
        interval: Wilson's 95 % interval of the accuracy.
        majority: The most frequent label, of the training rows if they are known.
        baseline: Accuracy of always writing that label.
        baseline_chance: The chance that a model no better than that beats it by so many rows (McNemar, one-sided).
        macro_f1: Mean F1 of all labels that are expected or written.
        labels: Each label, the most frequent first.
        confusion: Rows by expected label and what was written, with zeros left out; `(other)` is no label.
    """

    rows: int
    accuracy: float
    interval: tuple[float, float]
    majority: str
    baseline: float
    baseline_chance: float
    macro_f1: float
    labels: list[LabelScore]
    confusion: dict[str, dict[str, int]]


def score_labels(pairs: Iterable[tuple[str, str]], known: Mapping[str, int]) -> LabelScores:
    """Score rows of (expected, written) by label; `known` counts labels in the rows to learn from, or is empty."""
    found = [(label_of(expected), label_of(written)) for expected, written in pairs]
    support = Counter(expected for expected, _ in found)
    names = sorted({*support, *known}, key=lambda label: (-support[label], -known.get(label, 0), label))
    cells = Counter((expected, given if given in names else OTHER) for expected, given in found)
    written = Counter(given for _, given in cells.elements())
    scores = [_label_score(name, support[name], written[name], cells[name, name]) for name in names]
    shown = [score for score in scores if score.rows or score.written]
    counts = known or support
    majority = min(counts, key=lambda label: (-counts[label], label), default="")
    rows, right = len(found), sum(score.right for score in scores)
    beaten = right - cells[majority, majority], support[majority] - cells[majority, majority]
    confusion: dict[str, dict[str, int]] = {}
    for expected, given in sorted(cells, key=lambda cell: (names.index(cell[0]), -cells[cell], cell[1])):
        confusion.setdefault(expected, {})[given] = cells[expected, given]
    return LabelScores(
        rows=rows, accuracy=right / max(rows, 1), interval=wilson(right / max(rows, 1), max(rows, 1)),
        majority=majority, baseline=support[majority] / max(rows, 1), baseline_chance=sign_test(*beaten),
        macro_f1=sum(score.f1 for score in shown) / max(len(shown), 1), labels=shown, confusion=confusion,
    )  # fmt: skip


def _label_score(label: str, rows: int, written: int, right: int) -> LabelScore:
    f1 = 2 * right / max(rows + written, 1)
    return LabelScore(label, rows, written, right, right / max(written, 1), right / max(rows, 1), f1)
