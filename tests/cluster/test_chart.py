"""The chart as Helm renders it: strict values, least rights, restricted pods, metrics that exist."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from kubernetes.aio.client.configuration import Configuration
from prometheus_client import CollectorRegistry

from blockyard.agent.gateway.metrics import GatewayMetrics
from blockyard.agent.metrics import Metrics as AgentMetrics
from blockyard.agent.protocol import AgentStatus
from blockyard.operator import children, reasons
from blockyard.operator.kube import Kube
from blockyard.operator.main import Operator
from blockyard.operator.metrics import Metrics as OperatorMetrics
from blockyard.operator.observed import Service
from blockyard.operator.settings import OperatorSettings

from .rights import of_role

Raw = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/blockyard"
VALUES: Raw = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: Raw = json.loads((CHART / "values.schema.json").read_text())
DIGEST = "sha256:" + "0123456789abcdef" * 4

# For each value, one that differs from its default. Together they switch everything on.
EVERYTHING: dict[str, Any] = {
    "replicas": 2,
    "image.repository": "registry.example:5000/team/operator",
    "image.tag": "1.2.3",
    "image.digest": DIGEST,
    "image.pullPolicy": "Always",
    "agent.image.repository": "registry.example:5000/team/agent",
    "agent.image.tag": "1.2.3",
    "agent.image.digest": DIGEST,
    "imagePullSecrets": [{"name": "pull"}],
    "namespaces": ["one", "two"],
    "logLevel": "debug",
    "workers": 3,
    "resyncSeconds": 60,
    "pollsPerSecond": 50.5,
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "serviceAccount.create": False,
    "serviceAccount.name": "mine",
    "serviceAccount.annotations": {"example.com/role": "reader"},
    "rbac.create": False,
    "rbac.aggregate": False,
    "resources.requests.cpu": "1",
    "resources.requests.memory": "1Gi",
    "resources.limits.memory": "1Gi",
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "infra", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 2, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "podAnnotations": {"example.com/note": "x"},
    "podLabels": {"team": "x"},
    "serviceMonitor.enabled": True,
    "serviceMonitor.labels": {"release": "prometheus"},
    "serviceMonitor.interval": "10s",
    "prometheusRule.enabled": True,
    "prometheusRule.labels": {"release": "prometheus"},
    "dashboard.enabled": True,
    "dashboard.labels": {"dashboards": "yes"},
    "nameOverride": "other",
    "fullnameOverride": "quite-other",
}
# Values that show only where another one is set.
ALONG: dict[str, dict[str, Any]] = {
    "serviceAccount.create": {"serviceAccount.name": "mine"},
    "serviceMonitor.labels": {"serviceMonitor.enabled": True},
    "serviceMonitor.interval": {"serviceMonitor.enabled": True},
    "prometheusRule.labels": {"prometheusRule.enabled": True},
    "dashboard.labels": {"dashboard.enabled": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {**EVERYTHING, "serviceAccount.create": True, "rbac.create": True, "rbac.aggregate": True},
    "monitoring": {name: True for name in EVERYTHING if name.endswith(".enabled")},
    "namespaced": {"namespaces": ["one", "two"]},
    "by digest": {"image.digest": DIGEST, "agent.image.digest": DIGEST},
    "rights from elsewhere": {
        "serviceAccount.create": False, "serviceAccount.name": "mine",
        "rbac.create": False, "rbac.aggregate": False,
    },
    "two replicas": {"replicas": 2},
}  # fmt: skip
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def nested(flat: Mapping[str, Any]) -> Raw:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    whole: Raw = {}
    for path, value in flat.items():
        *outer, last = path.split(".")
        place = whole
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = value
    return whole


def leaves(values: Raw, schema: Raw, path: str = "") -> Iterator[str]:
    """Paths of all single values: a map whose keys the schema does not name is one value."""
    for name, value in values.items():
        inner = schema["properties"][name]
        here = f"{path}.{name}".lstrip(".")
        if isinstance(value, dict) and value and (name in ("requests", "limits") or inner.get("properties")):
            named = {**inner, "properties": inner.get("properties") or {key: {} for key in value}}
            yield from leaves(value, named, here)
        else:
            yield here


class Helm:
    """The program, with the chart."""

    def __init__(self, program: Path, home: Path) -> None:
        self._program = program
        self._environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}

    def run(
        self, *arguments: str, values: Mapping[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._program), *arguments, *(["--values", "-"] if values is not None else [])],
            input=None if values is None else yaml.safe_dump(nested(values)),
            env=self._environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def text(self, values: Mapping[str, Any], chart: Path = CHART) -> str:
        """What would be installed as release blockyard into namespace system."""
        arguments = ["template", "blockyard", str(chart), "--namespace", "system"]
        done = self.run(*arguments, values=values)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def objects(self, values: Mapping[str, Any]) -> list[Raw]:
        return [each for each in yaml.safe_load_all(self.text(values)) if each]


@pytest.fixture(scope="module")
def helm(programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(programs["helm"], tmp_path_factory.mktemp("helm"))


def of_kind(objects: list[Raw], kind: str) -> list[Raw]:
    return [each for each in objects if each["kind"] == kind]


def pod(objects: list[Raw]) -> Raw:
    (deployment,) = of_kind(objects, "Deployment")
    found: Raw = deployment["spec"]["template"]["spec"]
    return found


# ── Rendering ─────────────────────────────────────────────────────────────────────────────────────────────


@each_variant
def test_helm_lint_finds_nothing(helm: Helm, variant: str) -> None:
    done = helm.run("lint", "--strict", str(CHART), values=VARIANTS[variant])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout
    assert "ERROR" not in done.stdout


@each_variant
def test_every_object_is_named_labelled_and_placed(helm: Helm, variant: str) -> None:
    objects = helm.objects(VARIANTS[variant])
    names = set()
    for each in objects:
        metadata = each["metadata"]
        labels = metadata["labels"]
        assert labels["app.kubernetes.io/part-of"] == "blockyard"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        if each["kind"].startswith("Cluster"):
            assert "namespace" not in metadata
            assert metadata["name"].startswith("system-"), "two releases would meet in this name"
        else:
            assert metadata["namespace"] in ("system", *VARIANTS[variant].get("namespaces", []))
        names.add((each["kind"], metadata.get("namespace"), metadata["name"]))
    assert len(names) == len(objects)


@each_variant
def test_the_selector_takes_the_operators_pods_and_says_nothing_of_versions(helm: Helm, variant: str) -> None:
    (deployment,) = of_kind(helm.objects(VARIANTS[variant]), "Deployment")
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert not [name for name in selector if "version" in name or "chart" in name]


# The Pod Security Standard "restricted": field of the pod or of each container -> what it must be.
RESTRICTED_POD: dict[str, Any] = {
    "securityContext.runAsNonRoot": True,
    "securityContext.seccompProfile.type": "RuntimeDefault",
    "hostNetwork": None,
    "hostPID": None,
    "hostIPC": None,
    "volumes": None,  # none at all; the token's comes with the ServiceAccount
}
RESTRICTED_CONTAINER: dict[str, Any] = {
    "securityContext.allowPrivilegeEscalation": False,
    "securityContext.capabilities.drop": ["ALL"],
    "securityContext.capabilities.add": None,
    "securityContext.privileged": None,
    "securityContext.runAsUser": None,
    "securityContext.readOnlyRootFilesystem": True,
}


def look_up(whole: Raw, path: str) -> Any:
    for name in path.split("."):
        whole = (whole or {}).get(name)  # type: ignore[assignment]  # None once something is missing
    return whole


@each_variant
def test_the_operators_pod_is_restricted(helm: Helm, variant: str) -> None:
    spec = pod(helm.objects(VARIANTS[variant]))
    for path, wanted in RESTRICTED_POD.items():
        assert look_up(spec, path) == wanted, path
    assert spec["securityContext"]["runAsUser"] > 0
    for container in spec["containers"]:
        for path, wanted in RESTRICTED_CONTAINER.items():
            assert look_up(container, path) == wanted, path
        assert not [port for port in container["ports"] if "hostPort" in port]


@each_variant
def test_the_operator_understands_its_environment(
    helm: Helm, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variable names a setting, and the settings are what the values say."""
    values = VARIANTS[variant]
    (container,) = pod(helm.objects(values))["containers"]
    prefix = OperatorSettings.model_config["env_prefix"]
    for each in container["env"]:
        if each["name"].startswith(prefix):
            assert each["name"].removeprefix(prefix).lower() in OperatorSettings.model_fields, each["name"]
        monkeypatch.setenv(each["name"], each.get("value", "what the field says"))
    settings = OperatorSettings.load()
    assert settings.namespaces == tuple(values.get("namespaces", ()))
    assert settings.workers == values.get("workers", VALUES["workers"])
    assert settings.log_level == values.get("logLevel", VALUES["logLevel"])
    assert settings.resync_seconds == values.get("resyncSeconds", VALUES["resyncSeconds"])
    assert settings.polls_per_second == values.get("pollsPerSecond", VALUES["pollsPerSecond"])
    assert [port["containerPort"] for port in container["ports"]] == [settings.port]


@pytest.mark.parametrize(
    ("given", "image"),
    [
        ({}, "blockyard-operator:0.1.0"),
        ({"tag": "2"}, "blockyard-operator:2"),
        ({"tag": "2", "digest": DIGEST}, f"blockyard-operator@{DIGEST}"),
        ({"repository": "r.example:5000/a/b", "tag": "2"}, "r.example:5000/a/b:2"),
    ],
)
def test_images_are_named_by_digest_or_else_by_tag(helm: Helm, given: Raw, image: str) -> None:
    (container,) = pod(helm.objects({f"image.{name}": value for name, value in given.items()}))["containers"]
    assert container["image"] == image


def test_the_chart_has_the_projects_version() -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text())
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert version
    assert chart["version"] == chart["appVersion"] == version[1]


def test_the_charts_crds_are_the_generated_ones(helm: Helm) -> None:
    shown = list(yaml.safe_load_all(helm.run("show", "crds", str(CHART)).stdout))
    files = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))]
    assert sorted(shown, key=lambda crd: str(crd["metadata"]["name"])) == files


def test_a_packed_chart_is_whole(helm: Helm, tmp_path: Path) -> None:
    """crds/ is a link, which a package must follow."""
    done = helm.run("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    assert helm.text(VARIANTS["monitoring"], package) == helm.text(VARIANTS["monitoring"])
    shown = helm.run("show", "crds", str(package)).stdout
    assert shown == helm.run("show", "crds", str(CHART)).stdout
    assert "llmservices.serving.blockyard.dev" in shown


# ── Values ────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name that does not exist": ({"replica": 1}, "additional properties 'replica' not allowed"),
    "one in a map": ({"image.repo": "x"}, "at '/image': additional properties 'repo' not allowed"),
    "text for a number": ({"replicas": "one"}, "at '/replicas': got string, want integer"),
    "less than nothing": ({"replicas": -1}, "at '/replicas'"),
    "no workers": ({"workers": 0}, "at '/workers'"),
    "an image with its tag": ({"image.repository": "a/b:1"}, "at '/image/repository'"),
    "half a digest": ({"agent.image.digest": "sha256:12"}, "at '/agent/image/digest'"),
    "an unknown pull policy": ({"image.pullPolicy": "Sometimes"}, "'Always', 'IfNotPresent', 'Never'"),
    "a namespace that cannot be": ({"namespaces": ["No"]}, "at '/namespaces/0'"),
    "a namespace twice": ({"namespaces": ["a", "a"]}, "at '/namespaces'"),
    "namespaces as text": ({"namespaces": "a,b"}, "at '/namespaces': got string, want array"),
    "an unknown log level": ({"logLevel": "loud"}, "at '/logLevel'"),
    "no ServiceAccount at all": ({"serviceAccount.create": False}, "at '/serviceAccount/name'"),
    "a label that is no text": ({"podLabels": {"a": 1}}, "at '/podLabels/a': got number, want string"),
    "a scrape interval without unit": ({"serviceMonitor.interval": "30"}, "at '/serviceMonitor/interval'"),
    "resources of no kind": ({"resources.request": {}}, "additional properties 'request' not allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_cannot_work_are_refused_by_name(helm: Helm, case: str) -> None:
    values, message = REFUSED[case]
    done = helm.run("template", "blockyard", str(CHART), values=values)
    assert done.returncode != 0
    assert message in done.stderr


def test_the_sample_values_are_all_that_there_are() -> None:
    assert list(leaves(VALUES, SCHEMA)) == list(EVERYTHING)


@pytest.mark.parametrize("value", EVERYTHING)
def test_every_value_changes_something(helm: Helm, value: str) -> None:
    along = ALONG.get(value, {})
    assert helm.text(along) != helm.text({**along, value: EVERYTHING[value]})


def test_the_schema_knows_every_value_and_no_other() -> None:
    def compare(values: Raw, schema: Raw, path: str) -> None:
        assert schema["additionalProperties"] is False, path
        assert set(values) == set(schema["properties"]) - {"global"}, path
        for name, value in values.items():
            inner = schema["properties"][name]
            if isinstance(value, dict) and "properties" in inner and name not in ("resources", "affinity"):
                compare(value, inner, f"{path}.{name}")

    compare(VALUES, SCHEMA, "")


def documented() -> list[tuple[str, str, str]]:
    """(path, default, comment) of every value, from values.yaml: "# --" begins a comment."""
    rows, path, comment = [], list[str](), list[str]()
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        if text.startswith("# -- "):
            comment = [text[5:]]
        elif text.startswith("#"):
            if comment:
                comment.append(text[1:].strip())
        elif match := re.match(r"( *)([A-Za-z]+):", line):
            path[len(match[1]) // 2 :] = [match[2]]
            if comment:
                value: Any = VALUES
                for name in path:
                    value = value[name]
                rows.append((".".join(path), json.dumps(value), " ".join(comment)))
            comment = []
    return rows


def test_the_readme_has_every_value_with_its_default() -> None:
    rows = documented()
    for leaf in leaves(VALUES, SCHEMA):
        names = [name for name, _, _ in rows if leaf == name or leaf.startswith(f"{name}.")]
        assert names, f"values.yaml does not say what {leaf} is: begin a comment above it with '# -- '"
    table = "\n".join(
        ["| value | default | meaning |", "|---|---|---|"]
        + [f"| `{name}` | `{default}` | {comment} |" for name, default, comment in rows]
    )
    readme = (CHART / "README.md").read_text()
    assert f"<!-- values -->\n{table}\n<!-- /values -->" in readme, f"the table should be:\n{table}"


# ── Rights ────────────────────────────────────────────────────────────────────────────────────────────────


def operators(objects: list[Raw]) -> list[Raw]:
    """The roles that are bound to the operator."""
    bound = {
        (each["roleRef"]["kind"], each["metadata"].get("namespace"), each["roleRef"]["name"])
        for kind in ("RoleBinding", "ClusterRoleBinding")
        for each in of_kind(objects, kind)
        for subject in each["subjects"]
        if (subject["kind"], subject["namespace"]) == ("ServiceAccount", "system")
        and subject["name"] == pod(objects)["serviceAccountName"]
    }
    roles = of_kind(objects, "Role") + of_kind(objects, "ClusterRole")
    found = [r for r in roles if (r["kind"], r["metadata"].get("namespace"), r["metadata"]["name"]) in bound]
    assert len(found) == len(bound), "a binding leads to no role"
    return found


@each_variant
def test_no_right_is_a_wildcard_and_secrets_cannot_be_listed(helm: Helm, variant: str) -> None:
    objects = helm.objects(VARIANTS[variant])
    for role in of_kind(objects, "Role") + of_kind(objects, "ClusterRole"):
        for group, resource, verb in of_role(role):
            assert "*" not in (group, resource, verb)
            assert not (resource == "secrets" and verb in ("list", "watch", "delete", "update"))
            assert verb not in ("bind", "escalate", "impersonate")


def test_with_namespaces_only_nodes_and_llmservices_are_seen_of_the_rest(
    helm: Helm,
) -> None:
    roles = operators(helm.objects(VARIANTS["namespaced"]))
    (cluster,) = of_kind(roles, "ClusterRole")
    nodes = {("", "nodes", verb) for verb in ("list", "watch")}
    own_kind = {("serving.blockyard.dev", "llmservices", verb) for verb in ("list", "watch", "patch")}
    assert of_role(cluster) == nodes | own_kind
    own, *others = sorted(
        of_kind(roles, "Role"), key=lambda role: role["metadata"]["name"] != "blockyard-lease"
    )
    assert {resource for _, resource, _ in of_role(own)} == {"leases"}
    assert [role["metadata"]["namespace"] for role in others] == ["one", "two"]
    everywhere = of_kind(operators(helm.objects({})), "ClusterRole")
    assert all(of_role(role) | of_role(cluster) == of_role(everywhere[0]) for role in others)


def test_the_operator_has_what_it_grants_to_gateways(helm: Helm) -> None:
    """Else the API server refuses the gateway's Role."""
    service = Service.of(
        {
            "metadata": {"name": "a", "namespace": "b", "uid": "c"},
            "spec": {"model": {"hub": {"name": "SmolLM2-135M-Instruct"}}},
        }
    )
    granted = [
        role
        for role in children.companions(service, children.Defaults("image", "system"))
        if role["kind"] == "Role"
    ]
    assert granted
    (role,) = of_kind(operators(helm.objects({})), "ClusterRole")
    for each in granted:
        assert of_role(each) <= of_role(role)


# ── Monitoring ────────────────────────────────────────────────────────────────────────────────────────────

# What Prometheus adds to every series of a pod that a ServiceMonitor finds.
TARGET_LABELS = frozenset({"namespace", "pod", "service", "job", "instance", "container", "endpoint"})


def exported(registry: CollectorRegistry) -> dict[str, frozenset[str]]:
    """Series of a registry with the labels of each."""
    found: dict[str, frozenset[str]] = {}
    for collector in list(registry._collector_to_names):
        named = getattr(collector, "_labelnames", ())
        for family in collector.collect():
            labels = frozenset(named) | {name for sample in family.samples for name in sample.labels}
            match family.type:
                case "counter":
                    found[f"{family.name}_total"] = labels
                case "histogram":
                    found[f"{family.name}_bucket"] = labels | {"le"}
                    found |= {f"{family.name}_sum": labels, f"{family.name}_count": labels}
                case _:
                    found[family.name] = labels
    return found


@pytest.fixture(scope="module")
def series() -> dict[str, frozenset[str]]:
    """All series of agents, gateways and operators."""

    async def operators_own() -> CollectorRegistry:
        metrics, kube = OperatorMetrics(), Kube(Configuration())
        operator = Operator(OperatorSettings(agent_image="x", lease_namespace="x"), kube, metrics)
        await operator.end()
        return metrics.registry

    status = AgentStatus(version=1, incarnation="x", state="ready", model="x", finished={"stop": 1})
    agent, gateway = AgentMetrics(lambda: status, "x"), GatewayMetrics(lambda: {"ready": 1})
    registries = [agent._registry, gateway._registry, asyncio.run(operators_own())]
    return {name: labels for registry in registries for name, labels in exported(registry).items()}


def check_expression(expression: str, series: Mapping[str, frozenset[str]]) -> None:
    """The expression can be parsed, and all series and labels that it names are exported."""
    root = promql_parser.parse(re.sub(r"\$__rate_interval", "5m", expression))
    selectors: list[promql_parser.VectorSelector] = []

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            selectors.append(node)
        for name in ("expr", "lhs", "rhs", "vector_selector"):
            if (inner := getattr(node, name, None)) is not None:
                visit(inner)
        for inner in getattr(node, "args", None) or ():
            visit(inner)

    visit(root)
    assert selectors, expression
    known: set[str] = set(TARGET_LABELS)
    for selector in selectors:
        name = str(selector.name)
        assert name in series, f"nothing exports {name}"
        known |= series[name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in series[name] | TARGET_LABELS, f"{name} has no label {matcher.name}"
    for grouping in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert {label.strip() for label in grouping.split(",")} <= known, expression


def dashboard() -> Raw:
    found: Raw = json.loads((CHART / "dashboards/blockyard.json").read_text())
    return found


def test_every_expression_of_the_dashboard_is_about_something(series: Mapping[str, frozenset[str]]) -> None:
    targets = [target for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    assert len(targets) > 20
    for target in targets:
        check_expression(target["expr"], series)
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert label in target["expr"] or label in TARGET_LABELS
    for variable in dashboard()["templating"]["list"]:
        if match := re.fullmatch(
            r"label_values\((.+), (\w+)\)",
            str(variable["query"]["query"]) if isinstance(variable["query"], dict) else "",
        ):
            check_expression(match[1], series)


def test_the_dashboards_panels_do_not_overlap() -> None:
    cells = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_dashboard_is_installed_as_it_is(helm: Helm) -> None:
    (config,) = of_kind(helm.objects({"dashboard.enabled": True}), "ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(config["data"]["blockyard.json"]) == dashboard()


def test_every_alert_is_about_something(helm: Helm, series: Mapping[str, frozenset[str]]) -> None:
    (rules,) = of_kind(helm.objects({"prometheusRule.enabled": True}), "PrometheusRule")
    alerts = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert alerts
    for alert in alerts:
        check_expression(alert["expr"], series)
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["summary"]
        assert alert["alert"] in (ROOT / "docs/operations.md").read_text(), "say what to do about it"


def test_an_expression_about_nothing_is_found(series: Mapping[str, frozenset[str]]) -> None:
    for wrong in (
        "sum(rate(blockyard_nothing_total[5m]))",
        'blockyard_kv_blocks{model="x"}',
        "sum by (size) (vllm:num_requests_running)",
    ):
        with pytest.raises(AssertionError):
            check_expression(wrong, series)


def test_the_service_monitor_finds_its_service(helm: Helm) -> None:
    objects = helm.objects({"serviceMonitor.enabled": True})
    (monitor,), (service,) = of_kind(objects, "ServiceMonitor"), of_kind(objects, "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ports = {port["name"]: port["targetPort"] for port in service["spec"]["ports"]}
    (container,) = pod(objects)["containers"]
    for endpoint in monitor["spec"]["endpoints"]:
        assert ports[endpoint["port"]] in {port["name"] for port in container["ports"]}


def test_the_notes_say_what_uninstalling_leaves(helm: Helm) -> None:
    done = helm.run("install", "blockyard", str(CHART), "--dry-run=client", "--namespace", "system")
    assert done.returncode == 0, done.stderr
    for words in ("kubectl delete llms --all -A", "leaves the CRDs", "helm show crds"):
        assert words in done.stdout


# ── The page for who runs it ──────────────────────────────────────────────────────────────────────────────


OPERATIONS = (ROOT / "docs/operations.md").read_text()


def test_the_operations_page_explains_every_reason() -> None:
    """And names none that does not exist: in the first column are the operator's and the kubelet's."""
    ours = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
    kubelets = {"ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError", "CrashLoopBackOff"}
    said = set(re.findall(r"`([A-Z][A-Za-z]+)`", OPERATIONS))
    assert ours <= said, f"docs/operations.md says nothing of {ours - said}"
    failures = OPERATIONS.split("## Common failures")[1].split("\n## ")[0]
    named = {
        word
        for line in failures.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([A-Z][A-Za-z]+)`", line.split("|")[1])
    }
    assert named <= ours | kubelets


def test_the_operations_page_sets_only_values_that_exist() -> None:
    known = set(leaves(VALUES, SCHEMA))
    named = set(re.findall(r"--set '?([A-Za-z.]+)=", OPERATIONS))
    assert {"image.repository", "namespaces"} <= named <= known
