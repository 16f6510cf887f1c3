"""How the numbers of an adapter are trained, whatever they begin as."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Variations on plain LoRA.

    Attributes:
        weight_decay: Of AdamW; pulls towards the start, which for a plain start is the base. Decay towards zero would
            take out of the model what a start in delta form has taken off.
        lora_plus: Rate of B over that of A (Hayou et al., LoRA+, arXiv:2402.12354).
        dropout: Share of the inputs of A that is left out at each step, the others growing by as much.
        freezes_a: Train B alone (Zhang et al., LoRA-FA, arXiv:2308.03303, without its correction).
        seed: Of what dropout leaves out.
    """

    weight_decay: float = 0.0
    lora_plus: float = 1.0
    dropout: float = 0.0
    freezes_a: bool = False
    seed: int = 0
