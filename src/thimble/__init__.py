"""Thimble: fine-tune language models with LoRA on the machine you have."""

from typing import TYPE_CHECKING, Any

from thimble.commands import COMMANDS

if TYPE_CHECKING:
    from thimble.api import chat as chat
    from thimble.api import evaluate as evaluate
    from thimble.api import export as export
    from thimble.api import generate as generate
    from thimble.api import inspect as inspect
    from thimble.api import merge as merge
    from thimble.api import plan as plan
    from thimble.api import serve as serve
    from thimble.api import train as train
    from thimble.backends.torch.attach import adapter_of as adapter_of
    from thimble.backends.torch.attach import adapter_off as adapter_off
    from thimble.backends.torch.attach import attach as attach
    from thimble.backends.torch.attach import detach as detach
    from thimble.backends.torch.attach import unmerge as unmerge
    from thimble.core.adapter import Adapter as Adapter
    from thimble.files.peft import load_adapter as load_adapter
    from thimble.files.peft import save_adapter as save_adapter
    from thimble.models.base import open_base as open_base

__version__ = "0.1.0"

# Public name to the module that holds it; loaded when first used, so that importing thimble stays instant.
_HOMES = {
    **dict.fromkeys(COMMANDS, "thimble.api"),
    **dict.fromkeys(("attach", "adapter_of", "adapter_off", "unmerge", "detach"), "thimble.backends.torch.attach"),
    "Adapter": "thimble.core.adapter",
    "load_adapter": "thimble.files.peft", "save_adapter": "thimble.files.peft", "open_base": "thimble.models.base",
}  # fmt: skip

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'thimble' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
