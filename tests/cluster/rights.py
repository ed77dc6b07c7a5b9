"""What an account did, from the API server's audit log, in the words of RBAC rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


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
            # An apply that makes the object needs both rights; the log has it as a patch with the answer Created.
            if right.verb == "patch" and event["responseStatus"]["code"] == 201:
                found.add(right._replace(verb="create"))
    return found


def missed(log: Path, user: str) -> set[str]:
    """What the user was not allowed to do, in the API server's words."""
    return {
        f"{right.verb} {right.resource}.{right.group}: {event['responseStatus'].get('message')}"
        for event, right in _requests(log, user)
        if event["responseStatus"]["code"] == 403
        # No right helps where the namespace is on its way out.
        and "because it is being terminated" not in str(event["responseStatus"].get("message"))
    }


def _requests(log: Path, user: str) -> Iterator[tuple[dict[str, Any], Right]]:
    """Requests for objects (not for /healthz, /apis and the like) that have been answered."""
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["user"]["username"] == user and (target := event.get("objectRef")):
            resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
            yield event, Right(target.get("apiGroup", ""), resource, event["verb"])
