"""The chat templates of a Hugging Face folder, from the files that transformers would take them from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from thimble.data.added_tokens import read_settings
from thimble.errors import BaseModelError, listing
from thimble.files.untrusted import is_inside, printable, read_bytes, shown

MOST_TEMPLATE_BYTES, MOST_TEMPLATES = 1_000_000, 100


class Templates(NamedTuple):
    """The chat templates of a base."""

    default: str | None = None
    tool_use: str | None = None  # for conversations with tools, if they have one of their own
    warnings: tuple[str, ...] = ()


def folder_templates(folder: Path, config: Mapping[str, Any]) -> Templates:
    """The chat templates of a folder: of its own files, else of tokenizer_config.json, else of a processor."""
    of_processor = read_settings(folder / "chat_template.json").get("chat_template")
    places = [
        _of_files(folder),
        *(_by_name(template, folder) for template in (config.get("chat_template"), of_processor)),
    ]
    found = next((templates for templates in places if templates), {})
    tool_use = found.get("tool_use")
    if "default" in found or not found:
        return Templates(found.get("default"), tool_use)
    name = next(iter(found))
    warning = (
        f"{folder.name} has the chat templates {listing(map(printable, found), 6)} and none called default: "
        f"{printable(name)} is used; write the one that you mean into chat_template.jinja"
    )
    return Templates(found[name], tool_use, (warning,) * (len(found) > 1))


def _of_files(folder: Path) -> dict[str, str | None]:
    paths = {"default": folder / "chat_template.jinja"}
    more = folder / "additional_chat_templates"
    if more.is_dir():
        paths |= {path.name[: -len(".jinja")]: path for path in sorted(more.glob("*.jinja"))[:MOST_TEMPLATES]}
    return {name: _read_text(path, folder) for name, path in paths.items() if os.path.lexists(path)}


def _by_name(template: Any, folder: Path) -> dict[str, str | None]:
    """Templates of one setting by name; one alone is the default."""
    if isinstance(template, list):  # several templates by name
        entries = [entry for entry in template if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        return {entry["name"]: checked_template(entry.get("template"), str(folder)) for entry in entries}
    return {} if template is None else {"default": checked_template(template, str(folder))}


def _read_text(path: Path, folder: Path) -> str:
    """A text file of a folder; any text will do for it, so a link must not bring in one from elsewhere."""
    if not is_inside(path, folder):
        raise BaseModelError(
            f"{path} links to {shown(str(path.resolve()))}: expected a file of the same folder; copy it there"
        )
    try:
        return read_bytes(path, MOST_TEMPLATE_BYTES, BaseModelError).decode()
    except UnicodeDecodeError as error:
        raise BaseModelError(f"{path} is not UTF-8 at byte {error.start:,}: copy the file again") from None


def checked_template(template: Any, source: str) -> str | None:
    """Return a chat template; refuse what is no text, or too much of it."""
    if template is None or (isinstance(template, str) and len(template) <= MOST_TEMPLATE_BYTES):
        return template
    what = f"of {len(template):,} characters" if isinstance(template, str) else shown(template)
    raise BaseModelError(
        f"{source} has a chat template {what}: expected text of at most {MOST_TEMPLATE_BYTES:,} characters. "
        "Copy the file again."
    )
