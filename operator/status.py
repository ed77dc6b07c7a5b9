"""Computes the status of an LLMService from an ``Observed``; no other file does.

Conditions: Ready tells whether requests are served as the spec asks, Progressing whether something is being
changed, Degraded whether a person should look, Balanced whether no agent is short of blocks while another one
has some to spare. Messages contain no number that changes by itself, such as an age, because a status is
written whenever it differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from . import autoscale, reasons
from .api import AgentLine, Condition, Decision, LLMServiceStatus, PoolStatus, TierPool, quantity
from .autoscale import Scale
from .children import selector, url
from .observed import PAUSED, UNREADABLE_AFTER, Observed, Pod, stamp
from .replicas import (
    Action,
    Create,
    Delete,
    Drain,
    Release,
    gone,
    leaving,
    lost,
    misplaced,
    no_room,
    outdated,
    serving,
    unreadable,
)

LONGEST_MESSAGE = 1024
MOST_AGENTS = 64
MOST_DECISIONS = 16

# Fields of a service, its agents and its pools that change all the time while requests run.
_LOAD = {"running", "waiting", "usedPercent", "cachedPercent", "hitPercent", "autoscaling"}
_LOAD |= {"free", "cached", "active"}

_Truth = Literal["True", "False", "Unknown"]
_Verdict = tuple[_Truth, str, str]  # status, reason, message


def compute(
    observed: Observed, actions: Sequence[Action | Scale], previous: Mapping[str, Any]
) -> dict[str, Any]:
    """LLMServiceStatus as the API server stores it. ``actions`` are those that have just been carried out.

    Equal to ``previous`` when nothing has changed: write only if it differs.
    """
    service = observed.service
    view = _View(observed)
    device = [pod.agent.device_tier for pod in view.present if pod.agent is not None]
    host = [pod.agent.host_tier for pod in view.present if pod.agent is not None]
    verdicts = {
        "Ready": view.ready_verdict(),
        "Progressing": view.progressing_verdict(),
        "Degraded": view.degraded_verdict(),
        "Balanced": view.balanced_verdict(),
    }
    status = LLMServiceStatus(
        observed_generation=service.generation,
        conditions=list(_conditions(observed, verdicts, previous)),
        replicas=len(view.staying),
        ready_replicas=len(view.ready),
        updated_replicas=sum(not outdated(pod, observed) for pod in view.staying),
        ready_gateways=observed.gateway_ready,
        selector=",".join(f"{name}={value}" for name, value in selector(service).items()),
        revision=observed.revision or previous.get("revision", ""),
        url=previous.get("url", "") if service.spec is None else url(service),
        running=sum(pod.agent.running for pod in view.present if pod.agent is not None),
        waiting=sum(pod.agent.waiting for pod in view.present if pod.agent is not None),
        used_percent=_percent(sum(tier.active for tier in device), sum(tier.total for tier in device)),
        pool=PoolStatus(device=_pool(device), host=_pool(host)),
        autoscaling=autoscale.state(observed),
        agents=_lines(observed),
        decisions=_decisions(observed, actions, previous),
    )
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def urgent(status: Mapping[str, Any], previous: Mapping[str, Any]) -> bool:
    """Whether it differs in more than load (percentages, running and waiting requests, pool numbers).

    Load changes all the time while requests run, so it is written at most every few seconds.
    ``autoscaling.since`` belongs to the load too, but it must be removed at once when it is no longer true.
    """
    before = previous.get("autoscaling") or {}
    if "since" in before and status.get("autoscaling") != before:
        return True
    return _without_load(status) != _without_load(previous)


def _without_load(status: Mapping[str, Any]) -> dict[str, Any]:
    def strip(part: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in _LOAD}

    found = strip(status)
    found["conditions"] = [each for each in status.get("conditions") or () if each["type"] != "Balanced"]
    found["pool"] = {tier: strip(numbers) for tier, numbers in (status.get("pool") or {}).items()}
    found["agents"] = [strip(line) for line in status.get("agents") or ()]
    return found


# ── Conditions ────────────────────────────────────────────────────────────────────────────────────────────


class _View:
    """The pods of a service in groups: present, staying, leaving, ready."""

    def __init__(self, observed: Observed) -> None:
        self.observed = observed
        self.spec = observed.service.spec
        self.present = [pod for pod in observed.pods if not gone(pod, observed)]
        self.staying = [pod for pod in self.present if not leaving(pod)]
        self.going = [pod for pod in self.present if leaving(pod)]
        self.ready = [pod for pod in self.staying if serving(pod, observed)]
        self.troubles = list(self._troubles())

    def _troubles(self) -> Iterator[tuple[str, str]]:
        """(reason, message) of everything that keeps agents from serving, as the cluster reports it."""
        found: dict[str, list[tuple[str, str]]] = {}
        for pod in self.observed.pods:
            if why := lost(pod, self.observed):
                found.setdefault(reasons.NODE_LOST, []).append((pod.name, why))
            elif pod.problem and not (pod.deleting or leaving(pod)):
                reason = reasons.AGENT_FAILED if pod.finished else pod.problem
                words = f"{pod.problem}: {pod.message}" if pod.finished else pod.message
                found.setdefault(reason, []).append((pod.name, words))
            elif pod.agent is not None and pod.agent.state == "failed" and not pod.deleting:
                found.setdefault(reasons.AGENT_FAILED, []).append((pod.name, "its engine has failed"))
            elif unreadable(pod, self.observed) and pod.report is not None:
                words = f"its status has not been readable for {UNREADABLE_AFTER:.0f} s: {pod.report.error}"
                found.setdefault(reasons.REPORTS_UNREADABLE, []).append((pod.name, words))
        for reason, pods in found.items():
            more = f" and {len(pods) - 1} more" if len(pods) > 1 else ""
            yield reason, f"agent {pods[0][0]}{more}: {reason}: {pods[0][1]}"

    @property
    def counted(self) -> str:
        return f"{len(self.ready)} of {0 if self.spec is None else self.spec.replicas} agents are ready"

    def ready_verdict(self) -> _Verdict:
        service = self.observed.service
        if service.deleting:
            return "False", reasons.DELETING, "the LLMService is being deleted"
        if self.spec is None:
            return "False", reasons.INVALID_SPEC, service.problem
        if self.spec.replicas == 0:
            return "True", reasons.SCALED_TO_ZERO, "no agents are wanted"
        if self.observed.taken:
            return "False", reasons.NAME_TAKEN, "; ".join(self.observed.taken)
        enough = max(1, self.spec.replicas - self.spec.rollout.max_unavailable)
        if len(self.ready) < enough:
            if refused := self.observed.refused:
                return "False", refused.reason, f"{self.counted}; {refused.message}"
            if self.troubles:
                return "False", self.troubles[0][0], self._with_troubles(self.counted)
            return "False", reasons.AGENTS_NOT_READY, self.counted
        if self.spec.gateway.replicas and not self.observed.gateway_ready:
            words = f"{self.counted}, but no pod of Deployment {service.name}-gateway is"
            if refused := self.observed.gateway_refused:
                return "False", refused.reason, f"{words}; {refused.message}"
            return "False", reasons.GATEWAY_NOT_READY, words
        return "True", reasons.ALL_READY, self.counted

    def progressing_verdict(self) -> _Verdict:
        service, observed = self.observed.service, self.observed
        if service.paused:
            return "False", reasons.PAUSED, f"nothing is changed while annotation {PAUSED} is true"
        if service.deleting:
            count = len(observed.pods)
            return "True", reasons.DELETING, f"agents left: {count}, of which {len(self.going)} drain"
        if self.spec is None:
            return "False", reasons.INVALID_SPEC, "nothing is changed until the spec can be read"
        wanted = self.spec.replicas
        old = [pod for pod in self.staying if outdated(pod, observed)]
        away = [words for pod in self.staying if (words := misplaced(pod, observed)[1])]
        if old or no_room(observed) is not None:
            new = sum(pod.running and not outdated(pod, observed) for pod in self.staying)
            words = f"{new} of {wanted} agents run revision {observed.revision}{self._no_room()}"
            return "True", reasons.ROLLING_OUT, self._with_troubles(words)
        if away:
            words = f"agents to be replaced: {len(away)}, since {away[0]}"
            return "True", reasons.REPLACING, self._with_troubles(words)
        if len(self.staying) != wanted or len(self.ready) != wanted:
            running = sum(pod.running for pod in self.staying)
            words = f"agents wanted: {wanted}, running: {running}, ready: {len(self.ready)}"
            return "True", reasons.SCALING, self._with_troubles(words)
        if self.going:
            return "True", reasons.DRAINING, f"agents that drain: {_names(self.going)}"
        return "False", reasons.STABLE, "all is as it is wanted"

    def _no_room(self) -> str:
        """What is done, or can be done, while no node has room for a rollout's new agent."""
        room, spec = no_room(self.observed), self.spec
        if room is None or spec is None:
            return ""
        if not room.of_resources:
            return "; no node fits a new agent, whatever room there is: look at spec.template"
        if spec.rollout.when_full == "Wait":
            return (
                "; no node has room for one more agent: free a GPU, or set rollout.whenFull to Drain or "
                "rollout.maxUnavailable to 1"
            )
        leaving = [
            pod for pod in self.observed.pods if outdated(pod, self.observed) and pod not in self.staying
        ]
        if leaving:
            return f"; no node has room for one more agent, so this one gives its place: {_names(leaving)}"
        return (
            "; no node has room for one more agent, so old ones are drained and give their places one at a "
            f"time, each after {spec.rollout.patience_seconds} s (rollout.patienceSeconds)"
        )

    def degraded_verdict(self) -> _Verdict:
        if self.spec is None and not self.observed.service.deleting:
            return "True", reasons.INVALID_SPEC, self.observed.service.problem
        if refused := self.observed.refused or self.observed.gateway_refused:
            return "True", refused.reason, refused.message
        if self.observed.taken:
            return "True", reasons.NAME_TAKEN, "; ".join(self.observed.taken)
        troubles = [*self.troubles, *((reasons.PROTECTION_MISSING, words) for words in self.observed.missing)]
        if troubles:
            return "True", troubles[0][0], "; ".join(words for _, words in troubles)
        return "False", reasons.HEALTHY, "no agent has a problem"

    def balanced_verdict(self) -> _Verdict:
        used = {
            pod.name: _percent(pod.agent.device_tier.active, pod.agent.device_tier.total)
            for pod in self.ready
            if pod.agent is not None and pod.agent.device_tier.total
        }
        if self.spec is None or not used:
            return "Unknown", reasons.NO_REPORTS, "no agent has reported its pool"
        low, high = self.spec.balance.low_watermark_percent, self.spec.balance.high_watermark_percent
        fullest, emptiest = max(used, key=lambda name: used[name]), min(used, key=lambda name: used[name])
        if used[fullest] > high and used[emptiest] < low:
            words = (
                f"{fullest} uses {used[fullest]} % of its blocks (above {high} %) while {emptiest} uses "
                f"{used[emptiest]} % (below {low} %)"
            )
            return "False", reasons.OUT_OF_BALANCE, words
        return "True", reasons.IN_BALANCE, "no agent is short of blocks while another one has blocks to spare"

    def _with_troubles(self, words: str) -> str:
        return "; ".join((words, *(trouble for _, trouble in self.troubles)))


def _conditions(
    observed: Observed, verdicts: Mapping[str, _Verdict], previous: Mapping[str, Any]
) -> Iterator[Condition]:
    before = {each["type"]: each for each in previous.get("conditions") or ()}
    for kind, (truth, reason, message) in verdicts.items():
        old = before.get(kind, {})
        same = old.get("status") == truth and old.get("lastTransitionTime")
        yield Condition(
            type=kind,
            status=truth,
            observed_generation=observed.service.generation,
            last_transition_time=old["lastTransitionTime"] if same else stamp(observed.now),
            reason=reason,
            message=_short(message),
        )


# ── The other parts ───────────────────────────────────────────────────────────────────────────────────────


def _lines(observed: Observed) -> list[AgentLine]:
    lines = [_line(pod, observed) for pod in observed.pods]
    if len(lines) > MOST_AGENTS:
        lines.sort(key=lambda line: (not line.message, line.state == "Ready", -line.used_percent, line.name))
    return sorted(lines[:MOST_AGENTS], key=lambda line: line.name)


def _line(pod: Pod, observed: Observed) -> AgentLine:
    why = lost(pod, observed)
    line = AgentLine(
        name=pod.name,
        node=pod.node,
        state="Unknown" if why else pod.state,
        revision=pod.revision,
        message=_short(why or _trouble(pod) or misplaced(pod, observed)[1]),
    )
    agent = pod.agent
    if agent is not None:
        line.running, line.waiting = agent.running, agent.waiting
        line.used_percent = _percent(agent.device_tier.active, agent.device_tier.total)
        line.cached_percent = _percent(agent.device_tier.cached, agent.device_tier.total)
        line.hit_percent = _percent(agent.prefix_hits, agent.prefix_queries)
    return line


def _trouble(pod: Pod) -> str:
    if pod.problem:
        return f"{pod.problem}: {pod.message}"
    if pod.running and pod.report is not None and pod.report.error:
        return "its status cannot be read"
    if leaving(pod) and pod.drain_reason:
        return f"leaves: {pod.drain_reason}"
    if pod.restarts:
        return "was restarted once" if pod.restarts == 1 else f"was restarted {pod.restarts} times"
    return ""


def _decisions(
    observed: Observed, actions: Iterable[Action | Scale], previous: Mapping[str, Any]
) -> list[Decision]:
    """The decisions, newest first. A step that is only repeated is not a new decision."""
    found = [Decision.model_validate(each) for each in previous.get("decisions") or ()]
    for action in actions:
        if isinstance(action, Release):
            continue
        name = _agent(action)
        decision = Decision(
            time=stamp(observed.now),
            action=type(action).__name__,
            agent=name,
            reason=action.reason,
            message=_short(action.message),
        )
        last = next((each for each in found if each.agent == name), None)
        again = last is not None and (last.action, last.reason) == (decision.action, decision.reason)
        if isinstance(action, Scale) or not again:
            found.insert(0, decision)
    return found[:MOST_DECISIONS]


def _agent(action: Create | Drain | Delete | Scale) -> str:
    """The agent that the action is about; "" if it is about all agents."""
    match action:
        case Scale():
            return ""
        case Create():
            return action.name
    return action.pod.name


def _pool(tiers: Sequence[Any]) -> TierPool:
    return TierPool(
        total=sum(tier.total for tier in tiers),
        free=sum(tier.free for tier in tiers),
        cached=sum(tier.cached for tier in tiers),
        active=sum(tier.active for tier in tiers),
        size=quantity(sum(tier.total * tier.block_bytes for tier in tiers)),
    )


def _percent(part: int, whole: int) -> int:
    return round(100 * part / whole) if whole else 0


def _short(message: str) -> str:
    return message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}..."


def _names(pods: Sequence[Pod]) -> str:
    """At most three of them."""
    return ", ".join(pod.name for pod in pods[:3]) + (", ..." if len(pods) > 3 else "")
