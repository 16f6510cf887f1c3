"""A program of the user's own, which is run since the user named it; what fails in it is told with its place."""

import contextlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from thimble.errors import ConfigError


def load_program(path: Path, option: str, expected: str) -> Any:
    """Run a Python file as a module of its own.

    Args:
        path: The file.
        option: As it was typed, for messages: `--metric mine.py:score`.
        expected: What the option takes, for messages.

    Returns:
        The module.

    Raises:
        ConfigError: If it cannot be read or does not run, with the line.
    """
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{option}: {path} cannot be read as Python; {expected}")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.absolute().parent)  # where a program finds the files beside it
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        where = f"{error.filename} line {error.lineno}"
        raise ConfigError(f"{option}: {where} is not Python: {error.msg}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{option}: {path} does not run: {place_of(error, str(path))}") from None
    finally:
        with contextlib.suppress(ValueError):  # it may have taken it out itself
            sys.path.remove(folder)
    return module


def place_of(error: BaseException, path: str) -> str:
    """Where in the user's code something was raised, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if Path(frame.filename).absolute() == Path(path).absolute()]
    where = f"{path} line {mine[-1].lineno} ({mine[-1].line}): " if mine else ""
    told = " ".join(str(error).split())
    return f"{where}{type(error).__name__}" + (f": {told[:200]}" if told else "")
