"""What holds for all tests: how they may run side by side, and how Triton's kernels run without CUDA.

Triton decides when it is first imported whether it interprets its kernels, and several libraries import it;
so it is said here, before any test module is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

CLUSTER = Path(__file__).parent / "cluster"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster's tests come first: they take longest, and mostly wait."""
    items.sort(key=lambda item: not item.path.is_relative_to(CLUSTER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n`` a process takes whole files, and one all of the cluster's, which share a control plane.

    Helm's tests have one of their own.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = config.rootpath / nodeid.partition("::")[0]
            return "cluster" if file.parent == CLUSTER and file.name != "test_helm.py" else str(file)

    return Files(config, log)
