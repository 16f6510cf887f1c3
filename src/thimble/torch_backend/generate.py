"""Writing text: greedy or sampled continuation of a batch of prompts with a key-value cache."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thimble.torch_backend.decoder import Decoder
from thimble.torch_backend.kv_cache import KvCache

PROMPT_TOKENS = 2048  # of prompts read in one pass


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


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[NDArray[np.int32]],
    max_new_tokens: int,
    stop_ids: frozenset[int],
    sampler: Sampler | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continue prompts.

    Args:
        decoder: The base with whatever adapter hangs on it.
        prompts: int32 (length,) each; at least one token.
        max_new_tokens: Most tokens written per prompt.
        stop_ids: Tokens that end an answer; they are not part of it.
        sampler: Default: greedy.
        on_token: Called with (prompt number, token) as each token is written; returning True ends everything.

    Returns:
        The new tokens of each prompt.
    """
    sampler = sampler or Sampler()
    capacity = max(len(prompt) for prompt in prompts) + max_new_tokens
    spec = decoder.blocks[0].attention
    cache = KvCache(len(decoder.blocks), len(prompts), capacity, spec, decoder.compute)
    hidden = _read_prompts(decoder, prompts, cache)
    answers: list[list[int]] = [[] for _ in prompts]
    active = torch.arange(len(prompts))
    for _ in range(max_new_tokens):
        tokens = sampler.choose(decoder.logits(hidden))
        is_open = []
        for number, token in zip(active.tolist(), tokens.tolist(), strict=True):
            is_open.append(token not in stop_ids)
            if is_open[-1]:
                answers[number].append(token)
                if on_token and on_token(number, token):
                    return answers
        kept = torch.tensor(is_open).nonzero()[:, 0]
        if not len(kept) or max(len(answer) for answer in answers) >= max_new_tokens:
            break
        if len(kept) < len(active):
            cache.keep(kept)
            active, tokens = active[kept], tokens[kept]
        first = cache.lengths.numpy()
        packed = decoder.pack(np.arange(len(active) + 1), first, cache)
        hidden = decoder.hidden(tokens.numpy().astype(np.int32), packed)
        cache.lengths += 1
    return answers


def _read_prompts(decoder: Decoder, prompts: Sequence[NDArray[np.int32]], cache: KvCache) -> Tensor:
    """Fill the cache, a few prompts at a time; return the last hidden state of each, (prompts, hidden)."""
    last, begin = [], 0
    while begin < len(prompts):
        end, tokens = begin + 1, len(prompts[begin])
        while end < len(prompts) and tokens + len(prompts[end]) <= PROMPT_TOKENS:
            tokens += len(prompts[end])
            end += 1
        group = prompts[begin:end]
        starts = np.concatenate([[0], np.cumsum([len(prompt) for prompt in group])]).astype(np.int64)
        cache.reading = range(begin, end)
        hidden = decoder.hidden(np.concatenate(group), decoder.pack(starts, cache=cache))
        last.append(hidden[torch.from_numpy(starts[1:] - 1)])
        begin = end
    cache.lengths += torch.tensor([len(prompt) for prompt in prompts])
    cache.reading, cache.is_prompt = range(len(prompts)), False
    return torch.cat(last)
