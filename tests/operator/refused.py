"""What users can do so that the API server refuses an object, what it answers, and what they must be told.

``refusals.json`` holds the real answers as they came, but for names that are new in each run.
tests/cluster/test_refusals.py makes every one of them happen again and compares.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockyard.operator import children
from blockyard.operator.children import Defaults
from blockyard.operator.observed import Service

Raw = dict[str, Any]
DEFAULTS = Defaults(image="agent:1", namespace="blockyard-system")
NAMESPACE = "NAMESPACE"  # in the answers


@dataclass(frozen=True)
class Asked:
    """A service's spec, and which of its objects is made."""

    spec: Raw
    kind: str = "Pod"


@dataclass(frozen=True)
class Case:
    """``answer`` is the Status that comes, ``reason`` and ``message`` what is made of it."""

    asked: Asked
    answer: Raw
    reason: str
    message: str


def of_template(**spec: Any) -> Asked:
    return Asked({"template": {"spec": spec}})


def of_agent(**container: Any) -> Asked:
    return of_template(containers=[{"name": "agent", **container}])


def of_gateway(**spec: Any) -> Asked:
    return Asked({"gateway": {"replicas": 1, "template": {"spec": spec}}}, "Deployment")


PLAIN = Asked({"device": "cpu"})
WITH_LIMITS = Asked(
    {
        "device": "cpu",
        "template": {
            "spec": {
                "containers": [
                    {"name": "agent", "resources": {"limits": {"cpu": "1", "memory": "2Gi"}}},
                ]
            }
        },
    }
)
ASKED: dict[str, Asked] = {
    "pods beyond a quota": PLAIN,
    "GPUs beyond a quota": Asked({"tensorParallel": 2}),
    "several resources beyond a quota": Asked({"tensorParallel": 2}),
    "Services beyond a quota": Asked({}, "Service"),
    "limits that a quota demands": PLAIN,
    "a container above a LimitRange": WITH_LIMITS,
    "a container below a LimitRange": PLAIN,
    "a container above the limits that a LimitRange gives": PLAIN,
    "a pod above a LimitRange": WITH_LIMITS,
    "a pod without the limits of a LimitRange": PLAIN,
    "a pod that is not baseline": Asked(
        {
            "model": {"hostPath": {"path": "/models/m"}},
            "template": {
                "spec": {
                    "hostNetwork": True,
                    "containers": [
                        {
                            "name": "agent",
                            "securityContext": {"privileged": True, "allowPrivilegeEscalation": True},
                        },
                    ],
                }
            },
        }
    ),
    "a pod that is not restricted": of_template(
        securityContext={"runAsNonRoot": False, "runAsUser": 0}, containers=[{"name": "side", "image": "i"}]
    ),
    "an admission policy": PLAIN,
    "an admission policy that cannot be evaluated": PLAIN,
    "a webhook that denies": PLAIN,
    "a webhook that denies without a word": PLAIN,
    "a webhook that denies with the code of a conflict": PLAIN,
    "a webhook that nobody answers for": PLAIN,
    "a webhook whose Service is missing": PLAIN,
    "a webhook that hangs": PLAIN,
    "a webhook that nobody trusts": PLAIN,
    "a ServiceAccount that is missing": of_template(serviceAccountName="nobody"),
    "a PriorityClass that is missing": of_template(priorityClassName="urgent"),
    "a RuntimeClass that is missing": of_template(runtimeClassName="nvidia"),
    "a priority of one's own": of_template(priority=5),
    "a field that is not valid": of_template(restartPolicy="Sometimes"),
    "fields that are not valid": of_template(
        dnsPolicy="None",
        containers=[
            {"name": "agent", "imagePullPolicy": "Often"},
            {"name": "side", "env": [{"name": "a b="}]},
        ],
    ),
    "labels that are not valid": Asked({"template": {"metadata": {"labels": {"a b": "c d"}}}}),
    "a request above the template's limit": of_agent(resources={"limits": {"cpu": "100m"}}),
    "a field of another type": of_template(hostNetwork="yes"),
    "a quantity that is none": of_agent(resources={"limits": {"cpu": "lots"}}),
    "a gateway with fields that are not valid": of_gateway(
        dnsPolicy="x", containers=[{"name": "gateway", "imagePullPolicy": "Often"}]
    ),
    "a gateway with a field of another type": of_gateway(hostNetwork="yes"),
    "a gateway with a field that there is not": of_gateway(nodeSelektor={"a": "b"}),
    "a pod too large for the store": of_agent(env=[{"name": "X", "value": "x" * 1_600_000}]),
    "a pod too large for the API server": of_agent(env=[{"name": "X", "value": "x" * 3_300_000}]),
    "a name that somebody has": PLAIN,
    "no right to create pods": PLAIN,
    "no right to apply Services": Asked({}, "Service"),
    "no right to grant a right": Asked({"gateway": {"replicas": 1}}, "Role"),
    "a namespace that is being deleted": PLAIN,
    "a namespace that is gone": PLAIN,
}
CASES: dict[str, Case] = {
    name: Case(ASKED[name], **answer)
    for name, answer in json.loads(Path(__file__).with_name("refusals.json").read_text()).items()
}


def body(asked: Asked, namespace: str = NAMESPACE) -> Raw:
    """The object as the operator makes it, but for its owner, which is not there."""
    spec = {"model": {"hub": {"name": "m"}}, "gateway": {"replicas": 0}, **asked.spec}
    service = Service.of({"metadata": {"name": "s", "namespace": namespace, "uid": "u"}, "spec": spec})
    if asked.kind == "Pod":
        found = children.agent_pod(service, "s-abcde", "revision", DEFAULTS)
    else:
        found = next(each for each in children.companions(service, DEFAULTS) if each["kind"] == asked.kind)
    del found["metadata"]["ownerReferences"]
    return found
