"""What a run takes on a base that runs through transformers: an estimate by the sizes of its layers, on the safe side.

How transformers computes a layer is not known from its sizes alone. The factors below are meant to cover most families:
docs/any_model.md has what was measured.
"""

from thimble.models.execution import ExecutionPlan
from thimble.models.transformers_spec import TransformersSpec

PROCESS_BYTES = 560_000_000  # Python, torch and transformers, before any weight
KEPT = 1.3  # numbers kept for each that goes in or out of a linear layer: norms, activations and rotary embeddings
BLOCK_WIDTHS = 8  # and of each block, so many times its width
LOGITS_ALIVE = 3  # tables of logits at once, and their gradient
GRADIENTS_ALIVE = 2  # of the updated values of a parameter at once
COPIES = 1.1  # of the weights: while they are read a piece of the file is there too
PADDED = 4 / 3  # tokens that run for each of a row
REACHED = 0.45  # share of the rate of a large product
OVERHEAD_SECONDS = 4e-3  # of a block in a batch, forward and backward


def weight_bytes(numbers: int, width: int) -> int:
    """Of the frozen weights, in a type of so many bytes."""
    return round(COPIES * numbers * width)


def activation_bytes(spec: TransformersSpec, width: int, execution: ExecutionPlan, lowest: int) -> int:
    """What is kept for the backward pass."""
    tokens = round(PADDED * execution.micro_tokens)
    checkpointed = min(execution.checkpointed_blocks, spec.num_layers)
    block = _block_numbers(spec)
    kept = spec.num_layers - max(checkpointed, lowest) + (1 if checkpointed else 0)
    return round(tokens * width * (block * kept + spec.hidden_size * checkpointed))


def _block_numbers(spec: TransformersSpec) -> float:
    """Numbers that a block keeps for a token."""
    linear = sum(rows + columns for rows, columns in spec.shapes.values()) / spec.num_layers
    return KEPT * linear + BLOCK_WIDTHS * spec.hidden_size


def scratch_bytes(spec: TransformersSpec, execution: ExecutionPlan, longest: int) -> int:
    """Logits, and scores of attention where they are written out."""
    tokens = round(PADDED * execution.micro_tokens)
    scores = 2 * 4 * tokens * longest * max(1, spec.num_heads)
    return 4 * LOGITS_ALIVE * execution.micro_tokens * spec.vocab_size + scores


def seconds(spec: TransformersSpec, numbers: int, tokens: float, trained: int, flops: float, batches: float) -> float:
    """Of a step: forward, backward through the inputs, and what is trained."""
    body = max(numbers - spec.vocab_size * spec.hidden_size, 1)
    work = 4 * body * PADDED * tokens + 4 * spec.vocab_size * spec.hidden_size * tokens + 6 * trained * tokens
    return work / (flops * REACHED) + batches * spec.num_layers * OVERHEAD_SECONDS
