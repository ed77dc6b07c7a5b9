"""The operator's process: ``python -m blockyard.operator.main``, configured by ``BLOCKYARD_OPERATOR_*``.

kopf is used for watching only: its low-level event handlers feed the mirrors of ``cluster``. No other
handlers are registered, so that kopf writes no annotations, finalizers or events. The work is done by tasks
of our own in the same event loop, which a startup handler begins and a cleanup handler ends: the Lease, and
while it is held the workers. A standby process keeps its mirrors up to date.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

import kopf
from aiohttp import web

from .api import GROUP, VERSION
from .children import Defaults
from .cluster import MANAGED, Cluster, Mirror
from .events import Recorder
from .fleet import Fleet
from .kube import LLM_SERVICE, Kube, KubeError, NotFound
from .lease import Lease
from .metrics import Metrics
from .reconcile import ROUND_TIMEOUT, Reconciler, current_service
from .settings import OperatorSettings, SettingsError
from .workqueue import WorkQueue

log = logging.getLogger("blockyard.operator")

SILENCE = 60.0  # seconds without an attempt at the Lease that mean that the event loop hangs
STUCK = 2 * ROUND_TIMEOUT  # seconds for which a service is due or worked on that mean the same


class Operator:
    """Everything that one process of the operator consists of, and its health."""

    def __init__(self, settings: OperatorSettings, kube: Kube, metrics: Metrics) -> None:
        self.settings = settings
        self.kube = kube
        self.metrics = metrics
        self.queue = WorkQueue()
        self.cluster = Cluster(self.queue.add)
        self.fleet = Fleet(self.queue, polls_per_second=settings.polls_per_second)
        self.recorder = Recorder(kube, settings.identity)
        defaults = Defaults(settings.agent_image, settings.lease_namespace, settings.bind_pod_ip)
        self.reconciler = Reconciler(
            kube,
            self.cluster,
            self.fleet,
            self.queue,
            self.recorder,
            metrics,
            defaults,
            restart=self._restart,
        )
        # A process that was killed and its successor in the same pod must have different names.
        identity = f"{settings.identity}_{secrets.token_hex(4)}"
        self.lease = Lease(kube, settings.lease_namespace, settings.lease_name, identity)
        kube.may_write = lambda: self.lease.held
        self.acting = False
        self.failed = False
        self.stop = asyncio.Event()
        self._living: asyncio.Task[None] | None = None
        metrics.watch(
            {
                "queue_depth": ("services that are due", lambda: len(self.queue)),
                "queue_oldest_seconds": ("how long one has been due or worked on", self.queue.oldest),
                "agents_polled": ("agents that are followed", lambda: len(self.fleet)),
                "polls": ("polls of agents since the start", lambda: self.fleet.polls),
                "poll_errors": ("polls that got no status, since the start", lambda: self.fleet.errors),
                "services": ("LLMServices that are there", lambda: len(self.cluster.services)),
            }
        )

    # ── Life ──────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        self._living = asyncio.create_task(self._live(), name="lease")

    async def end(self) -> None:
        """Stop acting, release the Lease, close everything."""
        if self._living is not None:
            self._living.cancel()
            await asyncio.gather(self._living, return_exceptions=True)
        await self.fleet.close()
        self.queue.close()
        await self.kube.close()

    async def _live(self) -> None:
        try:
            await self.lease.lead(self._act)
        except Exception:
            log.exception("the operator cannot go on")
            self.failed = True
            self.stop.set()

    def _restart(self, why: str) -> None:
        """End the process in order, so that its pod starts it anew."""
        log.warning("ending to be started anew: %s", why)
        self.failed = True
        self.stop.set()

    async def _act(self) -> None:
        """What the holder of the Lease does, until it is cancelled."""
        self.acting = True
        self.metrics.lease_held.set(1)
        self.queue.close()
        settings = self.settings
        try:
            await self.reconciler.run(settings.workers, settings.namespaces, settings.resync_seconds)
        finally:
            self.acting = False
            self.metrics.lease_held.set(0)
            await self.fleet.clear()
            self.queue.close()

    # ── Health ────────────────────────────────────────────────────────────────────────────────────

    def trouble(self) -> str:
        """Why this process should be restarted; empty if it should not."""
        if (silent := time.monotonic() - self.lease.attempted_at) > SILENCE:
            return f"the Lease was last tried {silent:.0f} s ago"
        if self.acting and (oldest := self.queue.oldest()) > STUCK:
            return f"a service has been due or worked on for {oldest:.0f} s"
        return ""

    async def serve(self) -> web.AppRunner:
        """Health and metrics on one port; the runner is to be cleaned up at the end."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._healthz)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, self.settings.host, self.settings.port).start()
        log.info("health and metrics on %s", runner.addresses[0])
        return runner

    async def _healthz(self, _request: web.Request) -> web.Response:
        trouble = self.trouble()
        body = {"acting": self.acting, "trouble": trouble}
        return web.json_response(body, status=503 if trouble else 200)

    async def _metrics(self, _request: web.Request) -> web.Response:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=self.metrics.render(), headers={"Content-Type": content_type})


# ── kopf ──────────────────────────────────────────────────────────────────────────────────────────────


def registry_of(operator: Operator) -> kopf.OperatorRegistry:
    """All handlers that kopf runs."""
    registry = kopf.OperatorRegistry()
    cluster = operator.cluster

    @kopf.on.startup(registry=registry)
    async def begin(**_: Any) -> None:
        operator.begin()

    @kopf.on.cleanup(registry=registry)
    async def end(**_: Any) -> None:
        await operator.end()

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        """The credentials of our own client; kopf calls this again after each 401."""
        credentials = operator.kube.credentials
        scheme, _space, token = (await operator.kube.authorization() or "").partition(" ")
        return kopf.ConnectionInfo(
            server=credentials.host,
            ca_path=credentials.ssl_ca_cert,
            insecure=not credentials.verify_ssl,
            certificate_path=credentials.cert_file,
            private_key_path=credentials.key_file,
            scheme=scheme or None,
            token=token or None,
            proxy_url=credentials.proxy,
        )

    def feed(mirror: Mirror[Any]) -> Any:
        async def event(event: Any, **_: Any) -> None:
            if event["type"] == "DELETED":
                mirror.drop(event["object"])
            else:
                mirror.put(event["object"])

        return event

    kopf.on.event(GROUP, VERSION, "llmservices", id="llmservices", registry=registry)(feed(cluster.services))
    kopf.on.event("v1", "pods", id="pods", registry=registry)(feed(cluster.pods))
    kopf.on.event("v1", "nodes", id="nodes", registry=registry)(feed(cluster.nodes))
    kopf.on.event("apps", "v1", "deployments", id="deployments", registry=registry)(feed(cluster.deployments))
    return registry


def kopf_settings() -> kopf.OperatorSettings:
    """kopf's settings: our names for anything it could write, and a bound on everything it waits for."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    # Scanning would watch namespaces and CRDs, for which the operator has no rights.
    settings.scanning.disabled = True
    settings.persistence.finalizer = f"{GROUP}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=f"kopf.{GROUP}")
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=f"kopf.{GROUP}")
    settings.networking.connect_timeout = 5.0
    settings.networking.request_timeout = 30.0
    settings.watching.connect_timeout = 5.0
    settings.watching.chunk_size = 500
    settings.watching.label_selectors["v1", "pods"] = MANAGED
    settings.watching.label_selectors["apps", "v1", "deployments"] = MANAGED
    settings.process.ultimate_exiting_timeout = 60.0
    return settings


# ── The process ───────────────────────────────────────────────────────────────────────────────────────


class JsonLines(logging.Formatter):
    """One JSON object a line, with the service that the line is about, if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if service := current_service.get():
            line["service"] = service
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # kopf logs every event at INFO.
    logging.getLogger("kopf").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


async def run(settings: OperatorSettings) -> int:
    """Run until SIGTERM or SIGINT: the process' exit code."""
    metrics = Metrics()
    kube = await Kube.connect(settings, metrics.count_call)
    operator = Operator(settings, kube, metrics)
    try:
        async for _ in kube.pages(LLM_SERVICE, next(iter(settings.namespaces), None)):
            break
    except NotFound:
        log.error("the cluster does not know LLMService: apply the files in crds/ first")  # noqa: TRY400
        await operator.end()
        return 1
    except KubeError as error:
        log.error("LLMServices cannot be listed: %s", error)  # noqa: TRY400 -- the message says it all
        await operator.end()
        return 1
    runner = await operator.serve()
    try:
        await kopf.operator(
            registry=registry_of(operator),
            settings=kopf_settings(),
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            standalone=True,
            stop_flag=operator.stop,
        )
    finally:
        await runner.cleanup()
        await operator.end()
    return 1 if operator.failed else 0


def main() -> int:
    try:
        settings = OperatorSettings.load()
        configure_logging(settings.log_level)
        return asyncio.run(run(settings))
    except SettingsError as error:
        print(f"blockyard operator: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
