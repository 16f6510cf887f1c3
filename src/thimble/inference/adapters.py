"""Adapters in use: known by name, read when first used, kept in memory as far as there is room.

A request holds the adapter it began with, so one that is replaced or removed meanwhile changes nothing for it. What a
name stands for is looked up with each request, and what is kept of earlier requests goes by the contents of the
adapter, not by its name.
"""

import contextlib
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from thimble.backends.session import ActiveAdapter, Session
from thimble.core.adapter import Adapter
from thimble.core.combine import Combination, combination_problems, combine
from thimble.errors import AdapterError, Problems, as_word, listing
from thimble.models.adapters import adapters_under, load_fitting
from thimble.models.base import Base

BASE_NAME = "base"
MOST_NAME = 128  # characters
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MOST_NAME - 1}}}")
AHEAD_BYTES = 250_000_000  # of them, read before anybody asks: a second or two of work

# Names with the versions they stood for, and what each is multiplied by.
_Key = tuple[tuple[str, int, float], ...]


class UnknownAdapterError(AdapterError):
    """There is no adapter of that name."""


@dataclass(frozen=True)
class _Source:
    """Where an adapter lies, and how often the name was given before."""

    path: str
    version: int


class AdapterRegistry:
    """The adapters of one base, by name; every method may be called by any thread.

    Args:
        session: The base in memory.
        base: What adapters have to fit.
        resident_bytes: Most memory of adapters that are kept; one alone is used whatever it takes, and those that
            requests are still using stay beside them until these end.
    """

    def __init__(self, session: Session, base: Base, resident_bytes: int = 1_000_000_000) -> None:
        self._session, self._base, self._most = session, base, resident_bytes
        self._bare = session.load(None)
        self._sources: dict[str, _Source] = {}
        self._versions = 0
        self._resident: OrderedDict[_Key, ActiveAdapter] = OrderedDict()  # the longest unused first
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self.loads = self.evictions = 0

    # ---- names ----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """All adapters, used or not, in the order they were added."""
        return list(self._sources)

    @property
    def resident_bytes(self) -> int:
        """Memory of the adapters that are kept."""
        with self._lock:
            return sum(adapter.resident_bytes for adapter in self._resident.values())

    @property
    def most_bytes(self) -> int:
        """What these may take."""
        return self._most

    def path(self, name: str) -> str:
        """Where an adapter lies.

        Args:
            name: Of the adapter.

        Returns:
            The path it was added with.

        Raises:
            UnknownAdapterError: If there is none of that name.
        """
        return self._source(name).path

    def add(self, name: str, path: str | Path) -> None:
        """List an adapter, which is read when it is first used; one of the same name is replaced.

        Args:
            name: Letters, digits, `.`, `_` and `-`; not `base`.
            path: A PEFT folder, a run folder or a GGUF adapter.

        Raises:
            AdapterError: If the name cannot be used.
        """
        check_name(name)
        self._put(name, path)

    def _put(self, name: str, path: str | Path, active: ActiveAdapter | None = None) -> None:
        """Have a name stand for what lies at a path, which may have been read already."""
        with self._lock:
            self._versions += 1
            self._sources[name] = _Source(str(path), self._versions)
            for key in [key for key in self._resident if any(part[0] == name for part in key)]:
                del self._resident[key]
            if active is not None:
                self._keep(((name, self._versions, 1.0),), active)

    def add_folder(self, folder: str | Path) -> list[str]:
        """List every adapter that lies in a folder, by the name of its own folder or file.

        Args:
            folder: Of adapter folders, run folders and GGUF adapters.

        Returns:
            Their names.

        Raises:
            AdapterError: If the folder cannot be read, a name cannot be used, or two adapters have one name.
        """
        problems, found = Problems(), adapters_under(folder)
        for name in sorted({path.stem for path in found}):
            alike = [path for path in found if path.stem == name]
            if len(alike) > 1:
                problems.add(f"{listing(map(str, alike))} have one name, {name!r}: rename all but one")
            else:
                problems.attempt(self.add, name, alike[0])
        if problems.found:
            raise AdapterError(*problems.found)
        return sorted(path.stem for path in found)

    def load(self, name: str, path: str | Path) -> ActiveAdapter:
        """Add an adapter that is read and checked now: nothing changes unless it fits.

        Args:
            name: As in `add`.
            path: As in `add`.

        Returns:
            The adapter.

        Raises:
            AdapterError: If it is damaged or does not fit the base, or the name cannot be used.
        """
        check_name(name)
        active = self._session.prepare(load_fitting(str(path), self._base))
        self._put(name, path, active)
        return active

    def remove(self, name: str) -> None:
        """Forget an adapter; requests that have it go on with it.

        Args:
            name: Of the adapter.

        Raises:
            UnknownAdapterError: If there is none of that name.
        """
        path = self._source(name).path
        self._put(name, path)
        self._sources.pop(name, None)

    # ---- use ------------------------------------------------------------------------------------------------------

    def get(self, weights: str | Mapping[str, float]) -> ActiveAdapter:
        """An adapter or a sum of several, read if it is not in memory.

        Args:
            weights: A name, or names with what each adapter is multiplied by. `base` and no names are the bare base.

        Returns:
            The adapter, which the caller may use for as long as it holds it.

        Raises:
            UnknownAdapterError: If there is none of a name.
            AdapterError: If one is damaged or does not fit the base, or they cannot be added up.
        """
        weights = {weights: 1.0} if isinstance(weights, str) else weights
        key = self._key({name: weight for name, weight in weights.items() if name != BASE_NAME and weight})
        if not key:
            return self._bare
        if (found := self._find(key)) is not None:
            return found
        with self._loading:  # one at a time, and what two wait for is read once
            if (found := self._find(key)) is not None:
                return found
            active = self._session.prepare(self._read(key))
            with self._lock:
                self._keep(key, active)
            return active

    def read_ahead(self, most_bytes: int = AHEAD_BYTES) -> None:
        """Read the first adapters until they take so much memory, so that nobody waits for them.

        One that cannot be read is told to whoever asks for it.

        Args:
            most_bytes: Of memory; the last one may go beyond.
        """
        for name in self.names:
            if self.resident_bytes >= min(most_bytes, self._most):
                return
            with contextlib.suppress(AdapterError):
                self.get(name)

    def _read(self, key: _Key) -> Adapter:
        """What a key stands for, from the files."""
        problems = Problems()
        read = {
            name: problems.attempt(load_fitting, self._source(name).path, self._base) for name, _, _ in key
        }  # fmt: skip
        if problems.found:
            raise AdapterError(*problems.found)
        return blend({name: adapter for name, adapter in read.items() if adapter}, {name: w for name, _, w in key})

    def _source(self, name: str) -> _Source:
        source = self._sources.get(name)
        if source is None:
            known = f"choose from {listing([BASE_NAME, *self._sources])}"
            raise UnknownAdapterError(f"there is no adapter {as_word(name)} here: {known}")
        return source

    def _key(self, weights: Mapping[str, float]) -> _Key:
        return tuple(sorted((name, self._source(name).version, float(weight)) for name, weight in weights.items()))

    def _find(self, key: _Key) -> ActiveAdapter | None:
        with self._lock:
            if key in self._resident:
                self._resident.move_to_end(key)
            return self._resident.get(key)

    def _keep(self, key: _Key, active: ActiveAdapter) -> None:
        """Have an adapter in memory, and those that were not used for longest out of it; the lock is held."""
        self.loads += 1
        self._resident[key] = active
        held = sum(adapter.resident_bytes for adapter in self._resident.values())
        while held > self._most and len(self._resident) > 1:
            _, oldest = self._resident.popitem(last=False)
            held -= oldest.resident_bytes
            self.evictions += 1


def check_name(name: str) -> None:
    """Refuse what no adapter can be called, with an AdapterError that says what can be one's name."""
    if not NAME.fullmatch(name) or name == BASE_NAME:
        raise AdapterError(
            f"{name!r} is no name for an adapter: expected up to 128 letters, digits, '.', '_' and '-', beginning "
            f"with a letter or digit, and not {BASE_NAME!r}"
        )


def blend(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> Adapter:
    """The sum of adapters of one base, each multiplied by a weight.

    Args:
        adapters: By name.
        weights: By the same names.

    Returns:
        An adapter of the sum of their ranks; a single one of weight 1 as it is.

    Raises:
        AdapterError: If one is DoRA and is not alone with weight 1: lengths of rows neither add up nor scale.
    """
    problems = combination_problems(adapters, "cat")
    scaled = [name for name, adapter in adapters.items() if adapter.has_magnitudes and weights[name] != 1]
    if scaled and not problems:
        problems = [
            f"adapter {listing(scaled)} is DoRA, which sets lengths of rows: it can have no other weight than 1"
        ]
    if problems:
        raise AdapterError(*problems)
    if len(adapters) == 1 and set(weights.values()) == {1.0}:
        return next(iter(adapters.values()))
    parts = [adapter.plain() for adapter in adapters.values()]
    layers = dict(combine(parts, Combination([weights[name] for name in adapters])))
    return replace(parts[0], layers=layers, notes={})
