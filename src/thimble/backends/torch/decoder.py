"""The decoder of every Llama-like family, as plain as it can be: read `Decoder.block` first.

Built from a base's description and weights; used for training, evaluation and generation. Rows are packed: a batch is
one long list of tokens, cut into rows. It holds no adapter: each forward pass is given those of its rows. Knows nothing
of tokenizers, optimisers or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.session import ForwardRow
from thimble.backends.torch.attention import Angles, Asked, AttentionSpec, attend
from thimble.backends.torch.block_linear import BlockLinear
from thimble.backends.torch.elementwise import Gated, Prologue, RmsNorm
from thimble.backends.torch.frozen import FrozenLinear, Matrix, Neighbours, load_matrix
from thimble.backends.torch.int8 import Int8Gradient, Int8Linear, Watched
from thimble.backends.torch.kv_cache import KvCache, Places, attend_cached, place_rows
from thimble.backends.torch.lora import BARE, Layers, Lora, Projection, project
from thimble.backends.torch.memory import Memory
from thimble.core.sizes import PADDED_LABELS, padded
from thimble.data.prefixes import Segment
from thimble.models.base import EMBEDDING, FINAL_NORM, HEAD, Base
from thimble.models.spec import Rope

FEW_TOKENS = 8  # more than so many are padded: each number of them is a new set of compiled products


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass is given beside its tokens."""

    segments: Sequence[Segment]  # the rows, and prefixes that some of them share; none where rows have `places`
    size: int  # tokens with padding, which belongs to no row
    angles: dict[int, Angles]  # by number of the rotary embedding in `Decoder.ropes`
    lora: Lora = BARE  # the adapters of the rows
    # so many, from the lowest, keep only their input for the backward pass and are run again in it (activation
    # checkpointing)
    checkpointed_blocks: int = 0
    asked: Asked | None = None  # tokens whose last hidden states are wanted; all if None
    places: Places | None = None  # where each row stands in a key-value cache that it reads and extends, or None


@dataclass(frozen=True)
class Block:
    """One layer's weights and settings."""

    number: int  # place in the stack, from 0
    attention: AttentionSpec  # its heads, scale, window and soft-cap
    rope: int | None  # number of its rotary embedding in `Decoder.ropes`, or None
    qkv: Projection  # makes queries, keys and values
    out: Projection  # mixes the heads
    gate_up: Projection  # makes the gate and the values of the MLP
    down: Projection  # brings the MLP back to the width of the stream
    attn_norm: RmsNorm  # applied to what attention reads
    mlp_norm: RmsNorm  # applied to what the MLP reads
    attn_out_norm: RmsNorm | None  # applied to what attention adds (Gemma), or None
    mlp_out_norm: RmsNorm | None  # applied to what the MLP adds (Gemma), or None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All linear layers, in the order they run."""
        return self.qkv, self.out, self.gate_up, self.down


class Decoder:
    """A frozen base, ready to run."""

    def __init__(self, base: Base, store: str, compute: torch.dtype) -> None:
        self.spec = base.decoder
        self.compute = compute
        self.memory = Memory(compute)
        self.ropes = list({id(rope): rope for rope in base.decoder.ropes if rope is not None}.values())  # each once
        self._base, self._store = base, store
        self.embedding = self._linear([EMBEDDING])
        self.head = self.embedding if base.decoder.is_tied else self._linear([HEAD])
        self.norm = self._norm(FINAL_NORM.removesuffix(".weight"))
        self.gate = Gated(base.decoder.activation)
        self.blocks = [self._block(number) for number in range(base.decoder.num_layers)]
        for number, projection in enumerate(self.projections):
            projection.number = number

    # ---- building -------------------------------------------------------------------------------------------------

    def _linear(self, names: list[str], has_bias: bool = True) -> FrozenLinear:
        matrices: list[Matrix] = [load_matrix(self._base.weights[name], self._store, self.compute) for name in names]
        bias = self._bias(names) if has_bias else None
        return FrozenLinear(matrices, None if bias is None else bias.to(self.compute), self.memory)

    def _bias(self, names: Sequence[str]) -> Tensor | None:
        """The biases of some weights end to end, float32; None if none has any."""
        biases = [self._base.weights.get(name.removesuffix("weight") + "bias") for name in names]
        rows = [self._base.weights[name].shape[0] for name in names]
        parts = [bias.read() if bias else np.zeros(count, np.float32) for bias, count in zip(biases, rows, strict=True)]
        return torch.from_numpy(np.concatenate(parts)) if any(biases) else None

    def _projection(self, paths: Sequence[str], has_bias: bool = True) -> Projection:
        shapes, columns, start = self.spec.linear_shapes(), {}, 0
        for path in paths:
            columns[path] = slice(start, start + shapes[path][0])
            start = columns[path].stop
        return Projection(self._linear([f"{path}.weight" for path in paths], has_bias), columns)

    def _norm(self, path: str) -> RmsNorm:
        return RmsNorm(torch.from_numpy(self._base.weights[f"{path}.weight"].read()), self.spec.norm_eps)

    def _block(self, number: int) -> Block:
        spec, path = self.spec, f"model.layers.{number}"
        qkv = [f"{path}.self_attn.{kind}_proj" for kind in (("qkv",) if spec.is_fused else "qkv")]
        gate_up = [f"{path}.mlp.{kind}_proj" for kind in (("gate_up",) if spec.is_fused else ("gate", "up"))]
        post, rope = spec.has_post_norms, spec.ropes[number]
        return Block(
            number=number,
            attention=self._attention(number, qkv),
            rope=None if rope is None else next(i for i, known in enumerate(self.ropes) if known is rope),
            qkv=self._projection(qkv, has_bias=False),  # attention adds it
            out=self._projection([f"{path}.self_attn.o_proj"]),
            gate_up=self._projection(gate_up),
            down=self._projection([f"{path}.mlp.down_proj"]),
            attn_norm=self._norm(f"{path}.input_layernorm"),
            mlp_norm=self._norm(f"{path}.{'pre_feedforward_layernorm' if post else 'post_attention_layernorm'}"),
            attn_out_norm=self._norm(f"{path}.post_attention_layernorm") if post else None,
            mlp_out_norm=self._norm(f"{path}.post_feedforward_layernorm") if post else None,
        )

    def _attention(self, number: int, qkv: Sequence[str]) -> AttentionSpec:
        spec, path = self.spec, f"model.layers.{number}.self_attn"
        q_norm, k_norm = (self._norm(f"{path}.{x}_norm") if spec.has_qk_norm else None for x in "qk")
        bias = self._bias([f"{name}.weight" for name in qkv])
        return AttentionSpec(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.attention_scale, spec.windows[number],
            spec.attention_softcap, q_norm, k_norm, None if bias is None else bias.view(-1, spec.head_dim),
        )  # fmt: skip

    def quantize(self, sample: NDArray[np.int32]) -> None:
        """Make the products of all blocks whole-number ones, after a look at a sample of text, int32 (tokens,).

        Those of the head stay as they are: the gradient at its output has one large number a row and thousands of small
        ones that matter together, which eight bits would lose.
        """
        watched = [Watched(projection.frozen) for projection in self.projections]
        for projection, layer in zip(self.projections, watched, strict=True):
            projection.frozen = layer
        with torch.no_grad():
            self.hidden(sample, self.pack([Segment(0, len(sample))]))
        for projection, layer in zip(self.projections, watched, strict=True):
            projection.frozen = Int8Linear(layer)
        self.memory.release()

    def round_gradients(self) -> None:
        """Have gradients of inputs made in whole numbers from now on, but for the head's."""
        for projection in self.projections:
            if not isinstance(projection.frozen, Int8Gradient):
                projection.frozen = Int8Gradient(projection.frozen)
        self.memory.release()

    def multiply_blocks(self) -> None:
        """Have the forward pass multiply the blocks of the file as they are, but for the head's."""
        for projection in self.projections:
            if BlockLinear.fits(projection.frozen):
                projection.frozen = BlockLinear(projection.frozen)

    def stream(self) -> None:
        """From now on, read weights ahead of every product and let go of them behind it."""
        layers = [projection.frozen for projection in self.projections] + [self.head]
        for earlier, layer, later in zip([None, *layers], layers, [*layers[1:], None], strict=False):
            layer.neighbours = Neighbours(earlier, later)

    @property
    def projections(self) -> list[Projection]:
        """Every group of linear layers, in the order they run."""
        return [projection for block in self.blocks for projection in block.projections]

    def measure(self, layers: Layers) -> None:
        """Bring what DoRA multiplies rows by up to date; see Projection.measure."""
        for projection in self.projections:
            projection.measure(layers)

    # ---- running --------------------------------------------------------------------------------------------------

    def pack(
        self, segments: Sequence[Segment], lora: Lora = BARE, checkpointed_blocks: int = 0,
        wanted: NDArray[np.int64] | None = None,
    ) -> ForwardPass:  # fmt: skip
        """Prepare a pass over segments, which see nothing but their prefixes and themselves.

        Of tokens that are wanted alone, ascending, the pass returns nothing else where that saves something.
        """
        positions = np.concatenate([np.arange(one.position, one.length) for one in segments])
        ends = np.repeat([one.length for one in segments], [one.end - one.start for one in segments])
        size = padded(len(positions))
        asked = None if wanted is None else Asked(wanted, -(-len(wanted) // PADDED_LABELS) * PADDED_LABELS)
        if asked and not 0 < asked.size < size:
            asked = None
        checkpointed_blocks = min(checkpointed_blocks, len(self.blocks))
        return ForwardPass(segments, size, self.angles(positions, ends, size), lora, checkpointed_blocks, asked)

    def pack_rows(self, rows: Sequence[ForwardRow], cache: KvCache, lora: Lora = BARE) -> ForwardPass:
        """Prepare a pass over rows that stand in a cache: prompts, parts of prompts, next tokens."""
        places = place_rows(rows, cache)
        tokens = len(places.positions)
        size = tokens if tokens <= FEW_TOKENS else padded(tokens)
        ends = np.array([row.end for row in rows])[places.row_of]
        return ForwardPass((), size, self.angles(places.positions, ends, size), lora, places=places)

    def angles(self, positions: NDArray[np.int64], ends: NDArray[np.int64], size: int) -> dict[int, Angles]:
        """Rotations of tokens at some positions, of rows that end at `ends`, padded to `size` tokens."""
        positions, ends = (np.pad(array, (0, size - len(array))) for array in (positions, ends))
        return {number: _angles(rope, positions, ends) for number, rope in enumerate(self.ropes)}

    def embed(self, ids: NDArray[np.int32], size: int) -> Tensor:
        """Look up tokens: int32 (tokens,) to (size, hidden), padded, compute type."""
        x = self.embedding.gather(np.pad(ids.astype(np.int64), (0, size - len(ids))))
        if self.spec.embedding_scale != 1.0:
            x = x * torch.tensor(self.spec.embedding_scale, dtype=self.compute)
        return x

    def hidden(self, ids: NDArray[np.int32], forward: ForwardPass) -> Tensor:
        """Run all blocks over packed rows: int32 (tokens,) to (tokens with padding, hidden), before the final norm.

        Where some tokens are asked for, they are all that is returned, (their size, hidden).
        """
        return self.through(self.blocks, self.embed(ids, forward.size), forward)

    def through(self, blocks: Sequence[Block], x: Tensor, forward: ForwardPass) -> Tensor:
        """Run the stream, (tokens with padding, hidden), through some blocks."""
        self.memory.begin()
        for block in blocks:
            is_checkpointed = block.number < forward.checkpointed_blocks
            x = _checkpointed(self, block, x, forward) if is_checkpointed else self.block(block, x, forward)
        return x

    def block(self, block: Block, x: Tensor, forward: ForwardPass) -> Tensor:
        """One transformer block: attention and a gated MLP, each added to the stream x, (tokens, hidden).

        In the last one, tokens that are not asked for are but keys and values.
        """
        angles, lora = None if block.rope is None else forward.angles[block.rope], forward.lora
        asked = forward.asked if block.number == len(self.blocks) - 1 else None
        qkv = project(x, block.qkv, lora, block.attn_norm)
        if forward.places is None:
            mixed = attend(qkv, block.attention, angles, forward.segments, self.memory, asked)
        else:
            mixed = attend_cached(qkv, block.attention, angles, forward.places, block.number, self.memory)
        if asked:
            places = np.pad(asked.places, (0, asked.size - len(asked.places)))
            x, lora = x.index_select(0, torch.from_numpy(places)), lora.at(places)
        x = self._added(x, mixed, block.out, lora, None, block.attn_out_norm)
        gate_up = project(x, block.gate_up, lora, block.mlp_norm)
        return self._added(x, gate_up, block.down, lora, self.gate, block.mlp_out_norm)

    def _added(
        self, x: Tensor, update: Tensor, projection: Projection, lora: Lora, prologue: Prologue | None,
        norm: RmsNorm | None,
    ) -> Tensor:  # fmt: skip
        """The residual stream with a projected update added, which Gemma normalises first."""
        if norm is None:
            return project(update, projection, lora, prologue, residual=x)
        return x + _Normalise.apply(project(update, projection, lora, prologue), norm)

    def logits(self, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Final norm, head and soft-cap: (n, hidden) to float32 (n, vocabulary).

        They are computed in a type of their own if one is given, and in the compute type otherwise.
        """
        dtype = dtype or self.compute
        x = self.norm.forward(hidden, torch.empty(hidden.shape, dtype=dtype))
        logits = self.head.forward(x, torch.empty(len(hidden), self.head.rows, dtype=dtype)).float()
        cap = self.spec.final_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    @property
    def resident_bytes(self) -> int:
        """Bytes of frozen weights held in memory of our own; the memory-mapped file does not count."""
        linears = [self.embedding] + ([] if self.head is self.embedding else [self.head])
        linears += [projection.frozen for projection in self.projections]
        return sum(linear.resident_bytes for linear in linears)


class _Normalise(torch.autograd.Function):
    """A norm that stands alone."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: RmsNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm.forward(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.norm.backward(ctx.saved_tensors[0], grads[0]), None


class _Checkpoint(torch.autograd.Function):
    """Runs a block without keeping anything but its input, and again when its gradients are asked for."""

    @staticmethod
    def forward(ctx, x: Tensor, start: Tensor, decoder: Decoder, block: Block, forward: ForwardPass) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = (decoder, block, forward)
        y = decoder.block(block, x, forward)
        return decoder.memory.keep(*y.shape).copy_(y)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        decoder, block, forward = ctx.call
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        decoder.memory.begin(forward.checkpointed_blocks)  # beside their outputs, nothing of other blocks is needed
        with torch.enable_grad():
            y = decoder.block(block, x, forward)
        torch.autograd.backward(y, grads[0])
        return x.grad, None, None, None, None


def _checkpointed(decoder: Decoder, block: Block, x: Tensor, forward: ForwardPass) -> Tensor:
    needs_gradient = x.requires_grad or any(layer.needs_gradient(forward.lora) for layer in block.projections)
    if not (torch.is_grad_enabled() and needs_gradient):
        return decoder.block(block, x, forward)
    return _Checkpoint.apply(x, torch.empty(0, requires_grad=True), decoder, block, forward)


def _angles(rope: Rope, positions: NDArray[np.int64], ends: NDArray[np.int64]) -> Angles:
    """cos and sin per token; rows longer than `long_from` use the long angles."""
    inv_freq = rope.inv_freq.astype(np.float32)[None]
    if rope.long_inv_freq is not None:
        is_long = (ends > rope.long_from)[:, None]
        inv_freq = np.where(is_long, rope.long_inv_freq.astype(np.float32)[None], inv_freq)
    turned = torch.from_numpy(positions.astype(np.float32)[:, None] * inv_freq)
    return Angles(turned.cos() * rope.scale, turned.sin() * rope.scale)
