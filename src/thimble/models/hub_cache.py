"""The cache of the Hugging Face hub on this machine: looked into, never filled."""

import os
import re
from pathlib import Path

HUB_ADDRESS = "https://huggingface.co/"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")


def is_hub_form(name: str) -> bool:
    """Whether a text has the form of a hub name, `owner/name`."""
    return bool(_HUB_NAME.fullmatch(name)) and ".." not in name and "--" not in name


def cache_folder() -> Path:
    """Where huggingface_hub keeps what was fetched, by the variables that it reads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(named))


def cached_name(folder: str) -> str | None:
    """The hub name that a folder of such a cache is called after, `models--owner--name`; None of any other folder."""
    kind, *parts = folder.split("--", 2)
    return "/".join(parts) if kind == "models" and parts and all(parts) else None


def hub_name_of(folder: Path) -> str | None:
    """The hub name of a snapshot inside such a cache, `models--owner--name/snapshots/<commit>`; None of any other."""
    parent = folder.absolute().parent
    return cached_name(parent.parent.name) if parent.name == "snapshots" else None


def cached_snapshot(name: str) -> Path | None:
    """The folder in which the cache holds a hub model, that of its main branch or the only one; None if it has none."""
    if not is_hub_form(name):
        return None
    place = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        commit = (place / "refs" / "main").read_text(encoding="ascii").strip()
        found = [place / "snapshots" / commit] if re.fullmatch(r"[\w.-]+", commit) else []
    except (OSError, UnicodeDecodeError):
        found = sorted((place / "snapshots").glob("*")) if (place / "snapshots").is_dir() else []
    return next((folder for folder in found if (folder / "config.json").is_file()), None)
