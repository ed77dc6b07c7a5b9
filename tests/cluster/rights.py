"""What an account did, from the API server's audit log, in the words of RBAC rules."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .cluster import Cluster

CHART = Path(__file__).parents[2] / "charts/blockyard"
LEASE = "blockyard-operator"  # which the account may hold


class Right(NamedTuple):
    """One verb on one kind of object, "pods" or "llmservices/status"."""

    group: str
    resource: str
    verb: str


def of_role(role: dict[str, Any]) -> set[Right]:
    """All rights of a Role or ClusterRole."""
    return {
        Right(group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(log: Path, user: str) -> set[Right]:
    """What the user did and was allowed to do."""
    found = set()
    for event, right in _requests(log, user):
        if event["annotations"]["authorization.k8s.io/decision"] == "allow":
            found.add(right)
            # An apply that makes the object needs both; the log has a patch with the answer Created.
            if right.verb == "patch" and event["responseStatus"]["code"] == 201:
                found.add(right._replace(verb="create"))
    return found


def missed(log: Path, user: str) -> set[str]:
    """What the user was not allowed to do, in the API server's words."""
    return {
        f"{right.verb} {right.resource}.{right.group}: {event['responseStatus'].get('message')}"
        for event, right in _requests(log, user)
        if event["responseStatus"]["code"] == 403
        # No right helps where the namespace is on its way out, or a quota is used up.
        and not re.search(
            "because it is being terminated|exceeded quota", str(event["responseStatus"].get("message"))
        )
    }


def _requests(log: Path, user: str) -> Iterator[tuple[dict[str, Any], Right]]:
    """Requests for objects (not for /healthz, /apis and the like) that have been answered."""
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["user"]["username"] == user and (target := event.get("objectRef")):
            resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
            yield event, Right(target.get("apiGroup", ""), resource, event["verb"])


@contextlib.contextmanager
def operators_account(cluster: Cluster, namespace: str) -> Iterator[Path]:
    """A kubeconfig of the ServiceAccount that the chart makes for an operator of this namespace alone.

    Afterwards nothing may have been refused to it.
    """
    templates = [f"--show-only=templates/{name}.yaml" for name in ("serviceaccount", "rbac", "lease")]
    values = f"--set=namespaces={{{namespace}}},fullnameOverride={LEASE}"
    text = cluster.helm("template", "blockyard", str(CHART), f"--namespace={namespace}", values, *templates)
    manifests = [each for each in yaml.safe_load_all(text[text.index("---") :]) if each]
    for manifest in manifests:
        cluster.apply(manifest)
    try:
        yield cluster.kubeconfig_of(LEASE, namespace)
    finally:
        for manifest in manifests:
            if manifest["kind"].startswith("Cluster"):
                cluster.delete(manifest["kind"], manifest["metadata"]["name"])
    if cluster.control_plane:  # else the log is the user's
        user = f"system:serviceaccount:{namespace}:{LEASE}"
        refused = missed(cluster.control_plane.audit_log, user)
        assert not refused, refused
        assert used(cluster.control_plane.audit_log, user)
