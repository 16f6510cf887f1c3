"""The OpenAPI document of a table of routes."""

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from thimble import __version__

_REF = "#/components/schemas/{model}"


def document(routes: Sequence[Any]) -> dict[str, Any]:
    """The document, from the same table and the same bodies that requests are checked by."""
    bodies = list(dict.fromkeys(route.body for route in routes if route.body))
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    components = {**schemas.get("$defs", {}), "Error": _ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path.replace(":path", ""), {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Thimble", "version": __version__, "description": "One base and many adapters."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def _operation(route: Any) -> dict[str, Any]:
    error = {
        "description": "Refused.",
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
    }
    good = {"description": route.summary, "content": {route.gives: {}}}
    if "json" in route.gives:
        good["content"][route.gives] = {"schema": {"type": "object"}}
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__.strip("_"),
        "summary": route.summary,
        "responses": {"200": good, "4XX": error, "503": error},
        "security": [] if route.access == "public" else [{}, {"key": []}],
    }
    if route.is_answering:
        good["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    if "{" in route.path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if route.body:
        schema = {"$ref": _REF.format(model=route.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
