"""What rows hold that is not used: counted, and told as a warning unless it is only about the rows."""

from collections import Counter
from collections.abc import Iterable

from thimble.data.columns import MOST_NAMES, Left, folded, is_about
from thimble.data.row_forms import REJECTED
from thimble.errors import listing, plural

MOST_TOLD = 20  # columns in one message


class Unused:
    """Columns, and keys of messages, that no row was read from."""

    def __init__(self) -> None:
        self._filled: Counter[str] = Counter()
        self._repeated: dict[str, None] = {}
        self._empty: dict[str, None] = {}

    def add(self, left: Left) -> None:
        """Count what one more row had left over."""
        for name in dict.fromkeys(left.filled):
            self._filled[
                name if name in self._filled or len(self._filled) < MOST_NAMES else "columns of other names"
            ] += 1
        for names, more in ((self._empty, left.empty), (self._repeated, left.repeated)):
            if len(names) < MOST_NAMES:
                names |= dict.fromkeys(more)

    @property
    def notes(self) -> list[str]:
        """What is empty, or only about the rows."""
        about = [name for name in self._filled if is_about(name)]
        same = [name for name in self._repeated if name not in self._filled]
        empty = [name for name in self._empty if name not in self._filled and name not in self._repeated]
        notes = [f"not used, as it is about the rows and not of them: {self._counted(about)}"] if about else []
        notes += [f"not used, as the messages say the same: {listing(sorted(same), MOST_TOLD)}"] if same else []
        return notes + ([f"not used, as it is empty: {listing(sorted(empty), MOST_TOLD)}"] if empty else [])

    @property
    def warnings(self) -> list[str]:
        """What might have been meant to be learned or to stand in the prompt."""
        names = [name for name in self._filled if not is_about(name)]
        if not names:
            return []
        is_preference = any(folded(name) in REJECTED for name in names)
        why = "; Thimble learns from answers, not from preferences" if is_preference else ""
        how = "" if all("." in name or " " in name for name in names) else (
            "; to use a column, name it with --prompt-column, --completion-column or --prompt-template"
        )  # fmt: skip
        return [f"filled but not used: {self._counted(names)}{why}{how}"]

    def _counted(self, names: Iterable[str]) -> str:
        return listing((f"{name} ({plural(self._filled[name], 'row')})" for name in sorted(names)), MOST_TOLD)
