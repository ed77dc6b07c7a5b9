"""/openapi.json: the HTTP contract, made from the same models that validate requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .. import __version__
from . import openai_api as api
from .drain import DrainRequest
from .errors import ErrorResponse
from .prefix_sketch import PrefixReport
from .protocol import AgentStatus

_REF = "#/components/schemas/{model}"
_REQUESTS: list[type[BaseModel]] = [api.CompletionRequest, api.ChatRequest, api.TokenizeRequest, DrainRequest]
_RESPONSES: list[type[BaseModel]] = [
    api.CompletionResponse,
    api.ChatResponse,
    api.TokenizeResponse,
    api.ModelList,
    ErrorResponse,
    AgentStatus,
    PrefixReport,
]


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _answer(
    description: str, model: type[BaseModel] | None = None, media: str = "application/json"
) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"} if media != "application/json" else {"type": "object"}
    return {"description": description, "content": {media: {"schema": _ref(model) if model else schema}}}


def _operation(
    summary: str,
    good: dict[str, Any],
    *,
    body: type[BaseModel] | None = None,
    errors: tuple[int, ...] = (),
    parameters: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": good, **{str(s): _answer("error", ErrorResponse) for s in errors}},
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of an agent."""
    _, requests = models_json_schema([(m, "validation") for m in _REQUESTS], ref_template=_REF)
    _, responses = models_json_schema([(m, "serialization") for m in _RESPONSES], ref_template=_REF)
    tenant = {
        "name": "x-tenant",
        "in": "header",
        "required": False,
        "schema": {"type": "string", "maxLength": 128},
        "description": "whose request it is: tenants share fairly and never share cached prefixes",
    }
    # Each event's data is a chunk in OpenAI's form; the last one's is [DONE].
    stream: dict[str, Any] = {"text/event-stream": {}}

    def completion(summary: str, body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
        good = _answer("the answer, or with stream its events", answer)
        good["content"].update(stream)
        errors = (400, 404, 408, 413, 429, 500, 503)
        return {"post": _operation(summary, good, body=body, errors=errors, parameters=[tenant])}

    def probe(summary: str, no: int) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": _answer("yes"), str(no): _answer("no")}}}

    status_parameters = [
        _query("since", {"type": "integer"}, "answer when the version is another one"),
        _query("wait", {"type": "number", "minimum": 0, "maximum": 60}, "seconds to wait for that"),
    ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Blockyard agent", "version": __version__},
        "paths": {
            "/v1/chat/completions": completion("answer a chat", api.ChatRequest, api.ChatResponse),
            "/v1/completions": completion("continue a prompt", api.CompletionRequest, api.CompletionResponse),
            "/v1/models": {"get": _operation("the models served", _answer("models", api.ModelList))},
            "/tokenize": {
                "post": _operation(
                    "token ids of a prompt or chat",
                    _answer("tokens", api.TokenizeResponse),
                    body=api.TokenizeRequest,
                    errors=(400, 404, 408, 413, 503),
                )
            },
            "/status": {
                "get": _operation(
                    "the agent's block pool and load",
                    _answer("status", AgentStatus),
                    errors=(400,),
                    parameters=status_parameters,
                )
            },
            "/prefixes": {
                "get": _operation(
                    "the prompts served lately, as hashes of their beginnings",
                    _answer("what was used after since", PrefixReport),
                    errors=(400,),
                    parameters=[
                        _query("since", {"type": "integer"}, "the version that is known"),
                        _query("incarnation", {"type": "string"}, "and the incarnation it is of"),
                        status_parameters[1],
                    ],
                )
            },
            "/drain": {
                "post": _operation(
                    "take nothing new, and end what runs within a time; may be repeated",
                    _answer("status", AgentStatus),
                    body=DrainRequest,
                    errors=(400, 408, 413),
                )
            },
            "/healthz": probe("alive?", 500),
            "/readyz": probe("ready for requests?", 503),
            "/metrics": {"get": _operation("Prometheus metrics", _answer("metrics", media="text/plain"))},
            "/openapi.json": {"get": _operation("this document", _answer("OpenAPI"))},
        },
        "components": {"schemas": {**requests["$defs"], **responses["$defs"]}},
    }
