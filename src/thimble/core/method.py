"""How an adapter begins and how its numbers are trained: the names, and what each needs. The maths is in `starts`."""

from dataclasses import dataclass

AUTO, ADAPTER = "auto", "adapter"
AUTO_RANK = 16  # whose number of parameters, and whose scale, rank auto takes
MOST_SCALE = 1e4  # of an update: more is a slip, or meant to harm
DORA_RATE = 0.55  # what the default learning rate is multiplied by, from the sweeps of arXiv:2602.04998
LORA_PLUS_RATE = 0.5  # the same where B learns faster than A (Hayou et al., arXiv:2402.12354, section 5)


@dataclass(frozen=True)
class Init:
    """What a start needs and how it is trained.

    Attributes:
        needs: `nothing`, `weights`, `inputs` or `gradients` of some training rows, `quantised` weights beside those of
            the file, or an `adapter`.
        is_delta: Whether it is trained as B A − B₀ A₀.
        rate: What the default learning rate is multiplied by. From published sweeps (arXiv:2602.04998) and our own
            (benchmarks/RESULTS.md); those of 1 keep the length of A x at Kaiming's, which makes the rate transfer.
        changes_base: Whether the model differs from the base before the first step.
    """

    needs: str = "nothing"
    is_delta: bool = False
    rate: float = 1.0
    changes_base: bool = False


INITS = {
    "kaiming": Init(),
    "gaussian": Init(),
    "orthogonal": Init(),
    "olora": Init("weights", is_delta=True, rate=0.055),
    "pissa": Init("weights", is_delta=True, rate=0.12),
    "pissa:exact": Init("weights", is_delta=True, rate=0.12),
    "milora": Init("weights", is_delta=True, rate=0.3),
    "eva": Init("inputs"),
    "eva:centred": Init("inputs", rate=0.14),
    "corda": Init("inputs", is_delta=True, rate=0.12),
    "corda:knowledge": Init("inputs", is_delta=True, rate=0.3),
    "weighted-pca": Init("gradients"),
    "gradient": Init("gradients"),
    "gradient:lora-ga": Init("gradients", is_delta=True, rate=0.1),
    "gradient:lora-one": Init("gradients", rate=0.055, changes_base=True),
    "loftq": Init("quantised", changes_base=True),
    ADAPTER: Init("adapter", changes_base=True),
}


def method_rates(init: str, use_dora: bool, lora_plus: float, rslora_rank: int = 1) -> dict[str, float]:
    """What the default learning rate is multiplied by, and for what.

    Args:
        init: The option.
        use_dora: The option.
        lora_plus: The option.
        rslora_rank: The rank, if rsLoRA makes the scale √rank times as large: the first steps stay as long.

    Returns:
        Factors by what they are for; none of them is 1.
    """
    factors = {
        f"init {init}": 1.0 if init == AUTO else INITS[init_name(init)].rate,
        "DoRA": DORA_RATE if use_dora else 1.0,
        "LoRA+": LORA_PLUS_RATE if lora_plus > 1 else 1.0,
        "rsLoRA": rslora_rank**-0.5,
    }
    return {name: factor for name, factor in factors.items() if factor != 1}


def init_name(init: str) -> str:
    """The entry of `INITS` for a value of the option: `adapter:PATH` is `adapter`."""
    return ADAPTER if init.startswith(ADAPTER + ":") else init


@dataclass(frozen=True)
class Method:
    """Variations on plain LoRA.

    Attributes:
        weight_decay: Of AdamW; pulls towards the start, which for a plain start is the base. Decay towards zero would
            take out of the model what a start in delta form has taken off.
        lora_plus: Rate of B over that of A (Hayou et al., LoRA+, arXiv:2402.12354).
        dropout: Share of the inputs of A that is left out at each step, the others growing by as much.
        freezes_a: Train B alone (Zhang et al., LoRA-FA, arXiv:2308.03303, without its correction).
        max_grad_norm: Gradients are scaled down to this global norm.
    """

    weight_decay: float = 0.0
    lora_plus: float = 1.0
    dropout: float = 0.0
    freezes_a: bool = False
    max_grad_norm: float = 1.0
    seed: int = 0
