"""Others delete and change what belongs to a service, while clients ask: it is put back, and it is told.

One service for all tests, which run in the order in which they stand here; each leaves it as its spec says.
"""

from __future__ import annotations

import base64
import copy
import random
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from blockyard.operator.companions import ACCOUNT

from .api import ApiError, Raw
from .clients import PROMPTS, Clients
from .cluster import Cluster
from .node import NodeStandIn
from .operator_process import (
    STARTING,
    Service,
    condition,
    manifest,
    operators,
    prepare,
    reason,
    settled,
)
from .rights import operators_account
from .truth import Recorder

NAME = "kept"
STEPS, LONGEST_PAUSE = 40, 6.0  # of the meddling at random: about two minutes
SEED = 20261127
OWN = ("serving.blockyard.dev/", "app.kubernetes.io/")
# What stands beside the agents, by kind and name.
COMPANIONS = (
    ("Service", NAME),
    ("Service", f"{NAME}-agents"),
    ("PodDisruptionBudget", f"{NAME}-agents"),
    ("NetworkPolicy", f"{NAME}-agents"),
    ("ServiceAccount", f"{NAME}-gateway"),
    ("Role", f"{NAME}-gateway"),
    ("RoleBinding", f"{NAME}-gateway"),
    ("Deployment", f"{NAME}-gateway"),
)


class Stage:
    """A service with two agents and a gateway, and the clients that ask it."""

    def __init__(self, cluster: Cluster, namespace: str, recorder: Recorder) -> None:
        self.cluster, self.namespace, self.recorder = cluster, namespace, recorder
        self.service = Service(cluster, NAME, namespace)
        cluster.create(manifest(NAME, namespace, replicas=2, gateway={"replicas": 1}))
        self.service.wait(settled(2))
        self.before = {each: self.essence(*each) for each in COMPANIONS}
        self.clients = Clients(NAME, self.gateways)

    def gateways(self) -> list[str]:
        """Addresses of the gateways themselves: their Service may be missing at the moment."""
        found = []
        for pod in self.cluster.items("Pod", self.namespace):
            conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions") or ()}
            is_gateway = pod["spec"]["containers"][0]["name"] == "gateway"
            if (
                is_gateway
                and conditions.get("Ready") == "True"
                and "deletionTimestamp" not in pod["metadata"]
            ):
                found.append(f"{pod['status']['podIP']}:8080")
        return found

    def essence(self, kind: str, name: str) -> Raw | None:
        """What of an object its service decides, as far as meddling can change it."""
        found = self.cluster.find(kind, name, self.namespace)
        return None if found is None else essence(kind, found)

    def wait_for(self, kind: str, name: str) -> None:
        """Until the object is as it was in the beginning."""
        wanted = self.before[kind, name]
        self.cluster.wait(
            kind, name, self.namespace, lambda found: bool(found) and essence(kind, found) == wanted
        )

    def patch(self, kind: str, name: str, change: Raw) -> None:
        self.cluster.patch(kind, name, self.namespace, change)

    def restored(self) -> dict[str, int]:
        """What events tell of undone changes, and how often."""
        events = self.cluster.items("Event", self.namespace)
        return {event["message"]: event["count"] for event in events if event["reason"] == "Restored"}

    def wait_for_agents(self) -> None:
        """Until each agent answers those who have the Secret's token, which its kubelet has to bring it."""
        until = time.monotonic() + STARTING
        for pod in self.service.pods():
            while True:
                try:
                    self.service.chat(pod, "Say hello.")
                    break
                except urllib.error.HTTPError as error:
                    if error.code != 401 or time.monotonic() > until:
                        raise
                    time.sleep(0.5)  # a volume has no event to wait for

    def check(self) -> None:
        """Clients were served all the time, and no status has lied."""
        self.clients.wait_for(2 * len(PROMPTS))
        assert not self.clients.failed, self.clients
        assert all(len(answers) == 1 for answers in self.clients.answers.values()), self.clients.answers
        self.recorder.check()


def essence(kind: str, found: Raw) -> Raw:
    metadata = found["metadata"]
    labels = metadata.get("labels") or {}
    parts = {part: found[part] for part in ("spec", "rules", "roleRef", "subjects") if part in found}
    if kind == "Service":  # what the API server gives, which another life gets anew
        parts["spec"] = {name: parts["spec"].get(name) for name in ("selector", "type")}
        parts["ports"] = [(port["name"], port["port"], port["targetPort"]) for port in found["spec"]["ports"]]
    if kind == "Deployment":  # its pods are replaced with their ServiceAccount
        parts = copy.deepcopy(parts)
        del parts["spec"]["template"]["metadata"]["annotations"][ACCOUNT]
    return {
        **parts,
        "labels": {name: value for name, value in labels.items() if name.startswith(OWN)},
        "owners": metadata.get("ownerReferences"),
    }


@pytest.fixture(scope="module")
def stage(cluster: Cluster, nodes: NodeStandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    prepare(cluster, nodes)
    with ExitStack() as stack:
        namespace = stack.enter_context(cluster.namespace())
        account = stack.enter_context(operators_account(cluster, namespace))
        start = stack.enter_context(
            operators(cluster, namespace, account, tmp_path_factory.mktemp("meddling"))
        )
        start()
        node = f"{namespace}-node"
        cluster.run(nodes.add(node, gpus=0))
        recorder = stack.enter_context(Recorder(cluster, NAME, namespace))
        made = Stage(cluster, namespace, recorder)
        stack.callback(made.clients.stop)
        yield made
        made.clients.stop()
        cluster.delete("LLMService", NAME, namespace)
        made.service.wait_until_gone()
        cluster.run(nodes.remove(node))


def test_companions_that_are_deleted_or_changed_are_put_back(stage: Stage) -> None:
    deleted = COMPANIONS[1], COMPANIONS[2], COMPANIONS[3]
    began = time.monotonic()
    for kind, name in deleted:
        stage.cluster.delete(kind, name, stage.namespace)
    for kind, name in deleted:
        stage.wait_for(kind, name)
    edits: dict[tuple[str, str], Raw] = {
        COMPANIONS[2]: {"spec": {"minAvailable": 0}},
        COMPANIONS[1]: {"spec": {"selector": {"x": "y"}}},
        COMPANIONS[7]: {"spec": {"replicas": 3}},
    }
    for (kind, name), edit in edits.items():
        stage.patch(kind, name, edit)
    for kind, name in edits:
        stage.wait_for(kind, name)
    print(f"all put back after {time.monotonic() - began:.1f} s")
    told = " ".join(stage.restored())
    for kind, name in (*deleted, *edits):
        assert f"{kind} {name} was" in told, told
    stage.check()


def test_repeated_changes_are_one_event_with_a_count_and_a_name(stage: Stage) -> None:
    kind, name = COMPANIONS[2]
    for _ in range(3):
        patch = '{"spec": {"minAvailable": 1}}'
        stage.cluster.kubectl("patch", "pdb", name, "-n", stage.namespace, "--type=merge", "-p", patch)
        stage.wait_for(kind, name)
    message = f"{kind} {name} was changed by kubectl-patch and has been put back"
    assert message in stage.restored()


def test_the_secret_comes_back_and_its_token_can_be_changed_while_clients_ask(stage: Stage) -> None:
    token, secret = stage.service.token(), f"{NAME}-internal"
    stage.cluster.delete("Secret", secret, stage.namespace)
    stage.cluster.wait("Secret", secret, stage.namespace, bool)
    assert stage.service.token() == token, "the agents have that one"
    stage.cluster.kubectl(
        "annotate", "llms", NAME, "-n", stage.namespace, "serving.blockyard.dev/rotate-token=today"
    )

    def holds(previous: str) -> Callable[[Raw | None], bool]:
        return lambda found: decoded(found, "previous") == previous

    stage.cluster.wait("Secret", secret, stage.namespace, holds(token))
    rotated = stage.service.token()
    assert rotated != token
    stage.wait_for_agents()
    by_hand = {"data": {"token": base64.b64encode(b"by-hand").decode()}}
    stage.patch("Secret", secret, by_hand)
    stage.cluster.wait("Secret", secret, stage.namespace, holds(rotated))
    stage.check()
    assert not any(condition(found, "Ready") == "False" for found in stage.recorder.seen[-5:])


def decoded(found: Raw | None, key: str) -> str:
    return base64.b64decode(((found or {}).get("data") or {}).get(key, "")).decode()


def test_a_pod_whose_labels_are_taken_off_keeps_its_place(stage: Stage) -> None:
    before = {pod["metadata"]["uid"]: pod for pod in stage.service.pods()}
    victim = next(iter(before.values()))
    name, labels = victim["metadata"]["name"], victim["metadata"]["labels"]
    stage.patch("Pod", name, {"metadata": {"labels": None, "annotations": None}})
    stage.cluster.wait(
        "Pod", name, stage.namespace, lambda found: bool(found) and found["metadata"].get("labels") == labels
    )
    stage.patch("Pod", name, {"metadata": {"ownerReferences": None}})
    owners = victim["metadata"]["ownerReferences"]
    stage.cluster.wait(
        "Pod",
        name,
        stage.namespace,
        lambda found: bool(found) and found["metadata"].get("ownerReferences") == owners,
    )
    stage.service.wait(settled(2))
    assert {pod["metadata"]["uid"] for pod in stage.service.pods()} == before.keys()
    assert not stage.cluster.evict(name, stage.namespace), "it is covered by the budget again"
    stage.check()


def test_objects_of_others_are_left_alone_and_named(stage: Stage) -> None:
    cluster, namespace = stage.cluster, stage.namespace
    ports = [{"name": "web", "port": 80}]
    theirs = cluster.create(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "mine", "namespace": namespace},
            "spec": {"selector": {"app": "mine"}, "ports": ports},
        }
    )
    # The second one's Service would be the headless one of the service of this file.
    for name in ("mine", f"{NAME}-agents"):
        cluster.create(manifest(name, namespace))
    owners = {"mine": "is not this service's", f"{NAME}-agents": f"belongs to LLMService {NAME}"}
    for name, whose in owners.items():
        found = Service(cluster, name, namespace).wait(lambda each: reason(each, "Ready")[0] == "NameTaken")
        message = reason(found, "Ready")[1]
        assert f"Service {name} {whose}" in message and "another name" in message, message
        assert not Service(cluster, name, namespace).pods()
    assert cluster.get("Service", "mine", namespace) == theirs
    assert stage.essence("Service", f"{NAME}-agents") == stage.before["Service", f"{NAME}-agents"]
    for name in ("mine", f"{NAME}-agents"):
        cluster.delete("LLMService", name, namespace)
        cluster.wait_until_gone("LLMService", name, namespace)
    assert cluster.get("Service", "mine", namespace)["metadata"]["uid"] == theirs["metadata"]["uid"]
    stage.check()


def test_whatever_is_changed_at_random_the_service_ends_up_as_its_spec_says(stage: Stage) -> None:
    chance = random.Random(SEED)
    done = []
    for _ in range(STEPS):
        meddle = chance.choice(MEDDLING)
        try:
            done.append(f"{meddle.__name__}: {meddle(stage, chance)}")
        except ApiError as error:  # it has just gone, or was changed in between
            done.append(f"{meddle.__name__}: {error}")
        time.sleep(chance.uniform(0.0, LONGEST_PAUSE))  # the meddlers' own pace; nothing is awaited
    print("\n".join(done))
    stage.service.wait(settled(2))
    for each in COMPANIONS:
        stage.wait_for(*each)
    stage.wait_for_agents()
    account = stage.cluster.get("ServiceAccount", f"{NAME}-gateway", stage.namespace)["metadata"]["uid"]
    gateways = stage.cluster.get("Deployment", f"{NAME}-gateway", stage.namespace)["spec"]["template"]
    assert gateways["metadata"]["annotations"][ACCOUNT] == account
    assert len(stage.gateways()) >= 1
    stage.check()


# ── Meddling ──────────────────────────────────────────────────────────────────────────────────────────────


def delete_a_companion(stage: Stage, chance: random.Random) -> str:
    kind, name = chance.choice(COMPANIONS[:-1])
    stage.cluster.delete(kind, name, stage.namespace)
    return f"{kind} {name}"


def change_a_spec(stage: Stage, chance: random.Random) -> str:
    edits: dict[tuple[str, str], list[Raw]] = {
        COMPANIONS[0]: [{"spec": {"selector": {"x": "y"}}}, {"spec": {"ports": None}}],
        COMPANIONS[1]: [{"spec": {"selector": {"x": "y"}}}, {"spec": {"publishNotReadyAddresses": True}}],
        COMPANIONS[2]: [{"spec": {"minAvailable": 0}}, {"spec": {"selector": {"matchLabels": {"x": "y"}}}}],
        COMPANIONS[3]: [{"spec": {"ingress": None}}, {"spec": {"podSelector": {"matchLabels": {"x": "y"}}}}],
        COMPANIONS[5]: [{"rules": None}],
        COMPANIONS[6]: [{"subjects": None}],
        COMPANIONS[7]: [
            {"spec": {"replicas": 2}},
            {"spec": {"strategy": {"rollingUpdate": {"maxSurge": 2}}}},
        ],
    }
    each = chance.choice(list(edits))
    edit = chance.choice(edits[each])
    stage.patch(*each, edit)
    return f"{each} {edit}"


def change_metadata(stage: Stage, chance: random.Random) -> str:
    """Labels, annotations or owner references, of a companion or of an agent's pod."""
    pods = [("Pod", pod["metadata"]["name"]) for pod in stage.service.pods()]
    kind, name = chance.choice([*COMPANIONS, *pods, *pods])
    label = chance.choice(("service", "undrained", "revision"))
    edit = chance.choice(
        (
            {"labels": None},
            {"labels": None, "annotations": None},
            {"labels": {f"serving.blockyard.dev/{label}": chance.choice((None, "bogus"))}},
            {"labels": {"app.kubernetes.io/managed-by": None}},
            {"ownerReferences": None},
            {"annotations": None},
        )
    )
    stage.patch(kind, name, {"metadata": edit})
    return f"{kind} {name} {edit}"


def change_the_secret(stage: Stage, chance: random.Random) -> str:
    secret, how = f"{NAME}-internal", chance.choice(("deleted", "emptied", "changed", "without labels"))
    if how == "deleted":
        stage.cluster.delete("Secret", secret, stage.namespace)
    elif how == "emptied":
        stage.patch("Secret", secret, {"data": None})
    elif how == "changed":
        token = base64.b64encode(chance.randbytes(8).hex().encode()).decode()
        stage.patch("Secret", secret, {"data": {"token": token}})
    else:
        stage.patch("Secret", secret, {"metadata": {"labels": None, "ownerReferences": None}})
    return how


def delete_an_agent(stage: Stage, chance: random.Random) -> str:
    """Only while another one is ready: with none there is nobody who could answer."""
    pods = stage.service.pods()
    if len(pods) < 2 or not settled(2)(stage.cluster.find("LLMService", NAME, stage.namespace)):
        return "not now"
    name = str(chance.choice(pods)["metadata"]["name"])
    stage.cluster.delete("Pod", name, stage.namespace)
    return name


MEDDLING: tuple[Callable[[Stage, random.Random], str], ...] = (
    delete_a_companion,
    change_a_spec,
    change_a_spec,
    change_metadata,
    change_metadata,
    change_metadata,
    change_the_secret,
    delete_an_agent,
)
