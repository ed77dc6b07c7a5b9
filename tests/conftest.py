"""What holds for all tests: how they may run side by side, and how Triton's kernels run without CUDA.

Triton decides when it is first imported whether it interprets its kernels, and several libraries import it;
so it is said here, before any test module is loaded.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

CLUSTER = Path(__file__).parent / "cluster"
# Which files of the cluster share a control plane, if there are several test processes; the rest share one.
CONTROL_PLANES = {
    "test_helm.py": "helm",  # installs what is there once in a cluster
    **dict.fromkeys(("test_meddling.py", "test_operator.py", "test_under_load.py"), "agents"),
}

with contextlib.suppress(ImportError):  # `make gpu` runs without it
    from hypothesis import settings

    # How long an example takes depends on the machine and on what else it does.
    settings.register_profile("tests", parent=settings(), deadline=None)
    settings.load_profile("tests")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster's tests come first: they take longest, and mostly wait."""
    items.sort(key=lambda item: not item.path.is_relative_to(CLUSTER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n`` a process takes whole files, or all files of the cluster that share a control plane."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = config.rootpath / nodeid.partition("::")[0]
            return CONTROL_PLANES.get(file.name, "cluster") if file.parent == CLUSTER else str(file)

    return Files(config, log)
