"""A pod's volumes as local folders.

There are no mount namespaces here: a container's process sees this machine's files. A mount path is realised
by writing the local folder in its place in the values of environment variables, in the command and in the
arguments; a program that has a mount path built in must have a setting for it. Read-only mounts are not
enforced.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from .api import Api, Raw
from .environment import CannotStart, Find, data, field

TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
_RENEW_AT = 0.8  # of a token's life, as the kubelet does


class Volumes:
    """The volumes of one pod, under ``folder``.

    ``folders`` maps claim names, image references and host paths to folders of this machine. A host path that
    is not among them is a folder of the node's own, ``node_folder``, which later pods of that node find
    again.
    """

    def __init__(
        self, api: Api, find: Find, folder: Path, node_folder: Path, folders: Mapping[str, Path]
    ) -> None:
        self._api = api
        self._find = find
        self._folder = folder
        self._node_folder = node_folder
        self._folders = folders
        self._paths: dict[str, Path] = {}
        self._tokens: dict[str, tuple[float, str]] = {}  # file -> (time to renew it, token)

    async def mount(self, pod: Raw) -> None:
        """Make all volumes, or bring them up to date. Raises CannotStart while one cannot be made."""
        for volume in pod["spec"].get("volumes", []):
            self._paths[volume["name"]] = await self._make(volume, pod)

    def local(self, container: Raw, text: str) -> str:
        """``text`` with the container's mount paths replaced by local ones."""
        mounts = {
            mount["mountPath"].rstrip("/"): self._mounted(mount)
            for mount in container.get("volumeMounts", [])
        }
        if not mounts:
            return text
        longest_first = sorted(mounts, key=len, reverse=True)
        paths = "|".join(re.escape(path) for path in longest_first)
        return re.sub(rf"(?<![\w./-])({paths})(?![\w.-])", lambda match: str(mounts[match[1]]), text)

    def token_folder(self, container: Raw) -> Path | None:
        """Where the service account's token, certificate and namespace are for a container."""
        for mount in container.get("volumeMounts", []):
            if mount["mountPath"].rstrip("/") == TOKEN_PATH:
                return self._mounted(mount)
        return None

    def _mounted(self, mount: Raw) -> Path:
        path = self._paths[mount["name"]]
        if sub := mount.get("subPath"):
            path = path / str(sub)
            if not path.exists():
                path.mkdir(parents=True)
        return path

    async def _make(self, volume: Raw, pod: Raw) -> Path:
        name: str = volume["name"]
        path = self._folder / name
        kind = next((key for key in volume if key != "name"), "emptyDir")
        source: Raw = volume.get(kind) or {}
        match kind:
            case "emptyDir":
                path.mkdir(parents=True, exist_ok=True)
            case "hostPath":
                return self._host_path(source)
            case "persistentVolumeClaim":
                return self._given(name, source["claimName"])
            case "image":
                return self._given(name, source["reference"])
            case "secret":
                await self._write(path, pod, [{"secret": {**source, "name": source["secretName"]}}])
            case "configMap" | "downwardAPI":
                await self._write(path, pod, [{kind: source}])
            case "projected":
                await self._write(path, pod, source["sources"])
            case _:
                raise CannotStart(
                    "ContainerCreating", f"volume {name}: the node stand-in does not play {kind}"
                )
        return path

    def _given(self, volume: str, key: str) -> Path:
        if key not in self._folders:
            raise CannotStart(
                "ContainerCreating", f"volume {volume}: the node stand-in has no folder for {key}"
            )
        return self._folders[key]

    def _host_path(self, source: Raw) -> Path:
        if given := self._folders.get(source["path"]):
            return given
        path = self._node_folder / str(source["path"]).lstrip("/")
        if source.get("type") in (None, "", "DirectoryOrCreate"):
            path.mkdir(parents=True, exist_ok=True)
        elif not path.exists():
            raise CannotStart(
                "ContainerCreating", f"hostPath type check failed: {source['path']} is not there"
            )
        return path

    async def _write(self, path: Path, pod: Raw, sources: list[Raw]) -> None:
        files: dict[str, bytes] = {}
        for source in sources:
            for kind, content in source.items():
                files |= await self._files(kind, content, pod, path)
        _fill(path, files)

    async def _files(self, kind: str, source: Raw, pod: Raw, path: Path) -> dict[str, bytes]:
        if kind in ("secret", "configMap"):
            return await self._object_files("Secret" if kind == "secret" else "ConfigMap", source)
        if kind == "downwardAPI":
            return {item["path"]: _downward(pod, item) for item in source.get("items", [])}
        if kind == "serviceAccountToken":
            return {source["path"]: (await self._token(path / source["path"], source, pod)).encode()}
        raise CannotStart("ContainerCreating", f"the node stand-in does not play projected {kind}")

    async def _object_files(self, kind: str, source: Raw) -> dict[str, bytes]:
        found = await self._find(kind, source["name"])
        if found is None:
            if source.get("optional"):
                return {}
            raise CannotStart("ContainerCreating", f'{kind.lower()} "{source["name"]}" not found')
        entries = data(found)
        if "items" not in source:
            return entries
        missing = [item["key"] for item in source["items"] if item["key"] not in entries]
        if missing and not source.get("optional"):
            raise CannotStart("ContainerCreating", f"{kind.lower()} {source['name']} has no {missing}")
        return {item["path"]: entries[item["key"]] for item in source["items"] if item["key"] in entries}

    async def _token(self, file: Path, source: Raw, pod: Raw) -> str:
        renew, token = self._tokens.get(str(file), (0.0, ""))
        if time.time() < renew:
            return token
        metadata = pod["metadata"]
        spec: dict[str, Any] = {
            "expirationSeconds": source.get("expirationSeconds", 3600),
            "boundObjectRef": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
        }
        if audience := source.get("audience"):
            spec["audiences"] = [audience]
        status = await self._api.token(pod["spec"]["serviceAccountName"], metadata["namespace"], **spec)
        expires = datetime.fromisoformat(status["expirationTimestamp"]).timestamp()
        self._tokens[str(file)] = time.time() + _RENEW_AT * (expires - time.time()), status["token"]
        return str(status["token"])


def _downward(pod: Raw, item: Raw) -> bytes:
    if "fieldRef" not in item:
        raise CannotStart("ContainerCreating", f"the node stand-in does not play downwardAPI {item}")
    path = item["fieldRef"]["fieldPath"]
    if path in ("metadata.labels", "metadata.annotations"):
        entries = pod["metadata"].get(path.removeprefix("metadata."), {})
        escaped = {key: value.replace("\\", "\\\\").replace('"', '\\"') for key, value in entries.items()}
        return "\n".join(f'{key}="{value}"' for key, value in sorted(escaped.items())).encode()
    return field(pod, path).encode()


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder hold these files and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _replace(folder / name, content)
    for old in [path for path in folder.rglob("*") if path.is_file()]:
        if str(old.relative_to(folder)) not in files:
            old.unlink()


def _replace(path: Path, content: bytes) -> None:
    """Write a file that a reader sees whole, new or old; leave it alone if it is the same."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.touch(mode=0o600)
    partial.write_bytes(content)
    partial.replace(path)
