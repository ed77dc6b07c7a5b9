"""Reads the manifest of an LLMService for the local runtime, and checks that this machine can run it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .. import children
from ..api import API_VERSION, LLMServiceSpec
from ..children import Defaults
from ..observed import Service

GPU_TIMEOUT = 120.0  # seconds for torch to say how many GPUs there are


class ManifestError(Exception):
    """The manifest cannot be run here; the message names the file, the field and the remedy."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a service may use here: ids of GPUs, and a folder with API keys if there is one."""

    gpus: tuple[int, ...] = ()
    keys: Path | None = None


def read(path: Path, generation: int = 1) -> Service:
    """The one LLMService in a YAML file. ManifestError unless there is exactly one, and valid."""
    try:
        documents = [each for each in yaml.safe_load_all(path.read_text()) if each is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    services = [each for each in documents if isinstance(each, dict) and each.get("kind") == "LLMService"]
    if len(services) != 1:
        raise ManifestError(f"{path} has {len(services)} objects of kind LLMService; blockyard up runs one")
    raw: dict[str, Any] = services[0]
    if raw.get("apiVersion") != API_VERSION:
        raise ManifestError(f"{path}: apiVersion is {raw.get('apiVersion')!r}; it must be {API_VERSION}")
    name = (raw.get("metadata") or {}).get("name")
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{path}: metadata.name is missing; give the service a name")
    try:
        LLMServiceSpec.model_validate(raw.get("spec"), extra="forbid")
    except ValidationError as error:
        problems = [f"spec.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ManifestError(f"{path}: {'; '.join(problems)}") from None
    metadata = {
        **raw["metadata"],
        "namespace": "local",
        "uid": f"local-{name}",
        "generation": generation,
    }
    return Service.of({**raw, "metadata": metadata})


def check_runs_here(service: Service, machine: Machine) -> None:
    """ManifestError if this machine lacks what the service asks for."""
    spec = service.spec
    assert spec is not None, service.problem
    model = spec.model
    for field, value in (
        ("persistentVolumeClaim", model.persistent_volume_claim),
        ("image", model.image),
    ):
        if value is not None:
            raise ManifestError(
                f"spec.model.{field} needs Kubernetes; on one machine use spec.model.hostPath or "
                "spec.model.hub"
            )
    if model.host_path is not None and not Path(model.host_path.path).exists():
        raise ManifestError(f"spec.model.hostPath.path {model.host_path.path} does not exist on this machine")
    if spec.auth is not None and machine.keys is None:
        raise ManifestError(
            f"spec.auth.secretName: there are no Secrets here; give the keys of {spec.auth.secret_name} with "
            "--keys FOLDER (a file per tenant, its lines are keys), or leave spec.auth out"
        )
    most = spec.replicas if spec.autoscaling is None else spec.autoscaling.max_replicas
    if spec.device == "cuda" and len(machine.gpus) < most * spec.tensor_parallel:
        raise ManifestError(
            f"spec.device is cuda and {most} replicas of {spec.tensor_parallel} GPUs are asked for; "
            f"this machine has {len(machine.gpus)} usable GPUs. Set spec.device: cpu to run on the CPU, or "
            "lower spec.replicas, spec.autoscaling.maxReplicas or spec.tensorParallel"
        )


def check_names_are_free(service: Service, others: Iterable[Mapping[str, Any]], defaults: Defaults) -> None:
    """ManifestError if the service needs an object that another one has: a cluster could not run both.

    ``others``: the other LLMServices of this machine, as resources.
    """
    wanted = {(each["kind"], each["metadata"]["name"]) for each in children.companions(service, defaults)}
    for other in others:
        found = Service.of({**other, "metadata": {"uid": "", **other["metadata"]}})
        if found.spec is None or found.name == service.name:
            continue
        for body in children.companions(found, defaults):
            kind, name = body["kind"], body["metadata"]["name"]
            if (kind, name) in wanted:
                raise ManifestError(
                    f"{kind} {name} belongs to LLMService {found.name}, and {service.name} needs that name: "
                    "give the LLMService another name (metadata.name)"
                )


def usable_gpus() -> tuple[int, ...]:
    """Ids of the GPUs that torch can use; a child process asks torch, so that it is not loaded here."""
    program = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=GPU_TIMEOUT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(range(int(done.stdout)))
