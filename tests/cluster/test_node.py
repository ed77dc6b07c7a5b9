"""Pods that the real scheduler binds are real processes, and what the API says of them is true."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .api import Raw
from .cluster import Cluster
from .container import Image
from .node import NodeStandIn
from .test_control_plane import ended

NODE = "stand-in-node"
LOST = "stand-in-lost"
PYTHON = "python:test"
PORT = 8000
SERVE = ["-m", "http.server", str(PORT), "--bind", "$(POD_IP)", "--directory", "/content"]
POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}

# Says what it got; ends 0 on SIGTERM, after a child that left its session has been started.
TALKS = """
import json, os, signal, ssl, subprocess, sys, urllib.error, urllib.request
def end(*_):
    print("told to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
account = os.environ["BLOCKYARD_GATEWAY_SERVICEACCOUNT"]
read = lambda name: open(f"{account}/{name}").read()
server = "https://{KUBERNETES_SERVICE_HOST}:{KUBERNETES_SERVICE_PORT}".format(**os.environ)
request = urllib.request.Request(server + "/api/v1/namespaces/" + read("namespace") + "/secrets")
request.add_header("Authorization", "Bearer " + read("token"))
try:
    urllib.request.urlopen(request, context=ssl.create_default_context(cafile=account + "/ca.crt"))
except urllib.error.HTTPError as error:
    answer = json.load(error)["message"]
told = {"env": dict(os.environ), "argv": sys.argv[1:], "answer": answer, "child": child.pid}
print(json.dumps(told), flush=True)
while True:
    signal.pause()
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
signal.pause()
"""


def pod(name: str, namespace: str, *args: str, node: str = NODE, **spec: Any) -> Raw:
    """A pod with one container of Python; ``container`` adds to that, the rest to the pod's spec."""
    container = {
        "name": "main",
        "image": PYTHON,
        "args": list(args),
        "env": [POD_IP],
        **spec.pop("container", {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {"nodeSelector": {"kubernetes.io/hostname": node}, "containers": [container], **spec},
    }


def status_of(state: Raw | None) -> Raw:
    statuses = (state or {}).get("status", {}).get("containerStatuses", [])
    return statuses[0] if statuses else {"state": {}, "lastState": {}, "restartCount": 0, "ready": False}


def condition(state: Raw | None, kind: str) -> Raw:
    found = [one for one in (state or {}).get("status", {}).get("conditions", []) if one["type"] == kind]
    return found[0] if found else {}


def ready(state: Raw | None) -> bool:
    return condition(state, "Ready").get("status") == "True"


def waits_for(reason: str) -> Callable[[Raw | None], bool]:
    return lambda state: status_of(state)["state"].get("waiting", {}).get("reason") == reason


def gone(state: Raw | None) -> bool:
    return state is None


def last_state(cluster: Cluster, name: str, namespace: str) -> Raw:
    """What was written of a pod that is being deleted before its object went."""
    states: list[Raw] = []

    def keep(state: Raw | None) -> bool:
        if state:
            states.append(state)
        return state is None

    cluster.wait("Pod", name, namespace, keep)
    return states[-1]


def http(address: str, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def until(holds: Callable[[], bool], limit: float = 60.0) -> None:
    """For what tells nobody when it changes."""
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def lost_pod(cluster: Cluster, nodes: NodeStandIn) -> Iterator[None]:
    """A pod whose node was removed: made first, since controllers wait a minute before they collect it."""
    nodes.images[PYTHON] = Image(entrypoint=(sys.executable,))
    cluster.run(nodes.add(NODE, gpus=2))
    cluster.run(nodes.add(LOST, gpus=1))
    cluster.wait("ServiceAccount", "default", "default", bool)
    cluster.create(pod("lost", "default", "-c", STUBBORN, node=LOST))
    cluster.wait("Pod", "lost", "default", ready)
    pid = nodes.container("lost", "default").pid
    assert pid
    cluster.run(nodes.remove(LOST))
    assert ended(pid, limit=10)
    yield
    cluster.run(nodes.remove(NODE))


@pytest.fixture
def served(cluster: Cluster, namespace: str) -> str:
    """A Deployment of two pods that serve what their init container has written, and their Service."""
    labels = {"app": "served"}
    write = "import sys; open(sys.argv[1] + '/name', 'w').write(sys.argv[2])"
    name = {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    mounts = [{"name": "content", "mountPath": "/content"}]
    first = {"name": "first", "image": PYTHON, "args": ["-c", write, "/content", "$(NAME)"], "env": [name]}
    probe = {"httpGet": {"path": "/name", "port": "http"}, "periodSeconds": 1}
    main = {
        "name": "main",
        "image": PYTHON,
        "args": SERVE,
        "env": [POD_IP],
        "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": probe,
        "volumeMounts": mounts,
    }
    template = {
        "metadata": {"labels": {**labels, "undrained": "true"}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": NODE},
            "initContainers": [{**first, "volumeMounts": mounts}],
            "containers": [main],
            "volumes": [{"name": "content", "emptyDir": {}}],
        },
    }
    cluster.create(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "served", "namespace": namespace},
            "spec": {"replicas": 2, "selector": {"matchLabels": labels}, "template": template},
        }
    )
    cluster.create(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "served", "namespace": namespace},
            "spec": {"selector": labels, "ports": [{"name": "web", "port": 80, "targetPort": "http"}]},
        }
    )
    return namespace


def test_a_deployment_becomes_available_and_its_pods_serve_on_one_port_each_at_its_address(
    cluster: Cluster, served: str
) -> None:
    deployment = cluster.wait(
        "Deployment",
        "served",
        served,
        lambda state: bool(state and state["status"].get("availableReplicas") == 2),
    )
    assert condition(deployment, "Available")["status"] == "True"
    addresses = cluster.wait_for_endpoints("served", served, 2)
    assert all(address.endswith(f":{PORT}") for address in addresses) and len(set(addresses)) == 2
    names = {item["metadata"]["name"] for item in cluster.items("Pod", served)}
    assert {http(address, "/name") for address in addresses} == names


def test_a_killed_process_is_started_again_and_says_how_it_ended(
    cluster: Cluster, nodes: NodeStandIn, served: str
) -> None:
    cluster.wait_for_endpoints("served", served, 2)
    name = cluster.items("Pod", served)[0]["metadata"]["name"]
    before = nodes.kill(name, served)
    state = cluster.wait(
        "Pod", name, served, lambda state: ready(state) and status_of(state)["restartCount"] == 1
    )
    assert status_of(state)["lastState"]["terminated"]["exitCode"] == 137
    assert nodes.container(name, served).pid not in (None, before)
    cluster.wait_for_endpoints("served", served, 2)
    assert len(cluster.items("Pod", served)) == 2


def test_an_eviction_waits_for_the_budget_and_takes_what_the_budget_no_longer_covers(
    cluster: Cluster, served: str
) -> None:
    cluster.wait_for_endpoints("served", served, 2)
    budget = {"maxUnavailable": 0, "selector": {"matchLabels": {"undrained": "true"}}}
    metadata = {"name": "served", "namespace": served}
    cluster.create(
        {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": budget}
    )
    cluster.wait(
        "PodDisruptionBudget",
        "served",
        served,
        lambda state: bool(state and state["status"]["currentHealthy"] == 2),
    )
    name = cluster.items("Pod", served)[0]["metadata"]["name"]
    assert not cluster.evict(name, served)
    assert "deletionTimestamp" not in cluster.get("Pod", name, served)["metadata"]
    cluster.patch("Pod", name, served, {"metadata": {"labels": {"undrained": None}}})
    assert cluster.evict(name, served)
    cluster.wait("Pod", name, served, gone)


def test_a_pod_that_no_node_can_take_stays_pending_with_the_schedulers_words(
    cluster: Cluster, namespace: str
) -> None:
    gpus = {"limits": {"nvidia.com/gpu": "99"}}
    cluster.create(pod("huge", namespace, container={"resources": gpus}))
    state = cluster.wait(
        "Pod", "huge", namespace, lambda state: condition(state, "PodScheduled").get("status") == "False"
    )
    scheduled = condition(state, "PodScheduled")
    assert state["status"]["phase"] == "Pending" and scheduled["reason"] == "Unschedulable"
    assert "Insufficient nvidia.com/gpu" in scheduled["message"]


def test_the_nodes_gpus_are_given_out_and_come_back(cluster: Cluster, namespace: str) -> None:
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    cluster.create(pod("first", namespace, "-c", STUBBORN, container=gpus))
    cluster.wait("Pod", "first", namespace, ready)
    cluster.create(pod("second", namespace, "-c", STUBBORN, container=gpus))
    cluster.wait("Pod", "second", namespace, lambda state: "reason" in condition(state, "PodScheduled"))
    cluster.delete("Pod", "first", namespace, grace=0)
    cluster.wait("Pod", "second", namespace, ready)


def test_a_process_gets_its_environment_arguments_and_account(
    cluster: Cluster, nodes: NodeStandIn, namespace: str
) -> None:
    cluster.kubectl("create", "secret", "generic", "keys", "--from-literal=one=1st", "-n", namespace)
    cluster.kubectl("create", "configmap", "words", "--from-literal=two=2nd", "-n", namespace)
    missing = {"name": "nobody", "key": "none", "optional": True}
    env = [
        {"name": "PLAIN", "value": "a"},
        {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "one"}}},
        {"name": "CONFIG", "valueFrom": {"configMapKeyRef": {"name": "words", "key": "two"}}},
        {"name": "MISSING", "valueFrom": {"secretKeyRef": missing}},
        {"name": "BOTH", "value": "$(PLAIN) $(SECRET) $$(PLAIN) $(UNKNOWN)"},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
        {"name": "PLACES", "value": "/data/x:/database:http://host/data"},
        POD_IP,
    ]
    container = {"env": env, "envFrom": [{"prefix": "W_", "configMapRef": {"name": "words"}}]}
    container |= {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    volumes = [{"name": "data", "emptyDir": {}}]
    manifest = pod("talks", namespace, "-c", TALKS, "$(BOTH)", "/data", container=container, volumes=volumes)
    cluster.create(manifest)
    state = cluster.wait("Pod", "talks", namespace, ready)
    container_of = nodes.container("talks", namespace)
    until(lambda: "\n" in container_of.logs())
    said = json.loads(container_of.logs())
    got = said["env"]
    data = str(nodes.pod("talks", namespace).folder / "volumes" / "data")
    assert (got["SECRET"], got["CONFIG"], got["W_two"]) == ("1st", "2nd", "2nd") and "MISSING" not in got
    assert got["BOTH"] == "a 1st $(PLAIN) $(UNKNOWN)"
    assert (got["NODE"], got["LABEL"], got["POD_IP"]) == (NODE, "talks", state["status"]["podIP"])
    assert got["PLACES"] == f"{data}/x:/database:http://host/data"
    assert said["argv"] == [got["BOTH"], data]
    assert f'"system:serviceaccount:{namespace}:default" cannot list resource "secrets"' in said["answer"]


def test_a_deleted_pod_gets_sigterm_time_to_end_and_takes_all_its_processes_along(
    cluster: Cluster, nodes: NodeStandIn, namespace: str
) -> None:
    cluster.create(pod("talks", namespace, "-c", TALKS, terminationGracePeriodSeconds=600))
    cluster.wait("Pod", "talks", namespace, ready)
    container = nodes.container("talks", namespace)
    until(lambda: "\n" in container.logs())
    child = json.loads(container.logs())["child"]
    cluster.delete("Pod", "talks", namespace)
    last = last_state(cluster, "talks", namespace)
    assert status_of(last)["state"]["terminated"]["exitCode"] == 0
    assert last["status"]["phase"] == "Succeeded" and not ready(last)
    assert "told to end" in "".join(nodes.logs(namespace).values())
    assert ended(child, limit=10)


def test_a_pod_that_ignores_sigterm_is_killed_when_its_grace_period_is_over(
    cluster: Cluster, nodes: NodeStandIn, namespace: str
) -> None:
    cluster.create(pod("stubborn", namespace, "-c", STUBBORN, terminationGracePeriodSeconds=600))
    cluster.wait("Pod", "stubborn", namespace, ready)
    container = nodes.container("stubborn", namespace)
    until(lambda: "up" in container.logs())
    cluster.delete("Pod", "stubborn", namespace)
    state = cluster.wait(
        "Pod", "stubborn", namespace, lambda state: "deletionTimestamp" in (state or {})["metadata"]
    )
    assert ready(state) and container.pid  # it has been told, and has time
    cluster.delete("Pod", "stubborn", namespace, grace=1)
    last = last_state(cluster, "stubborn", namespace)
    assert status_of(last)["state"]["terminated"]["exitCode"] == 137
    assert last["status"]["phase"] == "Failed"


def test_a_pod_deleted_by_force_is_killed(cluster: Cluster, nodes: NodeStandIn, namespace: str) -> None:
    cluster.create(pod("stubborn", namespace, "-c", STUBBORN))
    cluster.wait("Pod", "stubborn", namespace, ready)
    pid = nodes.container("stubborn", namespace).pid
    assert pid
    cluster.delete("Pod", "stubborn", namespace, grace=0)
    cluster.wait("Pod", "stubborn", namespace, gone)
    assert ended(pid)


def test_a_container_that_ends_again_and_again_backs_off_and_keeps_its_logs(
    cluster: Cluster, nodes: NodeStandIn, namespace: str
) -> None:
    cluster.create(pod("crashes", namespace, "-c", "print('ouch'); raise SystemExit(3)"))
    state = cluster.wait("Pod", "crashes", namespace, waits_for("CrashLoopBackOff"))
    status = status_of(state)
    assert status["restartCount"] == 1 and status["lastState"]["terminated"]["exitCode"] == 3
    assert status["state"]["waiting"]["message"].startswith("back-off")
    assert nodes.container("crashes", namespace).logs().count("ouch") == 2
    cluster.delete("Pod", "crashes", namespace)
    cluster.wait("Pod", "crashes", namespace, gone)


@pytest.mark.parametrize(("code", "phase"), [(0, "Succeeded"), (5, "Failed")])
def test_a_pod_that_is_never_restarted_ends_with_its_process(
    cluster: Cluster, namespace: str, code: int, phase: str
) -> None:
    cluster.create(pod("once", namespace, "-c", f"raise SystemExit({code})", restartPolicy="Never"))
    state = cluster.wait(
        "Pod",
        "once",
        namespace,
        lambda state: (state or {}).get("status", {}).get("phase") in ("Succeeded", "Failed"),
    )
    assert state["status"]["phase"] == phase and status_of(state)["state"]["terminated"]["exitCode"] == code
    assert status_of(state)["restartCount"] == 0
    cluster.delete("Pod", "once", namespace)
    cluster.wait("Pod", "once", namespace, gone)


def test_a_missing_image_and_a_missing_secret_are_waited_for(
    cluster: Cluster, nodes: NodeStandIn, namespace: str
) -> None:
    key = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "late", "key": "key"}}}
    image = f"late:{namespace}"
    cluster.create(pod("late", namespace, "-c", STUBBORN, container={"image": image, "env": [key]}))
    state = cluster.wait("Pod", "late", namespace, waits_for("ErrImagePull"))
    assert image in status_of(state)["state"]["waiting"]["message"]
    nodes.images[image] = nodes.images[PYTHON]
    state = cluster.wait("Pod", "late", namespace, waits_for("CreateContainerConfigError"))
    assert status_of(state)["state"]["waiting"]["message"] == 'secret "late" not found'
    cluster.kubectl("create", "secret", "generic", "late", "--from-literal=key=k", "-n", namespace)
    cluster.wait("Pod", "late", namespace, ready)


def test_probes_decide_who_is_ready_and_who_is_started_again(
    cluster: Cluster, nodes: NodeStandIn, namespace: str
) -> None:
    def probe(path: str, **more: int) -> Raw:
        return {"httpGet": {"path": path, "port": PORT}, "periodSeconds": 1, **more}

    container = {
        "args": SERVE,
        "startupProbe": probe("/started", failureThreshold=1000),
        "readinessProbe": probe("/ready", failureThreshold=1),
        "livenessProbe": probe("/alive", failureThreshold=1),
        "volumeMounts": [{"name": "content", "mountPath": "/content"}],
    }
    volumes = [{"name": "content", "emptyDir": {}}]
    cluster.create(pod("probed", namespace, container=container, volumes=volumes))
    cluster.wait("Pod", "probed", namespace, lambda state: "running" in status_of(state)["state"])
    content = nodes.pod("probed", namespace).folder / "volumes" / "content"
    (content / "alive").touch()
    (content / "ready").touch()
    until(lambda: "/started" in nodes.container("probed", namespace).logs())
    assert not status_of(cluster.get("Pod", "probed", namespace)).get("started")
    (content / "started").touch()
    cluster.wait("Pod", "probed", namespace, ready)
    (content / "ready").unlink()
    state = cluster.wait("Pod", "probed", namespace, lambda state: not ready(state))
    assert "running" in status_of(state)["state"] and status_of(state)["restartCount"] == 0
    assert "main" in condition(state, "Ready")["message"]
    (content / "ready").touch()
    state = cluster.wait("Pod", "probed", namespace, ready)
    assert not condition(state, "Ready").get("message")
    (content / "alive").unlink()
    state = cluster.wait("Pod", "probed", namespace, lambda state: status_of(state)["restartCount"] == 1)
    assert status_of(state)["lastState"]["terminated"]["exitCode"] == 143


def test_volumes_hold_what_they_should_and_follow_its_changes(
    cluster: Cluster, nodes: NodeStandIn, namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_text("of a claim")
    nodes.folders[f"models/{namespace}"] = tmp_path
    cluster.kubectl("create", "secret", "generic", "keys", "--from-literal=tenant=first", "-n", namespace)
    labels = {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}
    volumes = [
        {"name": "keys", "secret": {"secretName": "keys"}},
        {"name": "info", "downwardAPI": {"items": [labels]}},
        {"name": "kept", "hostPath": {"path": f"/var/lib/{namespace}", "type": "DirectoryOrCreate"}},
        {"name": "model", "image": {"reference": f"models/{namespace}"}},
    ]
    mounts = [{"name": volume["name"], "mountPath": f"/content/{volume['name']}"} for volume in volumes]
    commands = """
import os, shutil, sys, time
keys, info, kept, model = sys.argv[1:]
for path in (keys + "/tenant", info + "/labels", model + "/weights"):
    print(open(path).read())
print("kept:", *os.listdir(kept), flush=True)
open(kept + "/" + os.environ["NAME"], "w").close()
while open(keys + "/tenant").read() != "second":
    time.sleep(0.1)
print("changed", flush=True)
time.sleep(600)
"""
    arguments = ["-c", commands, *(f"/content/{volume['name']}" for volume in volumes)]

    def start(name: str) -> None:
        container = {"volumeMounts": mounts, "env": [{"name": "NAME", "value": name}]}
        cluster.create(pod(name, namespace, *arguments, container=container, volumes=volumes))
        cluster.wait("Pod", name, namespace, ready)
        until(lambda: "kept:" in nodes.container(name, namespace).logs())

    start("one")
    assert 'first\napp="one"\nof a claim\nkept:\n' in nodes.container("one", namespace).logs()
    cluster.patch("Secret", "keys", namespace, {"stringData": {"tenant": "second"}})
    until(lambda: "changed" in nodes.container("one", namespace).logs())
    cluster.delete("Pod", "one", namespace, grace=1)
    cluster.wait("Pod", "one", namespace, gone)
    start("two")
    assert "kept: one\n" in nodes.container("two", namespace).logs()


def test_a_node_that_fails_is_unreachable_and_its_processes_are_dead(
    cluster: Cluster, nodes: NodeStandIn, namespace: str
) -> None:
    cluster.run(nodes.add(f"fails-{namespace}"))
    cluster.create(pod("alone", namespace, "-c", STUBBORN, node=f"fails-{namespace}"))
    cluster.wait("Pod", "alone", namespace, ready)
    pid = nodes.container("alone", namespace).pid
    assert pid
    cluster.run(nodes.fail(f"fails-{namespace}"))
    assert ended(pid, limit=10)

    def tainted(state: Raw | None) -> bool:
        taints = state["spec"].get("taints", []) if state else []
        return any(taint["key"] == "node.kubernetes.io/unreachable" for taint in taints)

    cluster.wait("Node", f"fails-{namespace}", None, tainted)
    state = cluster.wait("Pod", "alone", namespace, lambda state: not ready(state))
    assert state["status"]["phase"] == "Running"  # nobody is there who could say what became of it
    cluster.delete("Node", f"fails-{namespace}")


def test_the_stand_in_itself_had_no_error(nodes: NodeStandIn) -> None:
    assert nodes.errors == []


def test_the_pods_of_a_removed_node_are_collected(cluster: Cluster) -> None:
    assert cluster.find("Node", LOST) is None
    cluster.wait("Pod", "lost", "default", gone, limit=180)
