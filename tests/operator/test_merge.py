"""Pod templates are merged as ``kubectl patch`` merges them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockyard.operator.merge import TemplateError, merge

BASE = {
    "restartPolicy": "Always",
    "nodeSelector": {"a": "1"},
    "tolerations": [{"key": "x"}],
    "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
    "containers": [
        {
            "name": "agent",
            "image": "i",
            "command": ["blockyard", "agent"],
            "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
            "resources": {"requests": {"cpu": "1"}},
            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
        }
    ],
}


def agent(patch: dict[str, Any]) -> dict[str, Any]:
    """The container after a patch of it."""
    found: dict[str, Any] = merge(BASE, {"containers": [{"name": "agent", **patch}]})["containers"][0]
    return found


def test_maps_are_merged_and_null_takes_a_field_away() -> None:
    merged = merge(BASE, {"nodeSelector": {"b": "2"}, "restartPolicy": None})
    assert merged["nodeSelector"] == {"a": "1", "b": "2"}
    assert "restartPolicy" not in merged


def test_containers_env_and_mounts_are_merged_by_their_keys() -> None:
    merged = agent(
        {
            "env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
            "resources": {"limits": {"memory": "1Gi"}},
            "volumeMounts": [{"mountPath": "/cache", "readOnly": True}, {"mountPath": "/x", "name": "x"}],
        }
    )
    assert [(each["name"], each["value"]) for each in merged["env"]] == [("A", "1"), ("B", "3"), ("C", "4")]
    assert merged["resources"] == {"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}}
    assert merged["volumeMounts"] == [
        {"name": "cache", "mountPath": "/cache", "readOnly": True},
        {"name": "x", "mountPath": "/x"},
    ]
    assert merged["image"] == "i"


def test_a_new_container_stands_beside_the_old_one() -> None:
    merged = merge(BASE, {"containers": [{"name": "proxy", "image": "p"}]})
    assert [each["name"] for each in merged["containers"]] == ["agent", "proxy"]


@pytest.mark.parametrize("atomic", [{"tolerations": [{"key": "y"}]}, {"tolerations": []}])
def test_lists_that_kubernetes_does_not_merge_are_replaced(atomic: dict[str, Any]) -> None:
    assert merge(BASE, atomic)["tolerations"] == atomic["tolerations"]
    assert agent({"command": ["sh"]})["command"] == ["sh"]


def test_directives_delete_and_replace() -> None:
    assert agent({"env": [{"name": "A", "$patch": "delete"}]})["env"] == [{"name": "B", "value": "2"}]
    assert agent({"env": [{"name": "Z", "$patch": "delete"}]}) == BASE["containers"][0]
    assert agent({"env": [{"$patch": "replace"}, {"name": "Z", "value": "1"}]})["env"] == [
        {"name": "Z", "value": "1"}
    ]
    assert agent({"resources": {"$patch": "replace", "limits": {"cpu": "2"}}})["resources"] == {
        "limits": {"cpu": "2"}
    }
    assert "resources" not in agent({"resources": {"$patch": "delete"}})
    entry = {"name": "A", "$patch": "replace", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    assert agent({"env": [entry]})["env"][0] == {
        "name": "A",
        "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}},
    }


def test_retain_keys_keeps_only_what_it_names() -> None:
    claim = {"claimName": "c"}
    patch = {
        "name": "cache",
        "persistentVolumeClaim": claim,
        "$retainKeys": ["name", "persistentVolumeClaim"],
    }
    assert merge(BASE, {"volumes": [patch]})["volumes"][0] == {
        "name": "cache",
        "persistentVolumeClaim": claim,
    }


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"containers": {"name": "agent"}}, "spec.containers must be a list"),
        ({"containers": [{"image": "i"}]}, r"spec.containers\[0\] must be a map with name"),
        ({"containers": ["agent"]}, r"spec.containers\[0\] must be a map with name"),
        ({"containers": [{"name": "agent", "env": "A=1"}]}, r"spec.containers\[agent\].env must be a list"),
        (
            {"containers": [{"name": "agent", "resources": 5}]},
            r"spec.containers\[agent\].resources must be a map",
        ),
        ({"nodeSelector": ["a"]}, "spec.nodeSelector must be a map"),
        ({"tolerations": {"key": "x"}}, "spec.tolerations must be a list"),
        ({"volumes": [{"name": "x", "$patch": "remove"}]}, r"spec.volumes\[0\].\$patch is 'remove'"),
        ({"$deleteFromPrimitiveList/finalizers": []}, "is no field and no directive"),
        ({"$retainKeys": "name"}, r"\$retainKeys must be a list"),
    ],
)
def test_what_does_not_fit_is_named(patch: dict[str, Any], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        merge(BASE, patch)


WORDS = st.sampled_from(["a", "b", "c"])
SCALARS = WORDS | st.integers(0, 3) | st.booleans()
MAPS = st.dictionaries(WORDS, SCALARS, max_size=3)


def keyed(key: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    entry = st.fixed_dictionaries({key: WORDS}, optional=fields)
    return st.lists(entry, max_size=3, unique_by=lambda each: each[key])


CONTAINERS = keyed(
    "name",
    env=keyed("name", value=WORDS),
    command=st.lists(WORDS, max_size=2),
    resources=st.fixed_dictionaries({}, optional={"limits": MAPS, "requests": MAPS}),
    volumeMounts=keyed("mountPath", name=WORDS),
)
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "containers": CONTAINERS,
        "initContainers": CONTAINERS,
        "volumes": keyed("name", emptyDir=MAPS),
        "tolerations": st.lists(MAPS, max_size=2),
        "nodeSelector": MAPS,
        "hostNetwork": st.booleans(),
    },
)


@given(base=SPECS)
def test_merging_nothing_changes_nothing(base: dict[str, Any]) -> None:
    assert merge(base, {}) == base
    assert merge({}, base) == base


@given(base=SPECS, patch=SPECS)
def test_merging_twice_is_merging_once(base: dict[str, Any], patch: dict[str, Any]) -> None:
    before = deepcopy((base, patch))
    once = merge(base, patch)
    assert merge(once, patch) == once
    assert (base, patch) == before, "what is given is not touched"


@given(base=SPECS, patch=SPECS)
def test_all_of_the_patch_and_what_it_does_not_speak_of_is_there(
    base: dict[str, Any], patch: dict[str, Any]
) -> None:
    merged = merge(base, patch)
    assert merged.keys() == base.keys() | patch.keys()
    for name in ("containers", "volumes"):
        names = {each["name"] for each in [*base.get(name, ()), *patch.get(name, ())]}
        assert {each["name"] for each in merged.get(name, ())} == names
    for name in ("tolerations", "hostNetwork"):
        if name in patch:
            assert merged[name] == patch[name]
