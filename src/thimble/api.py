"""The commands as Python functions: `thimble.train("examples.jsonl", rank=8)` returns what `thimble train` reports.

Every function takes the options by their names, with `config` for a YAML file of them, and `on_event` and `should_stop`
as callbacks. What is refused raises an InputError that holds every problem found.
"""

import contextlib
import functools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from thimble.commands import COMMANDS
from thimble.config.groups import DataOptions
from thimble.config.options import options_of, takes_many
from thimble.config.sources import build_config


def call(command: str, *arguments: Any, **options: Any) -> Any:
    """Run a command of the registry; the functions below are this with their command's name.

    Arguments are what stands without a flag on the command line, in that order, None for what is left out; options have
    the names of the flags, and there are `config` (a YAML file) and the callbacks that the command takes. An
    InputError holds every problem found; too many arguments are a TypeError. Instead of a file, `data` may be rows.
    """
    entry = COMMANDS[command]
    callbacks = {name: options.pop(name) for name in entry.listeners if name in options}
    config_file = options.pop("config", None)
    given = {**options, **_positional(command, arguments)}
    with contextlib.ExitStack() as held:
        has_rows = given.get("data") is not None and not isinstance(given["data"], str | os.PathLike)
        if has_rows:
            given["data"], has_rows = _write_rows(given, held)
        config = build_config(entry.options, given, config_file)
        if has_rows and isinstance(config, DataOptions):
            config = config.replace(has_given_rows=True)
        return entry.function(config, **callbacks)


def _write_rows(given: Mapping[str, Any], held: contextlib.ExitStack) -> tuple[str, bool]:
    """Write rows to a temporary folder; or, of a run to be resumed that began with them, give the one it keeps.

    Returned with the path is whether it is temporary.
    """
    from thimble.data.given_rows import FOLDER, are_kept, written_rows

    folder, out = held.enter_context(written_rows(given["data"])), given.get("out")
    if given.get("resume") and out and are_kept(folder, Path(out) / FOLDER):
        return str(Path(out) / FOLDER), False
    return str(folder), True


def _positional(command: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Give arguments the names of the positional options; one that takes many takes them all."""
    specs = [spec for spec in options_of(COMMANDS[command].options).values() if spec.metadata["positional"]]
    if specs and takes_many(specs[0]):
        return {specs[0].name: [str(value) for value in arguments]} if arguments else {}
    if len(arguments) > len(specs):
        raise TypeError(f"{command}() takes {len(specs)} positional arguments but {len(arguments)} were given")
    named = [(spec.name, value) for spec, value in zip(specs, arguments, strict=False) if value is not None]
    return {name: value if name == "data" else str(value) for name, value in named}


def train(data: Any = None, **options: Any) -> Any:
    """Train an adapter; see `thimble train --help` for the options.

    Args:
        data: File or folder of examples, or rows: mappings or lists of messages, in a list, an iterator, a data set or
            a table, or such rows by split (`{"train": ..., "valid": ...}`). May stand in the `config` file instead. The
            run folder keeps rows, in `rows/`: from there the run can be resumed and repeated.
        **options: `base`, `rank`, `epochs` and so on; also `should_wait`, asked between steps for a reason to pause.

    Returns:
        A thimble.training.result.TrainReport.

    Raises:
        InputError: If the run is refused.
        RunError: If it diverged.
        KeyboardInterrupt: After Ctrl-C, or the stop of a notebook, once what was learned is kept.
    """
    if "should_stop" in options:
        return call("train", data, **options)
    with _kept_on_interrupt() as should_stop:
        return call("train", data, should_stop=should_stop, **options)


@contextlib.contextmanager
def _kept_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ask a run to stop at the first Ctrl-C, and raise its KeyboardInterrupt when that is done; the second at once.

    Only where Ctrl-C would raise one: not in other threads, nor where a program has a handler of its own.
    """
    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        with contextlib.suppress(UserWarning):  # of a program that makes errors of them
            warnings.warn(
                "stopping after this step, keeping what was learned; once more to leave at once", stacklevel=2
            )

    is_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT)
    is_ours = is_main and previous is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: bool(asked)
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, previous)
    if asked:
        raise KeyboardInterrupt


def plan(data: Any = None, **options: Any) -> Any:
    """Say what training would need; see `train` for the arguments. Returns a thimble.commands.plan.PlanReport."""
    return call("plan", data, **options)


def evaluate(data: Any = None, **options: Any) -> Any:
    """Measure a base and adapters on the same rows. Returns a thimble.commands.evaluate.EvaluateReport."""
    return call("evaluate", data, **options)


def generate(data: str | Path | Iterable[Any] | None = None, out: str | Path | None = None, **options: Any) -> Any:
    """Answer many prompts that have nothing to do with one another; see `thimble generate --help` for the options.

    >>> [answer.text for answer in generate(["Hello", {"prompt": "Bye"}], max_new_tokens=5)]  # doctest: +SKIP
    ["Hello! How can I", "Goodbye! It was nice"]

    Args:
        data: A file of prompts; or rows, each a text or a mapping with prompt, question, instruction, messages or text.
        out: File for the answers. Without it nothing is written.
        **options: `adapter`, `base`, `system`, `temperature`, `max_new_tokens` and so on.

    Returns:
        A list of thimble.data.answers.Answer, one a row and in their order, each with `text`, `finish_reason`,
        `prompt_tokens`, `completion_tokens` and `reference`; of adapters for pictures, sound and sentences a dict a
        row, as the command writes it; with `out` a thimble.commands.generate.GenerateReport.

    Raises:
        InputError: If it is refused.
    """
    from thimble.commands.generate import answer_rows, write_answers

    entry, rows, config_file = COMMANDS["generate"], None, options.pop("config", None)
    callbacks = {name: options.pop(name) for name in entry.listeners if name in options}
    if isinstance(data, str | os.PathLike):
        options["data"] = str(data)
    else:
        rows = data
    if out is not None:
        options["out"] = str(out)
    config: Any = build_config(entry.options, options, config_file)
    return (write_answers if config.out else answer_rows)(rows, config, **callbacks)


def chat(**options: Any) -> Any:
    """Open a conversation: `talk = chat(adapter=["runs/mine-1"])`, then `talk.ask("Hello")`, `talk.ask("And?")`.

    Each answer depends on the turns before. For many questions that have nothing to do with one another, such as a list
    of tickets, use `generate`, which is faster too, or `talk.ask(text, keep=False)`. When a conversation outgrows the
    context of the base, its oldest turns are left out; that is a warning of Python, unless `on_event` is given.

    Args:
        **options: `adapter`, `base`, `system`, `temperature` and so on; see `thimble chat --help`.

    Returns:
        A thimble.inference.conversation.Conversation.
    """
    return call("chat", **{"on_event": _warn, **options})


def _warn(event: Any) -> None:
    """Make Python's own warnings of what may spoil a result, where nobody listens to events."""
    if event.kind == "warning":
        warnings.warn(event.text, stacklevel=2)


def serve(**options: Any) -> Any:
    """Serve a base and adapters over HTTP, until `should_stop` says so or Ctrl-C; see `thimble serve --help`.

    Args:
        **options: `base`, `adapter`, `host`, `port`, `api_key` and so on.

    Returns:
        A thimble.commands.serve.ServeReport.

    Raises:
        InputError: If it cannot be begun.
    """
    return call("serve", **options)


def inspect(path: str | Path | None = None, other: str | Path | None = None, **options: Any) -> Any:
    """Look into a base, an adapter or two adapters; see `thimble inspect --help` for the options.

    Args:
        path: A base, or an adapter or run folder; default: the base named by `base`, or the default base.
        other: A second adapter to compare the first with.
        **options: `base`, `blocks`, `out`.

    Returns:
        A thimble.commands.inspect_.InspectReport.

    Raises:
        InputError: If there is nothing to look into.
    """
    return call("inspect", path, other, **options)


def merge(*adapters: Any, **options: Any) -> Any:
    """Make an adapter smaller, or merge it into a base; see `thimble merge --help` for the options.

    Args:
        *adapters: Adapter or run folders; several are added up. Or a model that `thimble.attach` has put an adapter on,
            alone: then that is merged into its weights, until `thimble.unmerge(model)`.
        **options: `out`, `truncate`, `rank`, `base`.

    Returns:
        A thimble.commands.merge.MergeReport; of a model, nothing.

    Raises:
        InputError: If it is refused; nothing is written then.
        RunError: If a merged weight does not fit its dtype.
    """
    if len(adapters) == 1 and not options and hasattr(adapters[0], "named_modules"):
        from thimble.backends.torch.attach import merge as merge_model

        return merge_model(adapters[0])
    return call("merge", *adapters, **options)


def export(adapter: str | Path = "", **options: Any) -> Any:
    """Write an adapter for another program, and prove it there; see `thimble export --help` for the options.

    Args:
        adapter: An adapter folder, a run folder, or a GGUF adapter.
        **options: `to`, `out`, `base`, `data`, `proof`, `verify_only`.

    Returns:
        A thimble.commands.export.ExportReport.

    Raises:
        InputError: If it is refused; nothing is written then.
        RunError: If the proof does not hold; nothing is left in `out` then.
    """
    return call("export", adapter, **options)


def __getattr__(name: str) -> Callable[..., Any]:
    """The function of a command that has none written out above."""
    if name not in COMMANDS:
        raise AttributeError(f"module 'thimble.api' has no attribute {name!r}")
    return functools.partial(call, name)
