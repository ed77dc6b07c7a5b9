"""One control plane for all tests of this folder, and a namespace for each.

With ``BLOCKYARD_TEST_KUBECONFIG`` or ``KUBECONFIG`` set the tests run against that cluster and start none:
they make namespaces, nodes and cluster-wide objects there.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import binaries
from .access import Access
from .api import ApiError
from .cluster import Cluster
from .control_plane import ControlPlane
from .network import SETTING
from .node import NodeStandIn

_clusters: list[Cluster] = []
LOG_LINES = 60  # of each pod, in the report of a failed test


def _external() -> str | None:
    return os.environ.get("BLOCKYARD_TEST_KUBECONFIG") or os.environ.get("KUBECONFIG")


def pytest_report_header() -> str:
    return f"cluster tests: against the cluster of {_external() or 'a control plane of their own'}"


def _cannot(why: str) -> None:
    """Skip tests whose programs are missing, but fail where CI relies on them."""
    if os.environ.get("CI"):
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


@pytest.fixture(scope="session")
def programs(pytestconfig: pytest.Config) -> dict[str, Path]:
    """kubectl, helm and the control plane's programs, built if need be."""
    capture: Any = pytestconfig.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", flush=True)

    try:
        return binaries.prepare(say)
    except binaries.CannotBuild as error:
        _cannot(str(error))
        raise


@pytest.fixture(scope="session")
def cluster(programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster; all tests share it, so they keep to their own namespaces and node names."""
    folder = tmp_path_factory.mktemp("cluster")
    external = _external()
    control_plane = None if external else ControlPlane(folder / "control-plane", programs)
    try:
        access = control_plane.access if control_plane else Access.of_kubeconfig(Path(str(external)))
        made = Cluster(access, folder, programs, control_plane)
        _clusters.append(made)
        try:
            yield made
        finally:
            _clusters.remove(made)
            made.close()
    finally:
        if control_plane:
            control_plane.stop()


@pytest.fixture(scope="session")
def nodes(cluster: Cluster) -> NodeStandIn:
    """The node stand-in, without nodes: `cluster.run(nodes.add(...))`."""
    try:
        return cluster.nodes()
    except ApiError as error:
        _cannot(f"this API server takes no loopback addresses for pods; see {SETTING} in network.py: {error}")
        raise


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace for one test."""
    with cluster.namespace() as name:
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """A failed test shows what its pods have logged."""
    report: Any = yield
    name = getattr(item, "funcargs", {}).get("namespace")
    if report.failed and name:
        for cluster in _clusters:
            for pod, text in cluster.stand_in.logs(name).items() if cluster.stand_in else []:
                report.sections.append((f"log of {pod}", "\n".join(text.splitlines()[-LOG_LINES:])))
    return report
