"""The commands as Python functions: `thimble.train("examples.jsonl", rank=8)` returns what `thimble train` reports."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from thimble.config.options import (
    ChatConfig,
    EvaluateConfig,
    InspectConfig,
    MergeConfig,
    Options,
    PlanConfig,
    TrainConfig,
    take_up,
)
from thimble.errors import ConfigError

CONFIGS: dict[str, type[Options]] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "evaluate": EvaluateConfig,
    "chat": ChatConfig,
    "inspect": InspectConfig,
    "merge": MergeConfig,
}
MODULES = {"inspect": "inspect_"}  # of commands that a module of the standard library is named like


def load_command(command: str) -> Callable[..., Any]:
    """The function of a command; imports what it needs only now."""
    return getattr(importlib.import_module(f"thimble.commands.{MODULES.get(command, command)}"), command)


def build_config(
    command: str, values: Mapping[str, Any], config_file: str | None = None, problems: Iterable[str] = ()
) -> Any:
    """Layer the sources of a config: the run folder being resumed, then a YAML file, then what was given.

    Args:
        command: Name of the command.
        values: Options given by flags or keywords; they win.
        config_file: A YAML file of options.
        problems: What the caller already found wrong.

    Returns:
        The config; what is wrong with it is in its `problems`.

    Raises:
        ConfigError: If the YAML file cannot be read.
    """
    layers = _read_yaml(Path(config_file)) if config_file else {}
    resumed = Path(str(values.get("out"))) / "config.yaml" if values.get("resume") and values.get("out") else None
    if resumed and resumed.exists():
        layers, differing = take_up(_read_yaml(resumed), {**layers, **values})
        problems, values = [*problems, *differing], {name: layers[name] for name in values if name in layers}
    lengths = ("epochs", "max_steps", "max_minutes")
    if any(values.get(name) is not None for name in lengths):  # a length that is given replaces any in a file
        layers = {name: value for name, value in layers.items() if name not in lengths}
    config = CONFIGS[command].build({**layers, **values}, where=config_file or "")
    return config.replace(problems=(*problems, *config.problems))


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or error
        raise ConfigError(f"config file {path}{where} is not YAML: {what}; expected lines such as `rank: 16`") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"config file {path} holds no options: expected lines such as `rank: 16`")
    return {name: option for name, option in value.items() if option is not None}


def _call(command: str, data: str | Path | None, options: dict[str, Any]) -> Any:
    heard = ("on_event", "should_stop", *(("should_wait",) if command == "train" else ()))
    listeners = {name: options.pop(name) for name in heard if name in options}
    config_file = options.pop("config", None)
    given = {**options, "data": str(data)} if data is not None else options
    return load_command(command)(build_config(command, given, config_file), **listeners)


def train(data: str | Path | None = None, **options: Any) -> Any:
    """Train an adapter; see `thimble train --help` for the options.

    Args:
        data: File or folder of examples; may stand in the `config` file instead.
        **options: `base`, `rank`, `epochs` and so on, by the names of the flags; also `config` (a YAML file),
            `on_event`, `should_stop` and `should_wait`.

    Returns:
        A thimble.training.result.TrainReport.

    Raises:
        InputError: If the run is refused.
        RunError: If it diverged.
    """
    return _call("train", data, options)


def plan(data: str | Path | None = None, **options: Any) -> Any:
    """Say what training would need; see `train` for the arguments. Returns a thimble.commands.plan.PlanReport."""
    return _call("plan", data, options)


def evaluate(data: str | Path | None = None, **options: Any) -> Any:
    """Measure a base and adapters on the same rows. Returns a thimble.commands.evaluate.EvaluateReport."""
    return _call("evaluate", data, options)


def chat(**options: Any) -> Any:
    """Open a conversation: `chat(adapter=["runs/mine-1"]).ask("Hello")`. Returns a thimble.commands.chat.Conversation."""
    from thimble.commands.chat import open_conversation

    return open_conversation(build_config("chat", options, options.pop("config", None)))


def inspect(path: str | Path | None = None, other: str | Path | None = None, **options: Any) -> Any:
    """CalibrationData into a base, an adapter or two adapters; see `thimble inspect --help` for the options.

    Args:
        path: A base, or an adapter or run folder; default: the base named by `base`, or the default base.
        other: A second adapter to compare the first with.
        **options: `base`, `blocks`, `out`; also `config`, `on_event` and `should_stop`.

    Returns:
        A thimble.commands.inspect_.InspectReport.

    Raises:
        InputError: If there is nothing to look into; with every problem found.
    """
    named = {name: str(value) for name, value in (("path", path), ("other", other)) if value is not None}
    return _call("inspect", None, {**options, **named})


def merge(*adapters: str | Path, **options: Any) -> Any:
    """Make an adapter smaller, or merge it into a base; see `thimble merge --help` for the options.

    Args:
        *adapters: Adapter or run folders; several are added up.
        **options: `out`, `truncate`, `rank`, `base`, by the names of the flags; also `config`, `on_event`, `should_stop`.

    Returns:
        A thimble.commands.merge.MergeReport.

    Raises:
        InputError: If it is refused; nothing is written then.
        RunError: If a merged weight does not fit its dtype.
    """
    given = {"adapter": [str(path) for path in adapters]} if adapters else {}
    return _call("merge", None, {**given, **options})
