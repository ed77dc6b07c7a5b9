"""How to reach an API server: what a kubeconfig says of one context."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Access:
    """An API server and the credentials for it; certificates and key are PEM texts."""

    server: str
    authority: str
    token: str = ""
    certificate: str = ""
    key: str = ""

    def with_token(self, token: str) -> Access:
        return replace(self, token=token, certificate="", key="")

    @classmethod
    def of_kubeconfig(cls, path: Path) -> Access:
        """Of its current context. ValueError for credentials that only kubectl can get."""
        config = yaml.safe_load(path.read_text())
        context = _named(config["contexts"], config.get("current-context"))["context"]
        cluster = _named(config["clusters"], context["cluster"])["cluster"]
        user = _named(config["users"], context["user"])["user"]

        def pem(source: dict[str, Any], name: str) -> str:
            if name in source:
                return (path.parent / str(source[name])).read_text()
            return base64.b64decode(source.get(f"{name}-data", "")).decode()

        token = user.get("token", "")
        if not token and "tokenFile" in user:
            token = (path.parent / user["tokenFile"]).read_text().strip()
        found = cls(
            server=cluster["server"].rstrip("/"),
            authority=pem(cluster, "certificate-authority"),
            token=token,
            certificate=pem(user, "client-certificate"),
            key=pem(user, "client-key"),
        )
        if not (found.token or found.certificate):
            raise ValueError(
                f"{path}: user {context['user']} has no token and no client certificate; make one for it"
            )
        return found

    def write_kubeconfig(self, path: Path, *, namespace: str = "default") -> Path:
        """A kubeconfig file (JSON is YAML) that only its owner can read."""

        def encoded(text: str) -> str:
            return base64.b64encode(text.encode()).decode()

        user: dict[str, str] = {"token": self.token} if self.token else {}
        if self.certificate:
            user |= {
                "client-certificate-data": encoded(self.certificate),
                "client-key-data": encoded(self.key),
            }
        cluster = {"server": self.server, "certificate-authority-data": encoded(self.authority)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}
            ],
            "current-context": "test",
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
        return path


def _named(entries: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise ValueError(f"kubeconfig: no entry {name!r} among {[entry['name'] for entry in entries]}")
