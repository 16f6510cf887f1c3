"""How an adapter is initialised and trained: names, properties and limits; the maths is in thimble.core.inits."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

AUTO, ADAPTER = "auto", "adapter"
AUTO_RANK = 16  # whose number of parameters, and whose scale, rank auto takes
MOST_SCALE = 1e4  # of an update: more is a slip, or meant to harm
DORA_RATE = 0.55  # what the default learning rate is multiplied by, from the sweeps of arXiv:2602.04998
KAIMING_ROW = 3**-0.5  # root mean square length of a row of A, uniform in ±1/√in


@dataclass(frozen=True)
class Init:
    """An initialization of A and B: what it is called, what it is made from and how it is trained.

    Attributes:
        name: Its entry in `INITS`; `str(init)` is the option as it is typed.
        needs: `nothing`, `weights`, `inputs` or `gradients` of calibration data, `quantised` weights beside those of
            the file, or an `adapter`.
        is_delta: Whether it is trained as B A − B₀ A₀.
        rate: What the default learning rate is multiplied by. From published sweeps (arXiv:2602.04998) and our own
            (benchmarks/RESULTS.md); those of 1 keep the length of x Aᵀ at Kaiming's, which makes the rate transfer.
        row_length: Root mean square length of a row of A by (rank, in), where it is random and not Kaiming's: the
            default learning rate is divided by how much longer it is.
        changes_base: Whether the model differs from the base before the first step.
        uses_general_text: Whether its calibration data are general text instead of training rows.
        is_weighted: Whether inputs count by the square of their gradient, instead of the gradient of W itself.
        ranks_read: Singular directions of the gradient it takes for each rank.
        rank_step: Ranks are multiples of this.
        path: The adapter folder of `adapter:PATH`; empty for all others.
    """

    name: str
    needs: str = "nothing"
    is_delta: bool = False
    rate: float = 1.0
    row_length: Callable[[int, int], float] | None = None
    changes_base: bool = False
    uses_general_text: bool = False
    is_weighted: bool = False
    ranks_read: int = 1
    rank_step: int = 1
    path: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.path}" if self.path else self.name

    def most_rank(self, shape: tuple[int, int]) -> int:
        """The highest rank that a layer of shape (out, in) can have."""
        return min(shape) // self.ranks_read // self.rank_step * self.rank_step

    def allowed_rank(self, rank: int, shape: tuple[int, int]) -> int:
        """The nearest rank at or below `rank` that a layer of shape (out, in) can have, or else the least there is."""
        return max(self.rank_step, min(rank, self.most_rank(shape)) // self.rank_step * self.rank_step)


INITS = {
    init.name: init
    for init in (
        Init("kaiming"),
        Init("gaussian", row_length=lambda rank, fan_in: fan_in**0.5 / rank),
        Init("orthogonal", is_delta=True, row_length=lambda rank, fan_in: (fan_in / 200) ** 0.5, rank_step=2),
        Init("olora", "weights", is_delta=True, rate=0.055),
        Init("pissa", "weights", is_delta=True, rate=0.12),
        Init("pissa:exact", "weights", is_delta=True, rate=0.12),
        Init("milora", "weights", is_delta=True, rate=0.3),
        Init("eva", "inputs"),
        Init("eva:centred", "inputs", rate=0.14),
        Init("corda", "inputs", is_delta=True, rate=0.12),
        Init("corda:knowledge", "inputs", is_delta=True, rate=0.3, uses_general_text=True),
        Init("weighted-pca", "gradients", is_weighted=True),
        Init("gradient", "gradients"),
        Init("gradient:whitened", "gradients"),
        Init("gradient:lora-ga", "gradients", is_delta=True, rate=0.1, ranks_read=2),
        Init("gradient:lora-one", "gradients", rate=0.055, changes_base=True),
        Init("loftq", "quantised", changes_base=True),
        Init(ADAPTER, "adapter", changes_base=True),
    )
}


def parse_init(text: str) -> Init:
    """Read the option `--init`; `str` of the result is the text again, a ValueError says what was expected.

    >>> parse_init("adapter:runs/mine-1").path
    'runs/mine-1'
    """
    name, _, path = text.partition(":")
    if name == ADAPTER and path:
        return replace(INITS[ADAPTER], path=path)
    if text in INITS and text != ADAPTER:
        return INITS[text]
    names = [*(name for name in INITS if name != ADAPTER), f"{ADAPTER}:PATH"]
    near = difflib.get_close_matches(text, names, n=1)
    raise ValueError(f"expected one of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else ""))


def method_rates(
    init: Init,
    use_dora: bool,
    lora_plus: float,
    sizes: Sequence[tuple[int, int]] = ((1, 1),),
    use_rslora: bool = False,
) -> dict[str, float]:
    """What the default learning rate is multiplied by, and for what; none of the factors is 1.

    `sizes` are (rank, in) of the adapted layers, the rank being the one that alpha was divided by. One rate is for all
    layers, so what differs between them counts as its mean. rsLoRA makes a scale √rank times as large, and LoRA+ with
    ratio λ the step of B λ times as long as that of A: with 1/√λ their product, to first order, grows as it did
    (Hayou et al., LoRA+, arXiv:2402.12354, where the rate is swept anew for each ratio).
    """
    longer = mean(init.row_length(*size) for size in sizes) / KAIMING_ROW if init.row_length else 1.0
    factors = {
        f"init {init}": init.rate / longer,
        "DoRA": DORA_RATE if use_dora else 1.0,
        "LoRA+": lora_plus**-0.5,
        "rsLoRA": 1 / mean(rank**0.5 for rank, _ in sizes) if use_rslora else 1.0,
    }
    return {name: factor for name, factor in factors.items() if factor != 1}


@dataclass(frozen=True)
class Method:
    """Variations on plain LoRA."""

    # of AdamW; pulls towards the initial values, which for a plain init are the base. Decay towards zero would take out
    # of the model what an init in delta form has taken off
    weight_decay: float = 0.0
    lora_plus: float = 1.0  # rate of B over that of A (Hayou et al., LoRA+, arXiv:2402.12354)
    dropout: float = 0.0  # share of the inputs of A that is left out at each step, the others growing by as much
    freezes_a: bool = False  # train B alone (Zhang et al., LoRA-FA, arXiv:2308.03303, without its correction)
    max_grad_norm: float = 1.0  # gradients are scaled down to this global norm
    seed: int = 0  # of dropout
    beta2: float = 0.999  # of AdamW: what its mean of squared gradients keeps at each step
