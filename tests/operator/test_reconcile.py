"""Rounds against an API server that conflicts, fails and forgets, with pods whose agents are real HTTP
servers.

What is decided is tested with the pure functions; here it is that decisions are carried out once, that
nothing is written twice or for nothing, that a killed operator's successor goes on, and that trouble stays
where it belongs.
"""

from __future__ import annotations

import asyncio
import base64
import copy
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blockyard.operator import companions as companions_module
from blockyard.operator import fleet as fleet_module
from blockyard.operator import kube as kube_module
from blockyard.operator import reconcile as reconcile_module
from blockyard.operator import replicas as replicas_module
from blockyard.operator import status as status_module
from blockyard.operator import workqueue as workqueue_module
from blockyard.operator.children import WANTED, Defaults
from blockyard.operator.cluster import Cluster
from blockyard.operator.companions import ACCOUNT, covers
from blockyard.operator.events import Recorder
from blockyard.operator.fleet import Fleet
from blockyard.operator.kube import (
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    EVENT,
    LLM_SERVICE,
    NETWORK_POLICY,
    NODE,
    POD,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    SERVICE_MONITOR,
    Kube,
)
from blockyard.operator.metrics import Metrics
from blockyard.operator.observed import (
    DRAINING_SINCE,
    FINALIZER,
    PAUSED,
    REVISION,
    ROTATE,
    UNDRAINED,
    Service,
)
from blockyard.operator.observed import SERVICE as SERVICE_LABEL
from blockyard.operator.reconcile import Reconciler
from blockyard.operator.workqueue import WorkQueue

from .agents import Agents
from .api_server import ApiServer, Fault, Raw

KEY = ("default", "s")
DEFAULTS = Defaults("agent:1", "operator")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 90))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_module, "BACKOFF", 0.001)
    monkeypatch.setattr(workqueue_module, "FIRST_RETRY", 0.01)
    monkeypatch.setattr(workqueue_module, "LONGEST_RETRY", 0.1)
    monkeypatch.setattr(reconcile_module, "RESYNC_RETRY", 0.01)
    monkeypatch.setattr(reconcile_module, "DRAIN_RETRY", 0.01)
    monkeypatch.setattr(reconcile_module, "LOAD_INTERVAL", 0.0)
    monkeypatch.setattr(reconcile_module, "SECRET_INTERVAL", 0.05)


class Life:
    """One life of an operator, without kopf: mirrors follow the server's history, as its watches do."""

    def __init__(self, server: ApiServer, **options: Any) -> None:
        self.server = server
        self.metrics = Metrics()
        self.kube = Kube(server.credentials(), self.metrics.count_call)
        self.queue = WorkQueue()
        self.cluster = Cluster(self.queue.add)
        self.fleet = Fleet(self.queue, polls_per_second=1e6)
        recorder = Recorder(self.kube, "test")
        self.reconciler = Reconciler(
            self.kube, self.cluster, self.fleet, self.queue, recorder, self.metrics, DEFAULTS, **options
        )
        self.watching = True
        self._position = len(server.history)

    async def __aenter__(self) -> Life:
        self._tasks = [
            asyncio.create_task(self._watch()),
            asyncio.create_task(self.reconciler.run(4, (), 3600.0)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fleet.close()
        self.queue.close()
        await self.kube.close()
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended

    async def _watch(self) -> None:
        mirrors = {
            LLM_SERVICE.plural: self.cluster.services,
            POD.plural: self.cluster.pods,
            NODE.plural: self.cluster.nodes,
            DEPLOYMENT.plural: self.cluster.deployments,
        }
        while True:
            async with self.server._changed:
                await self.server._changed.wait_for(
                    lambda: self.watching and self._position < len(self.server.history)
                )
            _, plural, event, body = self.server.history[self._position]
            self._position += 1
            if (mirror := mirrors.get(plural)) is not None:
                tell: Callable[[Raw], None] = getattr(mirror, "drop" if event == "DELETED" else "put")
                tell(copy.deepcopy(body))

    async def idle(self) -> None:
        """Until nothing is due or worked on. Nobody tells of that, so this looks again and again."""
        calm = 0
        while calm < 5:
            await asyncio.sleep(0.005)
            calm = 0 if len(self.queue) or self.queue._working or self.queue._failures else calm + 1

    async def quiet(self) -> None:
        """Until it is idle and the watch has told everything."""
        await self.idle()
        while self._position < len(self.server.history):
            await self.idle()


class Kubelet:
    """Gives pods a node, an address and a ready agent as soon as they appear; ends those that are deleted."""

    def __init__(self, server: ApiServer, agents: Agents) -> None:
        self.server, self.agents = server, agents
        self.hold = False  # pods stay pending

    async def run(self) -> None:
        while True:
            for pod in list(self.server.all(POD)):
                name = pod["metadata"]["name"]
                if "deletionTimestamp" in pod["metadata"]:
                    await self.server.remove(POD, name)
                elif not self.hold and "status" not in pod:
                    secret = self.server.get(SECRET, "s-internal")["data"]["token"]
                    ip = await self.agents.add(token=base64.b64decode(secret).decode())
                    status = {
                        "phase": "Running",
                        "podIP": ip,
                        "conditions": [{"type": "Ready", "status": "True"}],
                        "containerStatuses": [{"name": "agent", "state": {"running": {}}, "restartCount": 0}],
                    }
                    await self.server.change(POD, name, {"spec": {"nodeName": "n1"}, "status": status})
            async with self.server._changed:
                await self.server._changed.wait()


@asynccontextmanager
async def world() -> AsyncIterator[tuple[ApiServer, Agents, Kubelet]]:
    async with ApiServer() as server, Agents(8000) as agents:
        status = {"conditions": [{"type": "Ready", "status": "True"}]}
        await server.put(NODE, {"metadata": {"name": "n1"}, "spec": {}, "status": status})
        kubelet = Kubelet(server, agents)
        task = asyncio.create_task(kubelet.run())
        yield server, agents, kubelet
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def service(name: str = "s", **spec: Any) -> Raw:
    base = {"model": {"hub": {"name": "m"}}, "device": "cpu", "gateway": {"replicas": 0}}
    return {"metadata": {"name": name, "namespace": "default"}, "spec": {**base, **spec}}


def status_of(server: ApiServer, name: str = "s") -> Raw:
    found: Raw = server.objects[LLM_SERVICE.plural].get(("default", name), {}).get("status") or {}
    return found


def condition(server: ApiServer, kind: str, name: str = "s") -> tuple[str, str, str]:
    found = (one for one in status_of(server, name).get("conditions", ()) if one["type"] == kind)
    one = next(found, {"status": "", "reason": "", "message": ""})
    return one["status"], one["reason"], one["message"]


def ready(server: ApiServer, count: int) -> Callable[[], bool]:
    def holds() -> bool:
        return (
            status_of(server).get("readyReplicas") == count == status_of(server).get("replicas")
            and condition(server, "Ready")[0] == "True"
            and condition(server, "Progressing")[0] == "False"
        )

    return holds


def test_a_service_gets_finalizer_secret_companions_pods_and_a_status() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            made = await server.put(LLM_SERVICE, service(replicas=2))
            await server.until(ready(server, 2))
            await life.quiet()
            found = server.get(LLM_SERVICE, "s")
            assert found["metadata"]["finalizers"] == [FINALIZER]
            assert status_of(server)["observedGeneration"] == found["metadata"]["generation"] == 1
            children = [one for kind in (POD, SECRET, SERVICE, NETWORK_POLICY) for one in server.all(kind)]
            assert len(server.all(POD)) == 2 and len(server.all(SECRET)) == 1 and len(children) >= 5
            for child in children:
                assert child["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
                assert child["metadata"]["labels"]["serving.blockyard.dev/service"] == "s"

    run(scenario())


def test_a_settled_service_costs_no_write_and_a_new_operator_writes_nothing_either() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet):
            async with Life(server) as life:
                await server.put(LLM_SERVICE, service(gateway={"replicas": 1}))
                await server.until(lambda: server.all(DEPLOYMENT))
                await server.change(DEPLOYMENT, "s-gateway", {"status": {"readyReplicas": 1}})
                await server.until(ready(server, 1))
                await life.quiet()
                before = server.writes()
                for _ in range(5):
                    life.queue.add(KEY)
                    await life.quiet()
                assert server.writes() == before
            async with Life(server) as life:
                await life.cluster.relist(life.kube)
                await life.quiet()
                assert life.metrics.reconciles.labels("ok")._sum.get() > 0, "it has worked"
                assert server.writes() == before

    run(scenario())


def test_a_watch_that_lags_behind_our_own_writes_makes_no_second_pod() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, kubelet), Life(server) as life:
            kubelet.hold = True
            await server.put(LLM_SERVICE, service(replicas=3))
            await server.until(lambda: len(server.all(POD)) == 3)
            await life.quiet()
            life.watching = False
            await server.change(LLM_SERVICE, "s", {"spec": {"replicas": 4}})
            life.cluster.services.put(copy.deepcopy(server.get(LLM_SERVICE, "s")))
            await server.until(lambda: len(server.all(POD)) == 4)
            for _ in range(5):
                life.queue.add(KEY)
                await life.idle()
            assert len(server.all(POD)) == 4
            posts = [path for method, path in server.calls if method == "POST" and path.endswith("/pods")]
            assert len(posts) == 4, "a pod was asked for twice"

    run(scenario())


@pytest.mark.parametrize("cut", range(14))
def test_killed_after_any_write_the_next_operator_ends_with_the_same_result(cut: int) -> None:
    """The first life is ended the moment its write number ``cut`` was stored, without its answer."""

    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet):
            await server.put(LLM_SERVICE, service(replicas=2))
            server.calls.clear()
            dead = asyncio.Event()

            def counts(method: str, _path: str) -> bool:
                if method != "GET" and len(server.writes()) == cut + 1:
                    dead.set()
                return dead.is_set()

            server.faults.append(Fault(counts, times=10**6, code=0, after=True))
            async with Life(server) as first:
                ends = {asyncio.create_task(dead.wait()), asyncio.create_task(_settled(first, server))}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for end in ends:
                    end.cancel()
                for task in first._tasks:
                    task.cancel()
            server.faults.clear()
            async with Life(server) as second:
                await server.until(ready(server, 2))
                await second.quiet()
            assert len(server.all(POD)) == 2
            assert len(server.all(SECRET)) == 1

    run(scenario())


async def _settled(life: Life, server: ApiServer) -> None:
    await server.until(ready(server, 2))
    await life.quiet()


def test_scaling_in_drains_first_and_the_label_falls_only_when_it_is_drained() -> None:
    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=2))
            await server.until(ready(server, 2))
            busy, idle = (pod["status"]["podIP"] for pod in server.all(POD))
            await agents.of[busy].set(running=3)
            await agents.of[busy].polled(len(agents.of[busy].polls) + 1)
            await server.change(LLM_SERVICE, "s", {"spec": {"replicas": 1}})

            def drains() -> list[Raw]:
                return [p for p in server.all(POD) if DRAINING_SINCE in p["metadata"].get("annotations", {})]

            await server.until(drains)
            (going,) = drains()
            assert going["status"]["podIP"] == idle, "the idle one goes"
            await agents.of[idle].asked_to_drain()
            await life.quiet()
            assert UNDRAINED in server.get(POD, going["metadata"]["name"])["metadata"]["labels"]
            assert agents.of[idle].drains == [300.0] and not agents.of[busy].drains
            await agents.of[idle].set(state="drained")
            await server.until(ready(server, 1))
            assert [pod["status"]["podIP"] for pod in server.all(POD)] == [busy]
            released = [
                body["metadata"] for _, plural, _, body in server.history
                if plural == "pods" and body["metadata"]["name"] == going["metadata"]["name"]
            ]  # fmt: skip
            first = next(i for i, metadata in enumerate(released) if UNDRAINED not in metadata["labels"])
            assert "deletionTimestamp" not in released[first], "released before it was deleted"

    run(scenario())


SCALED = {"autoscaling": {"maxReplicas": 3, "targetUsedPercent": 100, "scaleInDelaySeconds": 1}}


def test_load_scales_out_at_once_and_in_after_the_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "SCALED_DELAY", 0.01)

    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(**SCALED, replicas=1))
            await server.until(ready(server, 1))
            (agent,) = agents.of.values()
            await agent.set(running=8, waiting=5)
            await server.until(ready(server, 2))
            await life.quiet()
            assert status_of(server)["autoscaling"] == {"wanted": 2, "reason": "RequestLoad"}
            await agent.set(running=1, waiting=0)
            await server.until(lambda: "since" in status_of(server)["autoscaling"])
            assert server.get(LLM_SERVICE, "s")["spec"]["replicas"] == 2
            await server.until(lambda: server.get(LLM_SERVICE, "s")["spec"]["replicas"] == 1)
            await life.quiet()
            told = [each for each in status_of(server)["decisions"] if each["action"] == "Scale"]
            assert [each["message"][:25] for each in told] == [
                "replicas from 2 to 1: blo",
                "replicas from 1 to 2: blo",
            ]
            events = [each for each in server.all(EVENT) if each["reason"] == "Scaled"]
            assert len(events) == 2
            assert server.get(LLM_SERVICE, "s")["metadata"]["generation"] == 3, "each change was written once"
            before = server.writes()
            life.queue.add(KEY)
            await life.quiet()
            assert server.writes() == before, "the same load costs nothing"

    run(scenario())


def test_where_scaling_is_refused_agents_are_seen_to_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "SCALED_DELAY", 0.01)

    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(**SCALED))
            await server.until(ready(server, 1))
            await life.quiet()
            refusal = Fault(lambda method, path: method == "PATCH" and path.endswith("/s"), 10**6, 403)
            server.faults.append(refusal)
            (agent,) = agents.of.values()
            await agent.set(running=8, waiting=5)
            await server.until(lambda: condition(server, "Degraded")[:2] == ("True", "Refused"))
            (pod,) = server.all(POD)
            await server.remove(POD, pod["metadata"]["name"])
            await server.until(lambda: server.all(POD) and "status" in server.all(POD)[0])
            (other,) = server.all(POD)
            assert other["metadata"]["uid"] != pod["metadata"]["uid"]
            refusal.times = 0
            await agents.of[other["status"]["podIP"]].set(running=8, waiting=5)
            await server.until(ready(server, 2))

    run(scenario())


def test_a_drain_that_an_agent_refuses_is_asked_for_again() -> None:
    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server):
            await server.put(LLM_SERVICE, service())
            await server.until(ready(server, 1))
            (agent,) = agents.of.values()
            agent.refuse_drain = 3
            await server.change(LLM_SERVICE, "s", {"spec": {"replicas": 0}})
            await agent.asked_to_drain()
            await agent.set(state="drained")
            await server.until(lambda: not server.all(POD))

    run(scenario())


def test_deletion_drains_then_lets_go_and_leaves_nothing() -> None:
    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=2))
            await server.until(ready(server, 2))
            await life.kube.delete(LLM_SERVICE, "default", "s")
            for agent in agents.of.values():
                await agent.asked_to_drain()
            assert len(server.all(POD)) == 2 and server.all(SERVICE), (
                "the gateway is needed until the drain ends"
            )
            for agent in agents.of.values():
                await agent.set(state="drained")
            await server.until(lambda: not server.all(LLM_SERVICE))
            await life.quiet()
            assert not server.all(POD) + server.all(SECRET) + server.all(SERVICE)
            assert len(life.fleet) == 0

    run(scenario())


def test_an_invalid_spec_is_a_condition_and_its_repair_ends_it() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=-3))
            await server.put(LLM_SERVICE, service("fine", replicas=0))
            await server.until(lambda: condition(server, "Ready")[1] == "InvalidSpec")
            assert "spec.replicas" in condition(server, "Ready")[2]
            await server.until(lambda: condition(server, "Ready", "fine")[1] == "ScaledToZero")
            await life.quiet()
            before = server.writes()
            life.queue.add(KEY)
            await life.quiet()
            assert server.writes() == before, "it is said once"
            await server.change(LLM_SERVICE, "s", {"spec": {"replicas": 1}})
            await server.until(ready(server, 1))

    run(scenario())


def test_a_defect_in_one_services_round_is_said_on_it_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server):
            original = reconcile_module.replicas.plan

            def plan(observed: Any) -> Any:
                if observed.service.name == "cursed":
                    raise ZeroDivisionError("a defect")
                return original(observed)

            monkeypatch.setattr(reconcile_module.replicas, "plan", plan)
            await server.put(LLM_SERVICE, service("cursed"))
            await server.put(LLM_SERVICE, service())
            await server.until(ready(server, 1))
            await server.until(lambda: "ZeroDivisionError" in condition(server, "Degraded", "cursed")[2])
            monkeypatch.setattr(reconcile_module.replicas, "plan", original)
            await server.change(LLM_SERVICE, "cursed", {"spec": {"replicas": 0}})
            await server.until(lambda: condition(server, "Degraded", "cursed")[0] == "False")

    run(scenario())


def test_what_the_api_server_refuses_is_said_for_people_until_it_goes_through_and_raw_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quota = "exceeded quota: gpus, requested: pods=1, used: pods=4, limited: pods=4"

    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server):

            def posts(method: str, path: str) -> bool:
                return method == "POST" and path.endswith("/pods")

            server.faults.append(Fault(posts, times=10**6, code=403, message=quota))
            await server.put(LLM_SERVICE, service())
            await server.until(lambda: condition(server, "Ready")[1] == "QuotaExceeded")
            words = "it exceeds ResourceQuota gpus: pods (4 used, 1 asked, 4 allowed); raise the quota"
            assert words in condition(server, "Ready")[2]
            assert condition(server, "Degraded")[:2] == ("True", "QuotaExceeded")
            await server.until(lambda: words in str(server.all(EVENT)))
            assert "/api" not in str([event["message"] for event in server.all(EVENT)])
            server.faults.clear()
            await server.until(ready(server, 1))
            assert condition(server, "Degraded")[0] == "False"
            assert f"create /api/v1/namespaces/default/pods: {quota}" in caplog.text

    run(scenario())


def test_a_paused_service_is_left_alone_but_seen() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            body = service()
            body["metadata"]["annotations"] = {PAUSED: "true"}
            await server.put(LLM_SERVICE, body)
            await server.until(lambda: condition(server, "Progressing")[1] == "Paused")
            await life.quiet()
            assert not server.all(POD) + server.all(SECRET) + server.all(SERVICE)
            await server.change(LLM_SERVICE, "s", {"metadata": {"annotations": {PAUSED: None}}})
            await server.until(ready(server, 1))

    run(scenario())


def mends(server: ApiServer) -> list[str]:
    """What events tell of undone changes, with the number of times."""
    return [
        f"{event['count']} x {event['message']}"
        for event in server.all(EVENT)
        if event["reason"] == "Restored"
    ]


def test_companions_that_others_change_or_delete_are_put_back_at_once() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=0))
            await server.until(lambda: condition(server, "Ready")[1] == "ScaledToZero")
            await life.quiet()
            wanted = copy.deepcopy(server.get(SERVICE, "s-agents")["spec"])
            before = len(server.writes("services")) + len(server.writes("networkpolicies"))
            stolen = {"selector": {"x": "y"}, "extra": 1}
            await server.change(SERVICE, "s-agents", {"spec": stolen})
            await server.remove(NETWORK_POLICY, "s-agents")
            await server.until(lambda: len(mends(server)) == 2)
            await life.quiet()
            after = len(server.writes("services")) + len(server.writes("networkpolicies"))
            assert after == before + 2, "one write for each change, and nothing else"
            assert server.get(SERVICE, "s-agents")["spec"]["selector"].items() >= wanted["selector"].items()
            assert sorted(mends(server)) == [
                "1 x NetworkPolicy s-agents was deleted by somebody else and has been made again",
                "1 x Service s-agents was changed by somebody and has been put back",
            ]
            assert condition(server, "Degraded")[0] == "False"

    run(scenario())


def test_repeated_meddling_is_one_event_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions_module, "MEND_PAUSE", 0.01)
    monkeypatch.setattr(reconcile_module, "RESTORED_REPEAT", 0.01)

    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=0))
            await server.until(lambda: condition(server, "Ready")[1] == "ScaledToZero")
            await life.quiet()
            for _ in range(4):
                await server.change(DISRUPTION_BUDGET, "s-agents", {"spec": {"minAvailable": 0}})
                await server.until(
                    lambda: server.get(DISRUPTION_BUDGET, "s-agents")["spec"]["minAvailable"] > 0
                )
            await server.until(lambda: bool(mends(server)) and mends(server)[0].startswith("4 x "))
            assert len(mends(server)) == 1

    run(scenario())


def test_while_a_protection_cannot_be_put_back_a_condition_says_what_that_means() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=0))
            await server.until(lambda: condition(server, "Ready")[1] == "ScaledToZero")
            await life.quiet()
            await server.change(LLM_SERVICE, "s", {"metadata": {"annotations": {PAUSED: "true"}}})
            await server.remove(DISRUPTION_BUDGET, "s-agents")
            await server.until(lambda: condition(server, "Degraded")[1] == "ProtectionMissing")
            assert condition(server, "Degraded")[2] == (
                "PodDisruptionBudget s-agents is missing: agents can be evicted before they are drained"
            )
            await server.change(LLM_SERVICE, "s", {"metadata": {"annotations": {PAUSED: None}}})
            await server.until(lambda: condition(server, "Degraded")[0] == "False")
            assert server.get(DISRUPTION_BUDGET, "s-agents")

    run(scenario())


@pytest.mark.parametrize("owner", ["nobody", "another service"])
def test_what_belongs_to_others_is_never_written_and_the_condition_names_it(owner: str) -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            metadata: Raw = {"name": "s", "namespace": "default"}
            if owner != "nobody":
                reference = {"kind": "LLMService", "name": "other", "uid": "u-other", "controller": True}
                metadata |= {"ownerReferences": [reference], "labels": {SERVICE_LABEL: "other"}}
            theirs = await server.put(SERVICE, {"metadata": metadata, "spec": {"ports": [{"port": 1}]}})
            theirs = copy.deepcopy(theirs)
            await server.put(LLM_SERVICE, service(replicas=1))
            await server.until(lambda: condition(server, "Ready")[1] == "NameTaken")
            await life.quiet()
            _, _, message = condition(server, "Ready")
            whose = "was last written by somebody" if owner == "nobody" else "belongs to LLMService other"
            assert "Service s " in message and whose in message and "another name" in message
            assert server.get(SERVICE, "s") == theirs
            assert not server.all(POD), "agents wait until the name is free"
            await server.remove(SERVICE, "s")
            life.queue.add(KEY)
            await server.until(ready(server, 1))

    run(scenario())


def test_a_name_that_something_else_has_leads_to_another_name() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, kubelet), Life(server) as life:
            kubelet.hold = True
            made = await server.put(LLM_SERVICE, service(replicas=0))
            await server.until(lambda: condition(server, "Ready")[1] == "ScaledToZero")
            await life.quiet()
            custom = life.cluster.services.get(KEY)
            assert custom is not None
            observed = life.reconciler._observe(custom.service, status_of(server)["revision"])
            taken = next(replicas_module._free_names(observed))
            theirs = await server.put(POD, {"metadata": {"name": taken, "namespace": "default"}, "spec": {}})
            await server.change(LLM_SERVICE, "s", {"spec": {"replicas": 1}})
            await server.until(lambda: len(server.all(POD)) == 2)
            await life.quiet()
            assert server.get(POD, taken) == theirs
            ours = next(pod for pod in server.all(POD) if pod["metadata"]["name"] != taken)
            assert ours["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]

    run(scenario())


@pytest.mark.parametrize(
    "edit",
    [
        {"labels": {UNDRAINED: None}},
        {"labels": {SERVICE_LABEL: "else", "app.kubernetes.io/component": None, REVISION: "bogus"}},
        {"labels": None, "annotations": None},
        {"ownerReferences": None},
        {"ownerReferences": None, "labels": {UNDRAINED: None, REVISION: None}},
    ],
)
def test_a_pods_labels_and_owner_are_put_back_and_its_agent_goes_on(edit: Raw) -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=1))
            await server.until(ready(server, 1))
            await life.quiet()
            (pod,) = server.all(POD)
            before, name = copy.deepcopy(pod["metadata"]), pod["metadata"]["name"]
            await server.change(POD, name, {"metadata": edit})

            def as_before() -> bool:
                now = server.get(POD, name)["metadata"]
                return all(now.get(part) == before[part] for part in ("labels", "ownerReferences", "uid"))

            await server.until(as_before)
            await life.quiet()
            assert as_before() and len(server.all(POD)) == 1
            assert ready(server, 1)()

    run(scenario())


def test_a_deleted_secret_comes_back_with_the_token_that_agents_have() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=1))
            await server.until(ready(server, 1))
            await life.quiet()
            token = server.get(SECRET, "s-internal")["data"]["token"]
            await server.remove(SECRET, "s-internal")
            await server.until(lambda: bool(server.all(SECRET)))
            assert server.get(SECRET, "s-internal")["data"]["token"] == token
            await server.until(lambda: any("Secret s-internal was deleted" in each for each in mends(server)))

    run(scenario())


@pytest.mark.parametrize("how", ["by hand", "by the annotation"])
def test_a_changed_token_is_followed_and_the_one_before_stays_valid_for_a_while(how: str) -> None:
    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server, token_overlap=3.0) as life:
            await server.put(LLM_SERVICE, service(replicas=1))
            await server.until(ready(server, 1))
            await life.quiet()
            old = server.get(SECRET, "s-internal")["data"]["token"]
            new = base64.b64encode(b"another").decode()
            if how == "by hand":
                await server.change(SECRET, "s-internal", {"data": {"token": new}})
            else:
                await server.change(LLM_SERVICE, "s", {"metadata": {"annotations": {ROTATE: "1"}}})
            await server.until(lambda: server.get(SECRET, "s-internal")["data"].get("previous") == old)
            now = server.get(SECRET, "s-internal")["data"]["token"]
            assert now == new if how == "by hand" else now != old
            await life.quiet()
            assert ready(server, 1)(), "the agent that has the old token only is still polled"
            for agent in agents.of.values():
                agent.token = base64.b64decode(now).decode()
            await server.until(lambda: "previous" not in server.get(SECRET, "s-internal")["data"])
            await life.quiet()
            assert server.get(SECRET, "s-internal")["data"] == {"token": now}
            assert ready(server, 1)()

    run(scenario())


def test_an_agent_whose_report_cannot_be_read_is_not_counted_as_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas_module, "UNREADABLE_AFTER", 0.2)
    monkeypatch.setattr(status_module, "UNREADABLE_AFTER", 0.2)

    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server):
            await server.put(LLM_SERVICE, service(replicas=1))
            await server.until(ready(server, 1))
            (agent,) = agents.of.values()
            agent.token = "something else"
            await agent.set(running=1)
            await server.until(lambda: condition(server, "Ready")[1] == "ReportsUnreadable")
            assert status_of(server)["readyReplicas"] == 0
            assert "401" in condition(server, "Ready")[2]
            agent.token = base64.b64decode(server.get(SECRET, "s-internal")["data"]["token"]).decode()
            await server.until(ready(server, 1))

    run(scenario())


def test_a_deleted_gateway_comes_back_at_once_and_an_unwanted_one_goes() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=0, gateway={"replicas": 1}))
            await server.until(lambda: server.all(DEPLOYMENT))
            await life.quiet()
            await server.remove(DEPLOYMENT, "s-gateway")
            await server.until(lambda: server.all(DEPLOYMENT))
            await life.quiet()
            await server.change(LLM_SERVICE, "s", {"spec": {"gateway": {"replicas": 0}}})
            await server.until(lambda: not server.all(DEPLOYMENT))

    run(scenario())


def test_a_field_that_the_spec_has_no_more_is_taken_from_its_companion() -> None:
    """Also by an operator that was not there when the spec changed."""
    template = {"metadata": {"labels": {"team": "a"}}}

    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet):
            async with Life(server) as life:
                await server.put(LLM_SERVICE, service(gateway={"replicas": 1, "template": template}))
                await server.until(lambda: server.all(DEPLOYMENT))
                await life.quiet()
            before = server.get(DEPLOYMENT, "s-gateway")["metadata"]["annotations"][WANTED]
            await server.change(LLM_SERVICE, "s", {"spec": {"gateway": {"template": None}}})
            async with Life(server) as life:
                await life.quiet()
                assert server.get(DEPLOYMENT, "s-gateway")["metadata"]["annotations"][WANTED] != before

    run(scenario())


def test_gateways_whose_service_account_is_another_one_are_replaced() -> None:
    """The tokens of the first one are refused for as long as their pods run."""

    def bound(server: ApiServer) -> bool:
        account = server.get(SERVICE_ACCOUNT, "s-gateway")["metadata"]["uid"]
        template = server.get(DEPLOYMENT, "s-gateway")["spec"]["template"]
        return bool(template["metadata"]["annotations"][ACCOUNT] == account)

    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet):
            async with Life(server) as life:
                await server.put(LLM_SERVICE, service(replicas=0, gateway={"replicas": 1}))
                await server.until(lambda: server.all(DEPLOYMENT))
                await life.quiet()
                assert bound(server)
                first = server.get(SERVICE_ACCOUNT, "s-gateway")["metadata"]["uid"]
                await server.remove(SERVICE_ACCOUNT, "s-gateway")
                await server.until(lambda: server.all(SERVICE_ACCOUNT) and bound(server))
                await life.quiet()
                assert server.get(SERVICE_ACCOUNT, "s-gateway")["metadata"]["uid"] != first
            version = server.get(DEPLOYMENT, "s-gateway")["metadata"]["resourceVersion"]
            async with Life(server) as life:
                await life.quiet()
                assert server.get(DEPLOYMENT, "s-gateway")["metadata"]["resourceVersion"] == version

    run(scenario())


def test_a_kind_that_the_cluster_does_not_have_is_said_and_costs_nothing_else() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server):
            server.missing.add(SERVICE_MONITOR.plural)
            await server.put(LLM_SERVICE, service(replicas=0))
            await server.until(lambda: condition(server, "Ready")[1] == "ScaledToZero")
            await server.change(LLM_SERVICE, "s", {"spec": {"monitoring": {"serviceMonitor": True}}})
            await server.until(lambda: condition(server, "Degraded")[:2] == ("True", "KindMissing"))
            assert "spec.monitoring.serviceMonitor" in condition(server, "Degraded")[2]

    run(scenario())


def test_a_secret_that_was_deleted_is_made_again_before_the_next_pod() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server):
            await server.put(LLM_SERVICE, service())
            await server.until(ready(server, 1))
            await server.remove(SECRET, "s-internal")
            await server.change(LLM_SERVICE, "s", {"spec": {"replicas": 2}})
            await server.until(ready(server, 2))
            assert len(server.all(SECRET)) == 1

    run(scenario())


def test_services_of_one_name_in_two_lives_do_not_share_pods_or_tokens() -> None:
    async def scenario() -> None:
        async with world() as (server, agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service())
            await server.until(ready(server, 1))
            first = server.get(LLM_SERVICE, "s")["metadata"]["uid"]
            await server.change(LLM_SERVICE, "s", {"metadata": {"finalizers": []}})
            await server.remove(LLM_SERVICE, "s")
            await server.put(LLM_SERVICE, service())
            await server.until(ready(server, 1))
            await life.quiet()
            owners = {pod["metadata"]["ownerReferences"][0]["uid"] for pod in server.all(POD)}
            assert owners == {server.get(LLM_SERVICE, "s")["metadata"]["uid"]} and first not in owners
            first_agent, second_agent = agents.of.values()
            assert first_agent.token != second_agent.token

    run(scenario())


def test_an_api_server_that_is_away_delays_and_breaks_nothing() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server):
            server.faults.append(Fault(lambda method, _: method != "GET", times=60, code=503))
            await server.put(LLM_SERVICE, service(replicas=2))
            await server.until(ready(server, 2))
            assert len(server.all(POD)) == 2

    run(scenario())


def test_a_relist_finds_what_watches_have_missed() -> None:
    async def scenario() -> None:
        async with world() as (server, _agents, _kubelet), Life(server) as life:
            await server.put(LLM_SERVICE, service(replicas=2))
            await server.until(ready(server, 2))
            await life.quiet()
            life.watching = False
            lost = server.all(POD)[0]["metadata"]["name"]
            await server.remove(POD, lost)
            life._position = len(server.history)
            life.watching = True
            assert len(life.cluster.pods) == 2, "nobody has told it"
            await life.reconciler._resync(())
            await server.until(lambda: len(server.all(POD)) == 2)
            await life.quiet()

    run(scenario())


def test_events_are_counted_instead_of_repeated_and_a_burst_is_cut() -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            kube, now = Kube(server.credentials()), [1000.0]
            recorder = Recorder(kube, "one", clock=lambda: now[0])
            subject = Service.of(await server.put(LLM_SERVICE, service()))
            for _ in range(5):
                await recorder.emit(subject, "Warning", "Stuck", "Observe", "no room")
            assert [event["count"] for event in server.all(EVENT)] == [1]
            now[0] += 400
            await recorder.emit(subject, "Warning", "Stuck", "Observe", "no room")
            restarted = Recorder(kube, "two", clock=lambda: now[0])
            await restarted.emit(subject, "Warning", "Stuck", "Observe", "no room")
            (event,) = server.all(EVENT)
            assert event["count"] == 7 and event["involvedObject"]["uid"] == subject.uid
            for number in range(100):
                await recorder.emit(subject, "Normal", "Noise", "Observe", f"message {number}")
            assert 10 < len(server.all(EVENT)) < 25, "a burst is cut"
            server.faults.append(Fault(lambda *_: True, times=99, code=403))
            now[0] += 4000
            await recorder.emit(subject, "Normal", "Lost", "Observe", "nobody hears")
            await kube.close()

    run(scenario())


@pytest.mark.parametrize(
    ("there", "wanted", "covered"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({}, {"a": 1}, False),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}, True),
        ({"a": {"b": [1, 2, 3]}}, {"a": {"b": [1, 2]}}, False),
        ({"ports": [{"port": 80, "protocol": "TCP"}]}, {"ports": [{"port": 80}]}, True),
        ({}, {"labels": {}, "rules": [], "note": ""}, True),
        ({"rules": [1]}, {"rules": []}, False),
        ({"flag": False}, {"flag": True}, False),
        ({"count": 1}, {"count": 0}, False),
        ({"a": "text"}, {"a": {"b": 1}}, False),
    ],
)
def test_drift_is_what_is_wanted_and_not_there(there: Any, wanted: Any, covered: bool) -> None:
    assert covers(there, wanted) is covered
