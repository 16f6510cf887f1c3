"""Modules that write what they hear: the loss of the tokens of a text, and the tokens that they write themselves.

A text begins with tokens that are given and not learned, such as Whisper's for its language and task.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100  # a label that is not compared


def token_logits(module: nn.Module, inputs: Mapping[str, Tensor], prompt: Tensor, labels: Tensor) -> Tensor:
    """Logits at the places that have a label, and at no other: they are the largest of what a decoder makes.

    Args:
        module: An encoder with a decoder, of transformers.
        inputs: What the encoder takes, by name.
        prompt: int64 (rows, given tokens).
        labels: int64 (rows, tokens), of the tokens behind the prompt; -100 fills rows up.

    Returns:
        float32 (labels that are compared, vocabulary).
    """
    is_compared = labels != IGNORED
    given = torch.cat([prompt, labels[:, :-1].clamp(min=0)], 1)
    behind = functional.pad(is_compared, (prompt.shape[1] - 1, 0))
    hook = module.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][behind],))
    try:
        logits: Tensor = module(**inputs, decoder_input_ids=given, use_cache=False).logits
    finally:
        hook.remove()
    return logits.float()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, nats summed over its tokens, float32 (rows,); logits as `token_logits` gives them."""
    is_compared = labels != IGNORED
    nats = functional.cross_entropy(logits, labels[is_compared], reduction="none")
    return nats.new_zeros(len(labels)).index_add(0, is_compared.nonzero()[:, 0], nats)


@torch.no_grad()
def write_tokens(module: Any, inputs: Mapping[str, Tensor], prompt: Tensor, most: int) -> Tensor:
    """What a module writes greedily, as `generate` of transformers does; the encoder runs once.

    Args:
        module: An encoder with a decoder, of transformers; its generation_config says which tokens end a text, and
            which are never written, or not first.
        inputs: What the encoder takes, by name.
        prompt: int64 (rows, given tokens), alike in all rows.
        most: Tokens that a row has at most.

    Returns:
        int64 (rows, tokens) without the prompt; rows that ended are filled up with the end token.
    """
    settings = module.generation_config
    ends = torch.tensor(settings.eos_token_id).reshape(-1)
    never = torch.tensor(settings.suppress_tokens or [], dtype=torch.int64)
    not_first = torch.tensor(settings.begin_suppress_tokens or [], dtype=torch.int64)
    encoded = module.get_encoder()(**inputs)
    beside = {name: array for name, array in inputs.items() if name == "attention_mask"}
    most = min(most, _positions(module) - prompt.shape[1])
    written = torch.full((len(prompt), max(0, most)), int(ends[0]))
    rows, step, cache, length = torch.arange(len(prompt)), prompt, None, 0
    while length < most and len(rows):
        made = module(
            encoder_outputs=encoded, decoder_input_ids=step, past_key_values=cache, use_cache=True, **beside
        )  # fmt: skip
        logits, cache = made.logits[:, -1].float(), made.past_key_values
        banned = never if length else torch.cat([never, not_first])
        found = logits.masked_fill(torch.isin(torch.arange(logits.shape[1]), banned), -torch.inf).argmax(-1)
        written[rows, length], length = found, length + 1
        goes_on = (~torch.isin(found, ends)).nonzero()[:, 0]
        if len(goes_on) < len(rows):  # those that ended cost nothing more
            rows, found = rows[goes_on], found[goes_on]
            cache.reorder_cache(goes_on)
            encoded["last_hidden_state"] = encoded.last_hidden_state[goes_on]
            beside = {name: array[goes_on] for name, array in beside.items()}
        step = found[:, None]
    return written[:, :length]


def _positions(module: Any) -> int:
    """How many tokens the decoder has positions for."""
    found = getattr(module.config, "max_target_positions", None) or getattr(
        module.config, "max_position_embeddings", 448
    )
    return int(found)
