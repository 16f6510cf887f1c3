"""What requests have read of a model of transformers: keys and values in blocks, or, of other models, the tokens.

A pass lays what the blocks of its rows hold side by side, padded on the left, and hands it to the model as its own kind
of cache. Which models take that is tried when a base is loaded. The others (state space, linear attention, positions
that depend on the length) read all tokens of a request again for each new one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch.transformers_model import AdaptedModel, is_near, probe_rows

BLOCK_TOKENS = 32
GROWTH = 1.5  # of the room, when it grows
# Settings with which what a token sees depends on its place counted from the left end of the padded row.
_COUNTED_FROM_THE_LEFT = ("attention_chunk_size",)

Shapes = list[tuple[int, int, int]]  # of each layer: key heads, width of a key, width of a value


class CachedRow(NamedTuple):
    """Some further tokens of one request.

    Attributes:
        ids: int32 (tokens,).
        blocks: Of the cache, in the order of the request's tokens.
        position: Of the first of the tokens in the request.
        wanted: Places among the tokens after which logits are wanted, int64.
    """

    ids: NDArray[np.int32]
    blocks: Sequence[int]
    position: int
    wanted: NDArray[np.int64]

    @property
    def end(self) -> int:
        """Tokens of the request, these included."""
        return self.position + len(self.ids)

    def places(self, block_tokens: int) -> NDArray[np.int64]:
        """Where all tokens of the request stand in the cache, counted in tokens."""
        every = np.arange(self.end)
        return np.asarray(self.blocks, np.int64)[every // block_tokens] * block_tokens + every % block_tokens


class TokenCache:
    """The tokens themselves: every pass reads them all again."""

    block_tokens = BLOCK_TOKENS

    def __init__(self) -> None:
        self._ids = np.zeros((0, BLOCK_TOKENS), np.int32)

    def reserve(self, blocks: int) -> None:
        """Make room for so many blocks."""
        missing = max(0, blocks - len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros((missing, BLOCK_TOKENS), np.int32)])

    def copy(self, source: int, target: int) -> None:
        """Copy a block over another."""
        self._ids[target] = self._ids[source]

    def discard(self, blocks: Sequence[int]) -> None:
        """Do nothing: numbers of tokens take little."""

    def read(self, model: AdaptedModel, rows: Sequence[CachedRow]) -> Tensor:
        """Logits of rows, float32 (all wanted, vocabulary)."""
        whole = []
        for row in rows:
            places, flat = row.places(BLOCK_TOKENS), self._ids.reshape(-1)
            flat[places[row.position :]] = row.ids
            whole.append(flat[places])
        return model.logits(whole, [row.position + row.wanted for row in rows])


class BlockCache:
    """Keys and values of each layer, (blocks, tokens, heads, width), in the compute type."""

    block_tokens = BLOCK_TOKENS

    def __init__(self, shapes: Shapes, compute: torch.dtype) -> None:
        self._shapes, self._compute, self._blocks = shapes, compute, 0
        self._rooms = self._empty(0)

    def _empty(self, blocks: int) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                torch.zeros(blocks, BLOCK_TOKENS, heads, key, dtype=self._compute),
                torch.zeros(blocks, BLOCK_TOKENS, heads, value, dtype=self._compute),
            )
            for heads, key, value in self._shapes
        ]

    def reserve(self, blocks: int) -> None:
        """Make room for so many blocks; what is there stays."""
        if blocks <= self._blocks:
            return
        before, held = self._rooms, self._blocks
        self._blocks = max(blocks, int(GROWTH * held))
        self._rooms = self._empty(self._blocks)
        for new, old in zip(self._rooms, before, strict=True):
            for room, rest in zip(new, old, strict=True):
                room[:held] = rest

    def copy(self, source: int, target: int) -> None:
        """Copy a block over another."""
        for pair in self._rooms:
            for room in pair:
                room[target] = room[source]

    def discard(self, blocks: Sequence[int]) -> None:
        """Do nothing: a layer has one array for all blocks."""

    def read(self, model: AdaptedModel, rows: Sequence[CachedRow]) -> Tensor:
        """Logits of rows, float32 (all wanted, vocabulary); keys and values of their tokens are kept."""
        past, new = max(row.position for row in rows), max(len(row.ids) for row in rows)
        ids, seen = np.zeros((len(rows), new), np.int64), np.zeros((len(rows), past + new), np.int64)
        positions = np.zeros((len(rows), new), np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = row.ids
            seen[number, past - row.position : past + len(row.ids)] = 1
            positions[number] = np.minimum(row.position + np.arange(new), row.end - 1)
        cache, inputs = self._gathered(rows, past), {}
        if not seen.all():
            inputs["attention_mask"] = torch.from_numpy(seen)
        if model.takes_positions:
            inputs["position_ids"] = torch.from_numpy(positions)
        wanted = [row.wanted for row in rows]
        found, _ = model.call(torch.from_numpy(ids), wanted, past_key_values=cache, use_cache=True, **inputs)
        self._keep(rows, cache, past)
        return found

    def _gathered(self, rows: Sequence[CachedRow], past: int) -> Any:
        """What the rows have read before, as transformers has it: (rows, heads, tokens, width), padded on the left."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, pair in enumerate(self._rooms if past else ()):
            sides = []
            for room in pair:
                side = torch.zeros(len(rows), past, *room.shape[2:], dtype=room.dtype)
                for place, row in zip(side, rows, strict=True):
                    held = torch.from_numpy(row.places(BLOCK_TOKENS)[: row.position])
                    place[past - row.position :] = room.flatten(0, 1)[held]
                sides.append(side.transpose(1, 2))
            cache.update(*sides, number)
        return cache

    def _keep(self, rows: Sequence[CachedRow], cache: Any, past: int) -> None:
        for layer, pair in zip(cache.layers, self._rooms, strict=True):
            for room, side in zip(pair, (layer.keys, layer.values), strict=True):
                for row, made in zip(rows, side, strict=True):
                    places = torch.from_numpy(row.places(BLOCK_TOKENS)[row.position :])
                    room.flatten(0, 1)[places] = made[:, past : past + len(row.ids)].transpose(0, 1)


@torch.no_grad()
def try_cache(model: AdaptedModel) -> Shapes | None:
    """The shapes of what a model caches, if it writes from blocks what it writes from whole rows; None if not."""
    config = model.module.config
    if model.spec.depends_on_length or any(getattr(config, name, None) for name in _COUNTED_FROM_THE_LEFT):
        return None
    rows = probe_rows(model.spec.vocab_size)
    lasts = [np.array([len(row) - 1]) for row in rows]
    expected = model.logits(rows, lasts)
    try:
        shapes = _shapes(model, rows[0])
        cache = BlockCache(shapes, model.compute)
        cache.reserve(2)
        ends = (1, 3)  # uneven beginnings, each read alone, and then the rest of both together
        for number, (row, end) in enumerate(zip(rows, ends, strict=True)):
            cache.read(model, [CachedRow(row[:end], [number], 0, np.array([0]))])
        rests = [
            CachedRow(row[end:], [number], end, last - end)
            for number, (row, end, last) in enumerate(zip(rows, ends, lasts, strict=True))
        ]
        found = cache.read(model, rests)
    except Exception:  # whatever the code of a family raises where it has another kind of cache
        return None
    return shapes if is_near(found, expected, model.compute) else None


def _shapes(model: AdaptedModel, row: NDArray[np.int32]) -> Shapes:
    """What each layer keeps of a row; a ValueError if that is no key and value for each token."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model.call(torch.from_numpy(row[None].astype(np.int64)), [np.array([0])], past_key_values=cache, use_cache=True)
    shapes = []
    for layer in cache.layers:
        (_, heads, tokens, key), (_, others, values, value) = layer.keys.shape, layer.values.shape
        if (others, tokens, values) != (heads, len(row), len(row)):
            raise ValueError("a layer keeps something else than a key and a value for each token")
        shapes.append((heads, key, value))
    if not shapes:
        raise ValueError("nothing is cached")
    return shapes
