"""The objects that an LLMService owns, each made by a pure function from the service alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .api import LLMServiceSpec
from .observed import Service


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the operator's installation decides for all services.

    ``bind_pod_ip``: agents and gateways listen on their pod's IP only, for nodes whose pods share a network.
    """

    image: str  # of agents and gateways
    namespace: str  # the operator's own; its pods may talk to agents
    bind_pod_ip: bool = False


class TemplateError(ValueError):
    """spec.template or spec.gateway.template cannot be merged; the message names the field."""


def revision(spec: LLMServiceSpec, defaults: Defaults) -> str:
    """10 hex digits of all that makes agents' pods differ: not replicas, balance, drain, gateway."""
    raise NotImplementedError


def agent_pod(service: Service, name: str, revision: str, defaults: Defaults) -> dict[str, Any]:
    """One agent's pod. TemplateError if spec.template does not fit."""
    raise NotImplementedError


def companions(service: Service, defaults: Defaults) -> list[dict[str, Any]]:
    """Everything but the agents' pods and the Secret, in the order in which it is to be applied."""
    raise NotImplementedError


def retired(service: Service, defaults: Defaults) -> list[tuple[str, str, str]]:
    """(apiVersion, kind, name) of the companions that this spec does not want."""
    raise NotImplementedError


def secret(service: Service, token: str) -> dict[str, Any]:
    """Secret NAME-internal. Create it once with a random token and never change it."""
    raise NotImplementedError
