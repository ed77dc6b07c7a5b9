"""The client: every call bounded, retried where that is safe, its refusals told apart, nothing written
unasked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import certifi
import pytest

from blockyard.operator import kube as kube_module
from blockyard.operator.kube import (
    EVENT,
    LLM_SERVICE,
    NODE,
    POD,
    SECRET,
    SERVICE,
    SERVICE_MONITOR,
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    Kube,
    NotFound,
    NotLeading,
    Unreachable,
    load_credentials,
)
from blockyard.operator.settings import OperatorSettings, SettingsError

from .api_server import ApiServer, Fault, kubeconfig

SOMEWHERE = "https://somewhere:6443"


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


@pytest.fixture(autouse=True)
def _fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_module, "BACKOFF", 0.001)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[ApiServer, Kube]]:
    async with ApiServer() as server:
        kube = Kube(server.credentials())
        yield server, kube
        await kube.close()


def pod(name: str, owner: str = "u1", **labels: str) -> dict[str, Any]:
    owners = [{"apiVersion": "v1", "kind": "X", "name": "x", "uid": owner, "controller": True}]
    metadata = {"name": name, "namespace": "default", "ownerReferences": owners, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {}}


def any_call(_method: str, _path: str) -> bool:
    return True


def test_objects_are_created_read_listed_changed_and_deleted() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            made = await kube.create(pod("a", app="x"))
            assert await kube.get(POD, "default", "a") == made
            assert await kube.get(POD, "default", "b") is None
            changed = await kube.merge(
                POD, "default", "a", {"metadata": {"labels": {"app": None, "new": "1"}}}
            )
            assert changed["metadata"]["labels"] == {"new": "1"}
            await kube.delete(POD, "default", "a", made["metadata"]["uid"])
            assert server.all(POD) == []
            assert await kube.delete(POD, "default", "a") is None, "gone is gone"

    run(scenario())


def test_long_lists_come_in_pages_of_one_moment_and_are_filtered_by_label() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            for number in range(kube_module.PAGE_SIZE + 3):
                await server.put(POD, pod(f"p{number}", app="x" if number % 2 else "y"))
            pages = [page async for page in kube.pages(POD)]
            assert [len(page.items) for page in pages] == [kube_module.PAGE_SIZE, 3]
            assert {page.version for page in pages} == {server.version}
            some = [raw async for page in kube.pages(POD, "default", "app=x") for raw in page.items]
            assert {raw["metadata"]["labels"]["app"] for raw in some} == {"x"}
            assert [page.items async for page in kube.pages(POD, "elsewhere")] == [[]]

    run(scenario())


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504, 0])
def test_what_passes_is_tried_again(code: int) -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            await server.put(POD, pod("a"))
            server.faults.append(Fault(any_call, times=3, code=code))
            found = await kube.get(POD, "default", "a")
            assert found is not None and len(server.calls) == 4

    run(scenario())


@pytest.mark.parametrize("code", [429, 503])
def test_attempts_are_bounded_and_the_last_refusal_comes_out(code: int) -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            server.faults.append(Fault(any_call, times=99, code=code))
            with pytest.raises(ApiError, match="a fault of the test") as caught:
                await kube.get(POD, "default", "a")
            assert caught.value.code == code
            assert len(server.calls) == kube_module.ATTEMPTS

    run(scenario())


def test_retry_after_is_honoured_but_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        pauses: list[float] = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)

        async with connected() as (server, kube):
            monkeypatch.setattr(kube_module.asyncio, "sleep", sleep)
            server.faults.append(Fault(any_call, times=1, code=429, headers={"Retry-After": "3"}))
            server.faults.append(Fault(any_call, times=1, code=429, headers={"Retry-After": "4000"}))
            await kube.get(POD, "default", "a")
            monkeypatch.undo()
        assert [pause for pause in pauses if pause >= 1] == [3.0, kube_module.LONGEST_PAUSE]

    run(scenario())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, ApiError),
        (401, Forbidden),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (410, Gone),
        (422, Invalid),
    ],
)
def test_refusals_are_told_apart_carry_the_servers_words_and_are_not_repeated(
    code: int, kind: type[ApiError]
) -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            server.faults.append(Fault(any_call, times=99, code=code))
            with pytest.raises(
                kind, match=r"patch /api/v1/namespaces/default/pods/a: a fault of the test"
            ) as caught:
                await kube.merge(POD, "default", "a", {})
            assert type(caught.value) is kind
            assert len(server.calls) == (2 if code == 401 else 1), "only after a 401, with fresh credentials"

    run(scenario())


def test_a_refusal_knows_what_was_asked_for_and_keeps_no_secret() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            server.faults.append(Fault(any_call, times=99, code=422))
            secret = {**pod("s"), "kind": "Secret", "data": {"token": "dG9rZW4="}}
            for made, sent in ((pod("a"), pod("a")), (secret, {})):
                with pytest.raises(Invalid) as caught:
                    await kube.create(made)
                error, name = caught.value, made["metadata"]["name"]
                assert (error.verb, error.kind, error.name) == ("create", made["kind"], name)
                assert (error.reason, error.message, error.body) == ("Fault", "a fault of the test", sent)
            with pytest.raises(Invalid) as caught:
                await kube.merge(POD, "default", "b", {"metadata": {"labels": {}}})
            assert (caught.value.verb, caught.value.kind, caught.value.name) == ("patch", "Pod", "b")

    run(scenario())


@pytest.mark.parametrize("code", [404, 409, 410])
def test_the_code_of_a_webhooks_denial_says_nothing_of_what_is_there(code: int) -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            message = 'admission webhook "w" denied the request: no'
            server.faults.append(Fault(any_call, times=99, code=code, message=message))
            with pytest.raises(ApiError, match="denied") as caught:
                await kube.create(pod("a"))
            assert type(caught.value) is ApiError and len(server.calls) == 1

    run(scenario())


def test_nobody_there_and_no_answer_in_time_are_unreachable() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            server.gate = asyncio.Event()
            with pytest.raises(Unreachable, match=r"no answer in 0.05 s \(5 attempts\)"):
                await kube._call("create", POD, "default", method="POST", body=pod("a"), limit=0.05)
            server.gate.set()
            nobody = Kube(server.credentials())
        with pytest.raises(Unreachable, match="5 attempts"):
            await nobody.get(POD, "default", "a")
        await nobody.close()

    run(scenario())


def test_a_page_of_a_proxy_is_no_json_and_becomes_the_message() -> None:
    async def scenario() -> None:
        with pytest.raises(ApiError, match="<html>sorry"):
            raise kube_module._refusal("get", POD, "/x", 400, {"message": "<html>sorry"})

    run(scenario())


def test_a_create_whose_answer_was_lost_finds_its_own_object_and_makes_no_second() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            server.faults.append(Fault(lambda method, _: method == "POST", code=0, after=True))
            made = await kube.create(pod("a"))
            assert made == server.get(POD, "a")
            assert len(server.all(POD)) == 1

    run(scenario())


def test_an_object_of_somebody_else_with_that_name_is_a_conflict() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            await server.put(POD, pod("a", owner="another"))
            with pytest.raises(Conflict):
                await kube.create(pod("a"))
            orphan = pod("b")
            del orphan["metadata"]["ownerReferences"]
            await server.put(POD, orphan)
            with pytest.raises(Conflict):
                await kube.create(orphan)

    run(scenario())


def test_preconditions_hold_back_writes_to_another_life_of_an_object() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            first = await server.put(POD, pod("a"))
            uid, version = first["metadata"]["uid"], first["metadata"]["resourceVersion"]
            await server.remove(POD, "a")
            await server.put(POD, pod("a"))
            with pytest.raises(Conflict):
                await kube.merge(POD, "default", "a", {"metadata": {"uid": uid, "labels": {"x": "1"}}})
            with pytest.raises(Conflict):
                await kube.merge(POD, "default", "a", {"metadata": {"resourceVersion": version}})
            assert await kube.delete(POD, "default", "a", uid) is None
            assert server.get(POD, "a")["metadata"].get("labels") == {}

    run(scenario())


def test_status_is_replaced_as_a_whole_for_the_right_uid_only() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            body = {"metadata": {"name": "s", "namespace": "default"}, "spec": {"x": 1}, "status": {"old": 1}}
            uid = (await server.put(LLM_SERVICE, body))["metadata"]["uid"]
            made = await kube.set_status(LLM_SERVICE, "default", "s", uid, {"new": [1]})
            assert made["status"] == {"new": [1]} and made["spec"] == {"x": 1}
            with pytest.raises(Invalid):
                await kube.set_status(LLM_SERVICE, "default", "s", "another", {})
            assert server.get(LLM_SERVICE, "s")["status"] == {"new": [1]}

    run(scenario())


def test_apply_makes_and_changes_with_our_field_manager_by_force() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            metadata = {"name": "s", "namespace": "default"}
            body = {"apiVersion": "v1", "kind": "Service", "metadata": metadata}
            for port in (80, 81):
                await kube.apply({**body, "spec": {"ports": [{"port": port}]}}, force=True)
                assert server.get(SERVICE, "s")["spec"]["ports"] == [{"port": port}]
            how = "application/apply-patch+yaml", "fieldManager=blockyard-operator&force=true"
            assert server.details == [("PATCH", *how)] * 2

    run(scenario())


def test_without_the_lease_nothing_is_written_and_reading_goes_on() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            kube.may_write = lambda: False
            for write in (
                kube.create(pod("a")),
                kube.apply(pod("a"), force=True),
                kube.merge(POD, "default", "a", {}),
                kube.delete(POD, "default", "a"),
                kube.set_status(LLM_SERVICE, "default", "a", "u", {}),
            ):
                with pytest.raises(NotLeading):
                    await write
            assert server.calls == []
            assert await kube.get(POD, "default", "a") is None

    run(scenario())


def test_a_write_that_waits_for_a_retry_is_not_repeated_once_the_lease_is_lost() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            server.faults.append(Fault(any_call, times=99, code=503))
            kube.may_write = lambda: len(server.calls) < 2
            with pytest.raises(NotLeading):
                await kube.create(pod("a"))
            assert len(server.calls) == 2

    run(scenario())


def test_concurrent_calls_are_bounded() -> None:
    async def scenario() -> None:
        async with connected() as (server, kube):
            server.gate = asyncio.Event()
            calls = [asyncio.create_task(kube.create(pod(f"p{number}"))) for number in range(100)]
            await server.called(kube_module.CONCURRENT_CALLS)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(server.called(kube_module.CONCURRENT_CALLS + 1), 0.2)
            server.gate.set()
            await asyncio.gather(*calls)
            assert len(server.all(POD)) == 100

    run(scenario())


def test_every_attempt_is_counted_by_verb_kind_and_code() -> None:
    async def scenario() -> None:
        counted: list[tuple[str, str, int]] = []
        async with ApiServer() as server:
            kube = Kube(server.credentials(), lambda *call: counted.append(call))
            server.faults += [Fault(any_call, code=503), Fault(any_call, code=0)]
            await kube.create(pod("a"))
            await kube.get(SECRET, "default", "a")
            [page async for page in kube.pages(NODE)]
            await kube.close()
        attempts = [("create", "Pod", 503), ("create", "Pod", 0), ("create", "Pod", 201)]
        assert counted == [*attempts, ("get", "Secret", 404), ("list", "Node", 200)]

    run(scenario())


def test_paths_are_those_of_the_api() -> None:
    assert POD.path("n", "p") == "/api/v1/namespaces/n/pods/p"
    assert POD.path() == "/api/v1/pods"
    assert NODE.path("ignored", "n") == "/api/v1/nodes/n"
    assert (
        LLM_SERVICE.path("n", "s", "status")
        == "/apis/serving.blockyard.dev/v1alpha1/namespaces/n/llmservices/s/status"
    )
    assert SERVICE_MONITOR.path("n") == "/apis/monitoring.coreos.com/v1/namespaces/n/servicemonitors"
    assert EVENT.path("a/b", "c d") == "/api/v1/namespaces/a%2Fb/events/c%20d"


# ── Credentials ───────────────────────────────────────────────────────────────────────────────────────


def settings(tmp_path: Path, **more: Any) -> OperatorSettings:
    return OperatorSettings(agent_image="i", serviceaccount=tmp_path, **more)


def test_a_kubeconfig_that_was_named_beats_the_service_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        file = kubeconfig(tmp_path / "config", SOMEWHERE, token="secret")
        found = await load_credentials(settings(tmp_path, kubeconfig=file))
        assert found.host == "https://somewhere:6443" and not found.verify_ssl
        kube = Kube(found)
        assert await kube.authorization() == "Bearer secret"
        await kube.close()

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    run(scenario())


def test_in_a_pod_the_service_account_of_the_given_folder_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        found = await load_credentials(settings(tmp_path))
        assert found.host == "https://10.0.0.1:443"
        assert found.ssl_ca_cert == str(tmp_path / "ca.crt")
        kube = Kube(found)
        assert await kube.authorization() == "bearer first"
        await kube.close()

    (tmp_path / "token").write_text("first")
    (tmp_path / "ca.crt").write_text(Path(certifi.where()).read_text())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    run(scenario())


def test_no_credentials_at_all_are_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_PORT", raising=False)
    with pytest.raises(SettingsError, match=r"no credentials for the Kubernetes API in .*absent"):
        run(load_credentials(settings(tmp_path, kubeconfig=tmp_path / "absent")))  # type: ignore[arg-type]  # it raises


def test_an_exec_plugins_token_that_has_ended_is_fetched_anew_after_a_401(tmp_path: Path) -> None:
    """The plugin hands out t1, t2, ...; the server takes the second one only."""

    async def scenario(file: Path, server: ApiServer) -> None:
        kube = await Kube.connect(settings(tmp_path, kubeconfig=file), lambda *_: None)
        assert await kube.authorization() == "Bearer t1"
        server.faults.append(Fault(any_call, times=1, code=401))
        assert await kube.get(POD, "default", "a") is None
        assert await kube.authorization() == "Bearer t2"
        await kube.close()

    async def serve() -> None:
        async with ApiServer() as server:
            await scenario(write_plugin(tmp_path, server.url), server)

    run(serve())


def write_plugin(folder: Path, url: str) -> Path:
    """A kubeconfig whose exec plugin counts its calls in its tokens."""
    api, count, plugin = "client.authentication.k8s.io/v1", folder / "count", folder / "plugin.sh"
    count.write_text("0")
    credential = json.dumps({"apiVersion": api, "kind": "ExecCredential", "status": {"token": "tN"}})
    plugin.write_text(
        f"#!/bin/sh\nn=$(($(cat {count})+1)); echo $n > {count}\necho '{credential}' | sed s/tN/t$n/\n"
    )
    plugin.chmod(0o755)
    command = {"apiVersion": api, "command": str(plugin), "interactiveMode": "Never"}
    file = kubeconfig(folder / "config", SOMEWHERE, exec=command)
    file.write_text(file.read_text().replace("https://somewhere:6443", url))
    return file
