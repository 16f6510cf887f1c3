"""How much memory a run will need, part by part, before anything is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path

from thimble.core.base import Base
from thimble.core.family import DecoderSpec

CGROUP = Path("/sys/fs/cgroup")
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}
PROCESS_BYTES = 330_000_000  # Python, torch, numba and their libraries, before any weight
LOGIT_CHUNK_BYTES = 64_000_000
LOGIT_COPIES = 3  # the chunk, its exponentials, and its copy in the compute type
ADAPTER_COPIES_BYTES = 4 * 4  # master, gradient and two moments, float32


@dataclass(frozen=True)
class Way:
    """How the rows of a step are run.

    Attributes:
        num_shares: Micro-batches that run side by side.
        micro_tokens: Most tokens of a micro-batch.
        tokens_at_once: Most tokens of all that run side by side.
        num_threads: Threads that run products, each with scratch of its own.
        is_recomputed: Only block inputs are kept for the backward pass.
    """

    num_shares: int
    micro_tokens: int
    tokens_at_once: int
    num_threads: int
    is_recomputed: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """What a run is expected to hold at its peak, in bytes.

    Attributes:
        process: The interpreter and its libraries.
        weights: Frozen weights in memory, or the pages of the memory-mapped file.
        scratch: The largest weight, decoded.
        adapter: Adapter, gradients and optimiser.
        activations: What the forward pass keeps for the backward pass.
        workspace: Logits and the temporaries of one block.
    """

    process: int
    weights: int
    scratch: int
    adapter: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Expected peak."""
        return self.process + self.weights + self.scratch + self.adapter + self.activations + self.workspace

    def parts(self) -> dict[str, int]:
        """The parts by name, and the total."""
        names = ("process", "weights", "scratch", "adapter", "activations", "workspace")
        return {name: getattr(self, name) for name in names} | {"total": self.total}


def adapter_parameters(spec: DecoderSpec, layers: list[str], rank: int) -> int:
    """Numbers in an adapter of one rank on some layers."""
    shapes = spec.linear_shapes()
    return sum(rank * sum(shapes[layer]) for layer in layers)


def cache_token_bytes(spec: DecoderSpec, compute: str) -> int:
    """What the keys and values of one token take, in bytes."""
    return 2 * spec.num_layers * spec.kv_size * COMPUTE_BYTES[compute]


def estimate_memory(base: Base, store: str, compute: str, trained: int, way: Way) -> MemoryPlan:
    """Expected peak memory of training.

    Args:
        base: The base.
        store: `dense`, `int8` or `file`.
        compute: `fp32` or `bf16`.
        trained: Numbers in the adapter.
        way: How a step is run.

    Returns:
        The parts.
    """
    spec, width, tokens = base.spec, COMPUTE_BYTES[compute], way.tokens_at_once
    per_block = spec.hidden_size * 2 + spec.q_size * 2 + 2 * spec.kv_size + 2 * spec.intermediate_size
    kept = spec.hidden_size if way.is_recomputed else per_block
    chunks = min(LOGIT_CHUNK_BYTES * way.num_shares, tokens * spec.vocab_size * 4)
    workspace = chunks * LOGIT_COPIES + tokens * (4 + 2 * width) * 2 * spec.intermediate_size
    activations = tokens * width * (kept * spec.num_layers + (per_block if way.is_recomputed else 0))
    scratch = 0 if store == "dense" else _largest_weight(spec) * width
    return MemoryPlan(
        process=PROCESS_BYTES,
        weights=_weight_bytes(base, store, width),
        scratch=scratch * way.num_threads,
        adapter=trained * (ADAPTER_COPIES_BYTES + 4 * (way.num_shares - 1) + (0 if compute == "fp32" else width)),
        activations=activations,
        workspace=workspace,
    )


def _weight_bytes(base: Base, store: str, width: int) -> int:
    if store == "file":
        return base.size_bytes
    return base.num_parameters * (1 if store == "int8" else width)


def _largest_weight(spec: DecoderSpec) -> int:
    """Numbers in the largest stack that is decoded at once: the head, or gate and up."""
    return max(spec.vocab_size, 2 * spec.intermediate_size, spec.q_size + 2 * spec.kv_size) * spec.hidden_size


def available_bytes() -> int:
    """Memory this process may still take: what the system has free, or less if a control group limits it."""
    free = _meminfo_bytes("MemAvailable")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            allowed = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text())
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
        free = min(free, max(allowed, 0))
    return free


def _meminfo_bytes(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
