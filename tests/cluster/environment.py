"""The environment and command line of a container's process, by Kubernetes' rules."""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .api import Raw

# Gives a Secret or a ConfigMap of the pod's namespace, or None where there is none.
Find = Callable[[str, str], Awaitable[Raw | None]]


class CannotStart(Exception):
    """A container cannot be started as it is; ``reason`` is what the kubelet would write as its state."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def expand(text: str, known: Mapping[str, str]) -> str:
    """``$(NAME)`` of known variables; unknown ones stay as they are, and ``$$`` stands for ``$``."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return known.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]+)\)", value, text)


def field(pod: Raw, path: str) -> str:
    """The value that a ``fieldRef`` names."""
    metadata, status = pod["metadata"], pod.get("status", {})
    if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str(metadata.get(match[1], {}).get(match[2], ""))
    values: dict[str, Any] = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": pod["spec"].get("nodeName"),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName"),
        "status.podIP": status.get("podIP"),
        "status.podIPs": status.get("podIP"),
        "status.hostIP": status.get("hostIP"),
        "status.hostIPs": status.get("hostIP"),
    }
    if values.get(path) is None:
        raise CannotStart("CreateContainerConfigError", f"fieldRef {path} is not played by the node stand-in")
    return str(values[path])


async def environment(container: Raw, pod: Raw, find: Find) -> dict[str, str]:
    """The variables that the pod's manifest gives to a container. Raises CannotStart."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        prefix = source.get("prefix", "")
        for kind, name in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
            if reference := source.get(name):
                entries = await _entries(find, kind, reference)
                found |= {prefix + key: value.decode() for key, value in (entries or {}).items()}
    for entry in container.get("env", []):
        name = entry["name"]
        origin = entry.get("valueFrom")
        if not origin:
            found[name] = expand(entry.get("value", ""), found)
        elif reference := origin.get("fieldRef"):
            found[name] = field(pod, reference["fieldPath"])
        elif "secretKeyRef" in origin or "configMapKeyRef" in origin:
            kind, reference = (
                ("Secret", origin["secretKeyRef"])
                if "secretKeyRef" in origin
                else ("ConfigMap", origin["configMapKeyRef"])
            )
            entries = await _entries(find, kind, reference)
            if entries is not None and reference["key"] in entries:
                found[name] = entries[reference["key"]].decode()
            elif not reference.get("optional"):
                where = f"{kind} {pod['metadata']['namespace']}/{reference['name']}"
                raise CannotStart(
                    "CreateContainerConfigError", f"couldn't find key {reference['key']} in {where}"
                )
        else:
            raise CannotStart(
                "CreateContainerConfigError", f"env {name}: the node stand-in does not play {origin}"
            )
    return found


def data(source: Raw) -> dict[str, bytes]:
    """The entries of a Secret or a ConfigMap."""
    if source["kind"] == "Secret":
        return {key: base64.b64decode(value) for key, value in (source.get("data") or {}).items()}
    texts = {key: value.encode() for key, value in (source.get("data") or {}).items()}
    return texts | {key: base64.b64decode(value) for key, value in (source.get("binaryData") or {}).items()}


async def _entries(find: Find, kind: str, reference: Raw) -> dict[str, bytes] | None:
    source = await find(kind, reference["name"])
    if source is None:
        if reference.get("optional"):
            return None
        raise CannotStart("CreateContainerConfigError", f'{kind.lower()} "{reference["name"]}" not found')
    return data(source)
