"""`/v1/chat/completions`: the next message of a conversation, whole or as it is written."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from thimble.server.answer import Place, chat_log_probs
from thimble.server.bodies import ChatBody
from thimble.server.generation import Generation
from thimble.server.prepare import prepare_chat
from thimble.server.replies import Events, Query, Reply
from thimble.server.service import Service
from thimble.server.tool_calls import Call


async def answer_chat(service: Service, query: Query[ChatBody]) -> Reply:
    """Answer a conversation."""
    body = query.body
    parts = await service.prepare(prepare_chat, service, body)
    chosen = await service.choose(body.model, body.lora)
    generation = Generation(service, parts, chosen, query.log)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": chosen.name,
            "system_fingerprint": chosen.fingerprint}  # fmt: skip
    if body.stream:
        has_usage = bool(body.stream_options and body.stream_options.include_usage)
        return Events(_chunks(service, generation, head, len(parts), has_usage), generation.close)
    try:
        return await _whole(service, generation, head, len(parts))
    finally:
        generation.close()


async def _chunks(
    service: Service, generation: Generation, head: dict[str, Any], answers: int, has_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    """Chunks as they come; None where nothing came for a while."""

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, places: list[Place] | None = None) -> Any:
        log_probs = chat_log_probs(places, service.tokenizer) if places else None
        choice = {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish}
        usage = {"usage": None} if has_usage else {}
        return {**head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    counts = [0] * answers
    for index in range(answers):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for told in generation.deltas():
        if not told:
            yield None
        for index, (text, calls, places, finish) in told:
            if text or places:
                yield chunk(index, {"content": text}, places=list(places))
            for tool_call in calls:
                yield chunk(index, {"tool_calls": [tool_call.as_sent(counts[index])]})
                counts[index] += 1
            if finish:
                yield chunk(index, {}, finish)
    if has_usage:
        yield {**head, "object": "chat.completion.chunk", "choices": [], "usage": generation.usage}


async def _whole(service: Service, generation: Generation, head: dict[str, Any], answers: int) -> dict[str, Any]:
    texts, finishes = [""] * answers, ["stop"] * answers
    places: list[list[Place]] = [[] for _ in range(answers)]
    calls: list[list[Call]] = [[] for _ in range(answers)]
    async for told in generation.deltas():
        for index, delta in told:
            texts[index] += delta.text
            calls[index] += delta.calls
            places[index] += delta.places
            finishes[index] = delta.finish or finishes[index]
    choices = []
    for index in range(answers):
        message: dict[str, Any] = {"role": "assistant", "content": texts[index], "refusal": None}
        if calls[index]:
            message["content"] = texts[index] or None
            message["tool_calls"] = [tool_call.as_sent() for tool_call in calls[index]]
        log_probs = chat_log_probs(places[index], service.tokenizer) if places[index] else None
        choices.append({
            "index": index, "message": message, "logprobs": log_probs, "finish_reason": finishes[index],
        })  # fmt: skip
    return {**head, "object": "chat.completion", "choices": choices, "usage": generation.usage}
