"""A real operator in a process of its own, and what tests ask of the services that it keeps."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blockyard.user_cache import cache_folder

from .api import Raw
from .cluster import Cluster
from .container import Image
from .node import NodeStandIn

ROOT = Path(__file__).parents[2]
IMAGE = "blockyard/agent:test"
CACHE = "/srv/blockyard"
STARTING = 240.0  # seconds for agents on a busy machine


class OperatorProcess:
    """``python -m blockyard.operator.main`` for one namespace, with a Lease of its own there."""

    def __init__(
        self, kubeconfig: Path, namespace: str, folder: Path, *, wait: bool = True, **settings: str
    ) -> None:
        self.log = folder / f"operator-{len(list(folder.glob('operator-*')))}.log"
        environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "BLOCKYARD_OPERATOR_AGENT_IMAGE": IMAGE,
            "BLOCKYARD_OPERATOR_BIND_POD_IP": "true",
            "BLOCKYARD_OPERATOR_NAMESPACES": namespace,
            "BLOCKYARD_OPERATOR_LEASE_NAMESPACE": namespace,
            "BLOCKYARD_OPERATOR_HOST": "127.0.0.1",
            "BLOCKYARD_OPERATOR_PORT": "0",
            **{f"BLOCKYARD_OPERATOR_{name.upper()}": value for name, value in settings.items()},
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blockyard.operator.main"],
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._announced, self._acting = threading.Event(), threading.Event()
        self.url = ""
        threading.Thread(target=self._read, daemon=True).start()
        assert self._announced.wait(60), self.text()
        assert self.url, self.text()
        if wait:
            self.wait_until_acting()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.log.open("w") as log:
            for line in self.process.stderr:
                log.write(line)
                log.flush()
                if match := re.search(r"health and metrics on \('([0-9.]+)', ([0-9]+)\)", line):
                    self.url = f"http://{match[1]}:{match[2]}"
                    self._announced.set()
                if ": acting" in line:
                    self._acting.set()
        self._announced.set()

    def wait_until_acting(self, limit: float = 60.0) -> None:
        assert self._acting.wait(limit), self.text()

    def text(self) -> str:
        return self.log.read_text()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a metric over all its labels."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(_total)?[{{ ]", line)
        )

    def writes(self) -> float:
        """Calls that changed something, the Lease's aside."""
        found = self.get("/metrics")[1]
        pattern = r'^blockyard_operator_api_writes_total\{kind="(?!Lease)\w+"\} ([0-9.e+]+)$'
        return sum(float(value) for value in re.findall(pattern, found, re.MULTILINE))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.kill()


StartOperator = Callable[..., OperatorProcess]


@contextlib.contextmanager
def operators(cluster: Cluster, namespace: str, account: Path, folder: Path) -> Iterator[StartOperator]:
    """A factory of operators for a namespace; they end after its services, by SIGTERM."""
    started: list[OperatorProcess] = []

    def start(*, wait: bool = True, **settings: str) -> OperatorProcess:
        started.append(OperatorProcess(account, namespace, folder, wait=wait, **settings))
        return started[-1]

    try:
        yield start
        for service in cluster.items("LLMService", namespace):
            name = service["metadata"]["name"]
            cluster.patch("LLMService", name, namespace, {"metadata": {"finalizers": []}})
            cluster.delete("LLMService", name, namespace)
    finally:  # also after a test that failed
        codes = [operator.stop() for operator in started]
    tracebacks = [operator.text() for operator in started if "Traceback" in operator.text()]
    assert not tracebacks, tracebacks[0]
    assert set(codes) <= {0, -signal.SIGKILL}, codes


def prepare(cluster: Cluster, nodes: NodeStandIn) -> None:
    """The custom resources, and how the nodes run our image with this machine's models."""
    for name in ("llmservices", "kvmoves"):
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / f"crds/{name}.yaml"))
        crd = f"{name}.serving.blockyard.dev"
        cluster.wait(
            "CustomResourceDefinition", crd, None, lambda found: condition(found, "Established") == "True"
        )
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    nodes.images[IMAGE] = Image(env={"PATH": path})
    nodes.folders[CACHE] = cache_folder()


def manifest(name: str, namespace: str, **spec: Any) -> Raw:
    """A small service on CPUs, without a gateway unless one is asked for."""
    return {
        "apiVersion": "serving.blockyard.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"hub": {"name": "SmolLM2-135M-Instruct"}, "cacheHostPath": CACHE},
            "device": "cpu",
            "engine": {"threads": 1, "maxSequences": 4, "maxModelLen": 1024},
            "kv": {"blocks": 128},
            "drain": {"timeoutSeconds": 30},
            "gateway": {"replicas": 0},
            **spec,
        },
    }


def condition(found: Raw | None, kind: str) -> str:
    """The status of a condition; "" where there is none."""
    return str(_condition(found, kind).get("status", ""))


def reason(found: Raw | None, kind: str) -> tuple[str, str]:
    said = _condition(found, kind)
    return str(said.get("reason", "")), str(said.get("message", ""))


def _condition(found: Raw | None, kind: str) -> Raw:
    conditions = ((found or {}).get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one["type"] == kind), {})


def settled(replicas: int) -> Callable[[Raw | None], bool]:
    """The status is of the current generation, so many agents are ready, and nothing is being changed."""

    def holds(found: Raw | None) -> bool:
        status = (found or {}).get("status") or {}
        return (
            found is not None
            and status.get("observedGeneration") == found["metadata"]["generation"]
            and status["replicas"] == status["readyReplicas"] == status["updatedReplicas"] == replicas
            and condition(found, "Ready") == "True"
            and condition(found, "Progressing") == "False"
        )

    return holds


class Service:
    """One LLMService as a test sees it."""

    def __init__(self, cluster: Cluster, name: str, namespace: str) -> None:
        self.cluster, self.name, self.namespace = cluster, name, namespace

    def wait(self, holds: Callable[[Raw | None], bool], limit: float = STARTING) -> Raw:
        return self.cluster.wait("LLMService", self.name, self.namespace, holds, limit=limit)

    def wait_until_gone(self, limit: float = STARTING) -> None:
        """It, and all that belonged to it."""
        self.cluster.wait_until_gone("LLMService", self.name, self.namespace, limit=limit)
        for kind in ("Pod", "Service", "Deployment", "PodDisruptionBudget", "NetworkPolicy", "Secret"):
            label = f"serving.blockyard.dev/service={self.name}"
            for child in self.cluster.items(kind, self.namespace, labels=label):
                self.cluster.wait_until_gone(kind, child["metadata"]["name"], self.namespace)

    def patch(self, **spec: Any) -> None:
        self.cluster.patch("LLMService", self.name, self.namespace, {"spec": spec})

    def pods(self, component: str = "agent") -> list[Raw]:
        labels = f"serving.blockyard.dev/service={self.name},app.kubernetes.io/component={component}"
        return self.cluster.items("Pod", self.namespace, labels=labels)

    def shown(self) -> str:
        """What ``blockyard status`` prints of its namespace."""
        return subprocess.run(
            [sys.executable, "-m", "blockyard.cli", "status", "--namespace", self.namespace],
            env={**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig), "COLUMNS": "160"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    def token(self) -> str:
        data = self.cluster.get("Secret", f"{self.name}-internal", self.namespace)["data"]
        return base64.b64decode(data["token"]).decode()

    def wait_for_report(self, pod: Raw, holds: Callable[[Raw], bool], limit: float = STARTING) -> Raw:
        """The first report of this pod's agent for which ``holds``."""
        until, query = time.monotonic() + limit, ""
        while time.monotonic() < until:
            report: Raw = json.loads(self._call(pod, f"/status{query}"))
            if holds(report):
                return report
            query = f"?since={report['version']}&incarnation={report['incarnation']}&wait=20"
        raise AssertionError(f"no such report of {pod['metadata']['name']} within {limit:g} s: {report}")

    def chat(self, pod: Raw, text: str, tokens: int = 8) -> str:
        """What the agent of this pod answers."""
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
        }
        answer = json.loads(self._call(pod, "/v1/chat/completions", body))
        return str(answer["choices"][0]["message"]["content"])

    def _call(self, pod: Raw, path: str, body: Raw | None = None) -> bytes:
        request = urllib.request.Request(
            f"http://{pod['status']['podIP']}:8000{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self.token()}"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return bytes(response.read())
