"""The registry of commands: the one place that lists them; the command line, Python, the docs and the tests ask it.

A command is a plain function, config in, report out; it never prints. A new one is a file here, a file in `config/` and
a line in `COMMANDS`. Everything is named by path and imported when it is first used, so that the list costs nothing.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from thimble.config.options import Options


class Command(NamedTuple):
    """One command."""

    name: str  # as it is typed, and the name of its function in Python
    summary: str  # one sentence for `thimble --help`
    options_path: str  # its config class, as `module:name` within thimble
    function_path: str  # its function; takes the config, `on_event` and, where it can end early, `should_stop`
    # What turns its report into text for a terminal; empty for a command that talks with its user.
    renderer_path: str = ""
    when_stopped: str = "after this step, keeping what is done"  # when it ends if interrupted, and what it leaves

    @property
    def options(self) -> type["Options"]:
        """Its config class."""
        options: type[Options] = _resolve(self.options_path)
        return options

    @property
    def function(self) -> Callable[..., Any]:
        """Its function."""
        function: Callable[..., Any] = _resolve(self.function_path)
        return function

    @property
    def renderer(self) -> Callable[[Any], str]:
        """What turns its report into text."""
        renderer: Callable[[Any], str] = _resolve(self.renderer_path)
        return renderer

    @property
    def listeners(self) -> tuple[str, ...]:
        """Names of the callbacks that its function takes beside the config."""
        import inspect

        return tuple(inspect.signature(self.function).parameters)[1:]


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"thimble.{module}"), name)


_LIST = (
    Command(
        "train", "Learn from examples; writes a run folder with the adapter and a report.",
        "config.train:TrainConfig", "commands.train:train", "report.terminal:render_train",
        "after this step, keeping what was learned",
    ),
    Command(
        "plan", "Say what a training run would decide, need and cost, without training.",
        "config.train:PlanConfig", "commands.plan:plan", "report.terminal:render_plan",
    ),
    Command(
        "evaluate", "Measure a base and adapters on the same rows.",
        "config.evaluate:EvaluateConfig", "commands.evaluate:evaluate", "report.terminal:render_evaluate",
    ),
    Command(
        "chat", "Talk to a base or an adapter, and switch between them.",
        "config.chat:ChatConfig", "commands.chat:open_conversation",
    ),
    Command(
        "generate", "Answer a whole file of prompts with a base or an adapter.",
        "config.generate:GenerateConfig", "commands.generate:generate", "report.terminal:render_generate",
        "after this step, keeping the answers so far",
    ),
    Command(
        "serve", "Serve a base and many adapters over HTTP, as the OpenAI API has it.",
        "config.serve:ServeConfig", "commands.serve:serve", "report.terminal:render_serve",
        "once the answers that were begun are done",
    ),
    Command(
        "inspect", "Look into the weights of a base, into an adapter, or compare two adapters.",
        "config.inspect_:InspectConfig", "commands.inspect_:inspect", "report.inspect_text:render_inspect",
    ),
    Command(
        "merge", "Combine adapters, make one smaller, or merge into a base of float weights and out of it.",
        "config.merge:MergeConfig", "commands.merge:merge", "report.terminal:render_merge",
        "after this step, writing nothing",
    ),
    Command(
        "export", "Write an adapter for llama.cpp, and prove that it does there what it does here.",
        "config.export:ExportConfig", "commands.export:export", "report.terminal:render_export",
        "after this step, writing nothing",
    ),
)  # fmt: skip
COMMANDS = {command.name: command for command in _LIST}
