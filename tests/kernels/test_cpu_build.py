"""Where there is a compiler the CPU operations are built once; elsewhere plain torch gives the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockyard.kernels import cpu_build

from .compute_everything import everything

compiled = pytest.mark.skipif(not cpu_build.load(), reason="no C++ compiler here: nothing can be built")
TIMEOUT_S = 300
PROGRAM = Path(__file__).with_name("compute_everything.py")
LOAD = """
import sys
from pathlib import Path
from blockyard.kernels import cpu_build
cpu_build.SOURCES = Path(sys.argv[1])
print(cpu_build.load())
"""


def start(*command: str | Path, **changes: str) -> subprocess.Popen[str]:
    """A Python of its own in a changed environment."""
    environment = {**os.environ, **changes}
    if "CXX" not in changes:
        environment.pop("CXX", None)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed, once it has ended well."""
    try:
        printed, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return printed.strip(), errors


@pytest.fixture
def broken_compiler(tmp_path: Path) -> str:
    program = tmp_path / "broken"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *.cpp*) echo "x.cpp:1: error: no such thing" >&2; exit 1;; esac\n'
        'exec c++ "$@"\n'  # answers what torch asks of any compiler first
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BLOCKYARD_CPU_KERNELS": "reference"}, None),
        ({"CXX": "no-such-compiler"}, "no C++ compiler 'no-such-compiler'; install one"),
        ({"PATH": "{tmp}"}, "no C++ compiler 'c++'; install one"),
        pytest.param(
            {"CXX": "{broken}"}, "built: x.cpp:1: error: no such thing. Plain torch is used", marks=compiled
        ),
        ({"BLOCKYARD_CACHE": "{broken}"}, "set BLOCKYARD_CACHE to one that can"),
    ],
)
def test_plain_torch_serves_where_nothing_can_be_built(
    changes: dict[str, str], message: str | None, tmp_path: Path, broken_compiler: str
) -> None:
    """Says why once, and computes the same."""
    places = {"tmp": tmp_path, "broken": broken_compiler}
    environment = {"BLOCKYARD_CACHE": str(tmp_path / "cache")}
    environment |= {name: value.format(**places) for name, value in changes.items()}
    result = tmp_path / "result"
    printed, errors = finish(start(PROGRAM, result, **environment))
    assert printed == "plain torch"
    assert errors.count("CPU kernels cannot be built") == (message is not None)
    assert message is None or message in errors
    assert not list(tmp_path.glob("cache/kernels/build-*"))
    for actual, expected in zip(torch.load(result), everything(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("compiled", "BLOCKYARD_CPU_KERNELS is 'compiled', but the CPU kernels cannot be built: there is no"),
        ("fast", "BLOCKYARD_CPU_KERNELS is 'fast'; it must be auto, compiled or reference"),
    ],
)
def test_a_choice_that_cannot_be_met_is_an_error(choice: str, message: str, tmp_path: Path) -> None:
    process = start(
        PROGRAM,
        tmp_path / "result",
        BLOCKYARD_CPU_KERNELS=choice,
        CXX="no-such-compiler",
        BLOCKYARD_CACHE=str(tmp_path / "cache"),
    )
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert message in errors.splitlines()[-1]


@compiled
def test_processes_that_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One builds and says so. A library that cannot be loaded is no library. The source is a short one."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "nothing.cpp").write_text("int nothing() { return 0; }\n")
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    library = tmp_path / "kernels" / f"cpu-{cpu_build._fingerprint()}.so"
    library.parent.mkdir()
    library.write_bytes(b"damaged")
    settings = {"BLOCKYARD_CACHE": str(tmp_path), "BLOCKYARD_CPU_KERNELS": "compiled"}
    reports = [finish(process) for process in [start("-c", LOAD, sources, **settings) for _ in range(3)]]
    assert [printed for printed, _ in reports] == ["True"] * 3
    assert sum(errors.count("building the CPU kernels") for _, errors in reports) == 1
    assert sorted(library.parent.iterdir()) == [library.with_suffix(".lock"), library]
    assert finish(start("-c", LOAD, sources, **settings)) == ("True", "")
