"""How one optimiser step is run: a value that travels with every call, so that no two copies of it disagree."""

from dataclasses import dataclass, replace

from thimble.core.sizes import MICRO_BATCH_TOKENS


def activation_dtype(compute: str, store: str) -> str:
    """Dtype of activations, `fp32` or `bf16`, by compute type and store.

    `bf16-int8` is bf16 whose gradients of inputs are multiplied in whole numbers. `int8` rounds the weights to int8
    rows, between activations in bf16, or multiplies blocks as they lie in the file, with results in fp32.
    """
    if compute == "int8":
        return "fp32" if multiplies_blocks(compute, store) else "bf16"
    return "bf16" if compute == "bf16-int8" else compute


def multiplies_blocks(compute: str, store: str) -> bool:
    """Whether the forward pass multiplies blocks of the file by activations in int8."""
    return compute == "int8" and store == "file"


@dataclass(frozen=True)
class ExecutionPlan:
    """How the weights are kept, and how the rows of a step are run."""

    store: str  # `dense`, `int8` or `file`
    num_shares: int = 1  # workers: micro-batches that run in parallel
    micro_tokens: int = MICRO_BATCH_TOKENS[0]  # most tokens of a micro-batch
    tokens_at_once: int = MICRO_BATCH_TOKENS[0]  # most tokens of all that run in parallel
    # blocks under activation checkpointing: they keep only their input for the backward pass
    checkpointed_blocks: int = 0
    is_streamed: bool = False  # weights are read from the file for each product and not kept
    num_sizes: int = 1  # sizes in which batches of uneven rows come, about

    def relative_cost(self, num_blocks: int, cores: int) -> float:
        """Time of a step over that of the fastest plan, about.

        By constants: the choice of a plan does not change with what was measured this week, and a run resumed elsewhere
        sums in the same order.
        """
        slow = 1 + 0.3 * self.checkpointed_blocks / num_blocks
        slow *= 1.0 if self.num_shares >= min(2, cores) else 1.2
        slow *= 1.0 if self.micro_tokens >= MICRO_BATCH_TOKENS[0] else 1.05
        return slow * (1.15 if self.is_streamed else 1.0) * (1.1 if self.store == "int8" else 1.0)

    def described(self) -> str:
        """How a step is run, in words."""
        again = f", {self.checkpointed_blocks} blocks checkpointed" if self.checkpointed_blocks else ""
        streamed = ", weights read from the file each time" if self.is_streamed else ""
        return f"{self.store}, {self.micro_tokens} tokens at a time, {self.num_shares} in parallel{again}{streamed}"

    def smaller(self, longest: int) -> "ExecutionPlan | None":
        """The next plan that takes less memory, for rows of at most so many tokens; None if there is none."""
        if self.micro_tokens > longest:
            return replace(self, micro_tokens=max(longest, self.micro_tokens // 2))
        return replace(self, num_shares=self.num_shares // 2) if self.num_shares > 1 else None
