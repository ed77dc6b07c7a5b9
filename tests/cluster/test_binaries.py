"""Where the programs come from, with a `go` that only writes down what it is asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import binaries

# Answers as Go does; "build" ends as the file `build` beside it says, and makes the programs if that is 0.
GO = """#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/asked"
case "$1 $2" in
"env GOVERSION") echo "go$(cat "$here/version")" ;;
"list -deps") echo one; echo two ;;
"list -m") echo "$here/module" ;;
build*)
    echo "compiler: out of cheese" >&2
    until test -f "$here/may_build"; do sleep 0.1; done
    for flag in "$@"; do case "$last" in -o) out="$flag" ;; esac; last="$flag"; done
    for name in server helm kube-apiserver kube-controller-manager kube-scheduler kubectl; do
        echo "#!/bin/sh" > "$out/$name"; chmod +x "$out/$name"
    done
    exit "$(cat "$here/build")" ;;
esac
"""


class Toolchain:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = folder / "module" / binaries.RELAXED[1]
        source.parent.mkdir(parents=True)
        source.write_text(f"func check(ip) {{\n\t{binaries.RELAXED[2]}\n")
        source.chmod(0o444)
        source.parent.chmod(0o555)
        (folder / "go").write_text(GO)
        (folder / "go").chmod(0o755)
        self.set("version", "1.99.0")
        self.set("build", "0")
        self.set("may_build", "")

    def set(self, name: str, value: str) -> None:
        (self.folder / name).write_text(value)

    def builds(self) -> int:
        asked = self.folder / "asked"
        return asked.read_text().count("build -v") if asked.exists() else 0


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolchain:
    """The only Go on PATH, and an empty cache folder."""
    made = Toolchain(tmp_path / "toolchain")
    monkeypatch.setenv("PATH", f"{made.folder}:{os.defpath}")
    monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return made


def left() -> list[str]:
    return sorted(path.name for path in binaries.cache().iterdir())


def test_programs_are_built_once_and_then_found(go: Toolchain) -> None:
    said: list[str] = []
    first = binaries.prepare(said.append)
    assert set(first) == set(binaries.PROGRAMS) and all(os.access(path, os.X_OK) for path in first.values())
    assert go.builds() == 1 and any("is built" in line for line in said)
    said.clear()
    assert binaries.prepare(said.append) == first
    assert go.builds() == 1 and not said
    assert left() == [binaries.digest("1.99.0"), "lock"]


def test_another_go_version_or_module_is_another_build(
    go: Toolchain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binaries.prepare(print)
    go.set("version", "1.99.1")
    binaries.prepare(print)
    assert go.builds() == 2
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("go.mod", "go.sum"):
        (changed / name).write_bytes((binaries.MODULE / name).read_bytes())
    before = binaries.digest("1.99.1")
    monkeypatch.setattr(binaries, "MODULE", changed)
    assert binaries.digest("1.99.1") == before
    (changed / "go.sum").write_text("")
    assert binaries.digest("1.99.1") != before


def test_a_build_that_fails_says_why_and_leaves_nothing(go: Toolchain) -> None:
    go.set("build", "1")
    with pytest.raises(binaries.CannotBuild, match=r"out of cheese.*KUBEBUILDER_ASSETS"):
        binaries.prepare(print)
    assert left() == ["lock"]
    go.set("build", "0")
    binaries.prepare(print)
    assert go.builds() == 2


def test_a_build_takes_the_rule_relaxed_and_leaves_the_source_alone(
    go: Toolchain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    modfile = binaries._relax(str(go.folder / "go"), tmp_path)
    copy = tmp_path / "module" / binaries.RELAXED[1]
    assert binaries.RELAXED[2] not in copy.read_text() and binaries.RELAXED[3] in copy.read_text()
    assert binaries.RELAXED[2] in (go.folder / "module" / binaries.RELAXED[1]).read_text()
    assert f'replace k8s.io/kubernetes => "{tmp_path}/module"' in modfile.read_text()
    monkeypatch.setattr(binaries, "RELAXED", (*binaries.RELAXED[:2], "if there is no such line {", ""))
    with pytest.raises(binaries.CannotBuild, match="0 times"):
        binaries._relax(str(go.folder / "go"), tmp_path / "other")


def test_what_a_killed_build_left_is_removed_by_the_next(go: Toolchain) -> None:
    old = binaries.cache() / "0123.partial"
    old.mkdir(parents=True)
    (old / "etcd").write_text("half of it")
    binaries.prepare(print)
    assert go.builds() == 1 and left() == [binaries.digest("1.99.0"), "lock"]


def test_of_two_processes_one_builds_and_both_have_the_programs(go: Toolchain, tmp_path: Path) -> None:
    (go.folder / "may_build").unlink()
    command = [sys.executable, "-m", "tests.cluster.binaries"]
    root = binaries.MODULE.parents[1]
    said = tmp_path / "said"
    with said.open("ab") as log:
        both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=log) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not (go.builds() and "waiting for it" in said.read_text()) and go.builds() < 2:
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
    finally:
        go.set("may_build", "")
        outputs = [process.communicate(timeout=120)[0] for process in both]
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == len(binaries.PROGRAMS)
    assert go.builds() == 1


def test_given_programs_are_taken_before_built_ones(
    go: Toolchain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in binaries.PROGRAMS:
        (assets / name).touch(mode=0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    assert binaries.prepare(print) == {name: assets / name for name in binaries.PROGRAMS}
    assert go.builds() == 0
    (assets / "helm").unlink()  # envtest's folder has none
    found = binaries.prepare(print)
    assert found["etcd"] == assets / "etcd" and found["helm"].is_relative_to(binaries.cache())
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(binaries.CannotBuild, match=r"KUBEBUILDER_ASSETS names .*nowhere"):
        binaries.prepare(print)


@pytest.mark.parametrize(
    ("version", "fits"), [("1.25.9", False), ("1.26.0", True), ("1.27", True), ("2.0", True)]
)
def test_only_a_go_that_is_new_enough_is_taken(go: Toolchain, version: str, fits: bool) -> None:
    go.set("version", version)
    assert binaries._installed_go() == ((str(go.folder / "go"), version) if fits else None)
