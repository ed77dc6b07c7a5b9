"""The gateway's settings: flags, and environment variables (``BLOCKYARD_GATEWAY_`` + name)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..errors import SettingsError
from .endpoints import Endpoints, FileEndpoints, ServiceAccount, SliceEndpoints


class GatewaySettings(BaseSettings):
    """Everything that can be set on a gateway."""

    model_config = SettingsConfigDict(env_prefix="BLOCKYARD_GATEWAY_", extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one and prints it")
    agents_file: Path | None = Field(
        None, description='where the agents are: a JSON list of {"name", "url"}, read again when it changes'
    )
    namespace: str | None = Field(None, description="or, in Kubernetes: the namespace of the LLMService")
    service: str | None = Field(None, description="and its name: agents are the endpoints of NAME-agents")
    serviceaccount: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        description="folder with the token and the CA for Kubernetes' API",
    )
    token: str | None = Field(
        None, min_length=1, description="sent to agents, and asked for by /status, as bearer token"
    )
    token_dir: Path | None = Field(
        None, description="or a folder with it in a file token, which is read again when it changes"
    )
    keys_dir: Path | None = Field(
        None,
        description="API keys: a file is a tenant, its lines are keys; without it nobody is asked for one",
    )
    requests_per_minute: int | None = Field(None, ge=1, description="of one tenant, at this gateway")
    concurrent_requests: int | None = Field(None, ge=1, description="of one tenant, at this gateway")
    max_attempts: int = Field(8, ge=1, le=100, description="agents that a request is sent to at most")
    patience: float = Field(
        30.0, ge=0, description="seconds a request waits for an agent in all, while none can take it"
    )
    request_timeout: float = Field(1800.0, gt=0, description="seconds a request may take in all")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="largest request body; more get a 413")
    client_timeout: float = Field(
        60.0, gt=0, description="seconds a client may take to send its body or to take what is sent to it"
    )
    linger: float = Field(
        0.0,
        ge=0,
        description="seconds after SIGTERM in which new requests are still taken, for balancers to learn",
    )
    grace_period: float = Field(30.0, ge=0, description="seconds that open requests get after that")
    ready_without_agents: bool = Field(False, description="be ready also while no agent is")

    @classmethod
    def load(cls, flags: dict[str, Any]) -> GatewaySettings:
        """Merge flags and environment; SettingsError names each bad setting."""
        try:
            settings = cls(**flags)
        except ValidationError as error:
            problems = [
                f"{(name := '.'.join(map(str, e['loc'])))} (--{name.replace('_', '-')}, "
                f"BLOCKYARD_GATEWAY_{name.upper()}): {e['msg']} (got {e['input']!r})"
                for e in error.errors(include_url=False)
            ]
            raise SettingsError("; ".join(problems)) from None
        in_kubernetes = settings.namespace is not None and settings.service is not None
        if in_kubernetes == (settings.agents_file is not None) or (
            not in_kubernetes and (settings.namespace or settings.service)
        ):
            raise SettingsError(
                "where are the agents? Set either agents_file (BLOCKYARD_GATEWAY_AGENTS_FILE), or both "
                "namespace and service (BLOCKYARD_GATEWAY_NAMESPACE, BLOCKYARD_GATEWAY_SERVICE)"
            )
        return settings

    def endpoints(self) -> Endpoints:
        """Where the agents come from. SettingsError if Kubernetes is meant and not there."""
        if self.agents_file is not None:
            return FileEndpoints(self.agents_file)
        host, port = (
            os.environ.get("KUBERNETES_SERVICE_HOST"),
            os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
        )
        account = ServiceAccount(self.serviceaccount)
        if not host:
            raise SettingsError("KUBERNETES_SERVICE_HOST is not set; outside Kubernetes use agents_file")
        try:
            account.trust()
            account.headers()
        except OSError as error:
            raise SettingsError(f"serviceaccount {self.serviceaccount}: {error}") from None
        host = f"[{host}]" if ":" in host else host
        assert self.namespace is not None and self.service is not None
        return SliceEndpoints(f"https://{host}:{port}", self.namespace, f"{self.service}-agents", account)
