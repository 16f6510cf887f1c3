"""What a message tells the user to type exists: every command and option named in a text of the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from thimble.commands import COMMANDS
from thimble.config.options import options_of
from thimble.config.values import flag

SOURCE = Path(__file__).parents[1] / "src" / "thimble"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
OPTIONS = [spec for command in COMMANDS.values() for spec in options_of(command.options).values()]
FLAGS = {flag(spec.name) for spec in OPTIONS if not spec.metadata["positional"]}
FLAGS |= {"--config", "--json", "--debug", "--help", "--version", "--completion"}
# Of pip, of llama-gguf-split, of llama-server, of vLLM, of hf, of Ollama.
OTHERS = {
    "--no-deps",
    "--merge",
    "--lora",
    "--enable-lora",
    "--max-lora-rank",
    "--lora-modules",
    "--repo-type",
    "--modelfile",
}


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Texts of a file with the lines they stand in, docstrings included; what is filled in is a space."""
    inside: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside |= set(ast.walk(node)) - {node}
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, node.value


def unknown_words(source: str) -> list[str]:
    """Commands and options that a file names and nobody can type."""
    found = []
    for line, text in texts(source):
        commands = re.findall(r"\bthimble ([a-z]+)\b", text)
        flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        found += [f"line {line}: thimble {word}" for word in commands if word not in COMMANDS]
        found += [f"line {line}: {word}" for word in flags if word not in FLAGS | OTHERS]
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_command_and_option_that_a_text_names_exists(file):
    assert unknown_words((SOURCE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('x = "use thimble publish"', ["line 1: thimble publish"]),
        ('x = f"run thimble train {data} --rnak 8"', ["line 1: --rnak"]),
        ('x = f"run thimble train {data} --rank {rank}, or pip install --no-deps it"', []),
        ('def f():\n    """See `thimble teach`."""', ["line 2: thimble teach"]),
    ],
)
def test_the_check_sees_what_cannot_be_typed(source, found):
    assert unknown_words(source) == found
