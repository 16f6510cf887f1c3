"""The OpenAPI document; `stress/server.py` makes requests from it."""

from thimble.server.routes import ROUTES


def test_the_document_names_every_route_and_every_field(server):
    document = server.http.get("/openapi.json").json()
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == {(route.method, route.path.replace(":path", "")) for route in ROUTES}
    chat = document["components"]["schemas"]["ChatBody"]["properties"]
    assert chat.keys() >= {"messages", "model", "stop", "tools", "response_format", "lora"}
