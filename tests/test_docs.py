"""The documents say what the code does: names, commands, versions and links that rot are found here."""

import importlib.util
import json
import pkgutil
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import thimble
from thimble.cli import make_parser
from thimble.commands import COMMANDS
from thimble.config.sources import build_config

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
PAGES = [
    *READMES,
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LOG.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """Fenced blocks: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[str]:
    """Headings, each with its number signs."""
    return re.findall(r"^(#+ .*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)


def commands(page: str) -> list[str]:
    """Lines of shell blocks, without comments; continued lines are joined."""
    text = "".join(content for language, content in blocks(read(page)) if language == "bash").replace("\\\n", " ")
    return [line for line in (raw.split("  #")[0].strip() for raw in text.splitlines()) if line and line[0] != "#"]


def make_cli() -> ModuleType:
    """docs/make_cli.py as a module."""
    return load("make_cli")


def load(name: str) -> ModuleType:
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ALL_COMMANDS = [
    (page, line) for page in PAGES if page.endswith(".md") and (ROOT / page).exists() for line in commands(page)
]


# ---- the generated page --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays out --help otherwise; the page is of 3.11")
def test_the_page_of_commands_is_up_to_date(monkeypatch):
    monkeypatch.setenv("COLUMNS", "41")  # whatever the terminal is like
    assert make_cli().write_page() == read("docs/cli.md"), "run `make docs`"


def test_every_field_of_a_report_is_explained():
    """What a report's docstring leaves out would be an empty cell of docs/cli.md."""
    module = make_cli()
    reports = {report for command in COMMANDS.values() for report in module.reports_of(command)}
    fields = {(report, name) for report in reports for name in report.__dataclass_fields__}
    explained = {(report, name) for report, name in fields if module.read_attributes(report.__doc__ or "").get(name)}
    assert sorted(f"{report.__name__}.{name}" for report, name in fields - explained) == []


def test_the_file_map_names_every_source_file_and_no_other():
    """A line a file, from its docstring; whoever adds a file writes that and nothing else."""
    module = load("make_map")
    assert module.read_section(read("docs/architecture.md"), module.HEADING) == module.write_map(), "run `make docs`"


def test_the_drawing_of_imports_is_what_a_machine_reads():
    module = load("make_map")
    page = read("docs/architecture.md")
    assert module.read_section(page, module.ROOMS_HEADING) == module.write_rooms(), "run `make docs`"


# ---- the readme ----------------------------------------------------------------------------------------------------


def test_both_readmes_have_the_same_shape():
    english, chinese = (read(page) for page in READMES)
    assert [line.split()[0] for line in headings(english)] == [line.split()[0] for line in headings(chinese)]
    assert blocks(english) == blocks(chinese)
    assert english.count("\n|") == chinese.count("\n|"), "a table has more rows in one of them"


@pytest.mark.parametrize("page", READMES)
def test_the_first_screen_of_a_readme_has_a_picture_the_demo_and_how_to_begin(page):
    first_screen = "\n".join(read(page).splitlines()[:40])
    for word in ("docs/report.png", "git clone", "make demo", "198/200", "thimble train mine.jsonl", "3.440"):
        assert word in first_screen, word


def test_the_readmes_rows_are_accepted(tmp_path):
    """The ten lines a newcomer copies."""
    from thimble.data.records import read_dataset

    [rows] = [content for language, content in blocks(read("README.md")) if language == "json"]
    (tmp_path / "mine.jsonl").write_text(rows)
    assert len(read_dataset(tmp_path / "mine.jsonl").train) == 10


# ---- commands ------------------------------------------------------------------------------------------------------


def fault_of(line: str) -> str:
    """What is wrong with a command line of the documents, or an empty string."""
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # settings in front
        words = words[1:]
    check = {"thimble": _thimble_fault, "make": _make_fault, "python": _python_fault, "pip": _pip_fault}.get(words[0])
    if check:
        return check(words[1:])
    return (
        ""
        if words[0] in ("git", "cd", ".", "llama-server", "curl", "ollama", "vllm", "lm_eval")
        else f"{words[0]} is no command a reader of these pages needs"
    )


def _thimble_fault(words: list[str]) -> str:
    try:
        options, unknown = make_parser().parse_known_args(words)
    except SystemExit as error:
        return "" if error.code == 0 else f"argparse refuses {words}"
    values = {
        name: value for name, value in vars(options).items() if name not in ("command", "config", "json", "debug")
    }
    command = COMMANDS.get(options.command)
    problems = build_config(command.options, values).problems if command else ()
    return "; ".join([*unknown, *problems])


def _make_fault(words: list[str]) -> str:
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)
    variables = re.findall(r"^([A-Z_]+) \?=", read("Makefile"), re.MULTILINE)
    known = {*targets, *variables}
    return "; ".join(word for word in words if word.split("=")[0] not in known)


def _python_fault(words: list[str]) -> str:
    if words[0] == "-m":
        return "" if words[1] in ("venv", "thimble", "pytest") else f"-m {words[1]}"
    return "" if (ROOT / words[0]).is_file() else f"there is no file {words[0]}"


def _pip_fault(words: list[str]) -> str:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    pins = dict(line.split("==") for line in read("constraints.txt").splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    faults = []
    for word in words[1:]:
        if word.startswith("-") or word == "constraints.txt":
            continue
        name, extra, version = re.fullmatch(r"([\w.-]+)(?:\[(\w+)\])?(?:==(.+))?", word).groups()
        is_ours = name in (".", project["name"])
        if extra and not (is_ours and extra in project["optional-dependencies"]):
            faults.append(f"there is no extra {extra} of {name}")
        if not is_ours and name not in pins:
            faults.append(f"{name} is not in constraints.txt")
        if version and pins.get(name) != version:
            faults.append(f"{name} is pinned to {pins.get(name)}")
    return "; ".join(faults)


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS, ids=[f"{page}: {line}" for page, line in ALL_COMMANDS])
def test_a_command_of_the_documents_exists(page, line):
    assert fault_of(line) == ""


@pytest.mark.parametrize(
    "line",
    [
        "thimble trian mine.jsonl", "thimble train mine.jsonl --rnak 8", "thimble train mine.jsonl --rank 0",
        "make demos", "python examples/99_none.py", "pip install torch==1.0", "pip install -e .[nothing]", "brew x",
    ],
)  # fmt: skip
def test_the_check_sees_a_command_that_does_not_exist(line):
    assert fault_of(line) != ""


# ---- names, links, versions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_the_code_exists(page):
    """`thimble.a.b` in backticks is a module, class, function or constant."""
    missing = []
    for name in re.findall(r"`(thimble(?:\.\w+)+)`", read(page)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_project_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", read(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == thimble.__version__


def test_no_document_names_a_place_on_the_authors_machine():
    for page in [*PAGES, "Makefile", ".ci/run", "constraints.txt", "pyproject.toml"]:
        assert re.findall(r"(?:/work|/root|/home|/tmp|file:)/\S*", read(page)) == [], page


def test_every_pin_is_exact():
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert "torch==2.13.0" in lines


# ---- the page of data formats --------------------------------------------------------------------------------------


def test_every_row_of_the_data_page_is_read_in_the_form_of_its_heading():
    from thimble.data.rows import parse_row

    sections = re.split(r"^### ", read("docs/data_format.md"), flags=re.MULTILINE)[1:]
    forms = {}
    for section in sections:
        lines = "".join(content for language, content in blocks(section) if language == "json").splitlines()
        forms |= {section.splitlines()[0]: {parse_row(json.loads(line), "").form for line in lines}} if lines else {}
    pairs = forms.pop("prompt and completion")
    assert pairs == {"prompt and completion", "question and answer", "instruction, context and response"}
    assert forms == {name: {name} for name in ("messages", "messages with tools", "ShareGPT", "Alpaca", "plain text")}


def test_the_data_page_shows_how_tools_are_written():
    from thimble.data.rows import parse_row
    from thimble.data.tool_text import write_tools

    text = read("docs/data_format.md")
    row = next(json.loads(line) for _, content in blocks(text) for line in content.splitlines() if '"tools"' in line)
    record = parse_row(row, "").record
    written = [message["content"] + "\n" for message in write_tools(record.messages, record.tools)]
    shown = [content for language, content in blocks(text.partition("### Tools that")[2]) if language == "text"]
    assert shown == [written[0], written[2], written[3]]


def test_every_message_of_the_troubleshooting_page_is_what_is_said(monkeypatch):
    import troubleshooting

    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    assert troubleshooting.write_page() == read("docs/troubleshooting.md"), "run `make docs`"
