"""Beginnings that requests have in common, read once: each request takes over the blocks that hold its beginning.

Whole blocks are shared; of the first one that differs, the tokens up to the difference are copied. Requests that come
together and begin alike do not read the same block twice either: the first one reads it, the others wait for it.
"""

import hashlib
from collections.abc import Sequence

from thimble.backends.session import KeyValueCache, Session
from thimble.inference.blocks import Blocks, chained
from thimble.inference.request import ActiveRequest


class Prefixes:
    """What was read before and is still in the cache.

    Args:
        blocks: Of the cache.
        cache: That holds them.
        session: Whose cache it is.
    """

    def __init__(self, blocks: Blocks, cache: KeyValueCache, session: Session) -> None:
        self._blocks, self._cache, self._session = blocks, cache, session
        self._size = cache.block_tokens

    def begin(self, request: ActiveRequest) -> None:
        """Have a request begin behind what is known of its prompt; the last token of it is always read."""
        what = f"{request.adapter.identity} {self._session.position_kind(request.end)}"
        request.chain = [hashlib.blake2b(what.encode(), digest_size=16).digest()]
        self._take_over(request)
        self._copy_beginning(request)

    def leaders(self, requests: Sequence[ActiveRequest]) -> list[ActiveRequest]:
        """Those that read on now; the others wait for a block that one of these reads."""
        found, being_read = [], set()
        for request in requests:
            if request.chain:
                self._take_over(request)
                key = self._next_key(request)
                if key is not None and key in being_read:
                    continue
                being_read.add(key)
            found.append(request)
        return found

    def note(self, request: ActiveRequest) -> None:
        """Keep the blocks that a request has filled."""
        chain = request.chain or []
        while len(chain) * self._size <= request.read:
            place = len(chain) - 1
            tokens = request.tokens(place * self._size, (place + 1) * self._size)
            request.blocks[place] = self._blocks.keep(request.blocks[place], chain[-1], tokens)
            chain.append(chained(chain[-1], tokens))

    def keep_last(self, request: ActiveRequest) -> None:
        """Keep the block that a request leaves half full, too."""
        chain = request.chain or []
        place = len(chain) - 1
        if place * self._size < request.read:
            tokens = request.tokens(place * self._size, request.read)
            request.blocks[place] = self._blocks.keep(request.blocks[place], chain[-1], tokens)

    def _next_key(self, request: ActiveRequest) -> bytes | None:
        """Key of the block that a request fills next, if that lies within its prompt and is not begun."""
        chain, end = request.chain or [], request.read + self._size
        if request.read % self._size or end >= request.prompt_tokens or request.read // self._size != len(chain) - 1:
            return None
        return chained(chain[-1], request.tokens(request.read, end))

    def _take_over(self, request: ActiveRequest) -> None:
        """Share the whole blocks that are known of what a request reads next."""
        while (key := self._next_key(request)) is not None:
            block = self._blocks.find(key)
            if block is None:
                return
            request.blocks.append(block)
            request.chain.append(key)  # type: ignore[union-attr]
            request.read += self._size
            request.cached_tokens += self._size

    def _copy_beginning(self, request: ActiveRequest) -> None:
        """Copy what is known of the block that a request begins in."""
        if request.read % self._size or not request.chain:
            return
        stop = min(request.read + self._size, request.prompt_tokens - 1)
        block, common = self._blocks.find_beginning(request.chain[-1], request.tokens(request.read, stop))
        if not common:
            return
        self._blocks.share(block)  # so that it is not the one that makes room for its copy
        own = self._blocks.take()
        self._cache.reserve(self._blocks.count)
        self._cache.copy(block, own)
        self._blocks.release([block])
        request.blocks.append(own)
        request.read += common
        request.cached_tokens += common
