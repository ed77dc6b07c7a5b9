"""Decides which agents are created and which are removed: a pure function from ``Observed`` to actions.

Level-triggered: everything that a decision needs is in ``Observed`` (a drain that has begun is in the pod's
annotations, the back-off after failures in the status' decisions), so the operator may be killed between any
two steps, and may see the same state twice. Plans are idempotent: the name of a new pod is derived from the
service, the revision and a free slot, so creating it a second time finds the first pod.

Each pod is of one of these kinds:

    gone      terminating, lost with its node, or failed: no part of the service any more
    leaving   drains, or is drained
    bad       serves until it is replaced: of an old revision, or on a node that it must leave
    good      of the newest revision, on a node that may be used

Good pods are created while fewer than replicas are good, and while good and bad pods together are fewer than
replicas plus maxSurge. Bad pods, and good pods in excess of replicas, are drained, as long as replicas minus
maxUnavailable pods stay ready.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import reasons
from .api import DrainSpec
from .observed import UNREADABLE_AFTER, Observed, Pod, seconds

NODE_LAG = 15.0  # seconds after scheduling in which the pod's node may still be unknown here
NODE_PATIENCE = 60.0  # seconds for which a node may be not ready until its agents count as lost
REPORT_SECONDS = 10.0  # seconds after the drain's deadline in which an agent may report that it is drained
# What the scheduler says of a node that lacks nothing but room.
_SHORT_OF = ("Insufficient ", "Too many pods")
BACKOFF_FIRST, BACKOFF_LONGEST = 10.0, 300.0  # seconds between replacements of failed pods, doubling
BACKOFF_MEMORY = 900.0  # seconds after which a failure is forgotten
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # Kubernetes' own for names: no vowels, so no words


@dataclass(frozen=True, slots=True)
class Create:
    """Make a pod of this name. Use a plain create: a pod of ours with that name means that it is done.

    If anything else has the name, plan again with the name among ``Observed.occupied``.
    """

    name: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Write DRAINING_SINCE (unless it is there) and DRAIN_REASON to the pod, then POST /drain to its agent.

    Planned again, with the time that is left, for as long as the agent answers and is not draining.
    """

    pod: Pod
    reason: str
    message: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Release:
    """Take the label UNDRAINED off and write RELEASED: the PodDisruptionBudget lets the pod go."""

    pod: Pod


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the pod, its uid as precondition; grace period 0 if ``force`` (its node cannot end it)."""

    pod: Pod
    reason: str
    message: str
    force: bool = False


Action = Create | Drain | Release | Delete


def plan(observed: Observed) -> list[Action]:
    """What is to be done now; [] if nothing, if the service is paused, or if its spec cannot be read.

    Several actions for one pod come in the order in which they must be carried out.
    """
    return _Round(observed).actions()


def due(observed: Observed) -> float | None:
    """Seconds until the plan changes without an event (a deadline, the end of a back-off); None if never."""
    this_round = _Round(observed)
    this_round.actions()
    return min((time - observed.now for time in this_round.times if time > observed.now), default=None)


def lost(pod: Pod, observed: Observed) -> str:
    """Why a pod counts as lost: its node is gone and its agent does not answer. "" if it is not lost."""
    since, word = _node_trouble(pod, observed)
    return word if pod.agent is None and since is not None and observed.now >= since else ""


def gone(pod: Pod, observed: Observed) -> bool:
    """It is no part of the service any more: terminating, failed, or lost with its node."""
    return pod.deleting or pod.finished or bool(lost(pod, observed))


def misplaced(pod: Pod, observed: Observed) -> tuple[str, str]:
    """(reason, words) if a pod must leave its node, although its agent may still serve; else ("", "")."""
    node = observed.nodes.get(pod.node)
    since, word = _node_trouble(pod, observed)
    if since is not None and observed.now >= since:
        return reasons.NODE_NOT_READY, word
    if node is not None and node.unschedulable:
        return reasons.NODE_CORDONED, f"node {pod.node} is cordoned"
    return "", ""


def outdated(pod: Pod, observed: Observed) -> bool:
    return pod.revision != observed.revision


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The scheduler finds no node for a rollout's new agent. ``words`` are its own.

    ``of_resources``: some node lacks only resources, so that the place of an old agent may be what is needed.
    """

    since: float
    words: str
    of_resources: bool


def no_room(observed: Observed) -> NoRoom | None:
    """Why a rollout cannot go on by adding agents; None if it can, or if there is none."""
    staying = [pod for pod in observed.pods if not (gone(pod, observed) or leaving(pod))]
    pending = [pod for pod in staying if not outdated(pod, observed) and pod.unschedulable_since is not None]
    if not pending or not any(outdated(pod, observed) for pod in observed.pods):
        return None
    first = min(pending, key=lambda pod: pod.unschedulable_since or 0.0)
    of_resources = any(words in first.message for words in _SHORT_OF)
    return NoRoom(first.unschedulable_since or 0.0, first.message, of_resources)


def leaving(pod: Pod) -> bool:
    """It drains or is drained, whoever asked for it."""
    asked = pod.draining_since is not None or not pod.undrained
    return asked or (pod.agent is not None and pod.agent.state in ("draining", "drained"))


def unreadable(pod: Pod, observed: Observed) -> bool:
    """Its agent should be at work, and for a while nobody has been able to tell whether it is."""
    since = pod.unreadable_since
    return pod.ready and since is not None and observed.now >= since + UNREADABLE_AFTER


def serving(pod: Pod, observed: Observed) -> bool:
    """It takes requests, as far as can be told."""
    return pod.ready and not unreadable(pod, observed)


def works(pod: Pod) -> bool:
    """Its agent reports that it serves, whatever the pod's condition is at the moment."""
    return pod.agent is not None and pod.agent.state == "ready"


def _node_trouble(pod: Pod, observed: Observed) -> tuple[float | None, str]:
    """(The time from which the pod's node counts as gone, why); (None, "") if the node is well."""
    if not pod.node:
        return None, ""
    node = observed.nodes.get(pod.node)
    if node is None:
        return (pod.scheduled or pod.created) + NODE_LAG, f"node {pod.node} is gone"
    if not node.ready:
        return node.since + NODE_PATIENCE, f"node {pod.node} is not ready for {NODE_PATIENCE:.0f} s"
    return None, ""


class _Round:
    """One look at one service. ``times`` are the moments at which time alone may change the plan."""

    def __init__(self, observed: Observed) -> None:
        self.observed = observed
        self.times: list[float] = []
        spec = observed.service.spec
        self.timeout = float((DrainSpec() if spec is None else spec.drain).timeout_seconds)

    def actions(self) -> list[Action]:
        service = self.observed.service
        if service.paused or (service.spec is None and not service.deleting):
            return []
        ended: list[Pod] = []
        going: list[Pod] = []
        staying: list[Pod] = []
        for pod in self.observed.pods:
            if (since := _node_trouble(pod, self.observed)[0]) is not None:
                self.times.append(since)
            if pod.unreadable_since is not None:
                self.times.append(pod.unreadable_since + UNREADABLE_AFTER)
            if gone(pod, self.observed):
                ended.append(pod)
            else:
                (going if leaving(pod) else staying).append(pod)

        waiting = self._waiting(ended)
        actions = [action for pod in ended for action in self._bury(pod, wait=waiting > 0)]
        actions += [action for pod in going for action in self._see_off(pod)]
        if service.deleting:
            words = "the LLMService is deleted"
            return actions + [self._send_off(pod, reasons.SERVICE_DELETED, words) for pod in staying]
        bad = {pod.name: why for pod in staying if (why := self._bad(pod)) is not None}
        by_worth = sorted(staying, key=self._worth)
        place = None if going or any(pod.deleting for pod in ended) else self._gives_place(by_worth)
        created = self._create(by_worth, bad, ended + going, waiting)
        return [*actions, *created, *self._remove(by_worth, bad, place)]

    # ── Pods that have ended ──────────────────────────────────────────────────────────────────────

    def _bury(self, pod: Pod, *, wait: bool) -> list[Action]:
        """Delete pods that do not disappear by themselves."""
        if why := lost(pod, self.observed):
            return [Delete(pod, reasons.NODE_LOST, why, force=True)]
        if pod.finished and not pod.deleting and (leaving(pod) or not wait):
            return [Delete(pod, reasons.AGENT_FAILED, f"{pod.problem or pod.phase}: {pod.message}")]
        return []

    def _waiting(self, ended: list[Pod]) -> int:
        """How many failed pods are not replaced yet; they are kept until then, so that people can look at
        them.

        The back-off keeps a pod that its node refuses from being made again without end.
        """
        failed = [
            pod
            for pod in ended
            if pod.finished and not (pod.deleting or leaving(pod) or lost(pod, self.observed))
        ]
        before = sorted(self._failures())
        if not failed or not before or self.observed.service.deleting:
            return 0
        until = before[-1] + min(BACKOFF_LONGEST, BACKOFF_FIRST * 2 ** (len(before) - 1))
        self.times += [until, *(time + BACKOFF_MEMORY for time in before)]
        return len(failed) if self.observed.now < until else 0

    def _failures(self) -> Iterator[float]:
        """When failed pods were last replaced, from the decisions in the status."""
        decisions: Iterable[Mapping[str, Any]] = self.observed.service.status.get("decisions") or ()
        for decision in decisions:
            if (decision.get("action"), decision.get("reason")) == (Delete.__name__, reasons.AGENT_FAILED):
                time = seconds(decision.get("time"))
                if time is not None and self.observed.now - time < BACKOFF_MEMORY:
                    yield time

    # ── Draining ──────────────────────────────────────────────────────────────────────────────────

    def _send_off(self, pod: Pod, reason: str, message: str) -> Action:
        """The first step of a removal: a drain if the agent may have work, deletion if no agent runs in the
        pod.
        """
        if pod.started:
            return Drain(pod, reason, message, self.timeout)
        return Delete(pod, reason, f"{message}; no agent runs in it")

    def _see_off(self, pod: Pod) -> list[Action]:
        """The next step of a removal that has begun with a drain."""
        reason = pod.drain_reason or reasons.AGENT_LEAVING
        if not pod.undrained:
            return [Delete(pod, reason, "it is drained")]
        state = None if pod.agent is None else pod.agent.state
        since = pod.draining_since
        if since is None:  # somebody else started the drain; the operator takes it over
            return [Drain(pod, reason, "its agent drains", self.timeout)]
        deadline = since + self.timeout
        self.times.append(deadline + REPORT_SECONDS)
        if state == "drained":
            end = "it is drained"
        elif state == "failed":
            end = "its engine has failed: there is nothing left to drain"
        elif state is None and not pod.running:
            end = "its agent does not run: there is nothing left to drain"
        elif self.observed.now >= deadline + REPORT_SECONDS:
            end = f"it did not drain within {self.timeout:.0f} s"
        elif state in ("ready", "starting"):  # the request to drain was lost, or the agent was restarted
            left = max(0.0, deadline - self.observed.now)
            return [Drain(pod, reason, "its agent has not begun to drain", left)]
        else:
            return []
        return [Release(pod), Delete(pod, reason, end)]

    # ── Creation and removal ──────────────────────────────────────────────────────────────────────

    def _create(
        self, staying: list[Pod], bad: Mapping[str, tuple[str, str]], left: list[Pod], waiting: int
    ) -> list[Action]:
        spec = self.observed.service.spec
        assert spec is not None, "without a spec nothing is planned"
        good = len(staying) - len(bad)
        missing = spec.replicas - good - waiting
        room = spec.replicas + spec.rollout.max_surge - len(staying) - waiting
        causes = [bad[pod.name] for pod in staying if pod.name in bad]
        causes += [
            (reasons.AGENT_LEAVING, f"{pod.name} is gone")
            for pod in left
            if pod.drain_reason in ("", reasons.AGENT_LEAVING)  # not because of a decision of ours
        ]
        words = f"agents wanted: {spec.replicas}, there: {good}"
        causes += [(reasons.SCALE_OUT, words)] * missing
        names = _free_names(self.observed)
        return [Create(next(names), *cause) for cause in causes[: max(0, min(missing, room))]]

    def _gives_place(self, by_worth: list[Pod]) -> Pod | None:
        """The old agent that must go first, since no node has room for one more; None if none has to.

        One at a time: while another one leaves, or a new agent starts, nobody else gives its place.
        """
        spec, room = self.observed.service.spec, no_room(self.observed)
        if spec is None or room is None or spec.rollout.when_full != "Drain" or not room.of_resources:
            return None
        self.times.append(room.since + spec.rollout.patience_seconds)
        old = [pod for pod in by_worth if outdated(pod, self.observed)]
        new = [pod for pod in by_worth if not outdated(pod, self.observed)]
        starts = any(not pod.ready and pod.unschedulable_since is None for pod in new)
        too_soon = self.observed.now < room.since + spec.rollout.patience_seconds
        return None if starts or too_soon or not old else old[0]

    def _remove(
        self, staying: list[Pod], bad: Mapping[str, tuple[str, str]], place: Pod | None
    ) -> list[Action]:
        spec = self.observed.service.spec
        assert spec is not None, "without a spec nothing is planned"
        good = [pod for pod in staying if pod.name not in bad]
        words = f"agents wanted: {spec.replicas}, there: {len(good)}; this one has the least work"
        causes = dict(bad)
        causes |= {pod.name: (reasons.SCALE_IN, words) for pod in good[: max(0, len(good) - spec.replicas)]}
        spare = sum(pod.ready for pod in staying) - (spec.replicas - spec.rollout.max_unavailable)
        actions: list[Action] = []
        for pod in staying:
            if pod.name not in causes or (pod.ready and spare <= 0 and pod is not place):
                continue
            # Its pod may not be ready at the moment although its agent serves.
            if works(pod) and spare < 0 and pod is not place:
                continue
            spare -= pod.ready
            reason, why = causes[pod.name]
            if pod is place:
                why = f"{why}; no node has room for one more agent, so this one gives its place"
            actions.append(self._send_off(pod, reason, f"{why} ({_load(pod)})"))
        return actions

    def _bad(self, pod: Pod) -> tuple[str, str] | None:
        """Why a pod that stays must be replaced."""
        reason, words = misplaced(pod, self.observed)
        if reason:
            return reason, words
        if outdated(pod, self.observed):
            return reasons.ROLLOUT, f"revision {self.observed.revision} replaces {pod.revision or 'none'}"
        return None

    def _worth(self, pod: Pod) -> tuple[Any, ...]:
        """Order of removal. First come agents on a bad node, then old revisions, then those that do not
        serve, then those with the fewest requests, the fewest active blocks, the fewest cached blocks, and
        the youngest.
        """
        agent = pod.agent
        return (
            not misplaced(pod, self.observed)[0],
            not outdated(pod, self.observed),
            pod.ready,
            0 if agent is None else agent.running + agent.waiting,
            0 if agent is None else agent.device_tier.active,
            0 if agent is None else agent.device_tier.cached,
            -pod.created,
            pod.name,
        )


def _load(pod: Pod) -> str:
    agent = pod.agent
    if agent is None:
        return "no report"
    tier = agent.device_tier
    return f"{agent.running + agent.waiting} requests, {tier.active} of {tier.total} blocks"


def _free_names(observed: Observed) -> Iterator[str]:
    """Names for new pods: always the same ones in the same order, without those that exist."""
    taken = {pod.name for pod in observed.pods} | observed.occupied
    for slot in itertools.count():
        facts = f"{observed.service.uid} {observed.revision} {slot}"
        number = int.from_bytes(hashlib.sha256(facts.encode()).digest())
        letters = ""
        for _ in range(5):
            number, letter = divmod(number, len(_ALPHABET))
            letters += _ALPHABET[letter]
        name = f"{observed.service.name}-{letters}"
        if name not in taken:
            taken.add(name)
            yield name
