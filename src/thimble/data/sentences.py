"""Rows for text encoders: a text and its label, or texts that belong together; found, read, checked and split.

Column names are those of datasets' text classification and of Sentence Transformers (Dataset Overview: anchor and
positive, sentence1 and sentence2 with a score, anchor, positive and negative); the user may name others.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thimble.data.columns import LABELS, Fields, Left, NamedCheck, NamedColumns
from thimble.data.records import Skipped, checked_rows
from thimble.data.row_forms import named_prompt
from thimble.data.row_values import cell_text, describe, is_missing, is_written_list, loaded, shown, sole, text_of
from thimble.data.rows import Parsed, said
from thimble.data.sources.find import find_files
from thimble.data.sources.read import read_rows
from thimble.data.spool import Items, Spool
from thimble.data.unused import Unused
from thimble.errors import DataError, Problems, listing

CLASSIFY, EMBED = "classify-text", "embed"
TEXTS = ("text", "sentence", "content", "review", "utterance", "query", "question", "prompt", "input", "instruction")
KINDS = (*LABELS, "topic", "category", "completion", "output", "answer", "target")  # columns that may hold a label
TWO_TEXTS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"),
    ("texta", "textb"), ("question", "sentence"),
)  # fmt: skip
ANCHORS = ("anchor", "query", "question", "sentence1", "question1", "text1", "texta", "premise", "prompt", "title")
POSITIVES = (
    "positive", "pos", "answer", "answers", "response", "passage", "document", "sentence2", "question2", "text2",
    "textb", "hypothesis", "completion", "body",
)  # fmt: skip
NEGATIVES = ("negative", "negatives", "neg", "hardnegative", *(f"negative{number}" for number in range(1, 17)))
SCORES = ("score", "similarity", "similarityscore", "labels", "label")
NLI = {0.0, 1.0, 2.0}  # entailment, neutral, contradiction
GUESSED_ROWS = 100  # by which the task is guessed
UNLABELLED = ("-1", "-1.0")  # which SNLI and GLUE write where there is no label
LABEL_FORMS = "text and label; premise, hypothesis and label"
PAIR_FORMS = "anchor and positive; question and answer; anchor, positive and negative; sentence1, sentence2 and score"


@dataclass(frozen=True)
class Sentence:
    """One example of an encoder.

    Attributes:
        texts: What is read: to be labelled, one text, or two that are read together; to be embedded, an anchor, what
            belongs to it, and what does not.
        label: What a text is to be called; None where texts are to be embedded.
        score: How alike the first two texts are, on any scale; None if they belong together and that is all.
        source: Where the row stands, such as "train.jsonl line 12".
    """

    texts: tuple[str, ...]
    label: str | None = None
    score: float | None = None
    source: str = ""

    @property
    def asked(self) -> str:
        """All texts in a line, for people."""
        return " | ".join(self.texts)

    @property
    def digest(self) -> str:
        """Alike for rows whose texts are the same but for case and spaces."""
        return "\n".join(map(folded, self.texts))


def folded(text: str) -> str:
    """A text without what does not make it another one: case, and white space beside or between words."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class SentenceData:
    """All examples of a file or folder, checked."""

    format: str  # "text and label"
    train: Items[Sentence]
    valid: Items[Sentence] | None  # None: the data has no file of its own for this
    test: Items[Sentence] | None
    skipped: Skipped
    told: tuple[str, ...]  # files and columns that were not used
    warnings: tuple[str, ...]  # what may be wrong
    files: tuple[Path, ...]


def read_sentences(
    path: str | Path, task: str, is_strict: bool = False, named: NamedColumns | None = None, needs_answers: bool = True
) -> SentenceData:
    """Read the rows of a task from whatever `read_dataset` reads.

    Args:
        path: File or folder.
        task: `classify-text` or `embed`.
        is_strict: Whether a single row that cannot be used is too many, instead of a tenth of them.
        named: The columns that the user named.
        needs_answers: Whether rows need a label, or what belongs to the anchor; without it a text is enough.

    Returns:
        The rows, in temporary files.

    Raises:
        DataError: With everything that is wrong, each with file and line.
    """
    splits, told = find_files(Path(path))
    skipped, unused = Skipped(is_strict), Unused()
    forms: Counter[str] = Counter()
    rows: dict[str, Spool[Sentence]] = {split: Spool(_packed, _unpacked) for split in splits}
    for split, parsed in checked_rows(splits, SentenceReader(task, named, needs_answers), told, skipped):
        rows[split].append(parsed.record)
        forms[parsed.form] += 1
        unused.add(parsed.left)
    _check_alike(rows.values(), task)
    return SentenceData(
        format=said(forms), train=rows["train"], valid=rows.get("valid"), test=rows.get("test"), skipped=skipped,
        told=(*told.notes, *unused.notes), warnings=(*told.warnings, *unused.warnings),
        files=tuple(dict.fromkeys(file.path for files in splits.values() for file in files)),
    )  # fmt: skip


def _check_alike(splits: Iterable[Items[Sentence]], task: str) -> None:
    """Refuse pairs of which some have a score and others none: they are learned in different ways."""
    scored: dict[bool, str] = {}
    for row in itertools.chain(*splits) if task == EMBED else ():
        scored.setdefault(row.score is not None, row.source)
    if len(scored) > 1:
        raise DataError(
            f"{scored[True]} has a score and {scored[False]} has none: expected a score in every row, or in none"
        )


def task_of(fields: Collection[str]) -> str:
    """The task that columns are made for, by their names; empty if they are made for neither.

    >>> task_of(["text", "label"]), task_of(["question", "answer"]), task_of(["messages"])
    ('classify-text', 'embed', '')
    """
    found = Fields(dict.fromkeys(fields, "?"))
    names = {name for name in (*TEXTS, *LABELS, "topic", "category", *ANCHORS, *POSITIVES) if name in found}
    is_labelled = bool(names & {*LABELS, "topic", "category"})
    if is_labelled and (names & set(TEXTS) or any(names.issuperset(pair) for pair in TWO_TEXTS)):
        return CLASSIFY
    return EMBED if names & set(ANCHORS) and names & set(POSITIVES) else ""


def guess_task(path: str | Path) -> str:
    """The task that the first rows of some data are made for; empty if that is neither, or they cannot be read."""
    try:
        splits, told = find_files(Path(path))
        rows = (row.value for files in splits.values() for row in read_rows(files[0], told))
        first = [row for row in itertools.islice(rows, GUESSED_ROWS) if isinstance(row, Mapping)]
    except (DataError, OSError):
        return ""
    task = task_of(first[0]) if first else ""
    return EMBED if task == CLASSIFY and any(map(_is_scored, map(Fields, first))) else task


def _is_scored(fields: Fields) -> bool:
    """Whether two texts have a label that is a score and no class: a number with a fraction, as GLUE has STS-B."""
    has_two = any(all(map(fields.__contains__, pair)) for pair in TWO_TEXTS)
    label = fields.peek(fields.first(LABELS) or "") if has_two else None
    try:
        return label is not None and math.isfinite(float(label)) and float(label) % 1 != 0
    except (TypeError, ValueError):
        return False


class SentenceReader:
    """Reads rows one by one, by the columns that the user named or else by those that are known."""

    def __init__(self, task: str, named: NamedColumns | None = None, needs_answers: bool = True) -> None:
        self._task, self._named, self._needs_answers = task, named or NamedColumns(), needs_answers
        self._check = NamedCheck(self._named)
        self._labels: set[float] = set()  # that were taken for scores

    def parse(self, row: Any, source: str) -> Parsed[Sentence]:
        """Check a row; a DataError says everything that is wrong with it."""
        if not isinstance(row, Mapping):
            forms = LABEL_FORMS if self._task == CLASSIFY else PAIR_FORMS
            raise DataError(f"the row is {describe(row)}: expected an object in one of the forms {forms}")
        fields, left = Fields(row), Left()
        self._check.see(fields)
        read = _labelled if self._task == CLASSIFY else _pair
        if not self._needs_answers and not self._has_answer(fields):
            read = _texts_alone
        form, parts = read(fields, self._named, left)
        fields.leave(left)
        sentence = Sentence(source=source, **parts)
        if sentence.score is not None and fields.first_filled(SCORES) in LABELS and len(self._labels) <= len(NLI):
            self._labels.add(sentence.score)
        return Parsed(sentence, form, left)

    def _has_answer(self, fields: Fields) -> bool:
        """Whether a row says what it is called; texts to be embedded say nothing of the kind."""
        if self._task == EMBED:
            return False
        named = self._named.completion
        return fields.has(named) if named else fields.first_filled(KINDS) is not None

    def check(self) -> None:
        """Raise a DataError if a column that the user named is in none of the rows read so far, or if what was taken
        for scores are the classes of NLI, of which 0 is the most alike.
        """
        self._check.check()
        if self._labels == NLI:
            raise DataError(
                "the labels are 0, 1 and 2, as data sets of inference number their classes (0 is entailment), and no "
                "scores: add --task classify-text to learn the classes; to learn embeddings, keep the rows of "
                "entailment without their label, and contradictions as a column called negative; if they are scores, "
                "call the column score"
            )


# ---- forms


def _labelled(fields: Fields, named: NamedColumns, left: Left) -> tuple[str, dict[str, Any]]:
    """A text, or two that are read together, and a label."""
    problems = Problems()
    if named:
        form, texts = problems.attempt(_named_text, fields, named) or ("", ())
        label = problems.attempt(_label, fields.cell(named.completion), shown(named.completion))
    else:
        names, kind = _columns_of_label(fields)
        form = ", ".join(map(fields.shown, names)) + f" and {fields.shown(kind)}"
        texts = [problems.attempt(_text, fields.take(name), fields.shown(name)) for name in names]
        label = problems.attempt(_label, fields.take(kind), fields.shown(kind))
    if problems.found:
        raise DataError(*problems.found)
    return form, {"texts": tuple(texts), "label": label}


def _texts_alone(fields: Fields, named: NamedColumns, left: Left) -> tuple[str, dict[str, Any]]:
    """A text, or two that are read together, of which nothing is known."""
    if named:
        form, texts = _named_text(fields, named)
        return form, {"texts": texts}
    pair = next((pair for pair in TWO_TEXTS if all(map(fields.__contains__, pair))), None)
    name = fields.first((*TEXTS, *ANCHORS, *POSITIVES))
    if not name:
        raise DataError(_unknown(fields, "", "text; question; prompt"))
    names = pair or (name,)
    return ", ".join(map(fields.shown, names)), {"texts": tuple(_text(fields.take(n), fields.shown(n)) for n in names)}


def _columns_of_label(fields: Fields) -> tuple[tuple[str, ...], str]:
    """The columns of the texts, and that of the label."""
    names = next((pair for pair in TWO_TEXTS if all(map(fields.__contains__, pair))), None)
    name = fields.first(TEXTS)
    names = names or ((name,) if name else None)
    kind = fields.first(kind for kind in KINDS if names and kind not in names)
    if not names or not kind:
        raise DataError(_unknown(fields, "classify-text", LABEL_FORMS))
    return names, kind


def _pair(fields: Fields, named: NamedColumns, left: Left) -> tuple[str, dict[str, Any]]:
    """Texts that belong together, texts that do not, and how alike they are if that is said."""
    problems = Problems()
    if named:
        form, texts = problems.attempt(_named_text, fields, named) or ("", ())
        texts = [*texts, problems.attempt(_text, fields.cell(named.completion), shown(named.completion))]
    else:
        anchor = fields.first(ANCHORS)
        positive = fields.first(name for name in POSITIVES if name != anchor)
        if not anchor or not positive:
            raise DataError(_unknown(fields, "embed", PAIR_FORMS))
        form = f"{fields.shown(anchor)} and {fields.shown(positive)}"
        texts = [problems.attempt(_first_text, fields, name, left) for name in (anchor, positive)]
    negatives = problems.attempt(_negatives, fields) or []
    scale = fields.first_filled(SCORES)
    score = problems.attempt(_score, fields, scale) if scale else None
    if score is not None and negatives:
        problems.add("the row has a score and a negative: expected one of them")
    if problems.found:
        raise DataError(*problems.found)
    form += (" with negatives" if negatives else "") + (f" with {fields.shown(scale)}" if scale else "")
    return form, {"texts": (*texts, *negatives), "score": score}


def _named_text(fields: Fields, named: NamedColumns) -> tuple[str, tuple[str]]:
    """The text that the user's columns make."""
    text = named_prompt(fields, named)
    where = shown(named.prompt) or "the text of --prompt-template"
    return f"{where} and {shown(named.completion)}", (_text(text, where),)


# ---- values


def _text(value: Any, where: str) -> str:
    text = text_of(value, where)
    if not text.strip():
        raise DataError(f"{where} is empty: expected text")
    return text


def _first_text(fields: Fields, name: str, left: Left) -> str:
    """A text, or the first of a list of them."""
    value, where = loaded(fields.take(name)), fields.shown(name)
    if isinstance(value, list | tuple):
        if len(value) > 1:
            left.add(f"{where} behind the first")
        value = value[0] if value else None
    return _text(value, where)


def _negatives(fields: Fields) -> list[str]:
    """The texts of all columns that hold what does not belong to the anchor."""
    found: list[str] = []
    for name in filter(fields.is_filled, fields.among(NEGATIVES)):
        value, where = loaded(fields.take(name)), fields.shown(name)
        found += [_text(text, where) for text in (value if isinstance(value, list | tuple) else [value])]
    return found


def _label(value: Any, where: str) -> str:
    """A label as text, whatever it is stored as."""
    value = sole(value)
    if isinstance(value, list | tuple) or is_written_list(value):
        raise DataError(f"{where} is a list: expected one label a row")
    label = cell_text(value, where).strip()
    if is_missing(value) or not label:
        raise DataError(f"{where} is {'missing' if is_missing(value) else 'empty'}: expected a label")
    if label in UNLABELLED:
        raise DataError(
            f"{where} is {label}, which data sets write where there is no label: if it is a class, write it as a word, "
            'such as "negative"'
        )
    return label


def _score(fields: Fields, name: str) -> float:
    value, where = fields.take(name), fields.shown(name)
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = float("nan")
    if abs(score) < float("inf"):
        return score
    raise DataError(
        f"{where} is {describe(value)}: expected a number that says how alike the two texts are; to learn labels, add "
        "--task classify-text; to learn which texts belong together, keep the rows where they do and leave it out"
    )


def _unknown(fields: Fields, task: str, forms: str) -> str:
    found = listing(map(shown, fields), 20) or "none"
    expects = f"--task {task} expects" if task else "expected"
    return (
        f"the columns are {found}: {expects} one of the forms {forms}; if yours have other names, add "
        "--prompt-column and --completion-column; if that is a first row and no names, put a line of names above it"
    )


# ---- contents ---------------------------------------------------------------------------------------------------


def contents(row: Sentence) -> list[str]:
    """What two rows must not have in common if one is to say something new: all texts together, or each of a pair."""
    return [row.digest] if row.label is not None else [folded(text) for text in row.texts[:2]]


def two_labels(rows: Items[Sentence]) -> list[tuple[str, str]]:
    """Rows that have the texts of an earlier one and another label: the sources of each two."""
    first: dict[str, Sentence] = {}
    told = []
    for row in rows:
        earlier = first.setdefault(contents(row)[0], row)
        if earlier.label != row.label:
            told.append((earlier.source, row.source))
    return told


def _packed(row: Sentence) -> bytes:
    return json.dumps([row.texts, row.label, row.score, row.source]).encode()


def _unpacked(packed: bytes) -> Sentence:
    texts, *rest = json.loads(packed)
    return Sentence(tuple(texts), *rest)
