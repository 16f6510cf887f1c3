"""Keys and values of what has been read, for generation: rows of different lengths side by side."""

import torch
from torch import Tensor

from thimble.backends.torch.attention import Angles, AttentionSpec, attend, split_heads
from thimble.backends.torch.memory import Memory


class KvCache:
    """Room for the keys and values of a batch of rows.

    Args:
        num_layers: Blocks of the decoder.
        rows: Rows in the batch.
        capacity: Most tokens of a row, prompt and answer together.
        spec: Attention of any layer, for its sizes.
        compute: Type of keys and values.
    """

    def __init__(self, num_layers: int, rows: int, capacity: int, spec: AttentionSpec, compute: torch.dtype) -> None:
        shape = (num_layers, rows, spec.num_kv_heads, capacity, spec.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=compute), torch.zeros(shape, dtype=compute)
        self.lengths = torch.zeros(rows, dtype=torch.int64)  # tokens of each row read so far
        self.capacity = capacity

    def keep(self, kept: list[int]) -> list[int]:
        """Forget all rows but these, moving as few as possible; return which row stands at each place now."""
        order = [*kept]
        spare = [row for row in kept if row >= len(kept)]
        stays = {row for row in kept if row < len(kept)}
        for place in range(len(kept)):
            order[place] = place if place in stays else spare.pop()
            if order[place] != place:
                for room in (self.keys, self.values):
                    room[:, place] = room[:, order[place]]
        self.lengths = self.lengths[order]
        return order


# The passes that fill a cache: for each row of the pass its number in the cache and how many of its tokens are kept.
Slots = list[tuple[int, int]]


def attend_cached(
    qkv: Tensor, spec: AttentionSpec, angles: Angles | None, starts: list[int], cache: KvCache, layer: int,
    slots: Slots | None, memory: Memory,
) -> Tensor:  # fmt: skip
    """Attention that extends the cache, and reads it unless whole prompts are given.

    Args:
        qkv: (tokens, (heads + 2 kv_heads) · head_dim).
        spec: The layer's attention.
        angles: Rotations, or None.
        starts: Where rows begin among the tokens.
        cache: Keys and values.
        layer: Number of the block.
        slots: For whole prompts, which see nothing but themselves: where they go. None: one token for every row.
        memory: For temporaries.

    Returns:
        (tokens, heads · head_dim).
    """
    q, k, v = split_heads(qkv, spec, angles, memory)
    if slots is None:
        return _attend_next(*(heads[:, : len(qkv)] for heads in (q, k, v)), spec, cache, layer)
    for (row, kept), start in zip(slots, starts, strict=False):
        cache.keys[layer, row, :, :kept] = k[:, start : start + kept]
        cache.values[layer, row, :, :kept] = v[:, start : start + kept]
    return attend(qkv, spec, angles, starts, memory)


def _attend_next(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, cache: KvCache, layer: int) -> Tensor:
    """One new token a row against all keys of its row; shapes as from `split_heads`.

    All of the cache's room takes part, masked, since cutting it to the longest row would copy it.
    """
    rows = torch.arange(len(cache.lengths))
    cache.keys[layer, rows, :, cache.lengths] = k.transpose(0, 1)
    cache.values[layer, rows, :, cache.lengths] = v.transpose(0, 1)
    keys, values = (room[layer, : len(rows)].flatten(0, 1) for room in (cache.keys, cache.values))
    scores = torch.bmm(q.transpose(0, 1).flatten(0, 1), keys.transpose(1, 2)).float()  # (rows · kv_heads, group, keys)
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    place, now = torch.arange(cache.capacity), cache.lengths[:, None]
    hidden = place > now
    if spec.window is not None:
        hidden |= place <= now - spec.window
    scores.view(len(rows), -1, cache.capacity).masked_fill_(hidden[:, None], float("-inf"))
    mixed = torch.bmm(scores.softmax(-1).to(q.dtype), values)
    return mixed.view(len(rows), -1)
