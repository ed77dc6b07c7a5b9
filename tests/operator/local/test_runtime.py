"""``blockyard up``: real agents and a real gateway as processes, from a manifest as a cluster takes it."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from rich.console import Console

from blockyard.cli import main
from blockyard.operator.local.manifest import (
    Machine,
    ManifestError,
    check_names_are_free,
    check_runs_here,
    read,
)
from blockyard.operator.local.runtime import DEFAULTS, running_services
from blockyard.operator.view import overview
from blockyard.user_cache import cache_folder

TIMEOUT = 240.0
MANIFEST = {
    "apiVersion": "serving.blockyard.dev/v1alpha1",
    "kind": "LLMService",
    "metadata": {"name": "tiny"},
    "spec": {
        "model": {"hub": {"name": "SmolLM2-135M-Instruct"}},
        "replicas": 2,
        "device": "cpu",
        "engine": {"threads": 1, "maxModelLen": 1024},
        "kv": {"blocks": 128},
        "drain": {"timeoutSeconds": 60},
    },
}


def written(folder: Path, **changes: Any) -> Path:
    """The manifest; a field that is None is left out."""
    path = folder / "service.yaml"
    fresh = folder / "service.new"
    spec = {**MANIFEST["spec"], **changes}  # type: ignore[dict-item]
    given = {field: value for field, value in spec.items() if value is not None}
    fresh.write_text(yaml.safe_dump({**MANIFEST, "spec": given}))
    fresh.replace(path)
    return path


class Up:
    """One ``blockyard up`` with a run folder of its own, and models and kernels of the user's cache."""

    def __init__(self, manifest: Path, cache: Path) -> None:
        self.runs = cache / "run"
        for shared in ("models", "kernels"):
            (cache_folder() / shared).mkdir(parents=True, exist_ok=True)
            (cache / shared).symlink_to(cache_folder() / shared)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = (cache / "up.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blockyard.cli", "up", str(manifest), "--port", str(self.port)],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "BLOCKYARD_CACHE": str(cache)},
        )
        self.log = cache / "up.log"

    def state(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.runs / "tiny" / "state.json").read_text()))
        except FileNotFoundError:
            return {}

    def until(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The state, once ``what`` holds of it."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            state = self.state()
            if state and what(state):
                return state
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{state}\n{self.log.read_text()}"
            time.sleep(0.1)  # the state is a file that is replaced: there is nothing else to wait for

    def ready(self, count: int) -> dict[str, Any]:
        def enough(state: dict[str, Any]) -> bool:
            status = state["service"]["status"]
            return status["readyReplicas"] == count == len(state["agents"])

        return self.until(enough)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(90)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._log.close()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    running = Up(written(tmp_path), tmp_path)
    yield running
    running.stop()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_a_service_lives_on_one_machine(up: Up, tmp_path: Path) -> None:
    state = up.ready(2)
    pids = list(state["agents"].values())
    assert [each["metadata"]["name"] for each in running_services(up.runs)] == ["tiny"]
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{up.port}/v1", api_key="none", timeout=120, max_retries=0
    )
    failures: list[Exception] = []
    answers: list[str] = []
    enough = threading.Event()

    def load(number: int) -> None:
        """Greedy answers, one after the other, until told to stop."""
        while not enough.is_set():
            try:
                answer = client.completions.create(
                    model="tiny", prompt=f"Count from {number}:", max_tokens=24, temperature=0
                )
                answers.append(answer.choices[0].text)
            except openai.OpenAIError as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        # An agent is killed: its requests go on elsewhere, and it comes back.
        os.kill(pids[0], signal.SIGKILL)
        up.until(lambda s: pids[0] not in s["agents"].values())
        restarted = up.ready(2)
        assert set(restarted["agents"]) == set(state["agents"])
        # Scaled in by an edit: one agent drains and goes.
        written(tmp_path, replicas=1)
        smaller = up.ready(1)
        assert smaller["service"]["status"]["observedGeneration"] == 2
        assert any(d["action"] == "Drain" for d in smaller["service"]["status"]["decisions"])
        # A change of what agents are: a new one first, then the old one goes.
        written(tmp_path, replicas=1, kv={"blocks": 160})
        rolled = up.until(
            lambda s: (
                not set(s["agents"]) & set(smaller["agents"]) and s["service"]["status"]["readyReplicas"] == 1
            )
        )
        assert rolled["service"]["status"]["pool"]["device"]["total"] == 160
        # A mistake in the file is said, and changes nothing.
        before = rolled["service"]["status"]["revision"]
        written(tmp_path, replicas=-1)
        wrong = up.until(lambda s: "spec.replicas" in json.dumps(s["service"]["status"]["conditions"]))
        assert wrong["service"]["status"]["revision"] == before
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    assert answers
    pids = [up.process.pid, *up.state()["agents"].values()]
    assert up.stop() == 0, up.log.read_text()
    assert not [pid for pid in pids if alive(pid)]
    assert running_services(up.runs) == []


def test_load_scales_a_service_on_one_machine(tmp_path: Path) -> None:
    scaling = {"maxReplicas": 2, "targetUsedPercent": 50, "scaleInDelaySeconds": 3}
    small: dict[str, Any] = {
        "replicas": None,
        "autoscaling": scaling,
        "engine": {**MANIFEST["spec"]["engine"], "maxSequences": 1},  # type: ignore[index]
    }
    up = Up(written(tmp_path, **small), tmp_path)
    enough = threading.Event()
    threads: list[threading.Thread] = []
    try:
        up.ready(1)
        url = f"http://127.0.0.1:{up.port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)

        def load() -> None:
            while not enough.is_set():
                client.completions.create(model="tiny", prompt="Count:", max_tokens=24, temperature=0)

        threads += [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        up.ready(2)
        # A file that says nothing of replicas leaves their number alone.
        written(tmp_path, **small, drain={"timeoutSeconds": 50})
        edited = up.until(lambda s: s["service"]["spec"]["drain"]["timeoutSeconds"] == 50)
        assert edited["service"]["spec"]["replicas"] == 2
        enough.set()
        calm = up.ready(1)
        decisions = [d["message"] for d in calm["service"]["status"]["decisions"] if d["action"] == "Scale"]
        assert [message[:20] for message in decisions] == ["replicas from 2 to 1", "replicas from 1 to 2"]
    finally:
        enough.set()
        for thread in threads:
            thread.join()
        code = up.stop()
    assert code == 0, up.log.read_text()


def test_nothing_outlives_a_runtime_that_is_killed(up: Up) -> None:
    state = up.until(lambda s: all(s["agents"].values()) and len(s["agents"]) == 2)
    up.process.kill()
    up.process.wait()
    deadline = time.monotonic() + TIMEOUT
    while left := [pid for pid in state["agents"].values() if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)  # the processes are not ours to wait for
    assert running_services(up.runs) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda"}, "spec.device: cpu"),
        ({"device": "cuda", "autoscaling": {"maxReplicas": 3}}, "3 replicas of 1 GPUs"),
        (
            {"model": {"persistentVolumeClaim": {"claimName": "models"}}},
            "persistentVolumeClaim needs Kubernetes",
        ),
        ({"model": {"image": {"reference": "models/tiny:1"}}}, "image needs Kubernetes"),
        ({"model": {"hostPath": {"path": "/no/such/folder"}}}, "/no/such/folder does not exist"),
        ({"auth": {"secretName": "keys"}}, "--keys FOLDER"),
        ({"model": {}}, "spec.model"),
        ({"model": {"hub": {"name": "a"}, "hostPath": {"path": "/tmp"}}}, "exactly one"),
        ({"replicas": -1}, "spec.replicas"),
        ({"replica": 2}, "spec.replica: Extra inputs"),
        ({"balance": {"lowWatermarkPercent": 90, "highWatermarkPercent": 10}}, "lowWatermarkPercent"),
    ],
)
def test_what_cannot_run_here_says_so(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        check_runs_here(read(written(tmp_path, **changes)), Machine())


def test_names_that_a_cluster_could_not_give_twice_are_refused_here_too(tmp_path: Path) -> None:
    service = read(written(tmp_path))
    spec = yaml.safe_load(written(tmp_path).read_text())["spec"]
    other = {"metadata": {"name": "other", "namespace": "local"}, "spec": spec}
    check_names_are_free(service, [other], DEFAULTS)
    other["metadata"]["name"] = f"{service.name}-agents"
    with pytest.raises(ManifestError, match=r"-agents belongs to LLMService .*-agents.*name"):
        check_names_are_free(service, [other], DEFAULTS)


def test_a_port_or_folder_that_something_else_has_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path / "cache"))
    manifest = str(written(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["up", manifest, "--port", str(taken.getsockname()[1])]) == 2
    assert "--port" in capfd.readouterr().err
    (tmp_path / "cache/run/tiny").rename(tmp_path / "away")
    (tmp_path / "cache/run/tiny").write_text("no folder")
    assert main(["up", manifest, "--port", "0"]) == 2
    assert "BLOCKYARD_CACHE" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("kind: Pod", "0 objects of kind LLMService"),
        ("kind: LLMService", "apiVersion"),
        ("kind: LLMService\napiVersion: serving.blockyard.dev/v1alpha1", "metadata.name"),
    ],
)
def test_a_file_that_is_no_manifest_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        read(path)


def test_every_example_for_cpus_runs_here() -> None:
    path = Path(__file__).parents[3] / "examples" / "cpu.yaml"
    check_runs_here(read(path), Machine())


def test_the_view_shows_what_a_person_needs() -> None:
    pool = {"total": 100, "free": 60, "cached": 30, "active": 10, "size": "1Gi"}
    agent = {"name": "tiny-abcde", "node": "n1", "state": "Draining", "running": 3, "message": "idle"}
    condition = {"type": "Ready", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    decision = {"action": "Drain", "agent": "tiny-abcde", "reason": "ScaleIn", "message": "idlest"}
    status = {
        "readyReplicas": 1,
        "observedGeneration": 1,
        "url": "http://tiny",
        "conditions": [condition],
        "pool": {"device": pool},
        "agents": [agent],
        "decisions": [{"time": "2026-01-01T10:11:12Z", **decision}],
    }
    metadata = {"name": "tiny", "namespace": "prod", "generation": 2}
    raw = {"metadata": metadata, "spec": {"replicas": 2}, "status": status}
    asked = {"service": "tiny", "kind": "migrate", "from": "a", "to": "b"}
    move = {"metadata": {"name": "move-1"}, "spec": asked, "status": {"phase": "Running"}}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(overview([raw], [move]))
    text = console.export_text()
    for shown in (
        *("prod/tiny", "1 of 2 ready", "http://tiny", "not yet seen", "Unschedulable: 0/3 nodes"),
        *("10 active, 30 cached, 60 free", "tiny-abcde", "Draining", "idle", "move-1", "migrate", "Running"),
        "10:11:12  Drain tiny-abcde: ScaleIn, idlest",
    ):
        assert shown in text, f"{shown} is missing in\n{text}"


def test_the_view_can_be_read_at_80_columns() -> None:
    """Names of agents, states and numbers are whole, and what is long wraps under itself."""
    words = "0/12 nodes are available: 12 Insufficient nvidia.com/gpu, 12 node(s) had a volume elsewhere"
    used = {"running": 12, "waiting": 130, "usedPercent": 100, "cachedPercent": 31, "hitPercent": 48}
    agents = [
        {"name": "smollm-7tt8b", "state": "Ready", "node": "ip-10-0-12-34.ec2.internal", **used},
        {"name": "smollm-kq9zs", "state": "Pending", "node": "", "message": words},
        {"name": "smollm-x2b4w", "state": "Terminating", "node": "ip-10-0-112-134.ec2.internal", **used},
    ]
    agents[0]["message"] = "was restarted once"
    condition = {"type": "Ready", "status": "False", "reason": "Unschedulable", "message": words}
    decision = {"action": "Create", "agent": "smollm-kq9zs", "reason": "ScaleOut", "message": words}
    tier = {"total": 17475, "free": 11000, "cached": 5475, "active": 1000, "size": "24Gi"}
    status = {
        "conditions": [condition],
        "pool": {"device": tier},
        "agents": agents,
        "decisions": [{"time": "2026-01-01T10:11:12Z", **decision}],
    }
    raw = {"metadata": {"name": "smollm", "namespace": "prod"}, "spec": {"replicas": 3}, "status": status}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(overview([raw]))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == [
        "prod/smollm  0 of 3 ready",
        "  Ready  False  Unschedulable: 0/12 nodes are available: 12 Insufficient",
        "                nvidia.com/gpu, 12 node(s) had a volume elsewhere",
        "  device  █▒▒▒▒▒▒·········  24Gi: 1000 active, 5475 cached, 11000 free blocks",
        "  AGENT         STATE        RUN  WAIT  USED  CACHED  HITS  NODE",
        "  smollm-7tt8b  Ready         12   130  100%     31%   48%  ip-10-0-12-34.ec2.i…",
        "  smollm-kq9zs  Pending        0     0    0%      0%    0%",
        "  smollm-x2b4w  Terminating   12   130  100%     31%   48%  ip-10-0-112-134.ec2…",
        "  smollm-7tt8b  was restarted once",
        "  smollm-kq9zs  0/12 nodes are available: 12 Insufficient nvidia.com/gpu, 12",
        "                node(s) had a volume elsewhere",
        "  10:11:12  Create smollm-kq9zs: ScaleOut, 0/12 nodes are available: 12",
        "            Insufficient nvidia.com/gpu, 12 node(s) had a volume elsewhere",
    ]
