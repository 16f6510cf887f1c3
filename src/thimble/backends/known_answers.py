"""What a base makes of texts, condensed and kept: a model is compared with it without running the base again.

With z what the head reads and F(z) = log Σ exp(W z), the divergence of a model from its base at a place is
KL = F(z') − F(z) − ∇F(z) · (z' − z), the Bregman divergence of F (Banerjee et al., JMLR 6, 2005). So of the base it
takes the gradient, which is the mean of the head's rows by the probabilities of the base, and one number: not the
logits of a vocabulary. That holds where logits are linear in z, so not where they are soft-capped.
"""

import contextlib
import hashlib
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.files.atomic import write_atomic

Ids = NDArray[np.int32]
SAME_NATS = 0.01  # by which the mean over a row may differ for one base: rounding to bfloat16, in another batch


class Answers(NamedTuple):
    """Of the places of a row that carry a label, in their order."""

    mean: NDArray[np.float32]  # (places, hidden), the mean of the head's rows
    offset: NDArray[np.float64]  # (places,), F(z) − mean · z
    likeliest: NDArray[np.int32]  # (places,), the likeliest token


class KnownAnswers:
    """The answers of one base, computed in one way, by row."""

    def __init__(self) -> None:
        self._rows: dict[bytes, Answers] = {}
        self.is_changed = False  # since they were read

    def get(self, ids: Ids, labels: Ids) -> Answers | None:
        """The answers to a row, int32 (tokens,) each; None if they are not known."""
        return self._rows.get(_key(ids, labels))

    def put(self, ids: Ids, labels: Ids, answers: tuple[NDArray, NDArray, NDArray]) -> None:  # type: ignore[type-arg]
        """Keep the answers to a row."""
        self._rows[_key(ids, labels)] = Answers(*answers)
        self.is_changed = True

    def agrees_with(self, others: "KnownAnswers") -> bool:
        """Whether rows that both have were answered alike."""
        both = [(self._rows[key], others._rows[key]) for key in self._rows.keys() & others._rows.keys()]
        return all(
            one.mean.shape == other.mean.shape and abs((one.offset - other.offset).sum()) <= SAME_NATS * len(one.offset)
            for one, other in both
        )

    def write(self, path: Path) -> None:
        """Write all of them; raises OSError."""
        content, parts = io.BytesIO(), zip(*self._rows.values(), strict=True)
        mean, offset, likeliest = map(np.concatenate, parts)
        keys = np.frombuffer(b"".join(self._rows), np.uint8).reshape(len(self._rows), -1)
        counts = np.array([len(answers.offset) for answers in self._rows.values()])
        np.savez(content, keys=keys, counts=counts, mean=mean, offset=offset, likeliest=likeliest)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, [content.getvalue()])

    @classmethod
    def read(cls, path: Path) -> "KnownAnswers":
        """What was written; nothing from a file that is damaged or not there."""
        known = cls()
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile):
            with np.load(path, allow_pickle=False) as file:  # it has a checksum of each array
                names = ("keys", "counts", *Answers._fields)
                keys, counts, mean, offset, likeliest = (file[name] for name in names)
            ends = np.cumsum(counts)[:-1]
            parts = zip(*(np.split(each, ends) for each in (mean, offset, likeliest)), strict=True)
            known._rows = {key.tobytes(): Answers(*part) for key, part in zip(keys, parts, strict=True)}
        return known


def _key(ids: Ids, labels: Ids) -> bytes:
    return hashlib.blake2b(ids.tobytes() + labels.tobytes(), digest_size=16).digest()
