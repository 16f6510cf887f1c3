"""The adapters that are served: found in folders, known by name, loaded, replaced and removed while requests run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from thimble.backends.session import ActiveAdapter, Session
from thimble.core.adapter import Adapter
from thimble.core.lowrank import total
from thimble.errors import AdapterError, Problems, as_word
from thimble.files.peft import find_adapter
from thimble.models.adapters import check_fits, load_adapters
from thimble.models.base import Base
from thimble.models.gguf_adapter import is_gguf


class Served(NamedTuple):
    """An adapter that is served."""

    path: str
    adapter: Adapter
    active: ActiveAdapter


class ServedAdapters:
    """Adapters by name, on one base.

    Args:
        session: The base in memory.
        base: The same base, for whether an adapter fits.
    """

    def __init__(self, session: Session, base: Base) -> None:
        self._session, self._base = session, base
        self._served: dict[str, Served] = {}
        self._bare = session.load(None)

    @property
    def names(self) -> list[str]:
        """Of all adapters, in the order they came."""
        return list(self._served)

    def path(self, name: str) -> str:
        """Where an adapter came from."""
        return self._served[name].path

    def put(self, name: str, path: str) -> None:
        """Read an adapter, and serve it by a name from now on; an AdapterError if it does not fit the base."""
        problems = Problems()
        read = load_adapters([path], problems, self._base).get(path)
        (adapter,) = problems.required(read)
        check_fits(path, adapter, self._base)
        self._served[name] = Served(path, adapter, self._session.load(adapter))

    def remove(self, name: str) -> None:
        """Serve an adapter no longer; who uses it goes on."""
        self._served.pop(name, None)

    def use(self, weights: Sequence[tuple[str, float]]) -> ActiveAdapter:
        """An adapter, or several added up with weights; without any the bare base. An AdapterError if it is gone."""
        gone = [name for name, _ in weights if name not in self._served]
        if gone:
            raise AdapterError(f"there is no adapter {gone[0]!r} any more")
        if not weights:
            return self._bare
        if len(weights) == 1 and weights[0][1] == 1:
            return self._served[weights[0][0]].active
        return self._session.load(blend([(self._served[name].adapter, weight) for name, weight in weights]))


def blend(weights: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Adapters added up with weights, exactly: an adapter of the sum of their ranks."""
    if any(adapter.has_magnitudes for adapter, _ in weights):
        raise AdapterError("a DoRA adapter can be used alone and whole only: it sets lengths, which do not add up")
    plain = [(adapter.plain().layers, weight) for adapter, weight in weights]
    paths = dict.fromkeys(path for layers, _ in plain for path in layers)
    return Adapter({
        path: total([
            replace(layers[path], scale=layers[path].scale * weight) for layers, weight in plain if path in layers
        ])
        for path in paths
    })  # fmt: skip


def find_adapters(given: Sequence[str], problems: Problems) -> dict[str, str]:
    """Paths of adapters by name, from what a user gave.

    Args:
        given: Each NAME=PATH, the path of an adapter or of the run folder around it, or a folder of such.
        problems: Takes paths that lead to no adapter, and names that are there twice.

    Returns:
        The paths; those in a folder by the names they have in it.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        name, path = ("", text) if not path or Path(text).exists() else (name, path)
        inner = {} if name or _is_adapter(Path(path)) else _inside(Path(path))
        if not inner:
            problems.attempt(_check_is_adapter, path)
        for own, place in (inner or {name or _name_of(Path(path)): path}).items():
            if own in found and found[own] != place:
                problems.add(
                    f"--adapter {as_word(place)}: there is another one called {own}: give it a name of its own, as in "
                    f"--adapter other={as_word(place)}"
                )
            found[own] = place
    return found


def _inside(folder: Path) -> Mapping[str, str]:
    """The adapters in a folder of such."""
    if not folder.is_dir():
        return {}
    return {_name_of(path): str(path) for path in sorted(folder.iterdir()) if _is_adapter(path)}


def _check_is_adapter(path: str) -> None:
    if not is_gguf(path):
        find_adapter(path)


def _is_adapter(path: Path) -> bool:
    try:
        _check_is_adapter(str(path))
    except AdapterError:
        return False
    return path.is_dir() or is_gguf(str(path))


def _name_of(path: Path) -> str:
    """What an adapter is called that was given no name: as its folder or file, or the run folder around it."""
    path = path.absolute()
    return path.parent.name if path.name == "adapter" else path.stem if path.is_file() else path.name
