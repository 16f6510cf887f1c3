"""Which adapters a user means: those named one by one, and those that lie in a folder, each with a name."""

import re
from collections.abc import Sequence
from pathlib import Path

from thimble.errors import Problems, as_word
from thimble.files.peft import find_adapter
from thimble.inference.adapters import MOST_NAME, check_name
from thimble.models.adapters import adapters_under, is_adapter
from thimble.models.gguf_adapter import is_gguf


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
        inner = [] if name or is_adapter(Path(path)) else _inside(Path(path))
        if not inner:
            problems.attempt(_check_is_adapter, path)
        for own, place in inner or [(name or _name_of(Path(path)), path)]:
            problems.attempt(check_name, own)
            if own in found and found[own] != place:
                problems.add(
                    f"--adapter {as_word(place)}: there is another one called {own}: give it a name of its own, as in "
                    f"--adapter other={as_word(place)}"
                )
            found[own] = place
    return found


def _inside(folder: Path) -> list[tuple[str, str]]:
    """The adapters in a folder of such, each with its name."""
    return [(_name_of(path), str(path)) for path in adapters_under(folder)] if folder.is_dir() else []


def _check_is_adapter(path: str) -> None:
    if not is_gguf(path):
        find_adapter(path)


def _name_of(path: Path) -> str:
    """What an adapter is called that was given no name: as its folder or file, or the run folder around it; what no
    name may hold, such as a space, becomes a hyphen.
    """
    path = path.absolute()
    name = path.parent.name if path.name == "adapter" else path.stem if path.is_file() else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:MOST_NAME] or "adapter"
