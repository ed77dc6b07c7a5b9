"""A gateway needs no engine: it runs where torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .test_server import go, scene

# Read by Python before anything else, from the first folder of PYTHONPATH.
BARRED = """
import sys

class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "triton", "transformers", "tokenizers", "numpy"}:
            raise ModuleNotFoundError(f"{name} is barred", name=name)

sys.meta_path.insert(0, Barred())
"""


def test_a_gateway_serves_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARRED)
    barred = {"PYTHONPATH": str(tmp_path)}
    engine = [sys.executable, "-c", "import blockyard.engine.runner"]
    done = subprocess.run(engine, env=barred, capture_output=True, text=True, check=False)
    assert "is barred" in done.stderr, "the bar holds nothing up"

    async def work() -> None:
        async with scene(tmp_path / "gateway", 1, "--token", "inner", **barred) as at:
            status, _, _ = await at.ask()
            assert status == 200

    go(work())


def test_its_modules_load_no_engine() -> None:
    program = """
import pkgutil, sys
import blockyard.agent.gateway as room
for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
    __import__(module.name)
print([name for name in sys.modules if name.startswith(("blockyard.engine", "blockyard.kernels", "torch"))])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
