"""The operator's settings, from environment variables ``BLOCKYARD_OPERATOR_*`` alone: it runs in a pod."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "BLOCKYARD_OPERATOR_"
SERVICEACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class SettingsError(Exception):
    """A setting is missing or cannot be used; the message names its variable."""


class OperatorSettings(BaseSettings):
    """Everything that can be set on the operator."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", env_ignore_empty=True)

    agent_image: str = Field(min_length=1, description="image of agents and gateways that name none")
    bind_pod_ip: bool = Field(False, description="agents and gateways listen on their pod's IP only")
    namespaces: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="namespaces to serve, by commas; all if empty"
    )
    lease_namespace: str = Field("", description="where the Lease is; the operator's own namespace if empty")
    lease_name: str = Field("blockyard-operator", min_length=1, description="one operator acts per Lease")
    identity: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        max_length=200,
        description="name in the Lease and in events; each life adds something of its own",
    )
    host: str = Field("0.0.0.0", description="address of health and metrics")
    port: int = Field(8080, ge=0, le=65535, description="port of health and metrics; 0 takes a free one")
    serviceaccount: Path = Field(SERVICEACCOUNT, description="folder with token, ca.crt and namespace")
    kubeconfig: Path | None = Field(None, description="kubeconfig file; KUBECONFIG counts too")
    workers: int = Field(8, ge=1, le=256, description="services reconciled at once")
    resync_seconds: float = Field(300.0, ge=1, description="everything is listed anew and compared so often")
    polls_per_second: float = Field(
        200.0, gt=0, description="polls of all agents together; busy ones wait longer in a large fleet"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(name.strip() for name in value.split(",") if name.strip())
            if isinstance(value, str)
            else value
        )

    @classmethod
    def load(cls) -> OperatorSettings:
        """From the environment. SettingsError names each variable that is wrong."""
        try:
            found = cls()  # type: ignore[call-arg]  # required fields come from the environment
        except ValidationError as error:
            problems = (
                f"{ENV_PREFIX}{'_'.join(map(str, problem['loc'])).upper()}: {problem['msg']}"
                for problem in error.errors(include_url=False)
            )
            raise SettingsError("; ".join(problems)) from None
        if found.kubeconfig is None and (path := os.environ.get("KUBECONFIG")):
            found.kubeconfig = Path(path)
        if not found.lease_namespace:
            found.lease_namespace = found._own_namespace()
        return found

    def _own_namespace(self) -> str:
        try:
            return (self.serviceaccount / "namespace").read_text().strip() or "default"
        except OSError:
            return "default"
