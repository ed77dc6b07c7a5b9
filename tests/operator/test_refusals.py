"""What a person is told when the API server refuses something: for the real answers, and for any other."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard.operator import reasons, refusals
from blockyard.operator.kube import DEPLOYMENT, LLM_SERVICE, POD, SECRET, SERVICE, SERVICE_MONITOR, ApiError
from blockyard.operator.refusals import LONGEST_MESSAGE, Refusal, explain, explain_gateway

from .refused import CASES, Case, Raw, body

PATH = "/api/v1/namespaces/n/pods"


def refused(message: str, code: int = 403, kind: str = POD.name, **more: Any) -> ApiError:
    known = {"verb": "create", "name": "s-abcde", "call": f"create {PATH}", **more}
    return ApiError(code, known.pop("reason", ""), message, kind=kind, **known)


def of_case(case: Case) -> ApiError:
    made, answer = body(case.asked), case.answer
    return ApiError(
        answer["code"],
        answer["reason"],
        answer["message"],
        verb="create" if made["kind"] == "Pod" else "patch",
        kind=made["kind"],
        name=made["metadata"]["name"],
        details=answer["details"],
        body=made,
    )


@pytest.mark.parametrize("name", CASES)
def test_what_users_can_cause_has_words_and_a_reason(name: str) -> None:
    case = CASES[name]
    assert explain(of_case(case)) == Refusal(case.reason, case.message)


# ── What the test cluster cannot show ─────────────────────────────────────────────────────────────────────

FINALIZERS = (
    'pods "s-abcde" is forbidden: cannot set blockOwnerDeletion if an ownerReference refers to a resource '
    "you can't set finalizers on: , <nil>"
)
MONITOR = "spec.monitoring.serviceMonitor"
OTHERS: dict[str, tuple[ApiError, str, list[str]]] = {
    "no right to own": (
        refused(FINALIZERS),
        reasons.RIGHTS_MISSING,
        ["llmservices/finalizers", "Helm chart"],
    ),
    "credentials that have ended": (
        refused("Unauthorized", 401, reason="Unauthorized"),
        reasons.RIGHTS_MISSING,
        ["does not accept the credentials"],
    ),
    "a person without rights": (
        refused(
            'llmservices.serving.blockyard.dev is forbidden: User "jane" cannot list resource "llmservices" '
            'in API group "serving.blockyard.dev" at the cluster scope',
            kind=LLM_SERVICE.name,
            verb="list",
            name="",
        ),
        reasons.RIGHTS_MISSING,
        [
            "LLMServices cannot be listed",
            "jane may not list llmservices.serving.blockyard.dev",
            "ask whoever",
        ],
    ),
    "a kind that the cluster does not have": (
        refused("404 page not found\n", 404, SERVICE_MONITOR.name, verb="patch", name="s"),
        reasons.KIND_MISSING,
        ["ServiceMonitor s cannot be written", "Prometheus operator", f"{MONITOR} to false"],
    ),
    "a name that is not free yet": (
        refused('object is being deleted: pods "s-abcde" already exists', 409, reason="AlreadyExists"),
        reasons.REFUSED,
        ["tried again"],
    ),
    "a change that came too late": (
        refused('Operation cannot be fulfilled on pods "s": the object has been modified', 409, verb="patch"),
        reasons.REFUSED,
        ["changed or deleted at the same moment"],
    ),
    "a field that cannot change": (
        refused(
            'Service "s" is invalid: spec.clusterIPs[0]: Invalid value: ["None"]: may not change once set',
            422,
            SERVICE.name,
            verb="patch",
            name="s",
            details={
                "causes": [
                    {
                        "field": "spec.clusterIPs[0]",
                        "message": 'Invalid value: ["None"]: may not change once set',
                    }
                ]
            },
        ),
        reasons.REFUSED,
        ["Service s cannot be written", "may not change once set", "delete the object"],
    ),
    "an API server that has too much to do": (
        refused("too many requests, please try again later", 429),
        reasons.REFUSED,
        ["cannot do it now: too many requests", "tried again"],
    ),
    "a store without a leader": (
        refused("etcdserver: leader changed", 500),
        reasons.REFUSED,
        ["cannot do it now: etcdserver: leader changed"],
    ),
    "a proxy's page": (
        refused("<!DOCTYPE html><html><body>Blocked by /api rule</body></html>", 403),
        reasons.REFUSED,
        ["web page", "HTTP status 403"],
    ),
    "nothing at all": (refused("", 418), reasons.REFUSED, ["HTTP status 418, without an explanation"]),
    "a quota's older words": (
        refused('pods "s" is forbidden: failed quota: team: must specify limits.cpu,limits.memory'),
        reasons.LIMITS_MISSING,
        ["lacks limits.cpu,limits.memory, which ResourceQuota team demands", "resources in spec.template"],
    ),
    "an object of a kind without a name": (
        refused('secrets is forbidden: "x"', kind=SECRET.name, name=""),
        reasons.REFUSED,
        ["Secrets cannot be created", '"x"'],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_test_cluster_cannot_show_has_words_too(name: str) -> None:
    error, reason, parts = OTHERS[name]
    found = explain(error)
    assert found.reason == reason
    assert not [part for part in parts if part not in found.message], found.message


def test_the_order_in_which_faults_come_does_not_change_the_words() -> None:
    """Or the status would be written with every attempt."""
    faults = [
        "maximum cpu usage per Pod is 1, but limit is 2",
        "minimum memory usage per Pod is 9Gi, but request is 2Gi",
    ]
    one, other = (
        explain(refused(f'pods "s" is forbidden: [{", ".join(order)}]')) for order in (faults, faults[::-1])
    )
    assert one == other and all(fault in one.message for fault in faults)
    causes = [{"field": f"spec.{field}", "message": "Required value"} for field in "ba"]
    one, other = (explain(refused("", 422, details={"causes": order})) for order in (causes, causes[::-1]))
    assert one == other and "spec.template.spec.a: Required value; spec.template.spec.b" in one.message


# ── Gateways ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_keeps_a_gateway_from_its_pods_is_said_without_their_names_which_change() -> None:
    quota = "exceeded quota: team, requested: pods=1, used: pods=3, limited: pods=3"
    found = [
        explain_gateway("s-gateway", f'pods "s-gateway-65c4cbc649-{end}" is forbidden: {quota}')
        for end in ("jzjp6", "q9dks")
    ]
    words = (
        "pods of Deployment s-gateway cannot be created: it exceeds ResourceQuota team: pods (3 used, 1 asked"
    )
    assert found[0] == found[1] and found[0].reason == reasons.QUOTA_EXCEEDED
    assert found[0].message.startswith(words) and found[0].message.endswith("spec.gateway.replicas")


def test_fields_of_a_gateways_pod_are_said_as_those_of_its_template() -> None:
    text = (
        'Pod "s-gateway-x" is invalid: [spec.containers[0].resources.requests: Invalid value: "1": must be '
        "less than or equal to cpu limit of 500m, spec.dnsPolicy: Required value]"
    )
    found = explain_gateway("s-gateway", text)
    assert found.reason == reasons.INVALID_SPEC
    assert "spec.gateway.template.spec.containers[0].resources.requests: Invalid value" in found.message
    assert "spec.gateway.template.spec.dnsPolicy: Required value" in found.message
    assert "nothing says why" in explain_gateway("s-gateway", "").message


# ── Texts of other people ─────────────────────────────────────────────────────────────────────────────────

DENIED = 'admission webhook "w" denied the request: '
QUOTED = {
    "a path of the API": (
        "see https://1.2.3.4:6443/apis/x/v1/secrets?watch=1 now",
        "see https://1.2.3.4:6443… now",
    ),
    "an address with credentials": ("see https://me:pw@wiki/rules?key=1#top", "see https://wiki/rules"),
    "JSON": ('no: {"env": [{"name": "A", "value": "s3cret"}]} is bad', "no: … is bad"),
    "JSON without its end": ('no: {"env": [{"name": "A", "value": "s3c', "no: …"),
    "a structure of Go": ('got v1.EnvVar{Name:"A", Value:"s3cret"}', "got v1.EnvVar…"),
    "a token": ("Bearer abcdefghijklmnopqrstuvwxyz is no good", "Bearer … is no good"),
    "a password": ("login with password=hunter2, please", "login with password=…, please"),
    "a JWT": ("got eyJhbGciOi.eyJzdWIi.c2ln", "got …"),
    "lines": ("first\n\tsecond\x1b[31m", "first second [31m"),
    "what is none of that": (
        "label example.com/api-owner must be one of {gold, silver}; see https://wiki/rules",
        "label example.com/api-owner must be one of {gold, silver}; see https://wiki/rules",
    ),
}


@pytest.mark.parametrize("name", QUOTED)
def test_what_others_have_written_is_quoted_without_paths_structures_and_secrets(name: str) -> None:
    said, quoted = QUOTED[name]
    assert f'denies it: "{quoted}"; change' in explain(refused(DENIED + said)).message


def test_a_webhooks_address_is_not_said() -> None:
    text = 'failed calling webhook "w": failed to call webhook: Post "https://10.0.0.1/v?token=t0p": EOF'
    found = explain(refused(f"Internal error occurred: {text}", 500))
    assert found.reason == reasons.WEBHOOK_UNAVAILABLE
    assert "t0p" not in found.message and "10.0.0.1" not in found.message


def test_a_long_text_is_cut_and_the_remedy_stays() -> None:
    found = explain(refused(DENIED + "no " * 5000))
    assert len(found.message) <= LONGEST_MESSAGE
    assert found.message.endswith("or ask whoever keeps the webhook")


def test_a_long_value_is_left_out_and_many_fields_are_counted() -> None:
    causes = [
        {"field": f"spec.x{number}", "message": f'Invalid value: "{"v" * 65}": no'} for number in range(9)
    ]
    found = explain(refused("", 422, details={"causes": causes}))
    assert 'spec.template.spec.x0: Invalid value: "…": no' in found.message
    assert "and 3 more" in found.message


# ── Whatever comes ────────────────────────────────────────────────────────────────────────────────────────

PARTS = st.sampled_from(
    [
        *(case.answer["message"] for case in CASES.values()),
        "create /api/v1/namespaces/n/pods: ",
        "https://u:p@h/apis/apps/v1?x=1",
        '{"kind": "Status", "message": {"a": [1]}}',
        '{"cut": "off',
        'pods "s" is forbidden: ',
        "exceeded quota: ",
        ", requested: ",
        "[spec.a: x, spec.b: y]",
        "\n",
        " ",
    ]
)
TEXTS = st.lists(PARTS | st.text(max_size=20), max_size=6).map("".join)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.from_regex(
    r"(spec|metadata)(\.(containers|env|volumes)\[[0-9]{1,3}\]|\.[a-z]{1,5}){0,4}", fullmatch=True
)
CAUSES = st.lists(st.fixed_dictionaries({"field": FIELDS | TEXTS, "message": TEXTS}) | JSON, max_size=8)
DETAILS = st.dictionaries(st.text(max_size=8), JSON, max_size=3) | CAUSES.map(lambda found: {"causes": found})
BODIES = st.dictionaries(st.sampled_from(["spec", "metadata", "x"]), JSON, max_size=3) | st.sampled_from(
    [body(case.asked) for case in CASES.values() if len(str(case.asked)) < 10_000]
)


def is_plain(message: str) -> bool:
    return not re.search(r"/apis?(?![\w-])|\{\s*\"[^\"]*\"\s*:|[\x00-\x1f]", message)


@settings(deadline=None)
@given(
    code=st.integers(400, 599),
    reason=st.sampled_from(["", "Forbidden", "Invalid", "AlreadyExists"]) | st.text(max_size=8),
    message=TEXTS,
    details=DETAILS,
    verb=st.sampled_from(["create", "patch", "delete", "get", "list", "watch", ""]),
    kind=st.sampled_from([POD.name, DEPLOYMENT.name, SERVICE.name, ""]),
    name=st.text(max_size=300) | TEXTS,
    sent=BODIES,
)
def test_whatever_is_answered_the_words_are_there_plain_and_bounded(
    code: int, reason: str, message: str, details: Raw, verb: str, kind: str, name: str, sent: Raw
) -> None:
    error = ApiError(code, reason, message, verb=verb, kind=kind, name=name, details=details, body=sent)
    found = explain(error)
    assert found.reason in vars(reasons).values() and re.fullmatch(r"[A-Z][A-Za-z]+", found.reason)
    assert found.message.strip() and len(found.message) <= LONGEST_MESSAGE
    assert is_plain(found.message), found.message
    assert is_plain(explain_gateway("s-gateway", message).message)


def test_a_defect_is_named_and_not_quoted() -> None:
    found = refusals.of_defect(KeyError({"token": "s3cret"}))
    assert found.reason == reasons.INTERNAL_ERROR
    assert "KeyError" in found.message and "s3cret" not in found.message
