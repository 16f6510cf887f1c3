"""All records to rows: counted as they come, and kept in a file without a name."""

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from thimble.core.labels import AnswerCounts
from thimble.data.encode import Encoder, Row
from thimble.data.records import Skipped
from thimble.data.rows import Record
from thimble.data.spool import Items, Spool
from thimble.data.template import Renderings
from thimble.errors import DataError, listing, plural

OnRecord = Callable[[int, int], None]
MOST_AHEAD = 16  # records whose texts the template writes while those before are encoded


@dataclass
class EncodeReport:
    """What became of the records; counts rows as they come."""

    target_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    rows_without_labels: list[str] = field(default_factory=list)  # sources; these are left out
    lengths: Sequence[int] = field(default_factory=lambda: array("q"))  # in tokens, after truncation
    digests: Sequence[int] = field(default_factory=lambda: array("Q"))  # of the token ids of each row
    answers: AnswerCounts = field(default_factory=AnswerCounts)  # the last answer of each row

    @property
    def tokens(self) -> int:
        """Of all rows together."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 without rows."""
        return max(self.lengths, default=0)

    @property
    def copies(self) -> int:
        """How many rows are the same as one before them."""
        return len(self.digests) - len(np.unique(np.asarray(self.digests, np.uint64)))

    def count(self, row: Row) -> bool:
        """Take a row into account; whether it has something to learn."""
        labels = row.target_tokens
        if not labels:
            self.rows_without_labels.append(row.source)
            return False
        self.lengths.append(len(row.ids))
        self.digests.append(int.from_bytes(hashlib.blake2b(row.ids.tobytes(), digest_size=8).digest()))
        self.target_tokens += labels
        self.truncated_rows += row.truncated_tokens > 0
        self.truncated_tokens += row.truncated_tokens
        return True


def encode_all(
    records: Items[Record],
    encoder: Encoder,
    skipped: Skipped | None = None,
    on_record: OnRecord = lambda done, total: None,
) -> tuple[Spool[Row], EncodeReport]:
    """Encode all records; returns the rows that have something to learn, in a temporary file, and what became of all.

    Records that the template refuses go to `skipped`; without it a single one is too many. Raises a DataError if there
    are too many of them, or if no row has a label.
    """
    skipped = Skipped(is_strict=True) if skipped is None else skipped
    rows, report = Spool(_packed, _unpacked), EncodeReport()
    for number, (record, written) in enumerate(_asked_ahead(records, encoder)):
        on_record(number, len(records))
        try:
            for row in encoder.encode(record, written):
                if report.count(row):
                    rows.append(row)
            if (answer := last_answer(record)) is not None:
                report.answers.add(answer)
        except DataError as error:
            skipped.add(record.source, *error.problems)
    skipped.check()
    if not rows and skipped.found and not report.rows_without_labels:
        raise DataError(*skipped.told())
    if not rows:
        raise DataError(
            f"none of {plural(len(records), 'row')} has a token to learn "
            f"({listing(dict.fromkeys(report.rows_without_labels), most=3)}): expected assistant turns or completions. "
            "For plain text set loss_on to auto or all."
        )
    return rows, report


def last_answer(record: Record) -> str | None:
    """The last answer of a record that ends in one, as it was given; None for plain text."""
    if record.messages is None:
        return record.completion
    last = record.messages[-1] if record.messages else {"role": ""}
    return (last.get("content") or "") if last["role"] == "assistant" else None


def _asked_ahead(records: Items[Record], encoder: Encoder) -> Iterator[tuple[Record, Renderings | None]]:
    """Records with what the template writes of them, some of them in advance."""
    ahead: deque[tuple[Record, Renderings | None]] = deque()
    for record in records:
        ahead.append((record, encoder.ask(record)))
        if len(ahead) > MOST_AHEAD:
            yield ahead.popleft()
    yield from ahead


def _packed(row: Row) -> bytes:
    """Two numbers, ids, labels, and where the row came from."""
    head = np.array([len(row.ids), row.truncated_tokens], np.int32)
    return head.tobytes() + row.ids.tobytes() + row.labels.tobytes() + row.source.encode(errors="surrogateescape")


def _unpacked(packed: bytes) -> Row:
    length, truncated_tokens = (int(number) for number in np.frombuffer(packed, np.int32, 2))
    ids, labels = np.frombuffer(packed, np.int32, 2 * length, 8).reshape(2, length)
    return Row(ids, labels, packed[8 + 8 * length :].decode(errors="surrogateescape"), truncated_tokens)
