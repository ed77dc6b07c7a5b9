"""Free host memory: the machine's, or what the control group's limit leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockyard.engine.kv.host_memory import available_bytes

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """/proc of a machine with 1000 MiB available, and an empty control-group folder."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    (cgroup / "memory").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemFree: 5 kB\nMemAvailable: {1000 * 1024} kB\n")
    return proc, cgroup


def limit_v2(cgroup: Path, limit: str, used: int, cache: int) -> None:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nfile {9 * cache}\n")


def limit_v1(cgroup: Path, limit: int, used: int, cache: int) -> None:
    folder = cgroup / "memory"
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {cache}\n")


def test_without_a_limit_it_is_what_the_machine_has(machine: tuple[Path, Path]) -> None:
    assert available_bytes(*machine) == 1000 * MIB


def test_version_2_leaves_limit_minus_use_and_the_cache_gives_way(machine: tuple[Path, Path]) -> None:
    limit_v2(machine[1], str(600 * MIB), used=400 * MIB, cache=50 * MIB)
    assert available_bytes(*machine) == 250 * MIB


def test_version_1_the_same(machine: tuple[Path, Path]) -> None:
    limit_v1(machine[1], 600 * MIB, used=400 * MIB, cache=30 * MIB)
    assert available_bytes(*machine) == 230 * MIB


def test_no_limit_is_no_limit(machine: tuple[Path, Path]) -> None:
    limit_v2(machine[1], "max", used=400 * MIB, cache=0)
    limit_v1(machine[1], 2**63 - 4096, used=400 * MIB, cache=0)
    assert available_bytes(*machine) == 1000 * MIB


def test_a_limit_above_what_the_machine_has_changes_nothing(machine: tuple[Path, Path]) -> None:
    limit_v2(machine[1], str(5000 * MIB), used=0, cache=0)
    assert available_bytes(*machine) == 1000 * MIB


def test_an_exceeded_limit_leaves_nothing(machine: tuple[Path, Path]) -> None:
    limit_v2(machine[1], str(100 * MIB), used=200 * MIB, cache=0)
    assert available_bytes(*machine) == 0


def test_strange_files_are_no_limit(machine: tuple[Path, Path]) -> None:
    (machine[1] / "memory.max").write_text("")
    (machine[1] / "memory.current").write_text("lots")
    assert available_bytes(*machine) == 1000 * MIB


def test_a_machine_without_these_files_still_has_an_answer(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) > 0
