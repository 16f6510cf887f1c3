"""The options of `thimble evaluate`."""

from dataclasses import dataclass

from thimble.config.groups import AdapterListOptions, DataOptions, EvaluationOptions, SpokenPurposeOptions


@dataclass(frozen=True)
class EvaluateConfig(EvaluationOptions, SpokenPurposeOptions, AdapterListOptions, DataOptions):
    """The options of `thimble evaluate`."""
