"""``blockyard up``, ``status`` and ``top``: services of this machine and of a cluster, in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..user_cache import cache_folder
from .local.manifest import (
    Machine,
    ManifestError,
    check_names_are_free,
    check_runs_here,
    read,
    usable_gpus,
)
from .local.runtime import DEFAULTS, LocalRuntime, running_services
from .refusals import explain
from .view import overview

REFRESH = 1.0  # seconds
Raw = dict[str, Any]
Found = tuple[list[Raw], list[Raw]]  # LLMServices, KVMoves


def runs_folder() -> Path:
    """The folder in which each local runtime keeps its logs and its state file."""
    return cache_folder() / "run"


async def up(manifest: Path, port: int, keys: Path | None) -> int:
    """Run a manifest here until SIGINT or SIGTERM; ManifestError if it cannot run here."""
    service = read(manifest)
    assert service.spec is not None
    machine = Machine(usable_gpus() if service.spec.device == "cuda" else (), keys)
    check_runs_here(service, machine)
    check_names_are_free(service, running_services(runs_folder()), DEFAULTS)
    folder = runs_folder() / service.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ManifestError(
            f"{folder}, where {service.name} would keep its logs, cannot be used: {error}; remove it, change "
            "metadata.name, or set BLOCKYARD_CACHE to another folder"
        ) from None
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ManifestError(
            f"{service.name} is running already (see blockyard status); stop it, or change metadata.name"
        ) from None
    stop = asyncio.Event()
    try:
        _check_port_is_free(port)
        with _screen(f"logs: {folder}") as show:
            runtime = LocalRuntime(manifest, machine, folder, port, show)
            _stop_on_signals(stop, runtime)
            await runtime.run(stop)
    finally:
        lock.release()
    return 0


def _check_port_is_free(port: int) -> None:
    """ManifestError if another program listens there: the gateway would fail to start again and again."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ManifestError(
                f"port {port} of this machine cannot be used: {error.strerror}; give another one with --port"
            ) from None


def _stop_on_signals(stop: asyncio.Event, runtime: LocalRuntime) -> None:
    """The first signal stops everything in order, the second kills at once."""

    def ended() -> None:
        if stop.is_set():
            runtime.kill()
        else:
            print("stopping: open requests are finished first; once more to stop at once", file=sys.stderr)
            stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended)


@contextlib.contextmanager
def _screen(title: str) -> Iterator[Callable[[Raw], None]]:
    """Shows a resource: live on a terminal, else one line whenever a condition changes."""
    console = Console(stderr=False, highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            console.print(title, style="dim")
            yield lambda raw: live.update(overview([raw]), refresh=True)
        return
    print(title, flush=True)
    told: list[str] = []

    def tell(raw: Raw) -> None:
        status = raw["status"]
        conditions = "  ".join(f"{c['type']}={c['status']} ({c['reason']})" for c in status["conditions"])
        line = (
            f"{raw['metadata']['name']}: {status['readyReplicas']} of {raw['spec']['replicas']} ready at "
            f"{status['url']}  {conditions}"
        )
        if told != [line]:
            told[:] = [line]
            print(line, flush=True)

    yield tell


@contextlib.asynccontextmanager
async def _cluster(namespace: str | None) -> AsyncIterator[Callable[[], Awaitable[Found]]]:
    """A function that reads the LLMServices and KVMoves of a cluster; it raises KubeError if that fails."""
    from .kube import KV_MOVE, LLM_SERVICE, Kube, load_credentials
    from .settings import OperatorSettings

    logging.getLogger("blockyard.operator").setLevel(logging.WARNING)
    settings = OperatorSettings.model_construct(
        agent_image="-", kubeconfig=Path(os.environ["KUBECONFIG"]) if "KUBECONFIG" in os.environ else None
    )
    kube = Kube(await load_credentials(settings))

    async def ask() -> Found:
        services: list[Raw] = []
        moves: list[Raw] = []
        for kind, found in ((LLM_SERVICE, services), (KV_MOVE, moves)):
            async for page in kube.pages(kind, namespace):
                found.extend(page.items)
        return services, moves

    try:
        yield ask
    finally:
        await kube.close()


def _has_cluster() -> bool:
    """Whether the environment or a kubeconfig names a cluster."""
    kubeconfig = os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config"
    return Path(kubeconfig).is_file() or "KUBERNETES_SERVICE_HOST" in os.environ


def words(error: Exception) -> str:
    """What a person is told of a call to the cluster that failed."""
    from .kube import ApiError, Unreachable

    if isinstance(error, ApiError):
        return explain(error).message
    return f"the cluster does not answer: {error.why}" if isinstance(error, Unreachable) else str(error)


async def show(namespace: str | None, *, here: bool, follow: bool) -> int:
    """Print all services once, or keep showing them until Ctrl-C.

    ``here``: only those of this machine. KubeError if a cluster is configured but cannot be read at first.
    """
    from .kube import KubeError

    here = here or not _has_cluster()
    console = Console(highlight=False)
    async with contextlib.AsyncExitStack() as stack:
        ask_cluster = None if here else await stack.enter_async_context(_cluster(namespace))

        async def ask() -> Found:
            services, moves = await ask_cluster() if ask_cluster else ([], [])
            return running_services(runs_folder()) + services, moves

        found = await ask()
        if not follow:
            console.print(overview(*found))
            return 0
        live = stack.enter_context(Live(console=console, auto_refresh=False, screen=console.is_terminal))
        problem = Text()
        while True:
            live.update(Group(problem, overview(*found)), refresh=True)
            await asyncio.sleep(REFRESH)
            try:
                found, problem = await ask(), Text()
            except KubeError as error:  # the last answer stays on the screen
                problem = Text(words(error), style="red")
