"""The HTTP contract: what /openapi.json promises, fuzzed against the running agent."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from blockyard.agent.openapi import document

from .process import MODEL, AgentProcess

EXAMPLES = 12  # per operation

# Not asked: that every valid request is served. Limits such as the context length and the pool depend on the
# model and are no part of the schema; that such a refusal is a documented 4xx is checked like all else.
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


# After a drain nothing else could be asked; test_drain.py asks for those.
api = schemathesis.openapi.from_dict(copy.deepcopy(document())).exclude(path="/drain")
api.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])


def soften(body: Any) -> None:
    """Ask the model that is there for few tokens; what was invalid stays so, and what was valid too."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) <= 512:
        body["model"] = MODEL
    for field in ("max_tokens", "max_completion_tokens"):
        value = body.get(field)
        if ("messages" in body and value is None) or (type(value) is int and 1 < value < 2**31):
            body[field] = 1
        if field == "max_completion_tokens" and "messages" not in body:
            body.pop(field, None)
    for field in ("n", "best_of"):
        if type(body.get(field)) is int and 2 < body[field] <= 64:
            body[field] = 2


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left(agent: AgentProcess) -> Iterator[None]:
    yield
    agent.idle()


@api.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_fuzzed_requests_get_documented_answers(case: Any, agent: AgentProcess) -> None:
    soften(case.body)
    response = case.call(base_url=agent.url, timeout=60)
    case.validate_response(response, checks=CHECKS)
    if 400 <= response.status_code < 500 and case.path not in ("/healthz", "/readyz"):
        error = json.loads(response.content)["error"]
        assert error["message"]
        assert error["type"]


def test_the_served_document_is_this_one(agent: AgentProcess) -> None:
    assert agent.get("/openapi.json") == document()
