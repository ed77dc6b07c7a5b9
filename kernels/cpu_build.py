"""The compiled CPU operations: built once into the user's cache folder, loaded from there ever after."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger("blockyard.kernels")

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-fopenmp", "-w"]
CHOICE = "BLOCKYARD_CPU_KERNELS"


def cache_folder() -> Path:
    """Where built kernels are kept: $BLOCKYARD_CACHE, else the user's cache folder."""
    base = os.environ.get("BLOCKYARD_CACHE")
    if base:
        return Path(base) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockyard" / "kernels"


@cache
def load() -> bool:
    """Make ``torch.ops.blockyard`` available; False, after one warning, if it cannot be built here.

    BLOCKYARD_CPU_KERNELS=reference asks for plain torch, =compiled makes a failing build an error.
    """
    choice = os.environ.get(CHOICE, "auto")
    if choice not in ("auto", "compiled", "reference"):
        raise ValueError(f"{CHOICE} is {choice!r}; it must be auto, compiled or reference")
    if choice == "reference":
        return False
    library = cache_folder() / f"cpu-{_fingerprint()}.so"
    try:
        if not library.is_file():
            _build(library)
        torch.ops.load_library(str(library))
    except Exception as error:
        if choice == "compiled":
            raise
        log.warning(
            "CPU kernels cannot be built (%s); plain torch is used, which is several times slower. "
            "Install a C++20 compiler, or set %s=reference to silence this",
            str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__,
            CHOICE,
        )
        return False
    return True


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def _fingerprint() -> str:
    digest = hashlib.sha256("\0".join([torch.__version__, *FLAGS, platform.machine(), _cpu()]).encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """What -march=native depends on; a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(library: Path) -> None:
    """Compile in a private folder and rename the result: two builders never see each other's halves."""
    from torch.utils import cpp_extension

    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        raise RuntimeError(f"there is no C++ compiler {cpp_extension.get_cxx_compiler()!r}")
    library.parent.mkdir(parents=True, exist_ok=True)
    print(
        "blockyard: building the CPU kernels, once for this machine (about a minute)",
        file=sys.stderr,
        flush=True,
    )
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), path]
    )  # for the ninja of this venv
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
            cpp_extension.load(
                name="blockyard_cpu",
                sources=[str(path) for path in _sources() if path.suffix == ".cpp"],
                extra_cflags=FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
            os.replace(Path(folder) / "blockyard_cpu.so", library)
    finally:
        os.environ["PATH"] = path
