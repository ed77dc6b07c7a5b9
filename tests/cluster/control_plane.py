"""A real control plane on this machine: etcd, kube-apiserver, kube-controller-manager and kube-scheduler.

Everything listens on 127.0.0.1, all data is in one folder, and nothing is left when it is stopped or when
this process is killed. RBAC decides, service accounts have real tokens, and all default controllers run.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from .access import Access
from .process import tied

START_LIMIT = 240.0  # seconds; 7 on an idle machine
POLL = 0.2
HOST = "127.0.0.1"
# What pods' service accounts ask for, without the controllers' own.
AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: None
    userGroups: [system:serviceaccounts:kube-system]
  - level: Metadata
    userGroups: [system:serviceaccounts]
"""
SERVICES = "10.96.0.0/16"  # no proxy serves these addresses here: tests reach pods by their endpoints


class DidNotStart(Exception):
    """A program of the control plane ended or did not become ready; the message has its last words."""


class ControlPlane:
    """Started when it is made, unless that raises; `stop` ends it."""

    def __init__(self, folder: Path, programs: Mapping[str, Path]) -> None:
        self._folder = folder
        self._programs = programs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._deadline = time.monotonic() + START_LIMIT
        self.audit_log = folder / "audit.jsonl"  # one audit.k8s.io/v1 Event a line, see AUDIT_POLICY
        self._etcd, self._api, self._manager, self._scheduler = _free_ports(4)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.access = self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill all programs; their data is not needed any more."""
        for process in reversed(self._running.values()):
            process.kill()
            process.wait()
        self._running.clear()
        shutil.rmtree(self._folder / "etcd", ignore_errors=True)

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._running.items()}

    def logs(self, lines: int = 30) -> dict[str, str]:
        """The last lines of each program."""
        return {path.stem: "\n".join(_tail(path, lines)) for path in sorted(self._folder.glob("*.log"))}

    def _start(self) -> Access:
        folder = self._folder
        make_certificates(folder)
        token = secrets.token_urlsafe(32)
        with _private(folder / "tokens.csv") as tokens:
            tokens.write_text(f'{token},admin,admin,"system:masters"\n')
        access = Access(f"https://{HOST}:{self._api}", (folder / "ca.crt").read_text(), token)
        kubeconfig = access.write_kubeconfig(folder / "admin.kubeconfig")
        (folder / "audit.yaml").write_text(AUDIT_POLICY)
        self._run(
            "etcd",
            f"--data-dir={folder / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls=http://{HOST}:{self._etcd}",
            f"--advertise-client-urls=http://{HOST}:{self._etcd}",
            f"--listen-peer-urls=http://{HOST}:0",
            "--log-level=warn",
        )
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://{HOST}:{self._etcd}",
            f"--bind-address={HOST}",
            f"--advertise-address={HOST}",
            f"--secure-port={self._api}",
            "--endpoint-reconciler-type=none",
            f"--tls-cert-file={folder / 'api.crt'}",
            f"--tls-private-key-file={folder / 'api.key'}",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--allow-privileged",
            # As on OpenShift: to block an owner's deletion takes a right.
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement",
            f"--audit-policy-file={folder / 'audit.yaml'}",
            f"--audit-log-path={self.audit_log}",
            "--audit-log-mode=blocking",  # a line is there before its answer
            f"--service-cluster-ip-range={SERVICES}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={folder / 'accounts.key'}",
            f"--service-account-key-file={folder / 'accounts.key'}",
        )
        self._wait_for("kube-apiserver", f"{access.server}/readyz", token)
        clients = [
            f"--kubeconfig={kubeconfig}",
            "--leader-elect=false",
            f"--bind-address={HOST}",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ]
        self._run(
            "kube-controller-manager",
            *clients,
            f"--secure-port={self._manager}",
            f"--cert-dir={folder / 'manager'}",
            f"--service-account-private-key-file={folder / 'accounts.key'}",
            f"--root-ca-file={folder / 'ca.crt'}",
            "--node-monitor-grace-period=5m",  # a busy machine must not lose its nodes
        )
        self._run(
            "kube-scheduler",
            *clients,
            f"--secure-port={self._scheduler}",
            f"--cert-dir={folder / 'scheduler'}",
        )
        self._wait_for("kube-controller-manager", f"https://{HOST}:{self._manager}/healthz")
        self._wait_for("kube-scheduler", f"https://{HOST}:{self._scheduler}/healthz")
        return access

    def _run(self, name: str, *arguments: str) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                tied([str(self._programs[name]), *arguments]),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.defpath},
            )

    def _wait_for(self, name: str, url: str, token: str = "") -> None:
        """Wait until the program reports that it is healthy."""
        trust = ssl.create_default_context(cafile=self._folder / "ca.crt")
        if not token:  # these make their certificates themselves, and only whether they are well is asked
            trust.check_hostname = False
            trust.verify_mode = ssl.CERT_NONE
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        while True:
            for running, process in self._running.items():
                if process.poll() is not None:
                    raise DidNotStart(self._last_words(running, f"ended with code {process.returncode}"))
            with (
                contextlib.suppress(OSError, urllib.error.URLError),
                urllib.request.urlopen(request, timeout=5, context=trust) as answer,
            ):
                if answer.status == 200:
                    return
            if time.monotonic() > self._deadline:
                raise DidNotStart(self._last_words(name, f"is not ready after {START_LIMIT:.0f} s"))
            time.sleep(POLL)

    def _last_words(self, name: str, what: str) -> str:
        return "\n".join([f"{name} {what}:", *_tail(self._folder / f"{name}.log", 20)])


def make_certificates(folder: Path) -> None:
    """An authority, the API server's certificate by it, and the key that signs service account tokens."""
    key = "-newkey rsa:2048 -nodes"
    subject = f"IP:{HOST},DNS:localhost,DNS:kubernetes.default.svc"
    # Its own configuration, since the machine's may lack what is asked for here.
    config = folder / "openssl.cnf"
    config.write_text(
        "[req]\ndistinguished_name=name\n[name]\n"
        "[authority]\nbasicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n"
        "subjectKeyIdentifier=hash\n"
        f"[server]\nbasicConstraints=critical,CA:false\nkeyUsage=critical,digitalSignature,keyEncipherment\n"
        f"extendedKeyUsage=serverAuth\nsubjectAltName={subject}\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    settings = f"-config {config.name}"
    authority = "-extensions authority -subj /CN=tests -keyout ca.key -out ca.crt"
    server = f"-extensions server -extfile {config.name} -out api.crt"
    for command in (
        f"req -x509 {key} {settings} -days 30 {authority}",
        f"req {key} {settings} -subj /CN=kube-apiserver -keyout api.key -out api.csr",
        f"x509 -req -in api.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 {server}",
        "genrsa -out accounts.key 2048",
    ):
        line = ["openssl", *command.split()]
        try:
            subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True, timeout=120)
        except FileNotFoundError:
            raise DidNotStart("openssl is missing: install Debian's package openssl") from None
        except subprocess.CalledProcessError as error:
            raise DidNotStart(f"openssl {command}: {error.stderr}") from None


@contextlib.contextmanager
def _private(path: Path) -> Iterator[Path]:
    """A file that only its owner can read."""
    path.touch(mode=0o600)
    yield path


def _free_ports(count: int) -> list[int]:
    """Ports outside the kernel's range for clients, so that no client takes one before it is used."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            found.append(port)
        if len(found) == count:
            return found
    raise DidNotStart(f"fewer than {count} of 1000 ports are free on {HOST}")


def _tail(path: Path, lines: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:]
