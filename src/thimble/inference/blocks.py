"""Blocks of the key-value cache: who uses them, and what they hold that later requests can use again.

A block holds the keys and values of `block_tokens` tokens and has a number. Requests that begin alike share blocks
(PagedAttention, Kwon et al., arXiv:2309.06180). What a block holds depends on all tokens before it and on the adapter
that read them, so it goes by a chain of hashes: that of the adapter's contents first, never its name, then those of the
tokens. A block that nobody uses stays until its room is needed, or there are more of them than may stay; the one unused
for longest goes first.
"""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_COMPARED = 16  # blocks that follow one another's, whose tokens are compared for a beginning in common

Tokens = NDArray[np.int32]


def chained(before: bytes, tokens: Tokens) -> bytes:
    """The key of a block of tokens that follows the one with the key `before`."""
    return hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest()


class _Kept(NamedTuple):
    """What a block holds that others may use."""

    key: bytes
    before: bytes  # key of the block before it
    tokens: Tokens


class Blocks:
    """The numbers of blocks, with the count of requests that use each.

    Args:
        most: Blocks there may be; None sets no limit, and what is kept makes room before another is added.
        most_unused: Blocks that may be kept without a user; None for as many as there is room for.
    """

    def __init__(self, most: int | None = None, most_unused: int | None = None) -> None:
        self.most, self.most_unused = most, most_unused
        self.count = 0  # numbers given out so far: 0 to count - 1
        self.evictions = 0  # blocks that held what a later request could have used, and do not any more
        self._users: dict[int, int] = {}
        self._free: list[int] = []
        self._emptied: set[int] = set()  # those of them whose memory was not given back
        self._kept: dict[int, _Kept] = {}
        self._by_key: dict[bytes, int] = {}
        self._followers: dict[bytes, list[int]] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # kept ones without users, the longest unused first

    @property
    def used(self) -> int:
        """How many have users."""
        return len(self._users)

    @property
    def unused(self) -> int:
        """How many have none, and hold what a later request can use."""
        return len(self._unused)

    def take(self) -> int:
        """A block for one user, whatever it held."""
        if self._free:
            block = self._free.pop()
            self._emptied.discard(block)
        elif self._unused and (self.most is None or self.count >= self.most):
            block = self._evict()
        else:
            block, self.count = self.count, self.count + 1
        self._users[block] = 1
        return block

    def share(self, block: int) -> int:
        """One user more of a block."""
        self._users[block] = self._users.get(block, 0) + 1
        self._unused.pop(block, None)
        return block

    def release(self, blocks: list[int]) -> None:
        """One user less of some blocks, which stand in the order of their tokens; the last of them goes first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._kept:
                self._unused[block] = None
            else:
                self._put_free(block)
        while self.most_unused is not None and self.unused > self.most_unused:
            self._put_free(self._evict())

    def emptied(self) -> list[int]:
        """Blocks that hold nothing, and have held something since they were last told here."""
        told, self._emptied = sorted(self._emptied), set()
        return told

    def _put_free(self, block: int) -> None:
        self._free.append(block)
        self._emptied.add(block)

    def keep(self, block: int, before: bytes, tokens: Tokens) -> int:
        """Let later requests use what a block holds; returns the block that is to be used for it from now on.

        That is another one if the same was kept already: the given one loses its user.
        """
        key = chained(before, tokens)
        known = self._by_key.get(key)
        if known is not None and known != block:
            self.share(known)
            self.release([block])
            return known
        self._kept[block] = _Kept(key, before, tokens)
        self._by_key[key] = block
        self._followers.setdefault(before, []).append(block)
        return block

    def find(self, key: bytes) -> int | None:
        """The block with a key, which has a user more; None if there is none."""
        block = self._by_key.get(key)
        return None if block is None else self.share(block)

    def find_beginning(self, before: bytes, tokens: Tokens) -> tuple[int, int]:
        """The block behind `before` that has most first tokens in common with some, and how many; 0 if none has."""
        best, most = -1, 0
        for block in self._followers.get(before, ())[-MOST_COMPARED:]:
            held = self._kept[block].tokens[: len(tokens)]
            same = held == tokens[: len(held)]
            common = len(held) if same.all() else int(same.argmin())
            if common > most:
                best, most = block, common
        return best, most

    def _evict(self) -> int:
        """The block that is unused for longest, which holds nothing any more."""
        block, _ = self._unused.popitem(last=False)
        self.evictions += 1
        kept = self._kept.pop(block)
        del self._by_key[kept.key]
        followers = self._followers[kept.before]
        followers.remove(block)
        if not followers:
            del self._followers[kept.before]
        return block
