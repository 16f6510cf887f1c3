"""Writing text: rows are read into a key-value cache, then continued together, greedily or by sampling."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.backends.torch.decoder import Decoder
from thimble.backends.torch.kv_cache import KvCache
from thimble.backends.torch.threads import map_parallel

T = TypeVar("T")

PASS_TOKENS = 1024  # read in one pass
ROWS_STEP = 8  # the rows that are written together become fewer in steps of so many


class Sampler:
    """Chooses next tokens.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: Only the likeliest tokens that make up this share are drawn from.
        seed: Start of the random choices.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.random = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor) -> Tensor:
        """float32 (rows, vocabulary) to int64 (rows,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        shares, order = torch.softmax(logits / self.temperature, -1).sort(-1, descending=True)
        shares[shares.cumsum(-1) - shares > self.top_p] = 0  # the likeliest token is always kept
        return order.gather(1, torch.multinomial(shares, 1, generator=self.random))[:, 0]


def read(
    decoder: Decoder,
    rows: Sequence[NDArray[np.int32]],
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    pass_tokens: int = PASS_TOKENS,
    tasks_at_once: int = 1,
    on_pass: Callable[[Tensor, range], T] = lambda hidden, rows: None,
) -> tuple[KvCache, Tensor, list[T]]:
    """Read rows, a few at a time on every core, and remember their prompts.

    Args:
        decoder: The base with whatever adapter hangs on it.
        rows: int32 (length,) each.
        prompt_tokens: How many tokens of each row are its prompt, at least one; what follows is read and forgotten.
        max_new_tokens: Room for answers.
        pass_tokens: Most tokens read in one pass; a longer row makes a pass of its own.
        tasks_at_once: Passes that run side by side.
        on_pass: Hears of the hidden states of each pass, (tokens, hidden), and which rows they are.

    Returns:
        The cache, the hidden state of the last token of each prompt, (rows, hidden), and what `on_pass` returned.
    """
    capacity = max(prompt_tokens) + max_new_tokens
    cache = KvCache(len(decoder.blocks), len(rows), capacity, decoder.blocks[0].attention, decoder.compute)

    @torch.no_grad()
    def read_pass(numbers: range) -> tuple[Tensor, T]:
        group = [rows[number] for number in numbers]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in group])]).astype(np.int64)
        slots = [(number, prompt_tokens[number]) for number in numbers]
        hidden = decoder.hidden(np.concatenate(group), decoder.pack(starts, cache, slots))
        ends = [start + kept - 1 for start, (_, kept) in zip(starts.tolist(), slots, strict=False)]
        return hidden[ends], on_pass(hidden, numbers)

    passes = _passes([len(row) for row in rows], pass_tokens)
    results = list(map_parallel([functools.partial(read_pass, numbers) for numbers in passes], tasks_at_once))
    cache.lengths += torch.tensor(prompt_tokens)
    return cache, torch.cat([last for last, _ in results]), [told for _, told in results]


def _passes(lengths: Sequence[int], most: int) -> list[range]:
    """Cut rows into stretches of at most so many tokens."""
    passes, begin, tokens = [], 0, 0
    for number, length in enumerate(lengths):
        if tokens and tokens + length > most:
            passes.append(range(begin, number))
            begin, tokens = number, 0
        tokens += length
    return [*passes, range(begin, len(lengths))]


@torch.no_grad()
def write(
    decoder: Decoder,
    cache: KvCache,
    hidden: Tensor,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampler: Sampler | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continue what was read.

    Args:
        decoder: The one that read.
        cache: From `read`; it is used up.
        hidden: From `read`.
        max_new_tokens: Most tokens written for a row.
        stop_ids: Tokens that end an answer; they are not part of it.
        sampler: Default: greedy.
        on_token: Called with (row, token) as each token is written; returning True ends everything.

    Returns:
        The new tokens of each row.
    """
    sampler = sampler or Sampler()
    answers: list[list[int]] = [[] for _ in hidden]
    active: list[int | None] = list(range(len(answers)))  # row at each place of the cache, None if its answer is done
    for written in range(1, max_new_tokens + 1):
        tokens = sampler.choose(decoder.logits(hidden)).tolist()
        for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
            if token in stop_ids:
                active[place] = None
            elif row is not None:
                answers[row].append(token)
                if on_token and on_token(row, token):
                    return answers
        kept = _worth_keeping(active)
        if not kept or written == max_new_tokens:
            break
        if len(kept) < len(active):
            order = cache.keep(kept)
            active, tokens = [active[place] for place in order], [tokens[place] for place in order]
        packed = decoder.pack(np.arange(len(active) + 1), cache)
        hidden = decoder.hidden(np.array(tokens, np.int32), packed)
        cache.lengths += 1
    return answers


def _worth_keeping(active: Sequence[int | None]) -> list[int]:
    """Places to go on with: those not done, and some that are, since a new number of rows is a new set of products."""
    going = [place for place, row in enumerate(active) if row is not None]
    done = [place for place, row in enumerate(active) if row is None]
    spare = -len(going) % ROWS_STEP if going else 0
    return sorted(going + done[:spare])
