"""The control plane itself, and that it leaves nothing behind."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .access import Access
from .cluster import Cluster
from .control_plane import ControlPlane, DidNotStart
from .network import PodNetwork

TESTS = Path(__file__).parent


def ended(pid: int, limit: float = 60.0) -> bool:
    """Whether a process is gone, or goes in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], limit)[0])
    finally:
        os.close(descriptor)


def test_the_control_plane_is_ready_and_says_its_version(cluster: Cluster) -> None:
    assert cluster.kubectl("get", "--raw", "/readyz") == "ok"
    assert "Server Version: v1." in cluster.kubectl("version")


def test_an_unknown_object_is_none_and_an_unknown_kind_an_error(cluster: Cluster, namespace: str) -> None:
    assert cluster.find("ConfigMap", "nobody", namespace) is None
    with pytest.raises(LookupError, match="Unicorn"):
        cluster.get("Unicorn", "nobody", namespace)


def test_a_service_account_may_do_what_its_role_says_and_no_more(cluster: Cluster, namespace: str) -> None:
    kubeconfig = str(cluster.kubeconfig_of("default", namespace))
    asked = ("--kubeconfig", kubeconfig, "get", "configmaps")
    assert "forbidden" in cluster.kubectl(*asked, check=False)
    rule = ("--verb=get,list", "--resource=configmaps", "-n", namespace)
    cluster.kubectl("create", "role", "reader", *rule)
    cluster.kubectl(
        "create",
        "rolebinding",
        "reader",
        "--role=reader",
        f"--serviceaccount={namespace}:default",
        "-n",
        namespace,
    )
    for _ in range(100):  # the authorizer learns of it a moment later
        if "kube-root-ca.crt" in (answer := cluster.kubectl(*asked, check=False)):
            break
        time.sleep(0.1)
    else:
        raise AssertionError(answer)
    assert "forbidden" in cluster.kubectl("--kubeconfig", kubeconfig, "get", "secrets", check=False)


def test_owned_objects_are_collected_with_their_owner(cluster: Cluster, namespace: str) -> None:
    def config(name: str, owners: list[dict[str, str]]) -> dict[str, object]:
        metadata = {"name": name, "namespace": namespace, "ownerReferences": owners}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}

    owner = cluster.create(config("owner", []))
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
    cluster.create(config("owned", [reference]))
    cluster.delete("ConfigMap", "owner", namespace)
    cluster.wait("ConfigMap", "owned", namespace, lambda state: state is None)


def test_a_program_that_cannot_run_is_an_error_with_its_last_words_and_ends_the_others(
    programs: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "kube-apiserver"
    broken.write_text("#!/bin/sh\necho no paper left in the printer\nexit 3\n")
    broken.chmod(0o755)
    folder = tmp_path / "control-plane"
    with pytest.raises(DidNotStart, match=r"kube-apiserver ended with code 3:\nno paper left"):
        ControlPlane(folder, {**programs, "kube-apiserver": broken})
    assert not (folder / "etcd").exists()
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in running


STARTS_AND_IS_KILLED = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from process import tied
print(subprocess.Popen(tied(["sleep", "600"])).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_the_tests_even_when_those_are_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTS_AND_IS_KILLED, str(TESTS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended(int(done.stdout)), done


def test_a_kubeconfig_says_what_it_was_written_from(tmp_path: Path) -> None:
    by_token = Access("https://127.0.0.1:1", "authority", token="secret")
    path = by_token.write_kubeconfig(tmp_path / "token")
    assert Access.of_kubeconfig(path) == by_token and path.stat().st_mode & 0o077 == 0
    by_certificate = Access("https://127.0.0.1:1", "authority", certificate="certificate", key="key")
    assert Access.of_kubeconfig(by_certificate.write_kubeconfig(tmp_path / "pair")) == by_certificate
    nothing = Access("https://127.0.0.1:1", "authority").write_kubeconfig(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no token and no client certificate"):
        Access.of_kubeconfig(nothing)


def test_two_runs_at_once_have_different_pod_networks_and_no_address_twice() -> None:
    with PodNetwork() as one, PodNetwork() as other:
        assert one.block != other.block
        taken = [network.take() for network in (one, other) for _ in range(100)]
        assert len(set(taken)) == 200 and one.host not in taken


def test_a_taken_pod_network_is_an_error_that_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with PodNetwork() as one:
        monkeypatch.setenv("BLOCKYARD_TEST_POD_NETWORK", str(one.block))
        with pytest.raises(OSError, match="BLOCKYARD_TEST_POD_NETWORK"):
            PodNetwork()
