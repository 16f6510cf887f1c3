"""What `import thimble` offers, and how little it costs."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import thimble
from thimble.api import CONFIGS

HEAVY = {"numpy", "torch", "numba", "llvmlite", "tokenizers", "jinja2", "yaml", "matplotlib", "pyarrow", "transformers"}
VERBS = ("train", "plan", "evaluate", "chat", "inspect", "merge")


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
    seen = {alias.name: node.module for block in blocks for node in block.body for alias in node.names}
    assert seen == thimble._HOMES


def test_every_verb_is_a_command_and_a_function():
    assert tuple(CONFIGS) == VERBS
    assert set(VERBS) <= set(thimble.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'trian'"):
        _ = thimble.trian


def test_the_version_is_that_of_the_distribution():
    assert importlib.metadata.version("thimble-lora") == thimble.__version__


def test_importing_thimble_loads_no_heavy_package():
    assert modules_after("import thimble") & HEAVY == set()


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], [], *([command, "--help"] for command in VERBS)], ids=" ".join
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


def test_no_verb_shows_the_help():
    done = run_command()
    assert done.returncode == 0
    assert all(command in done.stdout for command in VERBS)
