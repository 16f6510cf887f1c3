"""What every command may ask of the description of a base, whichever engine runs it."""

from collections.abc import Mapping
from typing import Protocol


class ModelSpec(Protocol):
    """A base as planning, encoding and adapters see it.

    `thimble.models.spec.DecoderSpec` describes the families of Thimble's own engine, and more than this of each;
    `thimble.models.transformers_spec.TransformersSpec` any other causal language model, run through transformers.
    """

    @property
    def family(self) -> str:
        """Its `model_type`, such as `llama`."""

    @property
    def about(self) -> str:
        """The family for people, with what is to be known of how it runs."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_layers(self) -> int:
        """Blocks."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def max_positions(self) -> int:
        """Longest row the base was made for."""

    @property
    def kv_size(self) -> int:
        """Width of all key heads of a block (and of all value heads)."""

    @property
    def checkpointable_blocks(self) -> int:
        """Blocks that can run under activation checkpointing."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether what rows have in common at their beginning is computed once."""

    @property
    def adapter_settings(self) -> Mapping[str, bool]:
        """Fields of PEFT's config that its adapters have beyond those of a plain one."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth telling of how the description was read."""

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Path of every linear layer that can be adapted and its (out, in), in the order they run."""

    def parameter_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Name of every parameter that can be adapted, though it is no layer's weight, and its (experts, out, in)."""


def adapted_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(out, in) of all that can be adapted: of layers, and of each matrix that a parameter stacks."""
    return spec.linear_shapes() | {path: shape[1:] for path, shape in spec.parameter_shapes().items()}
