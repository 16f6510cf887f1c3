"""The user's examples: read, split, encoded as token rows, and what is worth saying about them."""

import functools
from dataclasses import dataclass, replace

import numpy as np

from thimble.config.groups import DataOptions
from thimble.config.train import TrainConfig
from thimble.core.labels import AnswerCounts
from thimble.data.columns import NamedColumns
from thimble.data.encode import IGNORED, Encoder, Row
from thimble.data.encode_all import EncodeReport, encode_all
from thimble.data.model import Model
from thimble.data.records import (
    MAX_VALIDATION_ROWS,
    Dataset,
    Record,
    Skipped,
    beginning_records,
    general_records,
    read_dataset,
    split_rows,
)
from thimble.data.spool import Chosen, Items
from thimble.errors import ConfigError, listing, plural
from thimble.events import EventLog

SHOWN_SKIPPED = 3  # skipped rows that are shown in full


@dataclass(frozen=True)
class Examples:
    """The user's examples, as token rows."""

    dataset: Dataset
    encoder: Encoder
    train: Items[Row]
    train_report: EncodeReport  # counts over them
    valid: tuple[Row, ...]
    valid_records: tuple[Record, ...]  # the records behind them, for questions
    valid_report: EncodeReport  # counts over them

    @property
    def left_out(self) -> int:
        """How many rows cannot be used, or have nothing to learn."""
        reports = (self.train_report, self.valid_report)
        return self.dataset.skipped.count + sum(len(report.rows_without_labels) for report in reports)

    @property
    def answers(self) -> AnswerCounts:
        """How often rows have the same answer, validation rows included."""
        return self.train_report.answers + self.valid_report.answers

    @property
    def known(self) -> frozenset[int]:
        """Numbers of the validation rows that are also among the training rows, token by token."""
        return self._met[0]

    @property
    def asked(self) -> frozenset[int]:
        """Numbers of the other validation rows whose last question training rows ask too, with another answer.

        None if most training rows ask what validation rows ask, since then one question is what the data are about.
        """
        return self._met[1]

    @functools.cached_property
    def _met(self) -> tuple[frozenset[int], frozenset[int]]:
        held, questions = {row.ids.tobytes() for row in self.valid}, {_question(row) for row in self.valid} - {b""}
        learned, answered, count = set[bytes](), set[bytes](), 0
        for row in self.train if held else ():
            if (ids := row.ids.tobytes()) in held:
                learned.add(ids)
            if (question := _question(row)) in questions:
                answered.add(question)
                count += 1
        answered = answered if 2 * count <= len(self.train) else set()
        known = frozenset(number for number, row in enumerate(self.valid) if row.ids.tobytes() in learned)
        return known, frozenset(n for n, row in enumerate(self.valid) if _question(row) in answered) - known

    @functools.cached_property
    def unseen(self) -> tuple[int, ...]:
        """Numbers of the validation rows that say something new: not trained on, and each content once."""
        first = {row.ids.tobytes(): number for number, row in reversed(list(enumerate(self.valid)))}
        return tuple(sorted(set(first.values()) - self.known))


def _question(row: Row) -> bytes:
    """The tokens before the last answer of a row; nothing where all is learned, as of plain text."""
    learned = np.flatnonzero(row.labels != IGNORED)
    given = np.flatnonzero(row.labels[: learned[-1]] == IGNORED) if len(learned) else learned
    return row.ids[: given[-1] + 2].tobytes() if len(given) else b""


def make_encoder(model: Model, config: DataOptions) -> Encoder:
    """The encoder for a base, by the options of the data."""
    spec = model.base.spec
    # Of other families than our own the positions may be learned ones, which end with the context.
    seq_len = config.seq_len if model.base.is_own else min(config.seq_len, spec.max_positions)
    return Encoder(
        model.tokenizer, model.template, seq_len, config.loss_on, spec.vocab_size, spec.max_positions
    )  # fmt: skip


def encode_examples(
    dataset: Dataset, train: Items[Record], valid: Items[Record], model: Model, config: DataOptions, log: EventLog
) -> Examples:
    """Turn records into rows; what the template refuses is left out with the rest that cannot be used."""
    encoder = make_encoder(model, config)
    on_record = functools.partial(log.progress, "rows encoded")
    train_rows, train_report = encode_all(train, encoder, dataset.skipped, on_record) if train else ((), EncodeReport())
    valid_rows, valid_report = encode_all(valid, encoder, dataset.skipped, on_record) if valid else ((), EncodeReport())
    return Examples(dataset, encoder, train_rows, train_report, tuple(valid_rows), tuple(valid), valid_report)


def split_and_encode(dataset: Dataset, model: Model, config: TrainConfig, log: EventLog) -> Examples:
    """Encode the rows of a run, some of them held out for validation if the data have no valid file."""
    if dataset.valid is not None:
        return encode_examples(dataset, dataset.train, dataset.valid, model, config, log)
    if dataset.is_text:
        return _split_pieces(encode_examples(dataset, dataset.train, (), model, config, log), config.valid_split)
    train, valid = split_rows(dataset.train, config.valid_split, config.seed)
    return encode_examples(dataset, train, valid, model, config, log)


def _split_pieces(examples: Examples, share: float) -> Examples:
    """Hold out pieces of long texts, evenly spread: a file of text is one record but many rows."""
    rows = examples.train
    count = min(max(1, round(len(rows) * share)), MAX_VALIDATION_ROWS) if share and len(rows) > 1 else 0
    held = {int((number + 0.5) * len(rows) / count) for number in range(count)}
    trained = [number for number in range(len(rows)) if number not in held]
    lengths = [examples.train_report.lengths[number] for number in trained]
    target_tokens = sum(rows[number].target_tokens for number in trained)
    digests = [examples.train_report.digests[number] for number in trained]
    report = replace(examples.train_report, lengths=lengths, digests=digests, target_tokens=target_tokens)
    valid = tuple(rows[number] for number in sorted(held))
    return replace(examples, train=Chosen(rows, trained), train_report=report, valid=valid)


def general_rows(model: Model, config: DataOptions) -> tuple[Row, ...]:
    """General text for the forgetting check; conversations only where the base has a template for them."""
    records = [record for record in general_records() if model.template or record.text is not None]
    return tuple(encode_all(records, make_encoder(model, config.replace(loss_on="auto")))[0])


def beginnings(model: Model, config: DataOptions) -> tuple[Row, ...]:
    """What the base goes on from in texts of its own, without a label; questions only where it has a template."""
    records = [record for record in beginning_records() if model.template or record.text is not None]
    encoder = make_encoder(model, config)
    openings = ((encoder.opening(record), record.source) for record in records)
    return tuple(Row(ids, np.full(len(ids), IGNORED, np.int32), source) for ids, source in openings)


def log_examples(examples: Examples, log: EventLog) -> None:
    """Report what was read and how it is trained on."""
    dataset = examples.dataset
    held = plural(len(examples.valid), "row")
    log.note(f"data: {plural(len(examples.train), 'row')} of {dataset.format} to learn from, {held} held out")
    log_read(examples, log)
    if copies := examples.train_report.copies:
        of_all = plural(len(examples.train), "training row")
        log.note(f"{copies:,} of {of_all} repeat one before them: learned as often")
    if known := [examples.valid[number].source for number in sorted(examples.known)]:
        log.warning(
            f"also among the training rows: {plural(len(known), 'validation row')} ({listing(known, 3)}), where memory "
            "is enough to do well"
        )
    if asked := [examples.valid[number].source for number in sorted(examples.asked)]:
        log.warning(
            f"the question of {plural(len(asked), 'validation row')} ({listing(asked, 3)}) is in training rows too, "
            "with another answer: how well it is answered says little of new questions; to hold a question out with "
            "all of its answers, lay them into a valid file"
        )
    for name, report in (("training", examples.train_report), ("validation", examples.valid_report)):
        _log_lengths(name, report, log)


def log_read(examples: Examples, log: EventLog) -> None:
    """Report what of the data was not used, with the first rows that cannot be, and how the others were written."""
    skipped = examples.dataset.skipped
    for note in (*examples.dataset.notes, *examples.encoder.notes):
        log.note(note)
    for warning in (*examples.dataset.warnings, *examples.encoder.warnings, *examples.encoder.context_warnings):
        log.warning(warning)
    log_skipped(skipped, log)


def log_skipped(skipped: Skipped, log: EventLog) -> None:
    """Warn of rows that cannot be used, with the first of them."""
    if skipped.count:
        problems = (problem for row in skipped.found[:SHOWN_SKIPPED] for problem in row.problems[:1])
        log.warning(
            f"{skipped.count:,} of {plural(skipped.rows, 'row')} cannot be used and are left out (--strict refuses "
            f"them): {listing(problems, SHOWN_SKIPPED)}"
        )


def _log_lengths(name: str, report: EncodeReport, log: EventLog) -> None:
    """Warn of rows that were cut, or that have nothing to learn."""
    if report.truncated_rows:
        share = report.truncated_rows / len(report.lengths)
        log.warning(
            f"{plural(report.truncated_rows, f'{name} row')} longer than --seq-len ({share:.0%}) lost "
            f"{plural(report.truncated_tokens, 'token')} in all"
        )
    if report.rows_without_labels:
        sources = listing(report.rows_without_labels, 3)
        log.warning(f"{plural(len(report.rows_without_labels), f'{name} row')} left out, nothing to learn: {sources}")


def skipped_rows(examples: Examples) -> list[dict[str, str]]:
    """The rows that were left out, of very many the first, with where each stands and why."""
    rows = [{"source": row.source, "problem": "; ".join(row.problems)} for row in examples.dataset.skipped.found]
    for report in (examples.train_report, examples.valid_report):
        rows += [{"source": source, "problem": "nothing to learn"} for source in report.rows_without_labels]
    return rows


def open_data(config: DataOptions) -> Dataset:
    """Read the examples; see thimble.data.records. Refuses an empty name, which no option or file gave."""
    if not config.data:
        raise ConfigError("no data is given: name a file or folder of examples, as in: thimble train examples.jsonl")
    return read_dataset(config.data, config.strict, NamedColumns.of(config))
