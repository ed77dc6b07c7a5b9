"""Measures how much host memory this process may still take, within the machine and its container's limit."""

from __future__ import annotations

import os
from pathlib import Path

# Files of control groups, versions 2 and 1: limit, use, statistics, and the reclaimable cache's name in them.
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping. Page cache counts as free, because it is dropped first."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = _read_table(proc / "meminfo").get("MemAvailable:")
    if machine is not None:
        available = machine * 1024
    for limit_file, used_file, statistics, cache in CGROUPS:
        limit, used = _read_number(cgroup / limit_file), _read_number(cgroup / used_file)
        if limit is not None and used is not None:
            reclaimable = _read_table(cgroup / statistics).get(cache, 0)
            available = min(available, limit - used + reclaimable)
    return max(0, available)


def _read_number(path: Path) -> int | None:
    """The number in a file; None if the file is missing or contains "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_table(path: Path) -> dict[str, int]:
    """Read a file whose lines are a name and a number; empty if the file cannot be read."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
