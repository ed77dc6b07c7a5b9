"""helm install, upgrade, uninstall against a real API server; the operator runs in the chart's own pod.

This has a control plane of its own, since it installs and removes what is there once in a cluster.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockyard.operator import kube
from blockyard.operator.events import Recorder
from blockyard.operator.kube import Kube
from blockyard.operator.observed import ROTATE, Service
from blockyard.operator.settings import OperatorSettings
from blockyard.user_cache import cache_folder

from . import rights
from .cluster import Cluster
from .container import Image
from .control_plane import ControlPlane
from .operator_process import CACHE, STARTING, settled
from .rights import Right
from .test_chart import CHART, VARIANTS, nested, of_kind

Raw = dict[str, Any]

CRDS = ("llmservices.serving.blockyard.dev", "kvmoves.serving.blockyard.dev")
NODE = "helm-node"
LIMIT = 120.0  # seconds for what takes some, on a busy machine
# All pods share one network here, so that each operator must listen on its own address.
OWN_ADDRESS = [
    {"name": "BLOCKYARD_OPERATOR_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    {"name": "BLOCKYARD_OPERATOR_BIND_POD_IP", "value": "true"},
]


@pytest.fixture(scope="module")
def cluster(programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster without CRDs, with one node that has the operator's image."""
    folder = tmp_path_factory.mktemp("helm-cluster")
    control_plane = ControlPlane(folder / "control-plane", programs)
    try:
        made = Cluster(control_plane.access, folder, programs, control_plane)
        try:
            nodes = made.nodes()
            nodes.images |= {"blockyard-operator:0.1.0": Image(), "blockyard-agent:0.1.0": Image()}
            nodes.folders[CACHE] = cache_folder()
            made.run(nodes.add(NODE, gpus=0))
            yield made
        finally:
            made.close()
    finally:
        control_plane.stop()


class Release:
    """The chart as release blockyard in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self._cluster = cluster
        self.namespace = namespace
        self._values = folder / "values.yaml"

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.namespace}:blockyard"

    def install(self, **values: Any) -> str:
        return self._helm("install", "blockyard", str(CHART), *self._given(values))

    def upgrade(self, **values: Any) -> str:
        return self._helm("upgrade", "blockyard", str(CHART), *self._given(values))

    def uninstall(self) -> str:
        return self._helm("uninstall", "blockyard", "--ignore-not-found", "--wait", "--timeout=3m")

    def _given(self, values: Mapping[str, Any]) -> list[str]:
        whole = {
            "extraEnv": OWN_ADDRESS,
            **{name.replace("__", "."): value for name, value in values.items()},
        }
        self._values.write_text(yaml.safe_dump(nested(whole)))
        return ["--values", str(self._values), "--wait", "--timeout=3m"]

    def _helm(self, *arguments: str) -> str:
        return self._cluster.helm(*arguments, "--namespace", self.namespace)

    def pods(self) -> list[Raw]:
        """The operator's pods that are not on their way out."""
        labels = "app.kubernetes.io/component=operator"
        found = self._cluster.items("Pod", self.namespace, labels=labels)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def holder(self, but: str = "") -> str:
        """Who acts (its pod's name, "_" and a mark of its life), as soon as it is not ``but``."""

        def acts(lease: Raw | None) -> bool:
            return ((lease or {}).get("spec") or {}).get("holderIdentity") not in (None, "", but)

        lease = self._cluster.wait("Lease", "blockyard", self.namespace, acts, limit=LIMIT)
        return str(lease["spec"]["holderIdentity"])


def pod_of(identity: str) -> str:
    return identity.rpartition("_")[0]


@pytest.fixture
def release(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Release]:
    """Nothing is installed before, nothing is left after the test."""
    made = Release(cluster, namespace, tmp_path)
    yield made
    if cluster.find("CustomResourceDefinition", CRDS[0]):
        for service in cluster.items("LLMService"):  # of a test that failed
            metadata = service["metadata"]
            change = {"metadata": {"finalizers": None}}
            cluster.patch("LLMService", metadata["name"], metadata["namespace"], change)
            cluster.delete("LLMService", metadata["name"], metadata["namespace"])
    made.uninstall()
    for name in CRDS:
        if cluster.find("CustomResourceDefinition", name):
            cluster.delete("CustomResourceDefinition", name)
            cluster.wait_until_gone("CustomResourceDefinition", name, None)


def objects(cluster: Cluster) -> set[tuple[str, str, str]]:
    """(kind, namespace, name) of everything in the cluster but Events."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "--output=name", "--cached=false").split()
    columns = "custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name"
    text = cluster.kubectl(
        "get", ",".join(sorted({kind for kind in kinds if not kind.startswith("events")})),
        "--all-namespaces", "--no-headers", "--ignore-not-found", f"--output={columns}",
    )  # fmt: skip
    rows = (line.split() for line in text.splitlines() if not line.startswith("Warning"))
    return {(kind, namespace, name) for kind, namespace, name in rows}


def until_left(
    cluster: Cluster, before: set[tuple[str, str, str]], but: Set[tuple[str, str, str]] = frozenset()
) -> set[tuple[str, str, str]]:
    """What is there now and was not ``before``, once it is ``but`` or has long ceased to become less.

    The garbage collector learns of new kinds once in 30 s and then tries again after growing pauses.
    """
    left, since = objects(cluster) - before, time.monotonic()
    while left != but and time.monotonic() < since + LIMIT:
        now = objects(cluster) - before
        if len(now) < len(left):
            since = time.monotonic()
        left = now
    return left


def service(namespace: str, name: str = "model", **spec: Any) -> Raw:
    """An LLMService that needs no pods unless ``spec`` asks for some."""
    return {
        "apiVersion": "serving.blockyard.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"hub": {"name": "SmolLM2-135M-Instruct"}, "cacheHostPath": CACHE},
            "device": "cpu",
            "engine": {"threads": 1, "maxModelLen": 512},
            "kv": {"blocks": 64},
            "replicas": 0,
            "gateway": {"replicas": 0},
            **spec,
        },
    }


def observed(found: Raw | None) -> bool:
    """Has the operator looked at the object as it is now?"""
    return (
        bool(found)
        and (found.get("status") or {}).get("observedGeneration") == found["metadata"]["generation"]
    )


# ── What the API server says to the manifests ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_server_takes_every_object(
    cluster: Cluster, namespace: str, variant: str, tmp_path: Path
) -> None:
    """Strictly, without fields that it does not know. The Prometheus operator's kinds are not known here."""
    values = dict(VARIANTS[variant])
    if "namespaces" in values:
        values["namespaces"] = [namespace]
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(nested(values)))
    arguments = ["template", "blockyard", str(CHART), "--namespace", namespace]
    text = cluster.helm(*arguments, "--values", str(tmp_path / "values.yaml"))
    text = text[text.index("---") :]  # what helm says of the link crds/ goes before
    rendered = [each for each in yaml.safe_load_all(text) if each]
    known = [each for each in rendered if not each["apiVersion"].startswith("monitoring.coreos.com")]
    assert len(known) >= 2
    stdin = yaml.safe_dump_all(known)
    said = cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=stdin)
    assert said.count("(server dry run)") == len(known)


def test_the_operators_pod_is_admitted_where_only_restricted_pods_are(
    cluster: Cluster, namespace: str
) -> None:
    change = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    cluster.patch("Namespace", namespace, None, change)
    text = cluster.helm("template", "blockyard", str(CHART), "--namespace", namespace)
    (deployment,) = of_kind(list(yaml.safe_load_all(text[text.index("---") :])), "Deployment")
    spec = deployment["spec"]["template"]["spec"] | {"serviceAccountName": "default"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "namespace": namespace}, "spec": spec}
    cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod))
    del spec["securityContext"]
    refused = cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod), check=False)
    assert 'violates PodSecurity "restricted' in refused


# ── From zero to nothing ──────────────────────────────────────────────────────────────────────────────────


def test_install_upgrade_and_uninstall_leave_nothing_behind_but_the_crds(
    cluster: Cluster, namespace: str, release: Release
) -> None:
    before = objects(cluster)
    said = release.install()
    assert "uninstall` leaves the CRDs" in said
    first = release.holder()

    cluster.apply(service(namespace))
    made = cluster.wait("LLMService", "model", namespace, observed, limit=LIMIT)
    assert cluster.find("PodDisruptionBudget", "model-agents", namespace)

    # An upgrade changes what it should: another operator with another setting, and the service as it was.
    release.upgrade(workers=3)
    second = release.holder(but=first)
    (container,) = cluster.get("Pod", pod_of(second), namespace)["spec"]["containers"]
    assert {"name": "BLOCKYARD_OPERATOR_WORKERS", "value": "3"} in container["env"]
    kept = cluster.get("LLMService", "model", namespace)
    assert (kept["metadata"]["uid"], kept["metadata"]["generation"]) == (made["metadata"]["uid"], 1)
    cluster.patch("LLMService", "model", namespace, {"spec": {"rollout": {"maxSurge": 2}}})
    cluster.wait("LLMService", "model", namespace, observed, limit=LIMIT)

    cluster.kubectl("delete", "llms", "--all", "--all-namespaces", f"--timeout={LIMIT:.0f}s")
    release.uninstall()
    crds = {("CustomResourceDefinition", "<none>", name) for name in CRDS}
    crds.add(("APIService", "<none>", "v1alpha1.serving.blockyard.dev"))  # the API server's own, for CRDs
    assert until_left(cluster, before, crds) == crds
    cluster.kubectl("delete", "crd", *CRDS, f"--timeout={LIMIT:.0f}s")
    assert until_left(cluster, before) == set()
    gone = before - objects(cluster)  # namespaces of earlier tests may go meanwhile
    assert not [
        each for each in gone if each[1] in ("<none>", namespace, "default") and each[0] != "Namespace"
    ]


def test_helm_upgrade_leaves_crds_as_they_are_and_the_documented_command_renews_them(
    cluster: Cluster, namespace: str, release: Release
) -> None:
    """The CRD of an older version, of which services exist, which must stay as they are."""
    release.install()
    current = cluster.get("CustomResourceDefinition", CRDS[0])["spec"]
    older = copy.deepcopy(current)
    (version,) = older["versions"]
    del version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["rollout"]
    del version["additionalPrinterColumns"][0]
    cluster.patch("CustomResourceDefinition", CRDS[0], None, {"spec": older})
    cluster.create(service(namespace))

    release.upgrade(workers=3)
    assert cluster.get("CustomResourceDefinition", CRDS[0])["spec"] == older

    shown = cluster.helm("show", "crds", str(CHART))
    shown = shown[shown.index("---") :]
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=shown)
    assert cluster.get("CustomResourceDefinition", CRDS[0])["spec"] == current
    cluster.kubectl("wait", "--for=condition=Established", f"crd/{CRDS[0]}", f"--timeout={LIMIT:.0f}s")
    cluster.kubectl(
        "patch", "llms", "model", f"--namespace={namespace}", "--type=merge",
        "--patch", '{"spec": {"rollout": {"maxSurge": 2}}}',
    )  # fmt: skip
    cluster.wait("LLMService", "model", namespace, observed, limit=LIMIT)

    # Another installation finds CRDs that kubectl has taken over.
    release.uninstall()
    release.install()
    cluster.kubectl("delete", "llms", "model", f"--namespace={namespace}", f"--timeout={LIMIT:.0f}s")


def established(found: Raw | None) -> bool:
    conditions = ((found or {}).get("status") or {}).get("conditions") or []
    return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)


def test_of_two_replicas_one_acts_and_the_other_takes_over(
    cluster: Cluster, namespace: str, release: Release
) -> None:
    release.install(replicas=2)
    assert len(release.pods()) == 2
    assert cluster.find("PodDisruptionBudget", "blockyard", namespace)
    first = release.holder()
    assert cluster.stand_in
    cluster.run(asyncio.to_thread(cluster.stand_in.kill, pod_of(first), namespace))
    second = release.holder(but=first)
    assert pod_of(second) in {pod["metadata"]["name"] for pod in release.pods()}
    cluster.apply(service(namespace))
    cluster.wait("LLMService", "model", namespace, observed, limit=LIMIT)


def test_with_namespaces_the_operator_serves_these_and_leaves_others_alone(
    cluster: Cluster, release: Release
) -> None:
    before = objects(cluster)
    for name in ("served", "other"):
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    release.install(namespaces=["served"])
    release.holder()
    cluster.create(service("other"))
    cluster.create(service("served"))
    cluster.wait("LLMService", "model", "served", observed, limit=LIMIT)
    assert cluster.find("Service", "model", "served")
    ignored = cluster.get("LLMService", "model", "other")
    assert "finalizers" not in ignored["metadata"]
    assert "status" not in ignored
    assert not cluster.items("Service", "other")
    assert cluster.control_plane
    assert rights.missed(cluster.control_plane.audit_log, release.user) == set()
    cluster.kubectl("delete", "llms", "--all", "--all-namespaces", f"--timeout={LIMIT:.0f}s")
    release.uninstall()
    for name in ("served", "other"):
        assert not cluster.items("Role", name)
        assert not cluster.items("RoleBinding", name)
        cluster.delete("Namespace", name)
    cluster.kubectl("delete", "crd", *CRDS)
    assert until_left(cluster, before) == set()


@pytest.mark.parametrize("named", [True, False], ids=["named", "cluster-wide"])
def test_a_namespace_that_is_deleted_ends_and_can_come_back(
    cluster: Cluster, release: Release, named: bool
) -> None:
    """With an agent that runs; in a namespace that stays, services are served as before."""
    of = "named" if named else "all"
    leaving, staying = places = (f"leaving-{of}", f"staying-{of}")
    for name in places:
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    values: Raw = {"namespaces": list(places)} if named else {}
    release.install(**values)
    release.holder()
    cluster.create(service(leaving, replicas=1))
    cluster.wait("LLMService", "model", leaving, settled(1), limit=STARTING)
    cluster.delete("Namespace", leaving)
    cluster.wait_until_gone("Namespace", leaving, None, limit=STARTING)
    cluster.create(service(staying))
    cluster.wait("LLMService", "model", staying, observed, limit=STARTING)
    if named:
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": leaving}})
        release.upgrade(**values)
        cluster.create(service(leaving))
        cluster.wait("LLMService", "model", leaving, observed, limit=STARTING)
    cluster.kubectl("delete", "llms", "--all", "--all-namespaces", f"--timeout={STARTING:.0f}s")
    for name in places:
        if cluster.find("Namespace", name):
            cluster.delete("Namespace", name)
            cluster.wait_until_gone("Namespace", name, None, limit=STARTING)


# ── Rights ────────────────────────────────────────────────────────────────────────────────────────────────


def can(cluster: Cluster, user: str, namespace: str, verb: str, resource: str) -> bool:
    resource, _, subresource = resource.partition("/")
    said = cluster.kubectl(
        "auth", "can-i", verb, f"{resource}.serving.blockyard.dev", f"--subresource={subresource}",
        f"--as={user}", f"--namespace={namespace}", check=False,
    )  # fmt: skip
    return said.strip().splitlines()[-1] == "yes"


def grants(verb: str) -> Callable[[Raw | None], bool]:
    """Does a role grant this verb on KVMoves?"""
    right = Right("serving.blockyard.dev", "kvmoves", verb)
    return lambda role: role is not None and right in rights.of_role(role)


def test_viewers_and_editors_of_a_namespace_may_do_so_with_its_services(
    cluster: Cluster, namespace: str, release: Release
) -> None:
    release.install(replicas=0)
    for role in ("view", "edit", "admin"):
        cluster.kubectl(
            "create",
            "rolebinding",
            role,
            f"--clusterrole={role}",
            f"--user={role}er",
            f"--namespace={namespace}",
        )
    both = ("llmservices", "kvmoves")
    # The roles are aggregated by a controller.
    cluster.wait("ClusterRole", "admin", None, grants("patch"), limit=LIMIT)
    cluster.wait("ClusterRole", "view", None, grants("get"), limit=LIMIT)
    for user in ("viewer", "editer", "adminer"):
        assert all(
            can(cluster, user, namespace, verb, each) for verb in ("get", "list", "watch") for each in both
        )
        assert not can(cluster, user, "default", "get", "llmservices")
        assert not can(cluster, user, namespace, "patch", "llmservices/status"), "status is the operator's"
    writes = [(verb, each) for verb in ("create", "update", "patch", "delete") for each in both]
    for verb, each in [*writes, ("patch", "llmservices/scale")]:
        assert not can(cluster, "viewer", namespace, verb, each)
        assert can(cluster, "editer", namespace, verb, each)
        assert can(cluster, "adminer", namespace, verb, each)


# Rights that no request needs, and why the operator must have them: see the test after the next.
HELD = {
    Right("serving.blockyard.dev", "llmservices/finalizers", "update"),
    Right("discovery.k8s.io", "endpointslices", "get"),
    Right("discovery.k8s.io", "endpointslices", "list"),
    Right("discovery.k8s.io", "endpointslices", "watch"),
}


def test_every_right_is_used_and_none_is_missing(cluster: Cluster, namespace: str, release: Release) -> None:
    """A service's life with everything on and off, while the API server writes down who asks for what."""
    cluster.create(service_monitor_definition())
    cluster.wait("CustomResourceDefinition", "servicemonitors.monitoring.coreos.com", None, established)
    try:
        release.install()
        live_a_life(cluster, namespace, release)
        account = cluster.kubeconfig_of("blockyard", namespace)
        owner = cluster.get("ConfigMap", "kube-root-ca.crt", namespace)
        cluster.run(rare_coincidences(account, namespace, owner))
        assert cluster.control_plane
        log = cluster.control_plane.audit_log
        granted = {
            right
            for kind in ("ClusterRole", "Role")
            for role in cluster.items(kind, namespace if kind == "Role" else None)
            if role["metadata"]["name"] in (f"{namespace}-blockyard", "blockyard-lease")
            for right in rights.of_role({"rules": role["rules"]})
        }
        assert rights.missed(log, release.user) == set()
        assert granted - rights.used(log, release.user) == HELD
    finally:
        cluster.delete("CustomResourceDefinition", "servicemonitors.monitoring.coreos.com")


def live_a_life(cluster: Cluster, namespace: str, release: Release) -> None:
    """An agent and a gateway come and go, their service too; somebody deletes the Lease meanwhile."""
    everything: Raw = {"replicas": 1, "gateway": {"replicas": 1}, "monitoring": {"serviceMonitor": True}}
    cluster.apply(service(namespace, **everything))
    cluster.wait("LLMService", "model", namespace, settled(1), limit=STARTING)
    assert cluster.find("Deployment", "model-gateway", namespace)
    assert cluster.find("ServiceMonitor", "model", namespace)
    cluster.kubectl("annotate", "llms", "model", f"--namespace={namespace}", f"{ROTATE}=today")
    rotated = lambda found: "previous" in ((found or {}).get("data") or {})  # noqa: E731
    cluster.wait("Secret", "model-internal", namespace, rotated, limit=LIMIT)
    cluster.delete("Lease", "blockyard", namespace)
    release.holder()
    cluster.apply(service(namespace))
    for kind, name in (
        ("Deployment", "model-gateway"), ("ServiceMonitor", "model"), ("ServiceAccount", "model-gateway"),
        ("Role", "model-gateway"), ("RoleBinding", "model-gateway"),
    ):  # fmt: skip
        cluster.wait_until_gone(kind, name, namespace, limit=LIMIT)
    cluster.wait("LLMService", "model", namespace, settled(0), limit=LIMIT)
    cluster.kubectl("delete", "llms", "model", f"--namespace={namespace}", f"--timeout={LIMIT:.0f}s")


async def rare_coincidences(account: Path, namespace: str, owner: Raw) -> None:
    """An answer was lost, and a restarted operator says what the last one said: its code, its account."""
    api = await Kube.connect(OperatorSettings(agent_image="x", kubeconfig=account), lambda *_: None)
    reference = {key: owner[key] for key in ("apiVersion", "kind")} | {"controller": True}
    reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "twice", "namespace": namespace, "ownerReferences": [reference]},
        "spec": {"containers": [{"name": "a", "image": "a"}], "nodeSelector": {"no": "node"}},
    }
    try:
        first, again = await api.create(pod), await api.create(pod)
        assert first["metadata"]["uid"] == again["metadata"]["uid"]
        await api.delete(kube.POD, namespace, "twice", first["metadata"]["uid"], grace_seconds=0)
        subject = Service.of({"metadata": {"name": "x", "namespace": namespace, "uid": "y"}, "spec": {}})
        for _ in range(2):
            await Recorder(api, "test").emit(subject, "Normal", "Tested", "Test", "the same words")
    finally:
        await api.close()


def service_monitor_definition() -> Raw:
    """As much of the Prometheus operator's CRD as makes the API server keep such objects."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "servicemonitors.monitoring.coreos.com",
            "annotations": {"api-approved.kubernetes.io": "unapproved, a test"},
        },
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": "ServiceMonitor", "plural": "servicemonitors", "singular": "servicemonitor"},
            "versions": [version],
        },
    }


@pytest.mark.parametrize("held", sorted(HELD), ids=lambda right: f"{right.verb} {right.resource}")
def test_the_rights_that_no_request_needs_are_needed_all_the_same(
    cluster: Cluster, namespace: str, release: Release, held: Right
) -> None:
    """Without it the API server refuses what the operator makes for every service."""
    release.install(replicas=0)
    made = cluster.create(service(namespace))
    owner = {
        "apiVersion": made["apiVersion"], "kind": made["kind"], "name": "model",
        "uid": made["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip
    child = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "model-gateway", "namespace": namespace, "ownerReferences": [owner]},
        "rules": [
            {
                "apiGroups": ["discovery.k8s.io"],
                "resources": ["endpointslices"],
                "verbs": ["get", "list", "watch"],
            }
        ],
    }
    account = str(cluster.kubeconfig_of("blockyard", namespace))

    def create() -> str:
        arguments = ["create", "--dry-run=server", f"--kubeconfig={account}", "-f", "-"]
        return cluster.kubectl(*arguments, stdin=yaml.safe_dump(child), check=False)

    assert "created (server dry run)" in create()
    role = cluster.get("ClusterRole", f"{namespace}-blockyard")
    for rule in role["rules"]:
        if held.resource in rule["resources"]:
            rule["verbs"].remove(held.verb)
            if not rule["verbs"]:
                role["rules"].remove(rule)
            break
    cluster.patch("ClusterRole", f"{namespace}-blockyard", None, {"rules": role["rules"]})
    deadline = time.monotonic() + LIMIT
    while "created (server dry run)" in (said := create()) and time.monotonic() < deadline:
        pass  # the API server's copy of the role follows at once, but not in the same moment
    assert "forbidden" in said.lower()
