"""Who may import whom, read from the syntax trees: nothing of Thimble is imported here.

The table says what is allowed, from the bottom up; docs/architecture.md draws what is really imported. What a part may
import at module level is loaded with it; what it may import later (in a function, or for type checking only) is not.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "thimble"


class Part(NamedTuple):
    """What the files of one part may import."""

    parts: str = ""  # other parts of Thimble, at module level
    later: str = ""  # the same, inside a function
    packages: str = ""  # of other people, at module level
    packages_later: str = ""  # the same, inside a function


RULES = {
    "errors": Part(),
    "events": Part(),
    "core": Part("errors core", packages="numpy"),
    "config": Part("errors core config", packages_later="yaml"),
    "report": Part("errors events core config report", packages_later="jinja2 matplotlib"),
    "files": Part("errors core files", packages="numpy"),
    "models": Part("errors core files models", packages="numpy", packages_later="torch transformers"),
    "data/sources": Part("errors data/sources", packages_later="pyarrow yaml"),
    "data": Part(
        "errors events core config files models data data/sources", packages="numpy",
        packages_later="tokenizers jinja2 pyarrow huggingface_hub yaml PIL soundfile soxr",
    ),
    "backends": Part("errors core files models data backends", "backends/torch", packages="numpy"),
    "backends/torch": Part(
        "errors core files models data backends backends/torch", packages="numpy torch numba llvmlite",
        packages_later="transformers",
    ),
    "inference": Part("errors core models data backends inference", packages="numpy"),
    "training": Part(
        "errors events core config report files models data backends inference training __init__", "backends/torch",
        packages="numpy", packages_later="yaml jiwer",
    ),
    "exports": Part(
        "errors core files models data backends exports", "backends/torch", packages="numpy",
        packages_later="xllamacpp",
    ),
    "server": Part(
        "errors core files models data backends inference server __init__",
        packages="numpy starlette uvicorn pydantic pydantic_core prometheus_client llguidance",
    ),
    "commands": Part(
        "errors events core config report files models data backends inference training exports commands __init__",
        "backends/torch server", packages="numpy",
    ),
    "api": Part("config commands", "data backends/torch"),
    "chat_loop": Part("errors"),
    "cli": Part("errors config commands report __init__", "chat_loop"),
    "__init__": Part("commands", "api core files models backends/torch"),
    "__main__": Part("cli"),
}  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION, LARGEST_ROOM = 400, 45, 0.25  # lines; share of all lines
VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "misc"}
FRAMEWORKS = {"jax", "flax", "keras", "tensorflow", "onnx", "onnxruntime", "litert", "transformers", "peft", "gguf"}
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL"}  # of distributions whose import name is another

FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


class Import(NamedTuple):
    """One imported module."""

    name: str  # dotted
    line: int
    is_later: bool
    is_relative: bool = False


def part_of(module: str) -> str:
    """The part a module of Thimble belongs to; names in the package itself, such as __version__, are `__init__`."""
    names = module.split(".")[1:3]
    return next((part for part in ("/".join(names), *names[:1]) if part in RULES), "__init__")


def read_imports(source: str) -> list[Import]:
    """All imports of a file, in the order they stand."""
    return list(_walk(ast.parse(source), is_later=False))


def _walk(node: ast.AST, is_later: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, is_later) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level:
        yield Import(node.module or ".", node.lineno, is_later, is_relative=True)
    elif isinstance(node, ast.ImportFrom) and node.module == "thimble":
        yield from (Import(f"thimble.{alias.name}", node.lineno, is_later) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield Import(node.module or "", node.lineno, is_later)
    is_later = is_later or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, is_later or (isinstance(node, ast.If) and _is_for_types(node) and child in node.body))


def _is_for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def find_faults(file: str, source: str) -> list[str]:
    """What a file imports that it may not."""
    part = part_of("thimble." + file.removesuffix(".py").replace("/", "."))
    rule, faults = RULES[part], []
    for found in read_imports(source):
        top = found.name.split(".")[0]
        if found.is_relative:
            faults.append(f"{file}:{found.line} imports {found.name} relatively: write the whole name")
        elif top == "thimble":
            allowed = rule.parts.split() + rule.later.split() * found.is_later
            if part_of(found.name) not in allowed:
                faults.append(f"{file}:{found.line} imports {found.name}: {part} may import {allowed} here")
        elif top not in sys.stdlib_module_names:
            allowed = rule.packages.split() + rule.packages_later.split() * found.is_later
            if top not in allowed:
                faults.append(f"{file}:{found.line} imports {top}: {part} may import {allowed} here")
    return faults


def dependencies() -> set[str]:
    """Import names of everything pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("-", "_") for line in asked}
    return {IMPORT_NAMES.get(name, name) for name in names} - {"thimble_lora"}


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_its_part_may(file):
    assert find_faults(file, (SOURCE / file).read_text()) == []


def test_every_part_has_a_rule_and_every_rule_a_part():
    assert {part_of("thimble." + file.removesuffix(".py").replace("/", ".")) for file in FILES} == set(RULES)


def test_parts_do_not_import_in_a_circle():
    below: dict[str, set[str]] = {}
    for part, rule in RULES.items():  # the table stands in order: each part may load only what stands above it
        assert set(rule.parts.split()) - {part, "__init__"} <= set(below), part
        below[part] = set()


def imported_files(file: str) -> set[str]:
    """The files of Thimble that a file imports anywhere: inside functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "thimble":
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found |= {"/".join(name.split(".")[1:]) + end for name in names for end in (".py", "/__init__.py")}
    return (found & set(FILES)) - {file, "__init__.py"}


def test_no_files_import_one_another_in_a_circle_not_even_for_type_checking():
    left = {file: imported_files(file) for file in FILES}
    while free := [file for file, imports in left.items() if not imports & left.keys()]:
        for file in free:
            del left[file]
    assert not left, "each of these imports another one of them"


def test_files_functions_and_rooms_are_of_a_size_to_be_read():
    lines = {file: (SOURCE / file).read_text().count("\n") for file in FILES}
    assert {file: count for file, count in lines.items() if count > LONGEST_FILE} == {}
    long = {}
    for file in FILES:
        for node in ast.walk(ast.parse((SOURCE / file).read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:
                long[f"{file}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}
    rooms: dict[str, int] = {}
    for file, count in lines.items():
        room = part_of("thimble." + file.removesuffix(".py").replace("/", "."))
        rooms[room] = rooms.get(room, 0) + count
    assert {room: n for room, n in rooms.items() if n > LARGEST_ROOM * sum(lines.values())} == {}


def test_every_package_in_the_table_is_a_dependency():
    """A package that is imported but not asked for is missing on a fresh machine."""
    imported = {name for rule in RULES.values() for name in (rule.packages + " " + rule.packages_later).split()}
    assert imported <= dependencies()


def test_every_dependency_is_imported_somewhere():
    """The other way round: what nothing imports is not asked for (extras for development aside)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in project["dependencies"]}
    imported = {found.name.split(".")[0] for file in FILES for found in read_imports((SOURCE / file).read_text())}
    assert {IMPORT_NAMES.get(name, name) for name in asked} <= imported


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import torch", "imports torch"),
        ("if True:\n    import torch", "imports torch"),
        ("class A:\n    import torch", "imports torch"),
        ("from thimble.commands.train import train", "imports thimble.commands.train"),
        ("def f():\n    from thimble import cli", "imports thimble.cli"),
        ("from .config import option", "relatively"),
    ],
)
def test_the_check_sees_a_forbidden_import(source, fault):
    assert [fault in found for found in find_faults("core/x.py", source)] == [True]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("data/x.py", "def f():\n    import tokenizers"),
        ("data/x.py", "if TYPE_CHECKING:\n    import tokenizers"),
        ("commands/x.py", "from thimble import __version__"),
        ("core/x.py", "import json\nimport numpy as np\nfrom thimble.errors import listing"),
    ],
)
def test_the_check_lets_an_allowed_import_pass(file, source):
    assert find_faults(file, source) == []


def test_the_check_tells_now_from_later():
    assert find_faults("data/x.py", "import tokenizers") != []
    assert find_faults("data/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import tokenizers") != []


def named_things() -> list[Path]:
    """Every Python file of the project and every folder that holds one."""
    folders = (SOURCE, ROOT / "tests", ROOT / "examples", ROOT / "benchmarks", ROOT / "docs")
    files = [path.relative_to(ROOT) for folder in folders for path in folder.rglob("*.py")]
    files = [file for file in files if "site-packages" not in file.parts]  # the benchmarks' peers are not ours to name
    return sorted({*files, *(parent for file in files for parent in file.parents if parent.name not in ("", "src"))})


@pytest.mark.parametrize("path", named_things(), ids=str)
def test_a_name_says_what_is_inside_and_shadows_nothing(path):
    """A file named like a module of the standard library or of a dependency breaks whoever runs a file beside it."""
    name = path.stem
    assert name not in VAGUE_NAMES, f"{path} could hold anything"
    assert name not in sys.stdlib_module_names, f"{path} shadows a module of the standard library"
    if "src" not in path.parts and path != Path("tests/backends/torch"):  # in there nothing is run as a script
        assert name not in dependencies() | FRAMEWORKS, f"{path} shadows a package"
