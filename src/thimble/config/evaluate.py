"""The options of `thimble evaluate`."""

from dataclasses import dataclass

from thimble.config.groups import AdapterListOptions, DataOptions, EvaluationOptions


@dataclass(frozen=True)
class EvaluateConfig(EvaluationOptions, AdapterListOptions, DataOptions):
    """The options of `thimble evaluate`."""
