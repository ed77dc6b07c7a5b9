"""The wheel: what users install has everything, and runs where the sources are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from blockyard import __version__

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0  # seconds


def run(command: list[str | Path], folder: Path) -> str:
    """Standard output of a command that must succeed, away from the sources and without a network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PIP_NO_INDEX"] = "1"
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that nothing is left beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    hidden = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, folder / "sources", ignore=hidden)
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            folder,
            "./sources",
        ],
        folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and this one's dependencies; returns its folder of commands.

    A path that is only added to ``sys.path`` brings no editable installation along: those work by .pth files,
    which are read in site folders alone.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    commands = folder / "venv" / "bin"
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run([commands / "python", "-m", "pip", "install", "--no-deps", "--no-index", wheel], folder)
    return commands


def test_the_wheel_holds_what_is_needed_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {"py.typed"} | {f"kernels/cpu/{file.name}" for file in (ROOT / "kernels/cpu").iterdir()}
    for package in settings["packages"]:
        folder = ROOT.joinpath(*package.split(".")[1:])
        expected |= {str(file.relative_to(ROOT)) for file in folder.glob("*.py")}
    assert {"cli.py", "kernels/cpu/attention.cpp", "engine/engine.py", "agent/server.py"} <= expected
    inside = {name.removeprefix("blockyard/") for name in names if name.startswith("blockyard/")}
    assert inside == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_command_runs(installed: Path) -> None:
    assert run([installed / "blockyard", "--version"], installed.parent) == f"blockyard {__version__}\n"
    text = run([installed / "blockyard", "agent", "--help"], installed.parent)
    assert "--max-num-seqs" in text
    assert "BLOCKYARD_NAME" in text
    run([installed / "python", "-m", "blockyard.cli", "--version"], installed.parent)


def test_what_is_installed_is_the_wheel_and_computes(installed: Path) -> None:
    """With the CPU kernels too, where there is a compiler: their sources lie where the wheel put them."""
    program = """
import blockyard, torch
from blockyard import kernels
from blockyard.kernels import cpu_build, reference
print(blockyard.__file__)
print(cpu_build.SOURCES / "attention.cpp")
x, weight = torch.randn(3, 64), torch.randn(64)
torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
"""
    for path in run([installed / "python", "-c", program], installed.parent).splitlines():
        assert Path(path).is_relative_to(installed.parent), path
        assert Path(path).is_file(), path
