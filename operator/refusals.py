"""Puts a refusal of the API server into words that a person can act on. The raw answer is for the log.

A message says what cannot be done, why, with the numbers, and what to change. The API server's own texts name
fields of an object that the user has not written, paths of the API, and objects of other people. So each kind
of refusal is recognised by its text (the tests hold the real ones), and only what matters is taken over. What
other people have written, such as a policy's message, is quoted without paths of the API, structures and what
looks like a credential. All messages have a bounded length, and the same refusal always has the same words,
although the API server lists what is wrong with an object in an order that changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from . import reasons

LONGEST_MESSAGE = 900
LONGEST_QUOTE = 500
LONGEST_ANSWER = 4000  # characters of an answer that are looked at
LONGEST_NAME = 253
LONGEST_VALUE = 64  # a longer value is left out, for the field's name is enough
MOST_FIELDS = 6


class ApiErrorLike(Protocol):
    """What is read of ``kube.ApiError``. ``body`` is the object that was sent, for the names in it."""

    @property
    def code(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def details(self) -> Mapping[str, Any]: ...
    @property
    def verb(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def body(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something is not done: a CamelCase constant of ``reasons``, and the same for a person."""

    reason: str
    message: str


def explain(error: ApiErrorLike) -> Refusal:
    """The refusal of a call."""
    noun = "pod" if error.kind == "Pod" else error.kind or "object"
    subject = f"{noun} {error.name[:LONGEST_NAME]}" if error.name else f"{noun}s"
    case = _Case(
        what=f"{subject} cannot be {_DONE.get(error.verb, 'written')}",
        kind=error.kind,
        code=error.code,
        status=error.reason,
        text=_bare(error.message),
        causes=tuple(_causes(error.details)),
        body=error.body,
        template="spec.gateway.template" if error.kind == "Deployment" else "spec.template",
        replicas="spec.gateway.replicas" if error.kind == "Deployment" else "spec.replicas",
    )
    return _worded(case)


def explain_gateway(deployment: str, message: str) -> Refusal:
    """Why the pods of a gateway's Deployment are not made, from the message of its ReplicaFailure condition.

    Their names change with every attempt, so they are not said.
    """
    text = _bare(message)
    case = _Case(
        what=f"pods of Deployment {deployment} cannot be created",
        kind="Pod",
        code=0,
        status="",
        text=text,
        causes=tuple(_listed(text)),
        body={},
        template="spec.gateway.template",
        replicas="spec.gateway.replicas",
    )
    return _worded(case)


def of_defect(error: Exception) -> Refusal:
    """A round that failed for a reason that nobody has foreseen."""
    message = f"the operator has a defect, which its log describes: {type(error).__name__}; it is tried again"
    return Refusal(reasons.INTERNAL_ERROR, message)


def plain(text: str) -> str:
    """A text of somebody else in one line, without paths of the API, structures and credentials."""
    text = " ".join(_CONTROL.sub(" ", text[:LONGEST_ANSWER]).split())
    text = _URL.sub(r"\1\2\3", text)
    text = _API_PATH.sub("…", text)
    for pattern in _CREDENTIALS:
        text = pattern.sub(r"\1…", text)
    while (without := _STRUCTURE.sub("…", text)) != text:
        text = without
    return _CUT_OFF.sub("…", text)


_DONE = {"create": "created", "delete": "deleted", "get": "read", "list": "listed", "watch": "watched"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_URL = re.compile(r"(https?://)(?:[^\s/@\"']*@)?([^\s/?#\"']+)([^\s?#\"']*)(?:[?#][^\s\"']*)?")
_API_PATH = re.compile(r"/apis?(?![\w-])[^\s\"'`,;)\]]*")
_CREDENTIALS = (
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{16,}"),
    re.compile(r"(?i)(\b[\w-]*(?:password|passwd|token|secret|api[_-]?key|access[_-]?key)=)[^\s,;)\]]+"),
    re.compile(r"()\beyJ[\w-]+\.[\w-]+\.[\w-]*"),
)
_STRUCTURE = re.compile(r"&?\{[^{}]*[:…][^{}]*\}")  # of JSON or Go
_CUT_OFF = re.compile(r"\{\s*\"(?:[^\"]*\"\s*:.*|[^\"{}]*)$")  # the beginning of one


# ── What is known of a refusal ────────────────────────────────────────────────────────────────────────────


class _Cause(NamedTuple):
    """One field that is wrong."""

    field: str
    text: str


@dataclass(frozen=True, slots=True)
class _Case:
    """A refusal. ``text`` is the API server's, without what names the object; ``template`` and ``replicas``
    are the fields of the LLMService from which the object is made.
    """

    what: str
    kind: str
    code: int
    status: str
    text: str
    causes: tuple[_Cause, ...]
    body: Mapping[str, Any]
    template: str
    replicas: str


class _Words(NamedTuple):
    reason: str
    why: str
    remedy: str


# `pods "x" is forbidden: `, `Pod "x" is invalid: ` and the like.
_NAMES_OBJECT = re.compile(r"^[\w.]+(?: \"[^\"]*\")? is (?:forbidden|invalid): ")
_INTERNAL = re.compile(r"^Internal error occurred: ")


def _bare(message: str) -> str:
    text = _INTERNAL.sub("", message[:LONGEST_ANSWER].strip())
    return _NAMES_OBJECT.sub("", text)


def _causes(details: Mapping[str, Any]) -> Iterator[_Cause]:
    found = details.get("causes")
    for cause in found if isinstance(found, list) else ():
        if isinstance(cause, dict) and cause.get("field") and cause.get("message"):
            yield _Cause(str(cause["field"])[:LONGEST_ANSWER], str(cause["message"])[:LONGEST_ANSWER])


_FIELD = re.compile(r"((?:spec|metadata)(?:\.[\w\[\]./-]+)?): (.+)", re.DOTALL)


def _listed(text: str) -> Iterator[_Cause]:
    """The causes of an answer that has them in its text alone: `[spec.a: words, spec.b: words]`."""
    for part in re.split(r", (?=(?:spec|metadata)[.:])", text.removeprefix("[").removesuffix("]")):
        if match := _FIELD.fullmatch(part):
            yield _Cause(match[1], match[2])


def _worded(case: _Case) -> Refusal:
    words = next(filter(None, (rule(case) for rule in _RULES)), None) or _anything_else(case)
    what, remedy = plain(case.what), f"; {words.remedy}" if words.remedy else ""
    why = _short(plain(words.why), LONGEST_MESSAGE - len(what) - len(remedy) - 2)
    return Refusal(words.reason, plain(_short(f"{what}: {why}{remedy}", LONGEST_MESSAGE)))


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: max(0, longest - 3)]}..."


# ── Quotas and limits ─────────────────────────────────────────────────────────────────────────────────────

_QUOTA = re.compile(r"exceeded quota: ([^,\s]+), requested: (.*?), used: (.*?), limited: (.*)", re.DOTALL)
_EXTENDED = re.compile(r"^requests\.[^/]+/")  # resources such as GPUs
_COMPUTE = re.compile(r"^(?:requests\.|limits\.)?(?:cpu|memory|ephemeral-storage)$")
_QUOTA_DEMANDS = re.compile(r"failed quota: (\S+): must specify (.*)", re.DOTALL)
_LIMIT = re.compile(r"(?:minimum|maximum) \S+ usage per \w+ is|max limit to request ratio per \w+ is")
_NO_LIMIT = re.compile(r"\.\s+No (limit|request) is specified")
_BELOW_LIMIT = re.compile(r"Invalid value: \"([^\"]+)\": must be less than or equal to (\S+) limit of (\S+)$")
_CONTAINER_REQUESTS = re.compile(r"spec\.containers\[(\d+)\]\.resources\.requests")


def _quota_exceeded(case: _Case) -> _Words | None:
    match = _QUOTA.search(case.text)
    if match is None:
        return None
    asked, used, allowed = (_amounts(match[group]) for group in (2, 3, 4))
    numbers = ", ".join(
        f"{name} ({used.get(name, '0')} used, {amount} asked, {allowed.get(name, '0')} allowed)"
        for name, amount in asked.items()
    )
    why = f"it exceeds ResourceQuota {match[1]}: {numbers}"
    if case.kind != "Pod":
        return _Words(reasons.QUOTA_EXCEEDED, why, "raise the quota, or delete what is not needed any more")
    levers = [case.replicas]
    if any(_EXTENDED.search(name) for name in asked) and case.template == "spec.template":
        levers.append("spec.tensorParallel")
    if any(_COMPUTE.search(name) for name in asked):
        levers.append(f"resources in {case.template}")
    return _Words(reasons.QUOTA_EXCEEDED, why, f"raise the quota, or lower {' or '.join(levers)}")


def _amounts(text: str) -> dict[str, str]:
    """ "pods=1,requests.cpu=500m" -> amounts by resource."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name.strip(): amount.strip() for name, equals, amount in pairs if equals}


def _quota_demands(case: _Case) -> _Words | None:
    """A quota that counts a resource refuses pods that do not say how much of it they want."""
    match = _QUOTA_DEMANDS.search(case.text)
    if match is None:
        return None
    lacks, fields = [], []
    for part in match[2].split(";"):
        names, _, containers = part.strip().partition(" for: ")
        places = [container.strip() for container in containers.split(",") if container.strip()]
        lacks.append(f"{names} of container {', '.join(places)}" if places else names)
        fields += [f"{case.template}.spec.containers[{place}].resources" for place in places]
    why = f"it lacks {' and '.join(sorted(lacks))}, which ResourceQuota {match[1]} demands"
    where = " and ".join(dict.fromkeys(fields)) or f"resources in {case.template}.spec.containers"
    remedy = f"set that in {where}, or make a LimitRange with defaults"
    return _Words(reasons.LIMITS_MISSING, why, remedy)


def _limit_range(case: _Case) -> _Words | None:
    if _LIMIT.search(case.text) is None:
        return None
    text = _NO_LIMIT.sub(r", but no \1 is specified", case.text.removeprefix("[").removesuffix("]"))
    text = "; ".join(sorted(re.split(r", (?=minimum |maximum |\S+ max limit)", text)))
    remedy = f"change resources in {case.template}.spec.containers, or the LimitRange"
    return _Words(reasons.LIMIT_RANGE_VIOLATED, f"a LimitRange of the namespace forbids it: {text}", remedy)


def _limit_range_default(case: _Case) -> _Words | None:
    """A LimitRange gives limits to containers that have none, and they may be below what is requested."""
    found = []
    for cause in case.causes:
        container, match = _CONTAINER_REQUESTS.fullmatch(cause.field), _BELOW_LIMIT.search(cause.text)
        if container is None or match is None:
            return None
        own = _entry(case.body, ("spec", "containers", int(container[1])))
        if not own or match[2] in _map(_map(own.get("resources")).get("limits")):
            return None
        found.append(
            f"container {own.get('name')} requests {match[1]} {match[2]} and gets a limit of {match[3]}"
        )
    if not found:
        return None
    why = f"a LimitRange of the namespace sets limits that are too low: {'; '.join(sorted(found))}"
    remedy = f"set resources in {case.template}.spec.containers, or change the LimitRange"
    return _Words(reasons.LIMIT_RANGE_VIOLATED, why, remedy)


# ── Policies ──────────────────────────────────────────────────────────────────────────────────────────────

_POD_SECURITY = re.compile(r"violates PodSecurity \"([^\"]*)\": (.*)", re.DOTALL)
_POLICY = re.compile(
    r"ValidatingAdmissionPolicy '([^']*)' with binding '[^']*' denied request: (.*)", re.DOTALL
)
_WEBHOOK_DENIES = re.compile(r"admission webhook \"([^\"]*)\" denied the request(?:: (.*))?", re.DOTALL)
_WEBHOOK_FAILS = re.compile(r"failed calling webhook \"([^\"]*)\": (.*)", re.DOTALL)
_CALL_ADDRESS = re.compile(r"\b(?:Post|Get) \"[^\"]*\"")
# How a call of a webhook ends.
_CALL_ENDS = {
    r"deadline exceeded|[Tt]imeout|timed out": "it does not answer in time",
    r"connection refused": "nothing listens at its address",
    r"service \"[^\"]*\" not found": "its Service does not exist",
    r"no endpoints available": "its Service has no pod that is ready",
    r"x509|certificate": "its certificate is not trusted",
    r"no such host": "its address cannot be resolved",
}


def _pod_security(case: _Case) -> _Words | None:
    match = _POD_SECURITY.search(case.text)
    if match is None:
        return None
    change = f"change {case.template}"
    if case.template == "spec.template" and "hostPath volumes" in match[2]:
        change += ", do without spec.model.hostPath and cacheHostPath"
    why = f'the namespace enforces PodSecurity "{match[1]}", which forbids {match[2]}'
    return _Words(reasons.POD_SECURITY_VIOLATED, why, f"{change}, or use a namespace that allows it")


def _policy(case: _Case) -> _Words | None:
    match = _POLICY.search(case.text)
    if match is None:
        return None
    why = f"ValidatingAdmissionPolicy {match[1]} denies it: {_quoted(match[2])}"
    return _Words(reasons.POLICY_DENIED, why, _ask("policy"))


def _webhook_denies(case: _Case) -> _Words | None:
    match = _WEBHOOK_DENIES.search(case.text)
    if match is None:
        return None
    said = f": {_quoted(match[2])}" if (match[2] or "").strip() else " and does not say why"
    return _Words(reasons.WEBHOOK_DENIED, f"admission webhook {match[1]} denies it{said}", _ask("webhook"))


def _quoted(text: str) -> str:
    return f'"{_short(plain(text), LONGEST_QUOTE)}"'


def _ask(what: str) -> str:
    return f"change the LLMService so that the {what} admits it, or ask whoever keeps the {what}"


def _webhook_fails(case: _Case) -> _Words | None:
    match = _WEBHOOK_FAILS.search(case.text)
    if match is None:
        return None
    end = _CALL_ADDRESS.sub("", match[2])
    how = next((words for pattern, words in _CALL_ENDS.items() if re.search(pattern, end)), "it fails")
    why = f"admission webhook {match[1]} must be asked first, and {how}"
    return _Words(reasons.WEBHOOK_UNAVAILABLE, why, "it is tried again; tell whoever keeps the webhook")


# ── What is not there ─────────────────────────────────────────────────────────────────────────────────────

# kind -> (how its absence is said, reason, where it would have to be, field that names it)
_MISSING = {
    "ServiceAccount": (
        re.compile(r"error looking up service account [^/\s]+/([^\s:]+): .*not found"),
        reasons.SERVICE_ACCOUNT_MISSING,
        "the namespace",
        "serviceAccountName",
    ),
    "PriorityClass": (
        re.compile(r"no PriorityClass with name (\S+) was found"),
        reasons.PRIORITY_CLASS_MISSING,
        "the cluster",
        "priorityClassName",
    ),
    "RuntimeClass": (
        re.compile(r"RuntimeClass \"([^\"]*)\" not found"),
        reasons.RUNTIME_CLASS_MISSING,
        "the cluster",
        "runtimeClassName",
    ),
}
_NAMESPACE_ENDS = re.compile(r"namespace (\S+) because it is being terminated")
_NO_NAMESPACE = re.compile(r"namespaces \"([^\"]*)\" not found")
_NO_KIND = re.compile(r"404 page not found|the server could not find the requested resource")


def _missing(case: _Case) -> _Words | None:
    for kind, (pattern, reason, where, field) in _MISSING.items():
        if match := pattern.search(case.text):
            why = f"it names {kind} {match[1]}, which {where} does not have"
            return _Words(reason, why, f"create it, or change {case.template}.spec.{field}")
    return None


def _namespace_ends(case: _Case) -> _Words | None:
    if match := _NAMESPACE_ENDS.search(case.text):
        why = f"namespace {match[1]} is being deleted"
    elif case.code == 404 and (match := _NO_NAMESPACE.search(case.text)):
        why = f"there is no namespace {match[1]} any more"
    else:
        return None
    return _Words(reasons.NAMESPACE_TERMINATING, why, "create the LLMService in another namespace")


def _no_kind(case: _Case) -> _Words | None:
    if case.code != 404 or _NO_KIND.search(case.text) is None:
        return None
    remedy = "apply the custom resources of Blockyard's Helm chart"
    if case.kind == "ServiceMonitor":
        remedy = "install the Prometheus operator, or set spec.monitoring.serviceMonitor to false"
    return _Words(reasons.KIND_MISSING, f"the cluster does not have the kind {case.kind}", remedy)


# ── Rights ────────────────────────────────────────────────────────────────────────────────────────────────

_ACCOUNT = "system:serviceaccount:"
_RIGHT = re.compile(
    r"User \"([^\"]*)\" cannot (\w+) resource \"([^\"]*)\" in API group \"([^\"]*)\""
    r"(?: in the namespace \"([^\"]*)\")?"
)
_GRANTS = re.compile(r"attempting to grant RBAC permissions not currently held:(.*)", re.DOTALL)
_GRANT = re.compile(r"APIGroups:\[([^\]]*)\], Resources:\[([^\]]*)\].*?Verbs:\[([^\]]*)\]")
_FINALIZERS = "ownerReference refers to a resource you can't set finalizers on"
_OPERATORS_RULES = "apply the rules of the operator's Helm chart again, or add what its Role lacks"


def _rights(case: _Case) -> _Words | None:
    remedy = _OPERATORS_RULES
    if match := _RIGHT.search(case.text):
        resource = ".".join(filter(None, (match[3], match[4])))
        where = f"in namespace {match[5]}" if match[5] else "in the whole cluster"
        why = f"{match[1]} may not {match[2]} {resource} {where}"
        if not match[1].startswith(_ACCOUNT):
            remedy = "ask whoever manages the cluster for a Role with that right"
    elif match := _GRANTS.search(case.text):
        lacks = "; ".join(_right(*grant.groups()) for grant in _GRANT.finditer(match[1]))
        why = f"the operator may only grant rights that it has, and it lacks {lacks or 'some of these'}"
    elif _FINALIZERS in case.text:
        why = "the operator may not update llmservices/finalizers, which owner references need"
    elif case.code == 401:
        why, remedy = "the API server does not accept the credentials", "renew them"
    else:
        return None
    return _Words(reasons.RIGHTS_MISSING, why, remedy)


def _right(groups: str, resources: str, verbs: str) -> str:
    names = [re.findall(r"\"([^\"]*)\"", part) for part in (verbs, resources, groups)]
    return f"{', '.join(names[0])} of {', '.join(names[1])} in {', '.join(filter(None, names[2])) or 'core'}"


# ── What is wrong with the object ─────────────────────────────────────────────────────────────────────────

_TOO_LARGE = re.compile(r"request is too large|entity too large|message larger than max", re.IGNORECASE)
_MOST_BYTES = re.compile(r"limit is (\d+)")
_WRONG_TYPE = re.compile(r"cannot unmarshal (\w+) into Go struct field \w+\.(\S+) of type (\S+)")
_UNREADABLE = re.compile(r"in version \"[^\"]*\" cannot be handled as an? \w+: (.*)", re.DOTALL)
_TYPED_PATCH = re.compile(r"failed to create typed patch object \([^)]*\): (.*)", re.DOTALL)
_TYPED_FIELD = re.compile(r"^\s*\.([^\s:]+): (.*)$", re.MULTILINE)
_PATTERN = re.compile(r",\s+regex used for validation is '.*'\)", re.DOTALL)
_LONG_VALUE = re.compile(rf"\"(?:[^\"\\]|\\.){{{LONGEST_VALUE + 1},}}\"")
_TEMPLATED = ("Pod", "Deployment", "LLMService")  # what users write themselves, at least a part of


def _too_large(case: _Case) -> _Words | None:
    if case.code != 413 and _TOO_LARGE.search(case.text) is None:
        return None
    match = _MOST_BYTES.search(case.text)
    most = f": at most {match[1]} bytes" if match else ""
    remedy = f"shorten {case.template}, above all its annotations and the values of env"
    return _Words(reasons.OBJECT_TOO_LARGE, f"it is larger than the API server stores{most}", remedy)


def _invalid(case: _Case) -> _Words | None:
    """Fields that are wrong, as the user knows them."""
    causes = list(case.causes)
    if match := _TYPED_PATCH.search(case.text):
        found = _TYPED_FIELD.findall(match[1])
        causes = [_Cause(re.sub(r"\[name=\"([^\"]*)\"\]", r"[\1]", field), text) for field, text in found]
    elif match := _WRONG_TYPE.search(case.text):
        causes = [_Cause(match[2], f"must be {match[3]}, not {match[1]}")]
    elif match := _UNREADABLE.search(case.text):
        causes = [_Cause("spec", match[1])]
    if not causes:
        return None
    faults = sorted(f"{_field(case, each.field)}: {_fault(each.text)}" for each in causes)
    more = f"; and {len(faults) - MOST_FIELDS} more" if len(faults) > MOST_FIELDS else ""
    fields = "; ".join(faults[:MOST_FIELDS])
    if case.kind not in _TEMPLATED:
        remedy = "correct the LLMService if it asks for that, or delete the object, which is then made again"
        return _Words(reasons.REFUSED, f"it is not valid: {fields}{more}", remedy)
    return _Words(reasons.INVALID_SPEC, f"it is not valid: {fields}{more}", "correct that in the LLMService")


def _fault(text: str) -> str:
    text = re.sub(r", got .*", "", _PATTERN.sub(")", text), flags=re.DOTALL)
    text = text.replace("field not declared in schema", "there is no such field")
    text = re.sub(r"^quantities must match .*", "a quantity cannot be read; 500m and 2Gi are some", text)
    return _LONG_VALUE.sub('"…"', text).strip()


def _field(case: _Case, path: str) -> str:
    """A field of the object as the field of the LLMService that it comes from, with names for numbers."""
    named = _named(case.body, path)
    if case.kind == "Pod" and re.match(r"(?:spec|metadata)\b", named):
        return f"{case.template}.{named}"
    if case.kind == "Deployment":
        if named.startswith("spec.template"):
            return f"{case.template}{named.removeprefix('spec.template')}"
        if named == "spec.replicas":
            return case.replicas
    return named


def _named(body: Mapping[str, Any], path: str) -> str:
    """ "spec.containers[0].image" -> "spec.containers[agent].image"."""
    found: Any = body
    parts = []
    for part in path.split("."):
        match = re.fullmatch(r"(\w+)\[(\d{1,6})\]", part)
        if match is None:
            found = _map(found).get(part)
            parts.append(part)
            continue
        found = _entry(_map(found), (match[1], int(match[2])))
        name = _map(found).get("name")
        parts.append(f"{match[1]}[{name if isinstance(name, str) and name else match[2]}]")
    return ".".join(parts)


def _entry(body: Mapping[str, Any], path: Iterable[str | int]) -> Mapping[str, Any]:
    """The map at a path of names and places; {} if there is none."""
    found: Any = body
    for step in path:
        if isinstance(step, int):
            found = found[step] if isinstance(found, list) and step < len(found) else None
        else:
            found = _map(found).get(step)
    return _map(found)


def _map(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


# ── Names, and the rest ───────────────────────────────────────────────────────────────────────────────────


def _name_taken(case: _Case) -> _Words | None:
    if case.status == "AlreadyExists" and "object is being deleted" not in case.text:
        return _Words(
            reasons.NAME_TAKEN,
            "another object has that name",
            "delete it, or give the LLMService another name",
        )
    if case.code == 409:
        return _Words(reasons.REFUSED, "it was changed or deleted at the same moment", "it is tried again")
    return None


def _anything_else(case: _Case) -> _Words:
    text, remedy = plain(case.text), ""
    if text.startswith("<"):
        text = f"the answer is a web page of something before the API server (HTTP status {case.code})"
    elif not text.strip(" …"):
        text = f"HTTP status {case.code}, without an explanation" if case.code else "nothing says why"
    if case.code == 429 or case.code >= 500:
        text, remedy = f"the API server cannot do it now: {text}", "it is tried again"
    return _Words(reasons.REFUSED, text, remedy)


# The texts of policies and webhooks come first: whatever they quote is not the API server's.
_RULES: tuple[Callable[[_Case], _Words | None], ...] = (
    _policy,
    _webhook_denies,
    _webhook_fails,
    _quota_exceeded,
    _quota_demands,
    _pod_security,
    _limit_range,
    _limit_range_default,
    _missing,
    _namespace_ends,
    _rights,
    _too_large,
    _name_taken,
    _no_kind,
    _invalid,
)
