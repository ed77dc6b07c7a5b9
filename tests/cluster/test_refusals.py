"""Every refusal that users can cause, from the real API server: these are the texts by which
``operator/refusals.py`` knows them. The last test shows that they reach the status, and go from it again.

Neither an operator nor agents run for the texts: the operator's client makes an object as the operator would,
in a namespace where that is refused.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from blockyard.operator import kube as kube_module
from blockyard.operator import refusals
from blockyard.operator.kube import ApiError, Kube, load_credentials
from blockyard.operator.settings import OperatorSettings

from ..operator.refused import ASKED, CASES, NAMESPACE, Raw, body
from .api import Api
from .api import ApiError as Refused
from .cluster import Cluster
from .control_plane import make_certificates
from .node import NodeStandIn
from .operator_process import Service, condition, manifest, operators, prepare, reason
from .rights import operators_account

LIMIT = 30.0  # seconds; what is made in a namespace takes effect when the API server's caches have it
POLL = 0.1
WEAK = "weak"  # a ServiceAccount with the rights that a case gives it
RULES = [
    {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles"], "verbs": ["get", "create", "patch"]}
]


class Place:
    """A namespace in which something is refused."""

    def __init__(self, cluster: Cluster, namespace: str, hooks: Hooks) -> None:
        self.cluster, self.namespace, self.hooks = cluster, namespace, hooks
        self.kubeconfig = cluster.kubeconfig
        self.api = cluster.api
        self.made: list[tuple[str, str]] = []  # what is in no namespace

    def make(self, api: str, kind: str, name: str, **content: Any) -> None:
        metadata = {"name": name, "namespace": self.namespace}
        self.cluster.create({"apiVersion": api, "kind": kind, "metadata": metadata, **content})

    def everywhere(self, kind: str, name: str, **content: Any) -> None:
        metadata = {"name": f"{self.namespace}-{name}"}
        api = "admissionregistration.k8s.io/v1"
        self.cluster.create({"apiVersion": api, "kind": kind, "metadata": metadata, **content})
        self.made.append((kind, metadata["name"]))

    def quota(self, **hard: str) -> None:
        self.make("v1", "ResourceQuota", "team", spec={"hard": hard})
        self.cluster.wait(
            "ResourceQuota", "team", self.namespace, lambda found: bool(found and "used" in found["status"])
        )

    def limits(self, *limits: Raw) -> None:
        self.make("v1", "LimitRange", "limits", spec={"limits": limits})

    def enforce(self, level: str) -> None:
        labels = {"pod-security.kubernetes.io/enforce": level}
        self.cluster.patch("Namespace", self.namespace, None, {"metadata": {"labels": labels}})

    def policy(self, expression: str, **validation: str) -> None:
        name = f"{self.namespace}-policy"
        self.everywhere(
            "ValidatingAdmissionPolicy",
            "policy",
            spec={
                "matchConstraints": {"resourceRules": [PODS]},
                "validations": [{"expression": expression, **validation}],
            },
        )
        self.everywhere(
            "ValidatingAdmissionPolicyBinding",
            "binding",
            spec={
                "policyName": name,
                "validationActions": ["Deny"],
                "matchResources": {"namespaceSelector": self._here},
            },
        )

    def webhook(self, how: str = "", **client: Any) -> None:
        client = client or {"url": f"{self.hooks.url}/{how}", "caBundle": self.hooks.authority}
        self.everywhere(
            "ValidatingWebhookConfiguration",
            "webhook",
            webhooks=[
                {
                    "name": "policy.example.com",
                    "admissionReviewVersions": ["v1"],
                    "sideEffects": "None",
                    "timeoutSeconds": 1,
                    "clientConfig": client,
                    "rules": [PODS],
                    "namespaceSelector": self._here,
                }
            ],
        )

    @property
    def _here(self) -> Raw:
        return {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}}

    def weak(self, *rules: Raw) -> None:
        """An account of its own, with these rights alone."""
        self.make("v1", "ServiceAccount", WEAK)
        rbac = "rbac.authorization.k8s.io"
        self.make(f"{rbac}/v1", "Role", WEAK, rules=list(rules))
        self.make(
            f"{rbac}/v1",
            "RoleBinding",
            WEAK,
            roleRef={"apiGroup": rbac, "kind": "Role", "name": WEAK},
            subjects=[{"kind": "ServiceAccount", "name": WEAK}],
        )
        self.kubeconfig = self.cluster.kubeconfig_of(WEAK, self.namespace)
        self.api = Api(self.cluster.access_of(WEAK, self.namespace))

    def end(self) -> None:
        """Delete the namespace, but hold it."""
        metadata = {"finalizers": ["example.com/hold"]}
        self.make("v1", "ConfigMap", "held")
        self.cluster.patch("ConfigMap", "held", self.namespace, {"metadata": metadata})
        self.cluster.delete("Namespace", self.namespace)

    def clear(self) -> None:
        for kind, name in self.made:
            self.cluster.delete(kind, name)
        if self.cluster.find("ConfigMap", "held", self.namespace):
            self.cluster.patch("ConfigMap", "held", self.namespace, {"metadata": {"finalizers": None}})
        if self.api is not self.cluster.api:
            self.cluster.run(self.api.close())


PODS = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
# case -> what is made in the namespace; the others need nothing.
PLACES: dict[str, Callable[[Place], None]] = {
    "pods beyond a quota": lambda place: place.quota(pods="0"),
    "GPUs beyond a quota": lambda place: place.quota(**{"requests.nvidia.com/gpu": "1"}),
    "several resources beyond a quota": lambda place: place.quota(
        **{"pods": "0", "requests.memory": "1Gi", "requests.nvidia.com/gpu": "1"}
    ),
    "Services beyond a quota": lambda place: place.quota(services="0"),
    "limits that a quota demands": lambda place: place.quota(**{"limits.cpu": "4"}),
    "a container above a LimitRange": lambda place: place.limits(
        {"type": "Container", "max": {"cpu": "500m"}}
    ),
    "a container below a LimitRange": lambda place: place.limits(
        {"type": "Container", "min": {"cpu": "2"}, "maxLimitRequestRatio": {"memory": "1"}}
    ),
    "a container above the limits that a LimitRange gives": lambda place: place.limits(
        {"type": "Container", "default": {"cpu": "500m"}}
    ),
    "a pod above a LimitRange": lambda place: place.limits(
        {"type": "Pod", "max": {"cpu": "500m"}, "min": {"memory": "100Gi"}}
    ),
    "a pod without the limits of a LimitRange": lambda place: place.limits(
        {"type": "Pod", "max": {"cpu": "500m"}}
    ),
    "a pod that is not baseline": lambda place: place.enforce("baseline"),
    "a pod that is not restricted": lambda place: place.enforce("restricted"),
    "an admission policy": lambda place: place.policy(
        "false", message="every pod needs the label cost-center"
    ),
    "an admission policy that cannot be evaluated": lambda place: place.policy(
        "object.metadata.labels.team == 'x'"
    ),
    "a webhook that denies": lambda place: place.webhook("denies"),
    "a webhook that denies without a word": lambda place: place.webhook("silent"),
    "a webhook that denies with the code of a conflict": lambda place: place.webhook("conflict"),
    "a webhook that nobody answers for": lambda place: place.webhook(url="https://127.0.0.1:1/validate"),
    "a webhook whose Service is missing": lambda place: place.webhook(
        service={"namespace": place.namespace, "name": "policy"}
    ),
    "a webhook that hangs": lambda place: place.webhook("hangs"),
    "a webhook that nobody trusts": lambda place: place.webhook(url=f"{place.hooks.url}/denies"),
    "a name that somebody has": lambda place: place.cluster.create(
        body(ASKED["pods beyond a quota"], place.namespace)
    ),
    "no right to create pods": lambda place: place.weak(),
    "no right to apply Services": lambda place: place.weak(),
    "no right to grant a right": lambda place: place.weak(*RULES),
    "a namespace that is being deleted": lambda place: place.end(),
}


class Hooks:
    """Admission webhooks; the path says what one does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        make_certificates(folder)
        self.closing = closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                response: Raw = {"uid": review["request"]["uid"], "allowed": False}
                match self.path.split("?")[0]:
                    case "/denies":
                        response["status"] = {"message": "images must come from registry.example.com"}
                    case "/conflict":
                        response["status"] = {"message": "another team has that", "code": 409}
                    case "/hangs":
                        closing.wait()
                        return
                review["response"] = response
                data = json.dumps(review).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # those who do not trust the certificate hang up

        self._server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "api.crt", folder / "api.key")
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.url = f"https://127.0.0.1:{self._server.server_port}"
        self.authority = base64.b64encode((folder / "ca.crt").read_bytes()).decode()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def hooks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hooks]:
    made = Hooks(tmp_path_factory.mktemp("hooks") / "certificates")
    yield made
    made.close()


@pytest.fixture
def place(cluster: Cluster, namespace: str, hooks: Hooks) -> Iterator[Place]:
    made = Place(cluster, namespace, hooks)
    yield made
    made.clear()


@pytest.mark.parametrize("name", ASKED)
def test_the_api_server_answers_as_the_words_are_made_for(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_module, "BACKOFF", 0.01)
    case = CASES[name]
    namespace = "no-such-namespace" if name == "a namespace that is gone" else place.namespace
    made = body(case.asked, namespace)
    if name in PLACES:
        PLACES[name](place)
        _await_refusal(place, made, case.answer["message"])
    error = asyncio.run(_refused(place.kubeconfig, made))
    answer = {"code": error.code, "reason": error.reason, "message": error.message, "details": error.details}
    assert _generic(answer, namespace) == case.answer
    found = refusals.explain(error)
    assert (found.reason, _generic(found.message, namespace)) == (case.reason, case.message)


def _await_refusal(place: Place, made: Raw, message: str) -> None:
    """Until the API server has taken notice of what is in the namespace: it tells nobody when it has."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        try:
            place.cluster.run(_try(place.api, made))
        except Refused as error:
            if _generic(str(error), place.namespace) == message:
                return
        time.sleep(POLL)


async def _try(api: Api, made: Raw) -> None:
    """Make it without leaving it."""
    kind, namespace, name = made["kind"], made["metadata"]["namespace"], made["metadata"]["name"]
    query = {"dryRun": "All"}
    if kind == "Pod":
        await api.call("POST", f"/api/v1/namespaces/{namespace}/pods", made, query=query)
    else:
        group = f"apis/{made['apiVersion']}" if "/" in made["apiVersion"] else f"api/{made['apiVersion']}"
        path = f"/{group}/namespaces/{namespace}/{kind.lower()}s/{name}"
        query |= {"fieldManager": "tests", "force": "true"}
        await api.call("PATCH", path, made, query=query, patch="apply")


async def _refused(kubeconfig: Path, made: Raw) -> ApiError:
    settings = OperatorSettings(agent_image="-", kubeconfig=kubeconfig)
    kube = Kube(await load_credentials(settings))
    try:
        await (kube.create(made) if made["kind"] == "Pod" else kube.apply(made, force=True))
    except ApiError as error:
        return error
    finally:
        await kube.close()
    raise AssertionError(f"{made['kind']} {made['metadata']['name']} was made")


def _generic(found: Any, namespace: str) -> Any:
    """Without what is new in each run."""
    text = json.dumps(found).replace(namespace, NAMESPACE)
    return json.loads(re.sub(r"https://127\.0\.0\.1:\d+", "https://127.0.0.1:PORT", text))


def test_a_refusal_is_said_in_the_status_and_events_and_goes_from_them_when_it_is_over(
    cluster: Cluster, nodes: NodeStandIn, place: Place, tmp_path: Path
) -> None:
    prepare(cluster, nodes)
    namespace = place.namespace
    place.enforce("baseline")
    place.quota(**{"requests.nvidia.com/gpu": "1"})
    with (
        operators_account(cluster, namespace) as account,
        operators(cluster, namespace, account, tmp_path) as start,
    ):
        operator = start()
        model = {"hub": {"name": "SmolLM2-135M-Instruct"}}
        nowhere = {"spec": {"nodeSelector": {"no-such": "label"}}}  # other tests' nodes have GPUs, too
        asked = {"device": "cuda", "tensorParallel": 2, "model": model, "template": nowhere}
        cluster.create(manifest("large", namespace, **asked))
        front = {"replicas": 1, "template": {"spec": {**nowhere["spec"], "hostPID": True}}}
        cluster.create(manifest("front", namespace, gateway=front, model=model))
        large, gateway = Service(cluster, "large", namespace), Service(cluster, "front", namespace)

        found = large.wait(lambda found: reason(found, "Ready")[0] == "QuotaExceeded")
        words = "ResourceQuota team: requests.nvidia.com/gpu (0 used, 2 asked, 1 allowed)"
        assert reason(found, "Ready")[1].startswith("0 of 1 agents are ready; pod large-")
        assert words in reason(found, "Ready")[1] and "/api" not in json.dumps(found["status"])
        assert condition(found, "Degraded") == "True" and words in reason(found, "Degraded")[1]
        assert words in cluster.kubectl("describe", "llms/large", "-n", namespace)
        shown = cluster.kubectl("get", "llms/large", "-n", namespace)
        assert shown.splitlines()[1].split()[:3] == ["large", "False", "QuotaExceeded"]
        assert "QuotaExceeded" in large.shown() and "raise the quota" in " ".join(large.shown().split())
        raw = f"create /api/v1/namespaces/{namespace}/pods: pods"
        assert raw in operator.text(), "the raw answer is in the log"

        found = gateway.wait(lambda found: reason(found, "Degraded")[0] == "PodSecurityViolated")
        words = "pods of Deployment front-gateway cannot be created"
        assert words in reason(found, "Degraded")[1] and "hostPID=true" in reason(found, "Degraded")[1]

        more = {"spec": {"hard": {"requests.nvidia.com/gpu": "2"}}}
        cluster.patch("ResourceQuota", "team", namespace, more)
        large.wait(lambda found: reason(found, "Degraded")[0] == "Unschedulable")
        gateway.patch(gateway={"replicas": 1, "template": {"spec": {"hostPID": None}}})
        gateway.wait(lambda found: reason(found, "Degraded")[0] == "Unschedulable")
