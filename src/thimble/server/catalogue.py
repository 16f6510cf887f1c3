"""What is served and how it fares: models, adapters, tokens, health and figures."""

from typing import Any

from thimble.server.bodies import DetokenizeBody, LoadAdapterBody, TokenizeBody, UnloadAdapterBody
from thimble.server.engine_thread import ENDED
from thimble.server.prepare import encode_chat, encode_prompt
from thimble.server.refusal import Refusal, bad_field
from thimble.server.replies import Query, Reply, Text
from thimble.server.service import Service


async def list_models(service: Service, query: Query[None]) -> Reply:
    """The base first, then all adapters, whether they were used before or not."""
    names = [service.base_name, *service.adapters.names]
    return {"object": "list", "data": [_model(service, name) for name in names]}


async def show_model(service: Service, query: Query[None]) -> Reply:
    """One of them."""
    name = query.path["model"]
    if not name:
        raise Refusal(404, "there is no /v1/models/: the list of all models is /v1/models, without the last slash")
    service.check_name(name)
    return _model(service, service.base_name if service.is_base(name) else service.own_name(name))


def _model(service: Service, name: str) -> dict[str, Any]:
    is_base = service.is_base(name)
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "thimble",
        "root": str(service.model.base.path) if is_base else service.adapters.path(name),
        "parent": None if is_base else service.base_name,
        "max_model_len": service.context,
    }


async def load_adapter(service: Service, query: Query[LoadAdapterBody]) -> Reply:
    """Serve an adapter from now on; answers under way go on with what they began with."""
    name, path = query.body.lora_name, query.body.lora_path
    query.log["adapter"] = name
    if service.is_base(name) or ":" in name:
        raise bad_field("lora_name", f"{name!r} is the name of the base: choose another one")
    if name in service.adapters.names and not query.body.load_inplace:
        raise Refusal(409, f"lora_name: there is an adapter {name!r} already: add load_inplace to replace it",
                      "lora_name")  # fmt: skip
    await service.prepare(service.adapters.load, name, path)
    return {"status": "ok", "lora_name": name}


async def unload_adapter(service: Service, query: Query[UnloadAdapterBody]) -> Reply:
    """Serve an adapter no longer; answers under way go on."""
    name = query.body.lora_name
    query.log["adapter"] = name
    if name not in service.adapters.names:
        raise Refusal(404, f"there is no adapter {name[:128]!r}", "lora_name", "model_not_found")
    service.adapters.remove(name)
    return {"status": "ok", "lora_name": name}


async def tokenize(service: Service, query: Query[TokenizeBody]) -> Reply:
    """A text or a conversation as tokens."""
    body = query.body
    service.check_name(body.model)
    if body.messages is not None:
        ids = await service.prepare(encode_chat, service, body.messages, body.tools, body.chat_template_kwargs)
    else:
        ids = await service.prepare(encode_prompt, service, body.prompt or "", "prompt", body.add_special_tokens)
    told: dict[str, Any] = {"count": len(ids), "max_model_len": service.context, "tokens": ids.tolist()}
    if body.return_token_strs:
        told["token_strs"] = [service.tokenizer.piece(index) for index in told["tokens"]]
    return told


async def detokenize(service: Service, query: Query[DetokenizeBody]) -> Reply:
    """Tokens as text."""
    service.check_name(query.body.model)
    beyond = next((token for token in query.body.tokens if token >= service.vocab_size), None)
    if beyond is not None:
        raise bad_field("tokens", f"token {beyond} is not one of the {service.vocab_size:,} of the base")
    return {"prompt": await service.prepare(service.tokenizer.decode, query.body.tokens)}


async def health(service: Service, query: Query[None]) -> Reply:
    """Whether the engine runs."""
    if not service.engine.is_alive:
        raise Refusal(503, ENDED)
    return {"status": "ok"}


async def ready(service: Service, query: Query[None]) -> Reply:
    """Whether requests are taken."""
    if service.is_draining or not service.engine.is_alive:
        raise Refusal(503, "no requests are taken: the server stops")
    return {"status": "ready"}


async def metrics(service: Service, query: Query[None]) -> Reply:
    """Figures for Prometheus."""
    return Text(service.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")
