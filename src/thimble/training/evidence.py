"""What the rows of a run will be able to show, said before it begins."""

import math
from collections.abc import Iterable
from pathlib import Path

from thimble.core.labels import describe, oddities
from thimble.core.metrics import WEAK_RATIO
from thimble.core.significance import LEAST_ROWS
from thimble.data.examples import Examples
from thimble.data.language import token_ratio
from thimble.data.records import Dataset
from thimble.data.tokenizer import Tokenizer
from thimble.errors import plural
from thimble.events import EventLog
from thimble.training import run_folder
from thimble.training.guard import LEAST_TO_STOP

MOST_SPLIT = 0.5  # of the rows held out is what is advised at most


def log_evidence(examples: Examples, tokenizer: Tokenizer, valid_split: float, log: EventLog) -> float:
    """Tell of labels, of too few validation rows, and of a language that the base hardly knows; returns the token ratio
    of the data to English.
    """
    log_labels(examples, log)
    valid, unseen = len(examples.valid), len(examples.unseen)
    if valid or valid_split:
        has_file = examples.dataset.valid is not None
        log_few(valid, unseen, way_to_more(valid + len(examples.train), has_file, valid_split), log)
    return log_language(examples, tokenizer, log)


def log_few(valid: int, unseen: int, way: str, log: EventLog) -> None:
    """Warn of too few validation rows, of which so many are not trained on, with the way to have more."""
    if unseen >= LEAST_TO_STOP:
        return
    new = f", {unseen} of them new" if unseen < valid else ""
    what = f"to tell a gain from chance (at least {LEAST_ROWS}) or to stop by (at least {LEAST_TO_STOP})"
    what = what if unseen < LEAST_ROWS else f"to stop by (at least {LEAST_TO_STOP})"
    log.warning(f"{plural(valid, 'validation row')}{new}: too few {what}; {way}")


def way_to_more(rows: int, has_valid_file: bool, valid_split: float, labels: int = 0) -> str:
    """How to have enough validation rows: hold more of so many out, if that is enough and was not done, else what to
    add. Each label keeps a row to learn from.
    """
    if has_valid_file:
        return "add rows to the valid file"
    share = math.ceil(20 * LEAST_TO_STOP / max(rows, 1)) / 20
    if valid_split < share <= MOST_SPLIT and rows - labels >= LEAST_TO_STOP:
        return f"--valid-split {share:g} holds enough of them out"
    needed = max(math.ceil(LEAST_TO_STOP / MOST_SPLIT), labels + LEAST_TO_STOP)
    return f"give at least {needed} rows, no two of them the same, and --valid-split {MOST_SPLIT:g}"


def log_labels(examples: Examples, log: EventLog) -> None:
    """Tell whether the answers are labels, and what is odd about them."""
    learned, held = examples.train_report.answers, examples.valid_report.answers
    if examples.answers.are_labels:
        log.note(describe(*((learned, "the training rows") if learned.rows else (held, "these rows"))))
    for warning in oddities(learned, held):
        log.warning(warning)


def log_language(examples: Examples, tokenizer: Tokenizer, log: EventLog) -> float:
    """Warn of a text whose words the base has hardly read; returns how many times the tokens of English they take."""
    records = examples.dataset.train or examples.valid_records
    ratio = token_ratio(records, tokenizer)
    if ratio >= WEAK_RATIO:
        log.warning(
            f"the words of this data take {ratio:.1f} times the tokens of English ones: the base has read little text "
            "of this language, and training on some rows will not teach it; take a base that was made for it"
        )
    return ratio


def log_recall(adapters: Iterable[str], dataset: Dataset, log: EventLog) -> None:
    """Warn of adapters that were trained on the very rows they are measured on; their run folders know by hash."""
    if dataset.test or dataset.valid:
        return
    measured = {run_folder.hash_file(file) for file in dataset.files}
    for adapter in adapters:
        folders = (Path(adapter), Path(adapter).parent)
        manifest = next(filter(None, (run_folder.read_json(folder / "manifest.json") for folder in folders)), None)
        data = manifest.get("data") if isinstance(manifest, dict) else None
        if isinstance(data, dict) and measured & set(data.values()):
            log.warning(
                f"{adapter} was trained on rows of this file, so doing well on them shows memory: measure it on rows "
                "it has not seen"
            )
