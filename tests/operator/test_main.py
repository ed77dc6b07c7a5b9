"""The process: kopf feeds it and leaves no trace, health tells the truth, signals end it, bad settings name
themselves."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from blockyard.operator import main as main_module
from blockyard.operator.kube import DEPLOYMENT, LEASE, LLM_SERVICE, NODE, POD, Kube
from blockyard.operator.main import JsonLines, Operator, kopf_settings
from blockyard.operator.metrics import Metrics
from blockyard.operator.reconcile import current_service
from blockyard.operator.settings import OperatorSettings, SettingsError

from .api_server import ApiServer, Fault, Raw, kubeconfig

LIMIT = 60.0


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 120))


def service(name: str, **spec: Any) -> Raw:
    base = {"model": {"hub": {"name": "m"}}, "device": "cpu", "gateway": {"replicas": 0}, "replicas": 0}
    return {"metadata": {"name": name, "namespace": "default"}, "spec": {**base, **spec}}


def reason(server: ApiServer, name: str) -> str:
    found = server.objects[LLM_SERVICE.plural][("default", name)].get("status") or {}
    return next((one["reason"] for one in found.get("conditions", ()) if one["type"] == "Ready"), "")


class Process:
    """An operator process that talks to the stand-in."""

    def __init__(self, url: str, folder: Path, **environment: str) -> None:
        config = kubeconfig(folder / "kubeconfig", url, token="secret")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("BLOCKYARD")},
            "KUBECONFIG": str(config),
            "BLOCKYARD_OPERATOR_AGENT_IMAGE": "agent:1",
            "BLOCKYARD_OPERATOR_HOST": "127.0.0.1",
            "BLOCKYARD_OPERATOR_PORT": "0",
            **environment,
        }
        self.lines: list[Raw] = []
        self._line = asyncio.Condition()

    async def __aenter__(self) -> Process:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "blockyard.operator.main",
            env=self.environment,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._line:
                self.lines.append(json.loads(line))
                self._line.notify_all()
        async with self._line:
            self._line.notify_all()

    async def says(self, text: str) -> Raw:
        """The first log line with this text."""

        def found() -> list[Raw]:
            return [line for line in self.lines if text in line["message"]]

        async with asyncio.timeout(LIMIT), self._line:
            await self._line.wait_for(lambda: found() or self._reading.done())
        assert found(), self.lines
        return found()[0]

    async def get(self, path: str) -> tuple[int, str]:
        address = (await self.says("health and metrics on"))["message"]
        port = address.rsplit(", ", 1)[1].rstrip(")")
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}{path}") as response,
        ):
            return response.status, await response.text()

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), LIMIT)


@asynccontextmanager
async def running(folder: Path, **environment: str) -> AsyncIterator[tuple[ApiServer, Process]]:
    async with ApiServer() as server, Process(server.url, folder, **environment) as process:
        await process.says("acting")
        yield server, process


def test_the_process_serves_leaves_no_trace_of_kopf_and_ends_clean_on_sigterm(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (server, process):
            made = await server.put(LLM_SERVICE, service("s"))
            await server.until(lambda: reason(server, "s") == "ScaledToZero", LIMIT)
            assert await process.get("/healthz") == (200, '{"acting": true, "trouble": ""}')
            metrics = (await process.get("/metrics"))[1]
            assert "blockyard_operator_lease_held 1.0" in metrics
            assert 'blockyard_operator_api_writes_total{kind="LLMService"} 2.0' in metrics, (
                "finalizer and status"
            )
            assert "blockyard_operator_services 1.0" in metrics

            found = server.get(LLM_SERVICE, "s")
            assert found["metadata"]["finalizers"] == ["serving.blockyard.dev/drain"]
            assert set(found["metadata"]) - set(made["metadata"]) == {"finalizers"}, "no annotations"
            for kind in (POD, NODE, DEPLOYMENT):
                assert not server.writes(kind.plural)
            assert (await process.end()) == 0
            assert server.get(LEASE, "blockyard-operator")["spec"]["holderIdentity"] == "", "given back"
            assert not [line for line in process.lines if line["level"] in ("error", "warning")], (
                process.lines
            )

    run(scenario())


def test_changes_come_by_watches_also_after_they_were_cut_and_have_expired(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (server, _process):
            await server.put(LLM_SERVICE, service("first"))
            await server.until(lambda: reason(server, "first") == "ScaledToZero", LIMIT)
            await server.cut_watches()
            await server.put(LLM_SERVICE, service("second"))
            await server.until(lambda: reason(server, "second") == "ScaledToZero", LIMIT)
            server.horizon = server.version + 1
            await server.cut_watches()
            await server.put(LLM_SERVICE, service("third"))
            await server.until(lambda: reason(server, "third") == "ScaledToZero", LIMIT)

    run(scenario())


def test_a_standby_takes_over_from_a_killed_operator(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (server, first), Process(server.url, tmp_path) as second:
            await second.says("health and metrics on")
            assert json.loads((await second.get("/healthz"))[1]) == {"acting": False, "trouble": ""}
            first.process.kill()
            await server.put(LLM_SERVICE, service("s"))
            await server.until(lambda: reason(server, "s") == "ScaledToZero", LIMIT)
            await second.says("acting")
            assert server.get(LEASE, "blockyard-operator")["spec"]["leaseTransitions"] == 1

    run(scenario())


def test_only_the_given_namespaces_are_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, BLOCKYARD_OPERATOR_NAMESPACES="default, other") as (server, _process):
            elsewhere = service("s")
            elsewhere["metadata"]["namespace"] = "elsewhere"
            await server.put(LLM_SERVICE, elsewhere)
            await server.put(LLM_SERVICE, service("s"))
            await server.until(lambda: reason(server, "s") == "ScaledToZero", LIMIT)
            assert "status" not in server.get(LLM_SERVICE, "s", "elsewhere")
            lists = {path for method, path in server.calls if method == "GET" and path.endswith("/pods")}
            assert lists == {f"/api/v1/namespaces/{name}/pods" for name in ("default", "other")}

    run(scenario())


def test_log_lines_name_the_service_that_they_are_about(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (server, process):
            server.faults.append(
                Fault(lambda _, path: path.endswith("/llmservices/s/status"), times=99, code=422)
            )
            await server.put(LLM_SERVICE, service("s"))
            line = await process.says("a fault of the test")
            assert (line["service"], line["level"]) == ("default/s", "warning")

    run(scenario())


def test_without_the_custom_resources_it_says_what_to_do_and_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            server.missing.add(LLM_SERVICE.plural)
            async with Process(server.url, tmp_path) as process:
                await process.says("apply the files in crds/")
                assert await asyncio.wait_for(process.process.wait(), LIMIT) == 1

    run(scenario())


def test_bad_settings_are_named_on_one_line_and_end_it_with_2() -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("BLOCKYARD", "KUBE"))},
        "BLOCKYARD_OPERATOR_PORT": "99999",
        "BLOCKYARD_OPERATOR_WORKERS": "many",
    }
    done = subprocess.run(
        [sys.executable, "-m", "blockyard.operator.main"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    for name in ("AGENT_IMAGE", "PORT", "WORKERS"):
        assert f"BLOCKYARD_OPERATOR_{name}: " in line


# ── Without a process ─────────────────────────────────────────────────────────────────────────────────


def test_settings_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "namespace").write_text("home\n")
    monkeypatch.setenv("BLOCKYARD_OPERATOR_AGENT_IMAGE", "agent:1")
    monkeypatch.setenv("BLOCKYARD_OPERATOR_SERVICEACCOUNT", str(tmp_path))
    monkeypatch.setenv("BLOCKYARD_OPERATOR_NAMESPACES", "a, b,,")
    monkeypatch.setenv("KUBECONFIG", "/some/config")
    found = OperatorSettings.load()
    assert found.namespaces == ("a", "b") and found.lease_namespace == "home"
    assert found.kubeconfig == Path("/some/config")
    monkeypatch.setenv("BLOCKYARD_OPERATOR_NAMESPACES", "")
    monkeypatch.delenv("KUBECONFIG")
    found = OperatorSettings.load()
    assert found.namespaces == () and found.kubeconfig is None
    monkeypatch.delenv("BLOCKYARD_OPERATOR_AGENT_IMAGE")
    with pytest.raises(SettingsError, match="BLOCKYARD_OPERATOR_AGENT_IMAGE: Field required"):
        OperatorSettings.load()


def test_health_fails_when_the_lease_is_not_tried_or_a_service_waits_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            settings = OperatorSettings(agent_image="i", lease_namespace="home")
            operator = Operator(settings, Kube(server.credentials()), Metrics())
            assert operator.trouble() == ""
            operator.lease.attempted_at -= main_module.SILENCE + 1
            assert "Lease" in operator.trouble()
            operator.lease.attempted_at = time.monotonic()
            operator.queue.add(("default", "s"))
            monkeypatch.setattr(main_module, "STUCK", -1.0)
            assert operator.trouble() == "", "a standby has nothing to do"
            operator.acting = True
            assert "a service has been due" in operator.trouble()
            await operator.end()

    run(scenario())


def test_what_cannot_go_on_ends_the_process_with_an_error() -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            operator = Operator(
                OperatorSettings(agent_image="i", lease_namespace="home"),
                Kube(server.credentials()),
                Metrics(),
            )

            async def broken(*_: object) -> None:
                raise ZeroDivisionError

            operator.reconciler.run = broken  # type: ignore[method-assign]  # that is the test
            operator.begin()
            await asyncio.wait_for(operator.stop.wait(), 30)
            assert operator.failed
            await operator.end()

    run(scenario())


def test_kopf_is_told_our_names_and_bounds() -> None:
    settings = kopf_settings()
    assert not settings.posting.enabled and settings.peering.standalone and settings.scanning.disabled
    assert "kopf.zalando.org" not in repr(settings.persistence.finalizer)
    assert settings.networking.request_timeout and settings.watching.inactivity_timeout


def test_a_log_line_is_one_json_object_with_its_exception() -> None:
    current_service.set("ns/s")
    try:
        raise ValueError("why\nin two lines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("failed",), sys.exc_info())
    line = JsonLines().format(record)
    found = json.loads(line)
    assert "\n" not in line and found["message"] == "it failed" and found["service"] == "ns/s"
    assert "ValueError: why" in found["exception"]
    current_service.set("")
