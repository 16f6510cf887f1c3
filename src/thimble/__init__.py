"""Thimble: fine-tune language models with LoRA on the machine you have."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thimble.api import chat, evaluate, inspect, merge, plan, train
    from thimble.core.adapter import Adapter
    from thimble.files.peft import load_adapter, save_adapter
    from thimble.models.base import open_base

__version__ = "0.1.0"

# Public name to the module that holds it; loaded when first used, so that importing thimble stays instant.
_HOMES = {
    "train": "thimble.api", "plan": "thimble.api", "evaluate": "thimble.api", "chat": "thimble.api",
    "inspect": "thimble.api", "merge": "thimble.api",
    "Adapter": "thimble.core.adapter", "load_adapter": "thimble.files.peft", "save_adapter": "thimble.files.peft",
    "open_base": "thimble.models.base",
}  # fmt: skip

__all__ = [
    "Adapter", "__version__", "chat", "evaluate", "inspect", "load_adapter", "merge", "open_base", "plan",
    "save_adapter", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'thimble' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
