"""Paths in options: `~` and variables of the environment, alike in flags, YAML and Python, and those of a moved run.

A relative path counts from the working directory, wherever it was given. In the config.yaml of a run folder it is where
things were when the run began, which is a hint: what is no longer there is looked for beside the run folder.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from thimble.config.options import Field, Given, Options, options_of, takes_many, typed

OptionsT = TypeVar("OptionsT", bound=Options)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
MOST_ENDS = 4  # parts of a lost path, by the last of which it is looked for


def exists(path: str) -> bool:
    """Whether something has this name."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL in the name
        return False


def expanded(path: str, is_new: bool = False) -> str:
    """A path with `~`, `$NAME` and `${NAME}` filled in, unless something has this very name.

    A ValueError says what is not set here; in what is to be made it may be part of the name.
    """
    if exists(path):
        return path
    names = [match[1] or match[2] for match in _VARIABLE.finditer(path)]
    unset = [name for name in names if name not in os.environ]
    if unset and not is_new:
        raise ValueError(f"there is no such file, and the variable {unset[0]} is not set: set it, or name the file")
    filled = _VARIABLE.sub(lambda match: os.environ.get(match[1] or match[2], match[0]), path)
    home = os.path.expanduser(filled) if path.startswith("~") else filled
    if home.split("/")[0] == "~":
        raise ValueError("~ is the home folder, and this user has none: write the path out")
    return home


def expand_paths(options: type[Options], given: Mapping[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """Fill in the paths among some options; with a problem for each that cannot be."""
    filled, problems = dict(given), []
    for name, spec in _path_options(options):
        if name not in given or given[name].value is None:
            continue
        try:
            filled[name] = given[name]._replace(value=_expanded_value(spec, given[name].value))
        except ValueError as error:
            problems.append(f"{given[name].place}{typed(spec, given[name].value)}: {error}")
    return filled, problems


def _path_options(options: type[Options]) -> Iterator[tuple[str, Field]]:
    return ((name, spec) for name, spec in options_of(options).items() if spec.metadata["path"])


def _expanded_value(spec: Field, value: Any) -> Any:
    if isinstance(value, dict | bool):
        return value  # no path: refused with the other values
    if not takes_many(spec):
        change = functools.partial(expanded, is_new=spec.name == "out")
        return _replaced(spec, str(value), change) if not isinstance(value, list | tuple) else value
    if isinstance(value, list | tuple):
        return [expanded(str(path)) for path in value if str(path)]
    text = str(value)  # in a file or from Python: one path, or several with commas between them
    paths = [text] if exists(text) or "," not in text else [part.strip() for part in text.split(",")]
    return [expanded(path) for path in paths if path]


def _replaced(spec: Field, value: str, change: Any) -> str:
    """A value with another path in it."""
    match = re.fullmatch(spec.metadata["path"], value)
    return value[: match.start(1)] + change(match[1]) + value[match.end(1) :] if match else value


def path_in(spec: Field, value: object) -> str | None:
    """The path that a value names, such as that in `adapter:runs/mine-1`."""
    match = re.fullmatch(spec.metadata["path"], str(value)) if spec.metadata["path"] and value is not None else None
    return match[1] if match else None


# ---- a run folder that was moved, or is used from elsewhere --------------------------------------------------------


def kept_paths(options: Options, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a config.yaml, the paths in them absolute, since it may be read from anywhere."""
    kept = dict(values)
    for name, spec in _path_options(type(options)):
        if isinstance(kept.get(name), str) and kept[name]:
            kept[name] = _replaced(spec, kept[name], _absolute if name != "base" else _absolute_base)
    return kept


def without_folders(options: OptionsT) -> OptionsT:
    """The same options with the names of files and folders alone, for a command that others may read."""
    changes: dict[str, Any] = {}
    for name, spec in _path_options(type(options)):
        value = getattr(options, name)
        if isinstance(value, tuple):
            changes[name] = tuple(map(_last_part, value))
        elif value:
            changes[name] = _replaced(spec, value, _last_part if name != "base" else _last_part_of_base)
    return options.replace(**changes)


def _last_part(path: str) -> str:
    return os.path.basename(path.rstrip("/")) or path


def _last_part_of_base(path: str) -> str:
    return _last_part(path) if os.path.isabs(path) or exists(path) else path  # else a name of the hub


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _absolute_base(path: str) -> str:
    return os.path.abspath(path) if exists(path) else path  # else a name of the hub


def relocated(options: type[Options], saved: Mapping[str, Given], folder: Path, by_name: bool) -> dict[str, Given]:
    """The options of the config.yaml of a run folder, with the paths that things have now as far as they are found.

    They may lie as they did, seen from the run folder; if `by_name`, for what is known by its hash, also anything near
    that has the same name.
    """
    began, found = str(saved["out"].value) if "out" in saved else "", dict(saved)
    for name, spec in _path_options(options):
        value = saved[name].value if name in saved and name != "out" else None
        if isinstance(value, str):
            change = lambda path: _found(path, began, folder, by_name) or path  # noqa: E731
            found[name] = saved[name]._replace(value=_replaced(spec, value, change))
    return found


def _found(path: str, began: str, folder: Path, by_name: bool) -> str | None:
    is_absolute = os.path.isabs(path)
    places = [path] if is_absolute else []
    if began and os.path.isabs(began) == is_absolute:
        places.append(os.path.normpath(folder / os.path.relpath(path, began)))
    if by_name and is_absolute:
        parts = Path(path).parts[1:]
        ends = [os.path.join(*parts[-count:]) for count in range(min(len(parts), MOST_ENDS), 0, -1)]
        places += [os.path.normpath(anchor / end) for anchor in (Path(), folder, folder.parent) for end in ends]
    if not is_absolute and (exists(path) and not any(map(exists, places))):
        return path
    near = next(filter(exists, places), None)
    return path if near and exists(path) and os.path.samefile(near, path) else near
