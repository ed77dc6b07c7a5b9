"""Strategic merge of a partial PodSpec into a whole one, by the rules of ``kubectl patch``.

Maps are merged, null removes a field, lists are replaced, except for those that Kubernetes merges by a
key. Directives: ``$patch: delete`` and ``$patch: replace`` in a map or in an entry of a merged list (an entry
that holds nothing else than ``$patch: replace`` replaces the list), ``$retainKeys`` with the fields to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# List -> the key of its entries and the merged lists inside them; as patchMergeKey in k8s.io/api/core/v1.
# Lists that are not named here are replaced as a whole, tolerations too.
_Lists = Mapping[str, tuple[str, "_Lists"]]
_CONTAINER: _Lists = {
    "env": ("name", {}),
    "ports": ("containerPort", {}),
    "volumeDevices": ("devicePath", {}),
    "volumeMounts": ("mountPath", {}),
}
_POD_SPEC: _Lists = {
    "containers": ("name", _CONTAINER),
    "ephemeralContainers": ("name", _CONTAINER),
    "hostAliases": ("ip", {}),
    "imagePullSecrets": ("name", {}),
    "initContainers": ("name", _CONTAINER),
    "resourceClaims": ("name", {}),
    "schedulingGates": ("name", {}),
    "topologySpreadConstraints": ("topologyKey", {}),
    "volumes": ("name", {}),
}


class TemplateError(ValueError):
    """A pod template does not fit; the message names the field."""


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A new PodSpec: ``base`` with ``patch`` merged into it. TemplateError if they do not fit."""
    return _map(base, patch, _POD_SPEC, "spec")


def _map(base: Mapping[str, Any], patch: Mapping[str, Any], lists: _Lists, path: str) -> dict[str, Any]:
    directive = _directive(patch, path)
    if directive == "delete":
        return {}
    merged = {} if directive == "replace" else dict(deepcopy(base))
    if "$retainKeys" in patch:
        keep = patch["$retainKeys"]
        if not isinstance(keep, list):
            raise TemplateError(f"{path}.$retainKeys must be a list of field names")
        merged = {name: value for name, value in merged.items() if name in keep}
    for name, value in patch.items():
        if name.startswith("$"):
            continue
        field, there = f"{path}.{name}", merged.get(name)
        if value is None:
            merged.pop(name, None)
            continue
        kind = "a list" if name in lists else _kind(value if there is None else there)
        if _kind(value) != kind:
            raise TemplateError(f"{field} must be {kind}")
        if name in lists:
            merged[name] = _list(there or [], value, *lists[name], field)
        elif isinstance(value, Mapping):
            merged[name] = _map(there or {}, value, {}, field)
            if value.get("$patch") == "delete":
                del merged[name]
        else:
            merged[name] = deepcopy(value)
    return merged


def _list(base: list[Any], patch: list[Any], key: str, lists: _Lists, path: str) -> list[Any]:
    if {"$patch": "replace"} in patch:
        base, patch = [], [entry for entry in patch if entry != {"$patch": "replace"}]
    merged = {_key(entry, key, path): entry for entry in base}
    for place, entry in enumerate(patch):
        here = f"{path}[{place}]"
        name = _key(entry, key, here)
        if _directive(entry, here) == "delete":
            merged.pop(name, None)
        else:
            merged[name] = _map(merged.get(name, {}), entry, lists, f"{path}[{name}]")
    return list(merged.values())


def _key(entry: object, key: str, path: str) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get(key), str | int):
        raise TemplateError(f"{path} must be a map with {key}, by which it is merged")
    return entry[key]


def _directive(patch: Mapping[str, Any], path: str) -> str | None:
    for name in patch:
        if not isinstance(name, str) or (name.startswith("$") and name not in ("$patch", "$retainKeys")):
            raise TemplateError(
                f"{path}.{name} is no field and no directive; there are $patch and $retainKeys"
            )
    directive = patch.get("$patch")
    if directive not in (None, "merge", "replace", "delete"):
        raise TemplateError(f"{path}.$patch is {directive!r}; it can be merge, replace or delete")
    return directive


def _kind(value: object) -> str:
    return (
        "a map" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else "a single value"
    )
