"""The compiled CPU operations: built once into the user's cache folder and loaded from there afterwards."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

# Not relative: libraries that look for a package called kernels find this folder in a checkout's root.
from blockyard.user_cache import cache_folder

log = logging.getLogger("blockyard.kernels")

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-fopenmp", "-w"]
CHOICE = "BLOCKYARD_CPU_KERNELS"
LOCK_SECONDS = 600  # a build takes less than a minute; waiting for another process's build ends after this
_ops: Any = torch.ops


@cache
def load() -> bool:
    """Make ``torch.ops.blockyard`` available; False, after one warning, if it cannot be built here.

    BLOCKYARD_CPU_KERNELS=reference returns False at once; =compiled raises RuntimeError if the build fails.
    """
    choice = os.environ.get(CHOICE, "auto")
    if choice not in ("auto", "compiled", "reference"):
        raise ValueError(f"{CHOICE} is {choice!r}; it must be auto, compiled or reference")
    if choice == "reference":
        return False
    try:
        library = cache_folder() / "kernels" / f"cpu-{_fingerprint()}.so"
        if not _is_loadable(library):
            _build_once(library)
            _ops.load_library(str(library))
    except Exception as error:  # plain torch works whatever makes the build fail
        reason = _reason(error)
        if choice == "compiled":
            raise RuntimeError(
                f"{CHOICE} is 'compiled', but the CPU kernels cannot be built: {reason}"
            ) from error
        log.warning(
            "CPU kernels cannot be built: %s. Plain torch is used, which is several times slower; "
            "%s=reference chooses that without this warning",
            reason,
            CHOICE,
        )
        return False
    return True


def _is_loadable(library: Path) -> bool:
    """Load a library that is there. False if it does not fit this machine, say its C library."""
    try:
        _ops.load_library(str(library))
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    """The most useful line of an error: the compiler's first complaint among pages of output."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [line for line in lines if "error:" in line]
    return next(iter(complaints or lines), type(error).__name__)


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def _fingerprint() -> str:
    digest = hashlib.sha256("\0".join([torch.__version__, *FLAGS, platform.machine(), _cpu()]).encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """The CPU's feature flags, on which -march=native depends.

    They are part of the file name because machines with different CPUs may share one cache folder: a library
    from another machine could contain instructions that this CPU lacks.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build_once(library: Path) -> None:
    """Build under a lock, unless another process built it meanwhile.

    The ranks of a tensor-parallel engine start together, and each would build the same library.
    """
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(library.with_suffix(".lock")).acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise RuntimeError(f"another process holds {error.lock_file} for {LOCK_SECONDS} s; end it") from error
    except OSError as error:
        raise RuntimeError(
            f"the cache folder {library.parent} cannot be written ({error.strerror or error}); "
            "set BLOCKYARD_CACHE to one that can"
        ) from error
    with held:
        if not _is_loadable(library):
            _build(library)


def _build(library: Path) -> None:
    """Compile in a private folder and rename the result, so that an interrupted build leaves nothing."""
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")  # as cpp_extension chooses it; it may be "ccache g++"
    if shutil.which(compiler.split(" ")[0]) is None:
        raise RuntimeError(
            f"there is no C++ compiler {compiler!r}; install one that knows C++20, or name it in CXX"
        )
    print(
        "blockyard: building the CPU kernels, once for this machine (less than a minute)",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder, _own_ninja():
        cpp_extension.load(
            name="blockyard_cpu",
            sources=[str(path) for path in _sources() if path.suffix == ".cpp"],
            extra_cflags=FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        (Path(folder) / "blockyard_cpu.so").replace(library)


@contextmanager
def _own_ninja() -> Iterator[None]:
    """Put this Python's folder on PATH, so that torch finds its ninja without an activated environment."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        yield
    finally:
        os.environ["PATH"] = path
