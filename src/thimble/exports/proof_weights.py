"""The numbers of a written model, read again: whether they are right, and how much of an update rounding left of it.

The two are told apart. A file is right if its blocks are, bit for bit, those of a second encoding of base and update:
however little rounding leaves of an update, a wrong scale, a dropped layer or another order of rows makes other blocks
of what is left. What rounding took is measured along the update: of an update that is small against the steps of its
type single numbers show nothing, and thousands of them show its share.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thimble.core.lowrank import Factors, merge
from thimble.files.blocks import BLOCKS
from thimble.models.base import Base, Weight

Floats = NDArray[np.float64]

MEASURED_ROWS, ENCODED_ROWS = 256, 64  # of each matrix
# Length of the rounding error of a tensor, as a share of its own: what none of its type comes near.
ROUNDING = {"F32": 1e-6, "F16": 2e-3, "BF16": 1e-2}
ROUNDING_OF_BLOCKS = 0.5
# Share of the blocks that the update changes, or that are changed without one. Sums in another order end in other
# blocks for at most 0.0014 of them (F32, default base); a scale of 1.41 in the place of 1 in 0.1 to 1.0.
WRONG_BLOCKS = 0.02
SURVIVES = 0.9  # share of the update, or of what it takes off the loss: less is told


class WeightsCheck(NamedTuple):
    """What the numbers of a file were found to be."""

    tensors: int  # compared
    worst_rounding: float  # share of its length that a tensor changed by
    worst_update: float  # share of an update that is in the file; the one furthest from 1, and 1 without updates
    kept_update: float  # share of all updates together that is in the file
    problems: tuple[str, ...]  # what no rounding explains


class _Compared(NamedTuple):
    """One tensor: its rounding as a share of its length, the update along itself, before and in the file."""

    rounding: float
    size: float = 0.0  # square of the length of the update
    found: float = 0.0  # product of the update and of what the file differs from the base by

    @property
    def kept(self) -> float:
        return self.found / self.size if self.size else 1.0


def check_weights(
    base: Base,
    updates: Mapping[str, Factors],
    written: Base,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
) -> WeightsCheck:
    """Compare every tensor of a written file, by its name in transformers, with base and updates.

    Args:
        base: What was written.
        updates: By path of the layer.
        written: The file.
        importance: What its rounding errors were weighed by, as for `gguf_model.plan_tensors`.

    Returns:
        What was found; problems are of a wrong file, and not of a lossy one.
    """
    problems, compared = [], []
    if set(base.weights) != set(written.weights):
        missing = sorted(set(base.weights) ^ set(written.weights))
        problems.append(f"the file and the base do not hold the same tensors: {missing[:3]}")
    for name in (name for name in base.weights if name in written.weights):
        layer = name.removesuffix(".weight")
        old, new, update = base.weights[name], written.weights[name], updates.get(layer)
        one = _compare(old, new, update)
        wrong = _wrong_blocks(old, new, update, importance.get(layer) if importance else None)
        if update and wrong > WRONG_BLOCKS:
            problems.append(
                f"{one.kept:.2f} of the update of {name} is in the file, and {wrong:.0%} of the blocks that it changes "
                "are not those of base and update"
            )
        elif not one.rounding <= ROUNDING.get(new.dtype, ROUNDING_OF_BLOCKS):
            problems.append(f"{name} ({new.dtype}) differs by {one.rounding:.1%} of its length")
        elif wrong > WRONG_BLOCKS:
            problems.append(f"{wrong:.0%} of the blocks of {name} ({new.dtype}) are not those of the base")
        compared.append(one)
    return _summed(compared, problems)


def _summed(compared: Sequence[_Compared], problems: Sequence[str]) -> WeightsCheck:
    size, found = (sum(getattr(one, name) for one in compared) for name in ("size", "found"))
    worst = max((one.kept for one in compared), key=lambda kept: abs(kept - 1), default=1.0)
    rounding = max((one.rounding for one in compared), default=0.0)
    return WeightsCheck(len(compared), rounding, worst, found / size if size else 1.0, tuple(problems))


def _compare(old: Weight, new: Weight, update: Factors | None) -> _Compared:
    """What a tensor lost, in float64."""
    if len(old.shape) == 1:
        before, found = (weight.read().astype(np.float64) for weight in (old, new))
        return _Compared(_share(found - before, before))
    rows = _spread(old.shape[0], MEASURED_ROWS)
    before, found = (weight.read_rows(rows).astype(np.float64) for weight in (old, new))
    if update is None:
        return _Compared(_share(found - before, before))
    exact = merge(before, _of_rows(update, rows))
    delta = exact - before
    return _Compared(
        _share(found - exact, exact), float(np.square(delta).sum()), float(((found - before) * delta).sum())
    )


def _wrong_blocks(old: Weight, new: Weight, update: Factors | None, importance: NDArray[np.float32] | None) -> float:
    """Share of the blocks that are not those of a second encoding; with an update, of those that it changes."""
    from thimble.backends.torch.encode import encode

    if len(old.shape) == 1:
        return 0.0
    rows = _spread(old.shape[0], ENCODED_ROWS)
    values, found = old.read_rows(rows), new.raw_rows(rows)
    is_kept = old.dtype == new.dtype and not old.offset  # without an update the blocks stay as they are
    bare = old.raw_rows(rows) if is_kept else encode(values, new.dtype, importance)
    expected = bare
    if update:
        wide = values.astype(np.float64) if new.dtype == "F32" else values  # as the sum was made
        expected = encode(merge(wide, _of_rows(update, rows)).astype(np.float32), new.dtype, importance)
    is_wrong, *changes = (
        (one != other).reshape(-1, BLOCKS[new.dtype][1]).any(1)
        for one, other in ((found, expected), (found, bare), (expected, bare))
    )
    number = int((changes[0] | changes[1]).sum()) if update else len(is_wrong)
    return float(is_wrong.sum()) / number if number else 0.0


def _of_rows(update: Factors, rows: NDArray[np.int64]) -> Factors:
    return Factors(update.A, update.B[rows], update.scale, None if update.magnitude is None else update.magnitude[rows])


def _spread(number: int, most: int) -> NDArray[np.int64]:
    """Numbers of rows, spread over a matrix."""
    return np.unique(np.linspace(0, number - 1, most).astype(np.int64))


def _share(error: Floats, whole: Floats) -> float:
    size = float(np.linalg.norm(whole))
    return float(np.linalg.norm(error)) / size if size else float(np.linalg.norm(error))
