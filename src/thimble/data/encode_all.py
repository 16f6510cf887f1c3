"""All records to rows: counted as they come, and kept in a file without a name."""

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from thimble.data.encode import Encoder, Row
from thimble.data.records import Skipped
from thimble.data.rows import Record
from thimble.data.spool import Items, Spool
from thimble.data.template import Renderings
from thimble.errors import DataError, listing, plural

OnRecord = Callable[[int, int], None]
MOST_AHEAD = 16  # records whose texts the template writes while those before are encoded


def _nobody(done: int, total: int) -> None:
    """Tell nobody how far it is."""


@dataclass(frozen=True)
class EncodeReport:
    """What became of the records."""

    num_rows: int = 0
    tokens: int = 0
    target_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    rows_without_labels: tuple[str, ...] = ()  # sources; these are left out
    longest: int = 0  # in tokens, after truncation
    lengths: Sequence[int] = ()


def encode_all(
    records: Items[Record], encoder: Encoder, skipped: Skipped | None = None, on_record: OnRecord = _nobody
) -> tuple[Spool[Row], EncodeReport]:
    """Encode all records; returns the rows that have something to learn, in a temporary file, and what became of all.

    Records that the template refuses go to `skipped`; without it a single one is too many. Raises a DataError if there
    are too many of them, or if no row has a label.
    """
    skipped = Skipped(is_strict=True) if skipped is None else skipped
    rows, counted = Spool(_packed, _unpacked), _Counted()
    for number, (record, written) in enumerate(_asked_ahead(records, encoder)):
        on_record(number, len(records))
        try:
            for row in encoder.encode(record, written):
                if counted.hear(row):
                    rows.append(row)
        except DataError as error:
            skipped.add(record.source, *error.problems)
    skipped.check()
    if not rows and skipped.found and not counted.without_labels:
        raise DataError(*skipped.told())
    if not rows:
        raise DataError(
            f"none of {plural(len(records), 'row')} has a token to learn "
            f"({listing(dict.fromkeys(counted.without_labels), most=3)}): expected assistant turns or completions. "
            "For plain text set loss_on to auto or all."
        )
    return rows, counted.report()


def _asked_ahead(records: Items[Record], encoder: Encoder) -> Iterator[tuple[Record, Renderings | None]]:
    """Records with what the template writes of them, some of them in advance."""
    ahead: deque[tuple[Record, Renderings | None]] = deque()
    for record in records:
        ahead.append((record, encoder.ask(record)))
        if len(ahead) > MOST_AHEAD:
            yield ahead.popleft()
    yield from ahead


class _Counted:
    """Counts rows as they come."""

    def __init__(self) -> None:
        self.lengths = array("q")
        self.without_labels: list[str] = []
        self.target_tokens = self.truncated_rows = self.truncated_tokens = 0

    def hear(self, row: Row) -> bool:
        """Take a row into account; whether it has something to learn."""
        labels = row.target_tokens
        if not labels:
            self.without_labels.append(row.source)
            return False
        self.lengths.append(len(row.ids))
        self.target_tokens += labels
        self.truncated_rows += row.truncated_tokens > 0
        self.truncated_tokens += row.truncated_tokens
        return True

    def report(self) -> EncodeReport:
        return EncodeReport(
            num_rows=len(self.lengths),
            tokens=sum(self.lengths),
            target_tokens=self.target_tokens,
            truncated_rows=self.truncated_rows,
            truncated_tokens=self.truncated_tokens,
            rows_without_labels=tuple(self.without_labels),
            longest=max(self.lengths),
            lengths=self.lengths,
        )


def _packed(row: Row) -> bytes:
    """Two numbers, ids, labels, and where the row came from."""
    head = np.array([len(row.ids), row.truncated_tokens], np.int32)
    return head.tobytes() + row.ids.tobytes() + row.labels.tobytes() + row.source.encode(errors="surrogateescape")


def _unpacked(packed: bytes) -> Row:
    length, truncated_tokens = (int(number) for number in np.frombuffer(packed, np.int32, 2))
    ids, labels = np.frombuffer(packed, np.int32, 2 * length, 8).reshape(2, length)
    return Row(ids, labels, packed[8 + 8 * length :].decode(errors="surrogateescape"), truncated_tokens)
