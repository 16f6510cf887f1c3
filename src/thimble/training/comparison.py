"""What changed between base and result, row by row: what the verdict rests on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from thimble.core.labels import AnswerCounts, score_labels
from thimble.core.metrics import ERROR_RATES, LossSum, goodness
from thimble.core.significance import LEAST_ROWS, bootstrap, compare, share_interval, sign_test
from thimble.training.answers import Answer


def compare_losses(
    before: Mapping[int, LossSum], after: Mapping[int, LossSum], sources: Sequence[str] = ()
) -> dict[str, Any]:
    """Rows whose losses are known before and after, and whether they fell by more than chance.

    A row counts with its nats over the mean tokens of a row, so that the mean of all is the change of the loss. Pieces
    of one text, whose rows have one of the `sources` in common, rise and fall together: where there are texts enough,
    each text counts as one row, or chance would be thought smaller than it is.
    """
    both = [row for row in before if row in after and before[row].tokens]
    falls = {row: LossSum(before[row].nats - after[row].nats, before[row].tokens) for row in both}
    texts: dict[str, LossSum] = {}
    for row, fall in falls.items():
        name = sources[row] if sources else str(row)
        texts[name] = texts.get(name, LossSum()) + fall
    groups = len(texts) if len(texts) < len(falls) else 0
    units = (texts if groups >= LEAST_ROWS else falls).values()
    found = compare([unit.nats for unit in units], [unit.tokens for unit in units])
    return asdict(replace(found, groups=groups))


def compare_metrics(
    before: Sequence[Answer], after: Sequence[Answer], unseen: Collection[str]
) -> dict[str, dict[str, Any]]:
    """For each figure: the answers that have it, and how many of those to rows never trained on became better or worse.

    Chances are of becoming better or worse; the interval is that of the change of the figure itself.
    """
    names = dict.fromkeys(name for answer in (*before, *after) for name in answer.scores)
    return {name: _compare_metric(name, before, after, unseen) for name in names}


def _compare_metric(
    name: str, before: Sequence[Answer], after: Sequence[Answer], unseen: Collection[str]
) -> dict[str, Any]:
    both = [
        (new.scores[name] - old.scores[name], new.sizes.get(name, 1.0))
        for old, new in zip(before, after, strict=True)
        if name in old.scores and name in new.scores and (not new.source or new.source in unseen)
    ]
    gains = [goodness(name, change) - goodness(name, 0.0) for change, _ in both]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    if name not in ERROR_RATES and all(change in (-1, 0, 1) for change, _ in both):
        low, high = share_interval(better, worse, len(both))
    else:
        low, high = bootstrap([change * size for change, size in both], [size for _, size in both])
    return {
        "rows_before": sum(name in answer.scores for answer in before),
        "rows_after": sum(name in answer.scores for answer in after),
        "rows": len(both), "better": better, "worse": worse,
        "chance": sign_test(better, worse), "chance_worse": sign_test(worse, better), "low": low, "high": high,
    }  # fmt: skip


def label_report(answers: Sequence[Answer], learned: AnswerCounts) -> dict[str, Any]:
    """How well labels are found, as plain data; `learned` counts the labels of the training rows, or is empty."""
    pairs = ((answer.reference, answer.written) for answer in answers)
    return asdict(score_labels(pairs, learned.found))


def both_label_reports(before: Sequence[Answer], after: Sequence[Answer], learned: AnswerCounts) -> dict[str, Any]:
    """Labels before and after training, with how many training rows each label has."""
    return {
        "training_rows": dict(learned.found.most_common()),
        "before": label_report(before, learned), "after": label_report(after, learned) if after else {},
    }  # fmt: skip
