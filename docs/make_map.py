"""Write the sections of docs/architecture.md that a machine reads off the source: who imports whom, and the file map.

python docs/make_map.py            # write the sections
"""

import ast
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
SOURCE = Path(__file__).parents[1] / "src" / "thimble"
ROOMS_HEADING = "## Who imports whom\n"
ROOMS_HEAD = """
*Written by `make docs` from the imports of `src/thimble/`; do not edit this section. A room imports rooms above its own
line only. `tests/test_layering.py` says what each may import, and that no files import one another in a circle, not
even for type checking.*

| room | what it holds | imports | packages of others |
|---|---|---|---|
"""
HEADING = "## File map\n"
HEAD = """
*Written by `make docs` from the first sentence of each file in `src/thimble/`; do not edit this section.*

| file | what it holds |
|---|---|
"""
WITHOUT_DOCSTRING = {
    "py.typed": "Tells type checkers that Thimble has types.",
    "data/beginnings.jsonl": "Beginnings of texts and questions, after which the base writes what it is to keep.",
    "data/general.jsonl": "General texts and questions, to measure forgetting.",
    "report/page.html": "The template of the page.",
}


def write_rooms() -> str:
    """The section on rooms, heading included: from the bottom up."""
    imports: dict[str, set[str]] = {}
    packages: dict[str, set[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        room = _room(file.relative_to(SOURCE))
        found = _imported(file)
        imports.setdefault(room, set()).update(name for name in found if name in _rooms() and name != room)
        packages.setdefault(room, set()).update(found - _rooms() - sys.stdlib_module_names)
    rows, left = "", dict(imports)
    while left:
        room = next(room for room, needed in left.items() if not needed & left.keys())
        names = ", ".join(sorted(name.removesuffix(".py") for name in imports[room] - {"__init__.py"})) or "nothing"
        others = ", ".join(sorted(packages[room]))
        place = room if room.endswith(".py") else f"{room}/"
        if room not in ("__init__.py", "__main__.py"):
            summary = _summary(Path(room if room.endswith(".py") else f"{room}/__init__.py"))
            rows += f"| `{place}` | {summary} | {names} | {others} |\n"
        del left[room]
    return ROOMS_HEADING + ROOMS_HEAD + rows


def _rooms() -> set[str]:
    return {_room(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py")}


def _room(file: Path) -> str:
    """The room of a file: its folder, or the file itself."""
    return file.parts[0]


def _imported(file: Path) -> set[str]:
    """Rooms of Thimble and packages of others that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            path = Path(*name.split(".")[1:])
            if not name.startswith("thimble"):
                found.add(name.split(".")[0])
            elif (SOURCE / path).is_dir() and path.parts:
                found.add(_room(path / "__init__.py"))
            elif (SOURCE / path).with_suffix(".py").exists():
                found.add(_room(path.with_suffix(".py")))
    return found


def write_map() -> str:
    """The section, heading included."""
    found = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    files = [path for path in found if "__pycache__" not in path.parts]
    files.sort(key=lambda path: (len(path.parts) > 1, path))  # what stands in no room first
    return HEADING + HEAD + "".join(f"| `{file.as_posix()}` | {_summary(file)} |\n" for file in files)


def _summary(file: Path) -> str:
    """The first sentence of a file's docstring."""
    if file.suffix not in (".py", ".pyi"):
        return WITHOUT_DOCSTRING[file.as_posix()]
    docstring = ast.get_docstring(ast.parse((SOURCE / file).read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def read_section(page: str, heading: str) -> str:
    """A section as a page has it, from its heading to the next."""
    _, heading, rest = page.partition(heading)
    return heading + rest.partition("\n## ")[0]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for heading, section in ((ROOMS_HEADING, write_rooms()), (HEADING, write_map())):
        text = text.replace(read_section(text, heading), section)
    PAGE.write_text(text)
    print(f"wrote two sections of {PAGE}")
