"""`/v1/completions`: the continuation of texts or tokens, whole or as it is written."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from thimble.server.answer import Place, completion_log_probs
from thimble.server.bodies import CompletionBody
from thimble.server.generation import Generation
from thimble.server.prepare import prepare_completion
from thimble.server.replies import Events, Query, Reply
from thimble.server.service import Service


async def answer_completion(service: Service, query: Query[CompletionBody]) -> Reply:
    """Continue texts."""
    body = query.body
    parts = await service.prepare(prepare_completion, service, body)
    chosen = await service.choose(body.model, body.lora)
    generation = Generation(service, parts, chosen, query.log)
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": chosen.name, "system_fingerprint": chosen.fingerprint}  # fmt: skip
    echoed = [part.echo for part in parts]
    if body.stream:
        has_usage = bool(body.stream_options and body.stream_options.include_usage)
        return Events(_chunks(service, generation, head, echoed, has_usage), generation.close)
    try:
        return await _whole(service, generation, head, echoed, body.logprobs is not None)
    finally:
        generation.close()


async def _chunks(
    service: Service, generation: Generation, head: dict[str, Any], echoed: Sequence[str], has_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    """Chunks as they come; None where nothing came for a while."""

    def chunk(index: int, text: str, finish: str | None = None, places: Sequence[Place] = ()) -> dict[str, Any]:
        log_probs = completion_log_probs(places, service.tokenizer) if places else None
        choice = {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish}
        return {**head, "choices": [choice], **({"usage": None} if has_usage else {})}

    for index, text in enumerate(echoed):
        if text:
            yield chunk(index, text)
    async for told in generation.deltas():
        if not told:
            yield None
        for index, (text, _, places, finish) in told:
            if text or places or finish:
                yield chunk(index, text, finish, places)
    if has_usage:
        yield {**head, "choices": [], "usage": generation.usage}


async def _whole(
    service: Service, generation: Generation, head: dict[str, Any], echoed: Sequence[str], has_log_probs: bool
) -> dict[str, Any]:
    texts, finishes = list(echoed), ["stop"] * len(echoed)
    places: list[list[Place]] = [[] for _ in echoed]
    async for told in generation.deltas():
        for index, delta in told:
            texts[index] += delta.text
            places[index] += delta.places
            finishes[index] = delta.finish or finishes[index]
    choices = [
        {
            "index": index,
            "text": text,
            "logprobs": completion_log_probs(places[index], service.tokenizer) if has_log_probs else None,
            "finish_reason": finishes[index],
        }
        for index, text in enumerate(texts)
    ]
    return {**head, "choices": choices, "usage": generation.usage}
