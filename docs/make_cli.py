"""Write docs/cli.md from what `thimble --help` prints and from the docstrings of the reports.

python docs/make_cli.py            # write the page
python docs/make_cli.py --check    # fail if the page is not what would be written
"""

import contextlib
import dataclasses
import io
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

from thimble.cli import main
from thimble.commands import COMMANDS, Command
from thimble.config.names import ELSEWHERE, SYNONYMS

PAGE = Path(__file__).with_name("cli.md")
COLUMNS = "100"  # argparse wraps its text to the terminal; fixed, so that the page does not depend on it

JSON_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false"}

EXIT_CODES = """\
| code | when |
|---|---|
| 0 | done |
| 2 | refused before any work: bad data or options, an unknown base, or too little memory; nothing is written |
| 3 | the work began and failed: training diverged, the disk is full; the last good adapter is kept |
| 130, 143, 129 | interrupted (Ctrl-C), terminated, or left by its terminal; what was learned is kept |
| 1 | a fault of Thimble's own; `--debug` shows where |
"""

TALKS = {"chat": ["With `--prompt`: `answer`, the text, and `adapter`, what wrote it (`base` for no adapter).\n"]}

HEAD = """\
# CLI reference

*Written by `make docs` from `thimble --help` and the docstrings of the reports; do not edit this page.*

Every command is also a Python function of the same name with the same options: `thimble.train("mine.jsonl", rank=8)`.
A YAML file given with `--config` holds the same names (`learning_rate: 1e-4`); flags override it. Messages name an
option as it is typed (`--learning-rate`), wherever its value came from.
"""

JSON_HEAD = """\
With `--json` a command prints one JSON object, and nothing else, on stdout; messages for people go to stderr. Numbers
that are NaN or Inf are `null`. A command that is refused or fails prints
`{"error": [one sentence per problem], "exit_code": N}`.
"""


def write_page() -> str:
    """The whole page."""
    parts = [HEAD, _help(), "## Exit codes\n", EXIT_CODES]
    for name, command in COMMANDS.items():
        parts += [f"## thimble {name}\n", command.summary + "\n", _help(name)]
    parts += ["## Fields of the JSON reports\n", JSON_HEAD]
    for name, command in COMMANDS.items():
        parts += [f"### {name}\n", *(_fields(report) for report in reports_of(command)), *TALKS.get(name, ())]
    parts += ["## Names of other tools\n", _synonyms()]
    return "\n".join(parts)


def _help(*command: str) -> str:
    """What `thimble COMMAND --help` prints, as a block of text."""
    os.environ |= {"COLUMNS": COLUMNS, "NO_COLOR": "1"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return f"```text\n{printed.getvalue().rstrip()}\n```\n"


def reports_of(command: Command) -> list[type]:
    """The report of a command, and the dataclasses it is made of; none if it talks with its user."""
    report = typing.get_type_hints(command.function)["return"]
    found = [report] if command.renderer_path else []
    for kind in found:  # grows on the way
        parts = [part for spec in dataclasses.fields(kind) for part in _parts_of(spec.type)]
        found += [part for part in dict.fromkeys(parts) if dataclasses.is_dataclass(part) and part not in found]
    return found


def _parts_of(kind: Any) -> list[Any]:
    """A type and those it is made of: `list[Result]` is a list and Results."""
    return [kind, *(part for inner in typing.get_args(kind) for part in _parts_of(inner))]


def _fields(report: type) -> str:
    """The fields of a report as a table; what each means is taken from its docstring."""
    meanings = read_attributes(report.__doc__ or "")
    rows = [
        f"| `{spec.name}` | {_type_name(spec.type)} | {meanings.get(spec.name, '')} |"
        for spec in dataclasses.fields(report)
    ]
    title = (report.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()
    return "\n".join([title, "", "| field | type | meaning |", "|---|---|---|", *rows, ""])


def read_attributes(docstring: str) -> dict[str, str]:
    """The section `Attributes:` of a Google-style docstring: name to meaning."""
    meanings: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 8:  # a name; what continues a meaning is indented further
            name, _, meaning = line.strip().partition(": ")
            meanings[name] = meaning
        elif line.strip():
            meanings[name] += " " + line.strip()
    return {name: " ".join(meaning.split()).replace("|", "\\|") for name, meaning in meanings.items()}


def _type_name(kind: Any) -> str:
    """What a field becomes in JSON."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is types.NoneType else _type_name(part) for part in typing.get_args(kind))
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in JSON_TYPES:
        return JSON_TYPES[origin]
    if origin in (list, tuple):
        return f"list of {_type_name(inner[0])}"
    is_known = inner and inner[1] is not Any
    return f"object of {_type_name(inner[1])}" if is_known else "object"


def _synonyms() -> str:
    """What other tools call our options, and what has no counterpart here."""
    ours: dict[str, list[str]] = {}
    for other, name in SYNONYMS.items():
        ours.setdefault(name, []).append(f"`{other}`")
    lines = [
        "In config files and in Python these are accepted; on the command line they are answered with the flag.",
        "",
        "| option | also |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {', '.join(others)} |" for name, others in sorted(ours.items())]
    instead: dict[str, list[str]] = {}
    for other, advice in ELSEWHERE.items():
        instead.setdefault(advice, []).append(f"`{other}`")
    lines += ["", "These are refused, with what to do instead:", "", "| name | instead |", "|---|---|"]
    lines += [f"| {', '.join(others)} | {advice} |" for advice, others in instead.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = write_page()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == page else f"{PAGE.name} is not up to date: run `make docs`")
    PAGE.write_text(page)
    print(f"wrote {PAGE}")
