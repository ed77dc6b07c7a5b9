"""The mirrors: in whatever order answers, watches and lists arrive, the newest that was told is kept."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard.operator.cluster import Cluster, Gateway, Mirror, key_of
from blockyard.operator.observed import SERVICE
from blockyard.operator.workqueue import Key

Raw = dict[str, Any]


def thing(name: str, version: int, value: int = 0, namespace: str = "default") -> Raw:
    return {
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": str(version)},
        "value": value,
    }


class Kept:
    """A mirror of values, and its changes as they were told."""

    def __init__(self) -> None:
        self.changes: list[tuple[int | None, int | None]] = []
        self.mirror: Mirror[int] = Mirror(
            lambda raw: int(raw["value"]), lambda *change: self.changes.append(change)
        )


def test_the_older_of_two_updates_is_dropped_whichever_comes_last() -> None:
    kept = Kept()
    kept.mirror.put(thing("a", 5, value=5))
    kept.mirror.put(thing("a", 4, value=4))
    assert kept.mirror.get(("default", "a")) == 5
    kept.mirror.drop(thing("a", 7))
    kept.mirror.put(thing("a", 6, value=6))
    assert kept.mirror.get(("default", "a")) is None, "an answer that comes late does not bring it back"
    kept.mirror.put(thing("a", 8, value=8))
    kept.mirror.drop(thing("a", 7))
    assert kept.mirror.get(("default", "a")) == 8, "nor does the deletion of the one before take it away"
    assert kept.changes == [(None, 5), (5, None), (None, 8)]


def test_the_answer_to_a_deletion_does_not_outlive_what_was_deleted() -> None:
    kept = Kept()
    kept.mirror.put(thing("a", 5, value=5))
    kept.mirror.put(thing("a", 7, value=7))  # what a deletion by force answers: the object, at its end
    kept.mirror.drop(thing("a", 7))
    assert kept.mirror.get(("default", "a")) is None
    kept.mirror.put(thing("a", 7, value=7))
    assert kept.mirror.get(("default", "a")) is None, "nor where the watch was faster"


def test_equal_values_are_no_change() -> None:
    kept = Kept()
    for version in range(1, 5):
        kept.mirror.put(thing("a", version, value=1))
    assert kept.changes == [(None, 1)]


def test_a_list_takes_away_what_is_older_and_not_in_it_within_its_namespace() -> None:
    kept = Kept()
    kept.mirror.put(thing("old", 1, value=1))
    kept.mirror.put(thing("elsewhere", 1, value=2, namespace="other"))
    kept.mirror.put(thing("young", 11, value=3))
    kept.mirror.settle(set(), 10, "default")
    assert sorted(kept.mirror) == [2, 3]
    kept.mirror.settle(set(), 12)
    assert len(kept.mirror) == 0 and not kept.mirror._entries, "no deletion is remembered for ever"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_in_any_order_of_arrival_the_mirror_ends_where_the_server_is(data: st.DataObject) -> None:
    """The watch tells all writes in order; answers come at any time; lists are as of their version."""
    history: list[tuple[str, Raw]] = []
    server: dict[Key, Raw] = {}
    snapshots: dict[int, dict[Key, Raw]] = {}
    for version in range(1, data.draw(st.integers(1, 15)) + 1):
        name = data.draw(st.sampled_from("abc"))
        raw = thing(name, version, value=version)
        if ("default", name) in server and data.draw(st.booleans()):
            del server["default", name]
            history.append(("drop", raw))
        else:
            server["default", name] = raw
            history.append(("put", raw))
        snapshots[version] = dict(server)
    kept = Kept()
    told = 0
    while told < len(history):
        kind = data.draw(st.sampled_from(("watch", "watch", "answer", "list")))
        if kind == "watch":
            how, raw = history[told]
            (kept.mirror.put if how == "put" else kept.mirror.drop)(raw)
            told += 1
            continue
        version = data.draw(st.integers(1, len(history)))
        if kind == "answer":
            kept.mirror.put(history[version - 1][1])  # to a deletion, too, with its version and what it took
        elif version > told:  # a list is read after what the watch has told
            for raw in snapshots[version].values():
                kept.mirror.put(raw)
            kept.mirror.settle({key_of(raw) for raw in snapshots[version].values()}, version)
    assert {key: kept.mirror.get(key) for key in server} == {key: raw["value"] for key, raw in server.items()}
    assert len(kept.mirror) == len(server)


def pod(name: str, version: int, service: str = "s", owner: str = "u1", node: str = "n1") -> Raw:
    owners = [{"kind": "LLMService", "name": service, "uid": owner, "controller": True}]
    labels = {SERVICE: service}
    metadata = {"name": name, "namespace": "default", "uid": f"{name}-uid", "resourceVersion": str(version)}
    return {"metadata": {**metadata, "labels": labels, "ownerReferences": owners}, "spec": {"nodeName": node}}


def node(name: str, version: int, unschedulable: bool = False, beat: str = "") -> Raw:
    conditions = [{"type": "Ready", "status": "True", "lastHeartbeatTime": beat}]
    return {
        "metadata": {"name": name, "resourceVersion": str(version)},
        "spec": {"unschedulable": unschedulable},
        "status": {"conditions": conditions},
    }


def test_a_change_marks_the_services_that_it_concerns_and_no_other() -> None:
    dirty: list[Key] = []
    cluster = Cluster(dirty.append)
    cluster.nodes.put(node("n1", 1))
    cluster.nodes.put(node("n2", 2))
    assert dirty == []
    cluster.pods.put(pod("a", 3))
    cluster.pods.put(pod("b", 4, service="t", node="n2"))
    assert dirty == [("default", "s"), ("default", "t")]
    dirty.clear()
    cluster.nodes.put(node("n1", 5, beat="later"))
    assert dirty == [], "a heartbeat is no news"
    cluster.nodes.put(node("n1", 6, unschedulable=True))
    assert dirty == [("default", "s")]
    dirty.clear()
    cluster.pods.drop(pod("b", 7, service="t"))
    assert dirty == [("default", "t")] and not cluster._pods_of.get(("default", "t"))
    dirty.clear()
    cluster.nodes.drop(node("n1", 8))
    assert dirty == [("default", "s")] and "n1" not in cluster.nodes_by_name


def test_a_gateway_whose_newest_pods_are_refused_says_why_until_they_are_there() -> None:
    def gateway(pod: str, updated: int) -> Gateway:
        quota = "exceeded quota: q, requested: a=1, used: a=1, limited: a=1"
        message = f'pods "s-gateway-1-{pod}" is forbidden: {quota}'
        failure = {"type": "ReplicaFailure", "status": "True", "message": message}
        metadata = {"name": "s-gateway", "namespace": "default", "generation": 1}
        status = {"updatedReplicas": updated, "conditions": [failure]}
        return Gateway.of({"metadata": metadata, "spec": {"replicas": 2}, "status": status})

    one, other = gateway("aaaaa", 1), gateway("bbbbb", 1)
    assert one.refused is not None and one.refused.reason == "QuotaExceeded"
    assert one == other, "another attempt is no news"
    assert gateway("aaaaa", 2).refused is None, "older pods are refused, which nobody misses"
