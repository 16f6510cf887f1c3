"""Write the file map at the end of docs/architecture.md: a line for each source file, from its docstring.

python docs/make_map.py            # write the section
"""

import ast
from pathlib import Path

PAGE = Path(__file__).with_name("architecture.md")
SOURCE = Path(__file__).parents[1] / "src" / "thimble"
HEADING = "## File map\n"
HEAD = """
*Written by `make docs` from the first sentence of each file in `src/thimble/`; do not edit this section.*

| file | what it holds |
|---|---|
"""
WITHOUT_DOCSTRING = {
    "py.typed": "Tells type checkers that Thimble has types.",
    "data/general.jsonl": "General texts and questions, to measure forgetting.",
    "report/page.html": "The template of the page.",
}


def write_map() -> str:
    """The section, heading included."""
    found = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    files = [path for path in found if "__pycache__" not in path.parts]
    files.sort(key=lambda path: (len(path.parts) > 1, path))  # what stands in no room first
    return HEADING + HEAD + "".join(f"| `{file.as_posix()}` | {_summary(file)} |\n" for file in files)


def _summary(file: Path) -> str:
    """The first sentence of a file's docstring."""
    if file.suffix != ".py":
        return WITHOUT_DOCSTRING[file.as_posix()]
    docstring = ast.get_docstring(ast.parse((SOURCE / file).read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def read_map(page: str) -> str:
    """The section as a page has it, from its heading to the next."""
    _, heading, rest = page.partition(HEADING)
    return heading + rest.partition("\n## ")[0]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(read_map(text), write_map()) if HEADING in text else f"{text}\n{write_map()}")
    print(f"wrote the file map of {PAGE}")
