"""How much memory and time a run will need, part by part, before anything is loaded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from thimble.core.sizes import (
    BUFFER_TOKENS,
    PADDED_KEYS,
    TABLES_COMPARED,
    TILE,
    WINDOW,
    WINDOW_ROWS,
    logit_chunk,
    windows,
)
from thimble.core.targets import Size, block_of
from thimble.models import transformers_cost
from thimble.models.base import EMBEDDING, HEAD, Base
from thimble.models.execution import ExecutionPlan, activation_dtype, multiplies_blocks
from thimble.models.machine import Machine
from thimble.models.model_spec import ModelSpec, adapted_shapes
from thimble.models.spec import DecoderSpec
from thimble.models.transformers_spec import TransformersSpec

DTYPE_BYTES = {"fp32": 4, "bf16": 2}  # of an activation
SCALE_BYTES = 4  # of a key, a value or a row of weights in int8
IN_RUNS_BYTES = 1.25  # of an activation in int8, with the scale and the sum that 32 of them share
PROCESS_BYTES = 330_000_000  # Python, torch, numba and their libraries, before any weight
TOKEN_BYTES = 800  # of the vocabulary, in the tokenizer
PRODUCT_BYTES = 700_000  # that the libraries keep for each size of a product
PRODUCTS = 60  # of one size of batch: each linear layer and its low-rank parts, forward and backward
INT8_COPIES = 3  # of the largest weight, that the library makes to multiply int8
PAGES_AROUND = 65536  # bytes of a file that the system maps around one that is read
# Shares of a large product's rate that the engine reaches in its kinds of products, and what else was measured.
REACHED, REACHED_INT8, REACHED_LOW_RANK, REACHED_ATTENTION = 0.9, 0.88, 0.35, 0.7
BLOCKS_OVER_FP32 = 1.6  # rate of products with the blocks of a file by activations in int8, over that of fp32
MOVES = 3.0  # times that a kept value is read or written in a pass
OVERHEAD_SECONDS = 1e-3  # of a block's pass
DECODED = 2.5e9  # values per second and core
ONE_SHARE = 1.1  # a step that is not cut into a share a core
ADAPTER_NUMBER_BYTES = 2 * 3 * 4  # master and two moments, float32, and a copy of their last valid state
KL_READINGS = (
    1.5  # of texts on which answers are kept, in those of a training row: the base's logits are made again too
)
DECOMPOSED_BYTES = 4 * 8  # for each number of a weight, while it is decomposed
SKETCH_NUMBERS = 4  # of a gradient's sketch, for each parameter of the adapter that is made from it


@dataclass(frozen=True)
class MemoryPlan:
    """What a run is expected to hold at its peak, in bytes."""

    process: int  # the interpreter, its libraries, and the products they keep compiled
    weights: int  # frozen weights in memory, or the pages of the memory-mapped file
    adapter: int  # adapter, gradients and optimiser; A₀ and B₀ of the delta form
    activations: int  # what the forward pass keeps for the backward pass
    scratch: int  # decoded weights, logits and temporaries of one block, on each core; hidden states of a KL reference

    @property
    def total(self) -> int:
        """Expected peak."""
        return self.process + self.weights + self.adapter + self.activations + self.scratch

    def parts(self) -> dict[str, int]:
        """The parts by name, and the total."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"total": self.total}


def adapter_parameters(spec: ModelSpec, sizes: Mapping[str, Size], use_dora: bool = False) -> int:
    """Parameters of an adapter, by the sizes of its layers."""
    shapes = adapted_shapes(spec)
    return sum(size.rank * sum(shapes[path]) + use_dora * shapes[path][0] for path, size in sizes.items())


def _init_bytes(spec: DecoderSpec, needs: str, trained: int, activations: int) -> int:
    """What an init takes while it is made, beyond the room for activations, which only gradients need at that time."""
    widths = (spec.hidden_size, spec.q_size, spec.hidden_size, spec.intermediate_size)  # inputs of a block's layers
    largest = max(rows * cols for rows, cols in spec.linear_shapes().values())
    if needs == "inputs":  # second moments of one block, and the decomposition of the largest
        return 4 * sum(n * n for n in widths) + 3 * 4 * max(widths) ** 2 - activations
    if needs in ("weights", "quantised"):
        return DECOMPOSED_BYTES * largest - activations
    return SKETCH_NUMBERS * 4 * trained + 3 * 4 * largest if needs == "gradients" else 0


def lowest_block(layers: Iterable[str]) -> int:
    """Number of the lowest block that is adapted; nothing goes back through those below."""
    return min(map(block_of, layers))


def cache_token_bytes(spec: ModelSpec, dtype: str) -> int:
    """What the keys and values of one token take, in bytes, in a dtype of activations."""
    return 2 * spec.num_layers * spec.kv_size * DTYPE_BYTES[dtype]


def int8_cache_token_bytes(spec: DecoderSpec) -> int:
    """The same of keys and values in int8, each head of which has a float32 scale."""
    return 2 * spec.num_layers * spec.num_kv_heads * (spec.head_dim + SCALE_BYTES)


@dataclass(frozen=True)
class MemoryInputs:
    """What the memory of a run depends on, beside its base and its execution plan."""

    compute: str  # `fp32`, `bf16`, `bf16-int8` or `int8`
    trained: int  # parameters of the adapter
    longest: int  # tokens of the longest row, of training or validation
    lowest: int = 0  # number of the lowest adapted block; those below keep nothing
    # what the init and the ranks are made of: `weights`, `inputs`, `gradients`, `quantised`
    needs: tuple[str, ...] = ()
    is_delta: bool = False  # whether the run trains in delta form, which keeps A₀ and B₀
    kl_pass_tokens: int = 0  # of the texts beside a step, on which the base's answers are kept
    kl_places: int = 0  # of all of these texts, at which the base's hidden states are kept
    replaced: int = 0  # numbers of parameters that are adapted: their updated values are kept for the backward pass


def estimate_memory(base: Base, inputs: MemoryInputs, execution: ExecutionPlan) -> MemoryPlan:
    """Expected peak memory of a run, in parts."""
    trained, dtype = inputs.trained, activation_dtype(inputs.compute, execution.store)
    width = DTYPE_BYTES[dtype]
    if isinstance(base.spec, TransformersSpec):
        return _memory_of_transformers(base, base.spec, inputs, execution)
    working = 4 + 2 * width if inputs.is_delta else 0 if dtype == "fp32" else width
    adapter = trained * (ADAPTER_NUMBER_BYTES + 4 * execution.num_shares + working)
    activations = _activation_bytes(base.decoder, width, execution, inputs)
    compared = 4 * TABLES_COMPARED * base.decoder.vocab_size  # of a place, while the model is compared with the base
    kept = inputs.kl_places * base.decoder.hidden_size * width
    kept += logit_chunk(inputs.kl_pass_tokens, compared) * compared if inputs.kl_pass_tokens else 0
    # One size of a batch takes part in more products where shares run in parallel.
    products = PRODUCTS * PRODUCT_BYTES * (execution.num_shares + execution.num_sizes - 1)
    return MemoryPlan(
        process=PROCESS_BYTES + base.spec.vocab_size * TOKEN_BYTES + products,
        weights=_weight_bytes(base, inputs.compute, execution),
        adapter=max([adapter, *(_init_bytes(base.decoder, need, trained, activations) for need in inputs.needs)]),
        activations=activations,
        scratch=kept + execution.num_shares * _scratch_bytes(base, inputs.compute, inputs.longest, execution),
    )


def _memory_of_transformers(
    base: Base, spec: TransformersSpec, inputs: MemoryInputs, execution: ExecutionPlan
) -> MemoryPlan:
    width = DTYPE_BYTES[inputs.compute]
    execution = replace(execution, micro_tokens=max(execution.micro_tokens, inputs.kl_pass_tokens))
    return MemoryPlan(
        process=transformers_cost.PROCESS_BYTES + spec.vocab_size * TOKEN_BYTES,
        weights=transformers_cost.weight_bytes(base.num_parameters, width),
        adapter=inputs.trained * (ADAPTER_NUMBER_BYTES + 4 + 8 * inputs.is_delta),
        activations=transformers_cost.activation_bytes(spec, width, execution, inputs.lowest) + width * inputs.replaced,
        scratch=transformers_cost.scratch_bytes(spec, execution, inputs.longest)
        + width * transformers_cost.GRADIENTS_ALIVE * min(inputs.replaced, spec.largest_parameter),
    )


def _weight_bytes(base: Base, compute: str, execution: ExecutionPlan) -> int:
    """Weights in memory of our own, and pages of the file."""
    head: int = base.weights[EMBEDDING if base.spec.is_tied else HEAD].info.nbytes
    rounded = sum(rows * (cols + SCALE_BYTES) for rows, cols in base.spec.linear_shapes().values())
    if compute == "int8" and execution.store == "int8":
        return rounded + head
    copy = rounded if compute == "bf16-int8" and execution.store != "int8" else 0  # beside what the forward pass reads
    return copy + _kept_bytes(base, activation_dtype(compute, execution.store), head, execution)


def _kept_bytes(base: Base, dtype: str, head: int, execution: ExecutionPlan) -> int:
    """Weights as a store keeps them, where activations have some dtype."""
    if execution.is_streamed:  # two windows, a large layer being read, and the pages around the rows of the embedding
        layers = max(weight.info.nbytes for path, weight in base.weights.items() if path not in (EMBEDDING, HEAD))
        return 4 * WINDOW + 2 * layers + min(head, execution.tokens_at_once * PAGES_AROUND)
    if execution.store == "file":
        return base.size_bytes
    return base.num_parameters * (1 if execution.store == "int8" else DTYPE_BYTES[dtype])


def _activation_bytes(spec: DecoderSpec, width: int, execution: ExecutionPlan, inputs: MemoryInputs) -> int:
    lowest = inputs.lowest
    tokens = max(_rounded(execution.tokens_at_once, execution.num_shares), _rounded(inputs.kl_pass_tokens, 1))
    block = 2 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size + 2 * spec.intermediate_size
    checkpointed = max(0, execution.checkpointed_blocks - lowest)
    kept = spec.num_layers - lowest - checkpointed
    inputs = checkpointed * spec.hidden_size + (block if checkpointed else 0)
    return tokens * width * (block * kept + inputs)


def _rounded(tokens: int, shares: int) -> int:
    each = -(-tokens // shares)
    return shares * (-(-each // BUFFER_TOKENS) * BUFFER_TOKENS)


def _scratch_bytes(base: Base, compute: str, longest: int, execution: ExecutionPlan) -> int:
    """What one core needs while it runs a block or the loss, by the names in `backends.torch`."""
    spec, width = base.decoder, DTYPE_BYTES[activation_dtype(compute, execution.store)]
    tokens = _rounded(-(-execution.tokens_at_once // execution.num_shares), 1)
    hidden, inner, heads = spec.hidden_size, spec.intermediate_size, spec.q_size + 2 * spec.kv_size
    largest = max(hidden, inner, spec.q_size)
    numbers = tokens * (2 * largest + 2 * inner + heads)  # input, input_grad, gated_grad, qkv_grad
    numbers += tokens * (2 * inner + heads + spec.q_size)  # outputs without a backward pass
    numbers += tokens * hidden * 4  # the stream and its gradient
    keys = -(-longest // PADDED_KEYS) * PADDED_KEYS
    attention = (tokens + TILE) * (2 * heads + spec.q_size)  # heads, their gradients, mixed_grad
    attention += 2 * spec.num_heads * min(TILE, keys) * keys  # scores, slopes
    chunk = logit_chunk(tokens, width * spec.vocab_size)
    numbers += chunk * spec.vocab_size + 3 * tokens * hidden  # logits, hidden states with a label
    if execution.store != "dense":
        # Frozen matrices as they are multiplied, those with the same input as one: the first window of the largest.
        shapes = ((spec.vocab_size, hidden), (2 * inner, hidden), (hidden, inner), (heads, hidden))
        numbers += max(windows(rows, cols)[0].stop * cols for rows, cols in shapes)
    total = max(tokens * inner, chunk * hidden) * (4 + width)  # gradients summed over windows
    if multiplies_blocks(compute, execution.store):  # the input in int8, with a scale and a sum for each run
        total += tokens * largest * IN_RUNS_BYTES
    elif compute in ("int8", "bf16-int8"):  # rows as int8, sums as int32, and the library's own copies of a weight
        total += tokens * (2 * inner + 4 * max(WINDOW_ROWS, inner)) + INT8_COPIES * 2 * inner * hidden
    return int(numbers * width + 4 * attention + total)


@dataclass(frozen=True)
class StepWork:
    """What a training step does, as far as its time depends on it."""

    tokens: float  # of all rows of a step
    target_tokens: float  # of these, the target tokens
    row_tokens: float  # length of a typical row, by which attention's work goes
    trained: int  # parameters of the adapter
    lowest: int = 0  # number of the lowest adapted block; nothing goes back through those below
    epochs: float = 1.0  # how often each row is read: of the blocks below, what they make of it is kept the first time
    kl_tokens: float = 0.0  # of texts on which the base's answers are kept, on average beside a step


def estimate_seconds(base: Base, compute: str, work: StepWork, execution: ExecutionPlan, machine: Machine) -> float:
    """Expected seconds of a training step.

    The products are counted, at the rates of this machine and the shares of them that the engine was measured to reach;
    elementwise work goes by the rate of copying.
    """
    spec, dtype = base.spec, activation_dtype(compute, execution.store)
    if isinstance(spec, TransformersSpec):
        tokens = work.tokens + KL_READINGS * work.kl_tokens
        batches = max(1.0, tokens / execution.micro_tokens)
        flops = machine.flops.get(compute) or max(machine.flops.values())
        return transformers_cost.seconds(spec, base.num_parameters, tokens, work.trained, flops, batches)
    rate, width = machine.flops.get(dtype) or max(machine.flops.values()), DTYPE_BYTES[dtype]
    checkpointed = max(0, execution.checkpointed_blocks - work.lowest)
    below = work.lowest / spec.num_layers
    back = 1 - below
    forth = back + checkpointed / spec.num_layers + below / max(1.0, work.epochs)
    passes = forth + back
    tokens, targets = work.tokens + work.kl_tokens, work.target_tokens + KL_READINGS * work.kl_tokens
    seconds = _frozen_seconds(spec, compute, forth * tokens, back * tokens, execution.store, machine)
    seconds += 4 * spec.vocab_size * spec.hidden_size * targets / (rate * REACHED)
    seconds += 2 * (passes + 1) * work.trained * tokens / (rate * REACHED_LOW_RANK)
    seen = work.row_tokens / 2 + TILE / 2
    attention = 2 * spec.q_size * spec.num_layers * seen * tokens * (2 * passes + 3)
    seconds += attention / (machine.flops.get("fp32", rate) * REACHED_ATTENTION)  # float32 in every compute type
    block = 2 * (spec.hidden_size + spec.q_size + spec.kv_size + spec.intermediate_size)
    moved = tokens * spec.num_layers * passes * width * (block + spec.num_heads * seen)
    seconds += moved * MOVES / machine.copy_bytes
    batches = max(1.0, tokens / execution.micro_tokens)
    seconds += batches * spec.num_layers * passes * OVERHEAD_SECONDS / execution.num_shares
    if execution.store != "dense":
        decoded = forth * (compute != "int8")
        decoded += back * (compute in DTYPE_BYTES or multiplies_blocks(compute, execution.store))
        seconds += batches * base.num_parameters * decoded / (DECODED * machine.cores)
    return seconds * (ONE_SHARE if execution.num_shares < min(2, machine.cores) else 1.0)


def _frozen_seconds(spec: ModelSpec, compute: str, forth: float, back: float, store: str, machine: Machine) -> float:
    """Expected seconds of the products with frozen weights, for so many tokens forward and so many back."""
    dtype = activation_dtype(compute, store)
    rate = REACHED * (machine.flops.get(dtype) or max(machine.flops.values()))
    int8 = REACHED_INT8 * machine.flops["int8"] if "int8" in machine.flops else rate
    if multiplies_blocks(compute, store):
        rates = BLOCKS_OVER_FP32 * rate, rate
    else:
        rates = int8 if compute == "int8" else rate, rate if compute in DTYPE_BYTES else int8
    linears = sum(rows * cols for rows, cols in spec.linear_shapes().values())
    return 2 * linears * (forth / rates[0] + back / rates[1])
