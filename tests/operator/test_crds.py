"""The CRDs are what api.py says, and structural; tests/cluster/test_crds.py asks a real API server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from blockyard.operator import crds, reference
from blockyard.operator.api import (
    KVMoveSpec,
    KVMoveStatus,
    LLMServiceSpec,
    LLMServiceStatus,
    Resource,
    bytes_of,
    quantity,
)
from blockyard.operator.observed import Service

from .manifests import MOVES, SERVICES, Raw, llm_service

CRDS = {"llmservices": crds.llmservices(), "kvmoves": crds.kvmoves()}
CEL = "x-kubernetes-validations"


def schema(name: str) -> Raw:
    (version,) = CRDS[name]["spec"]["versions"]
    found: Raw = version["schema"]["openAPIV3Schema"]
    return found


def walk(node: Raw, path: str = "") -> Iterator[tuple[str, Raw]]:
    yield path, node
    for name, each in node.get("properties", {}).items():
        yield from walk(each, f"{path}.{name}")
    for inner in ("items", "additionalProperties"):
        if isinstance(node.get(inner), dict):
            yield from walk(node[inner], f"{path}[]")


NODES = [(name, path, node) for name in CRDS for path, node in walk(schema(name))]


def test_the_files_are_what_the_models_say() -> None:
    for path, text in crds.files().items():
        assert path.read_text() == text, f"{path.name} is stale: run make crds"
    assert crds.main(["--check"]) == 0


def test_a_stale_file_is_told_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crds, "FOLDER", tmp_path / "crds")
    assert crds.main(["--check"]) == 1
    assert "run make crds" in capsys.readouterr().err
    assert crds.main([]) == 0
    assert crds.main(["--check"]) == 0
    file = tmp_path / "crds" / "kvmoves.yaml"
    file.write_text(file.read_text().replace("Kind", "kind", 1))
    assert crds.main(["--check"]) == 1
    assert crds.main([]) == 0
    (tmp_path / "docs" / "reference.md").unlink()
    assert crds.main(["--check"]) == 1


def test_schemas_are_structural() -> None:
    """No references, no alternatives with null, a type everywhere, nothing that Kubernetes does not know."""
    for name, path, node in NODES:
        assert "type" in node, f"{name}{path}"
        assert not {"$ref", "anyOf", "allOf", "oneOf", "title", "const"} & node.keys(), f"{name}{path}"
        if node["type"] == "integer":
            assert node["format"] in ("int32", "int64"), f"{name}{path}"
    kept = [path for _, path, node in NODES if node.get("x-kubernetes-preserve-unknown-fields")]
    assert kept == [".spec.gateway.template.spec", ".spec.template.spec"]


def test_every_field_is_explained() -> None:
    for name, path, node in NODES:
        if path.startswith((".spec", ".status")) and not path.endswith("[]"):
            assert len(node.get("description", "")) > 8, f"{name}{path} says nothing to kubectl explain"


def test_what_cel_looks_at_is_bounded() -> None:
    """The API server estimates what rules cost for the largest value, and refuses a CRD beyond its limit."""
    for name, path, node in NODES:
        if path.startswith(".spec") and node["type"] == "string" and "enum" not in node and path[-2:] != "[]":
            assert "maxLength" in node, f"{name}{path}"
        if node["type"] == "array":
            assert "maxItems" in node, f"{name}{path}"


def test_a_status_has_no_defaults() -> None:
    """What the server would fill in would differ from what the operator has computed, for ever."""
    for name, path, node in NODES:
        if path.startswith(".status"):
            assert "default" not in node, f"{name}{path}"


@pytest.mark.parametrize(
    ("name", "field", "model"),
    [
        ("llmservices", "spec", LLMServiceSpec),
        ("llmservices", "status", LLMServiceStatus),
        ("kvmoves", "spec", KVMoveSpec),
        ("kvmoves", "status", KVMoveStatus),
    ],
)
def test_fields_and_their_defaults_are_the_models(name: str, field: str, model: type[Resource]) -> None:
    node = schema(name)["properties"][field]
    assert set(node["properties"]) == {each.alias or key for key, each in model.model_fields.items()}
    required = {each.alias or key for key, each in model.model_fields.items() if each.is_required()}
    assert set(node.get("required", ())) == required


def test_the_defaults_are_those_that_the_code_has() -> None:
    """A minimal manifest is the same whether the API server has filled it in or the models have."""
    defaults = {
        name: node["default"]
        for name, node in schema("llmservices")["properties"]["spec"]["properties"].items()
        if "default" in node
    }
    model = llm_service()["spec"]["model"]
    filled_in = LLMServiceSpec.model_validate({"model": model, **defaults})
    assert filled_in == LLMServiceSpec.model_validate({"model": model})


def test_rules_name_the_field_that_they_are_about() -> None:
    for name, path, node in NODES:
        for rule in node.get(CEL, ()):
            assert rule["message"], f"{name}{path}"
            if "fieldPath" in rule:
                field = rule["fieldPath"].removeprefix(".")
                assert field in node["properties"], f"{name}{path} has no field {field}"


def test_conditions_are_a_map_by_type() -> None:
    conditions = schema("llmservices")["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


@pytest.mark.parametrize("name", CRDS)
def test_columns_and_scale_lead_to_fields(name: str) -> None:
    (version,) = CRDS[name]["spec"]["versions"]
    paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]]
    paths += version["subresources"].get("scale", {}).values()
    known = {path for path, _ in walk(schema(name))} | {".metadata.creationTimestamp"}
    for path in paths:
        assert re.sub(r"\[\?.*?\]", "[]", path) in known, path
    assert version["subresources"]["status"] == {}


def test_kubectl_get_shows_what_is_wrong_first() -> None:
    (version,) = CRDS["llmservices"]["spec"]["versions"]
    narrow = [c["name"] for c in version["additionalPrinterColumns"] if not c.get("priority")]
    assert narrow == ["Ready", "Reason", "Wanted", "Serving", "Used %", "Age"]
    names = CRDS["llmservices"]["spec"]["names"]
    assert (names["shortNames"], names["categories"]) == (["llms"], ["all", "blockyard"])
    assert CRDS["kvmoves"]["spec"]["names"]["shortNames"] == ["kvm"]


def test_a_model_that_no_structural_schema_can_say_is_refused() -> None:
    class Odd(Resource):
        value: int | str = 0

    with pytest.raises(ValueError, match=r"values to unpack|structural"):
        crds.structural(Odd, defaults=True)


# ── The reference ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", CRDS)
def test_the_reference_has_every_field_in_the_order_of_the_models(name: str) -> None:
    """Each once. A list is told as its items, and a map in its own row."""
    text = reference.page([CRDS[name]])
    fields = [
        path.removeprefix(".")
        for of, path, node in NODES
        if of == name and path.count(".") > 1 and node["type"] != "array"
        if not (path.endswith("[]") and node["type"] == "string")
    ]
    told = re.findall(r"^\| \[?`((?:spec|status)\.[^`]*)`", text, re.MULTILINE)
    assert sorted(told) == sorted(fields)
    tables = [path for path in re.findall(r"^### \w+ (\S+)$", text, re.MULTILINE) if "." in path]
    assert tables == [path for path in fields if any(each.startswith(f"{path}.") for each in fields)]


def test_the_reference_is_what_github_shows_well() -> None:
    definition = crds.kvmoves()
    (version,) = definition["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["properties"]["blocks"]["description"] = "one | two\nthree"
    text = reference.page([CRDS["llmservices"], definition])
    assert r"one \| two three |" in text
    assert "<" not in text, "there is HTML in it"
    widths = [
        len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in text.splitlines()
    ]
    for before, after in pairwise(widths):
        assert before == after or 0 in (before, after), "a row has more cells than another one of its table"
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#(.*?)\)", text)) <= set(anchors)


@pytest.mark.parametrize(
    "line",
    [
        "| `spec.replicas` | integer | `1` | 0 to 1000 | How many agents",
        "| `spec.device` | `cuda`, `cpu` | `cuda` | immutable |",
        "| `spec.engine.maxModelLen` | integer |  | at least 1 |",
        "| `spec.engine.cudaGraphs` | boolean | `true` |  |",
        '| `spec.model.image.path` | string | `""` | at most 512 characters |',
        "| `spec.model.hostPath.path` | string | required, at most 512 characters, `^/[^:]*$` |",
        "| `spec.template.metadata.labels` | map of strings | Added",
        "| [`status.agents[]`](#llmservice-statusagents) | list of objects | The agents",
        "| `status.decisions[].time` | time | When",
        "| [`spec.why[]`](#kvmove-specwhy) | list of objects |  | at most 32 items, immutable |",
        "- metadata.name names Services too",
        "- `spec.kv.hostBlocks`: preemption Swap needs hostBlocks of at least 1",
        "- `spec.approved`: an approval cannot be withdrawn",
        '| Message | `-o wide` | Why, for a person. | `status.conditions[?(@.type=="Ready")].message` |',
    ],
)
def test_the_reference_tells_types_defaults_limits_and_rules(line: str) -> None:
    assert f"\n{line}" in reference.page(CRDS.values())


# ── The same rules without an API server ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrong", SERVICES)
def test_a_broken_service_is_no_service_and_names_the_field(wrong: str) -> None:
    manifest, path, words = SERVICES[wrong]
    metadata = {"namespace": "default", "uid": "u", **manifest["metadata"]}
    found = Service.of({**manifest, "metadata": metadata})
    assert found.spec is None
    assert found.problem.startswith(path) and words in found.problem


@pytest.mark.parametrize("wrong", MOVES)
def test_a_broken_move_is_no_move(wrong: str) -> None:
    manifest, _, words = MOVES[wrong]
    with pytest.raises(ValidationError) as refusal:
        KVMoveSpec.model_validate(manifest["spec"])
    assert words in str(refusal.value)


def test_a_service_that_can_work_has_no_problem() -> None:
    raw: dict[str, Any] = llm_service()
    raw["metadata"] |= {"namespace": "default", "uid": "u"}
    assert Service.of(raw).problem == ""
    assert Service.of({**raw, "spec": None}).problem
    assert Service.of({**raw, "spec": "none"}).problem


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1000),
        ("10Ki", 10240),
        ("20Gi", 20 << 30),
        ("1.5Gi", 3 << 29),
        ("2T", 2 * 10**12),
    ],
)
def test_quantities_are_bytes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("size", [0, 1, 10239, 10240, 5 << 30, 123456789012, 15 << 40])
def test_bytes_are_quantities_of_about_that_size(size: int) -> None:
    text = quantity(size)
    assert 0.9 * size <= bytes_of(text) <= size
    assert len(text) <= 8


def test_examples_are_valid_manifests() -> None:
    kinds = set()
    for file in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")):
        raw = yaml.safe_load(file.read_text())
        kinds.add(raw["kind"])
        model = {"LLMService": LLMServiceSpec, "KVMove": KVMoveSpec}[raw["kind"]]
        spec = model.model_validate(raw["spec"])
        assert spec.model_dump(by_alias=True, exclude_unset=True, mode="json") == raw["spec"], (
            f"{file.name} has a field that there is not"
        )
    assert kinds == {"LLMService", "KVMove"}
