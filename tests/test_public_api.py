"""What `import thimble` offers, and how little it costs."""

import ast
import importlib.metadata
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import thimble
from thimble import api
from thimble.commands import COMMANDS
from thimble.config.options import Options
from thimble.errors import InputError

HEAVY = {"numpy", "torch", "numba", "llvmlite", "tokenizers", "jinja2", "yaml", "matplotlib", "pyarrow", "transformers"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running some code."""
    code = f"import sys, json, contextlib, io\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def run_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "thimble", *args], capture_output=True, text=True, check=False)


def test_every_public_name_can_be_imported():
    for name in thimble.__all__:
        assert getattr(thimble, name) is not None, name


def test_the_public_names_are_the_declared_ones():
    assert set(thimble.__all__) == set(thimble._HOMES) | {"__version__"}
    assert thimble.__all__ == sorted(thimble.__all__)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(thimble.__file__).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname: node.module for block in blocks for node in block.body for alias in node.names}
    assert seen == thimble._HOMES


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_a_command_of_the_registry_is_complete(command):
    """One line of the registry makes a command, a function and a page of the docs."""
    assert issubclass(command.options, Options)
    assert command.listeners[0] == "on_event"
    assert set(command.listeners) <= {"on_event", "should_stop", "should_wait"}
    assert not command.renderer_path or callable(command.renderer)
    assert command.name in thimble.__all__
    assert callable(getattr(thimble, command.name))


def test_a_command_without_a_function_of_its_own_has_one_from_the_registry(monkeypatch):
    from thimble.config.merge import MergeConfig

    monkeypatch.setitem(COMMANDS, "publish", COMMANDS["merge"]._replace(name="publish"))
    monkeypatch.setattr("thimble.commands.merge.merge", lambda config, on_event=print: (config, on_event))
    config, on_event = api.publish("one", "two", out="there", on_event=len)
    assert config == MergeConfig(adapter=("one", "two"), out="there")
    assert on_event is len


def test_more_arguments_than_a_command_takes_are_a_type_error():
    with pytest.raises(TypeError, match="plan.. takes 1 positional"):
        api.call("plan", "one.jsonl", "two.jsonl")


def test_a_callback_that_a_command_does_not_take_is_refused():
    with pytest.raises(InputError, match="--should-wait is not an option of this command"):
        thimble.merge("one", out="two", should_wait=lambda: "")


def test_an_interrupted_run_in_python_keeps_what_it_learned_and_is_an_interrupt(examples, tiny_base, tmp_path):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with
    quick = {"seq_len": 64, "batch_tokens": 64, "rank": 4, "eval_rows": 0, "compute": "fp32", "max_steps": 10_000}

    def interrupt(event):
        if event.kind == "step":
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.warns(UserWarning, match="once more to leave at once"), pytest.raises(KeyboardInterrupt):
            thimble.train(examples, base=tiny_base, out=str(tmp_path / "run"), on_event=interrupt, **quick)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'trian'"):
        _ = thimble.trian


def test_the_version_is_that_of_the_distribution():
    assert importlib.metadata.version("thimble-lora") == thimble.__version__


def test_importing_thimble_loads_no_heavy_package():
    assert modules_after("import thimble") & HEAVY == set()


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], [], *([command, "--help"] for command in COMMANDS)], ids=" ".join
)
def test_help_loads_no_heavy_package(argv):
    """`thimble --help` answers at once: measured by what it loads, since time depends on the machine."""
    quiet = "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):"
    assert modules_after(f"from thimble.cli import main\n{quiet}\n    main({argv})") & HEAVY == set()


def test_a_refused_command_line_loads_no_framework():
    quiet = "with contextlib.redirect_stderr(io.StringIO()):"
    code = f'from thimble.cli import main\n{quiet}\n    main(["train", "--rnak", "8"])'
    assert modules_after(code) & {"torch", "numba", "matplotlib", "transformers"} == set()


def test_python_m_thimble_is_the_command():
    done = run_command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"thimble {thimble.__version__}")


def test_no_command_shows_the_help():
    done = run_command()
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
