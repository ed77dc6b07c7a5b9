"""Computes how many agents a service's load needs: pure functions from an ``Observed`` to replicas.

An agent can run out of KV blocks and of sequence slots, so the load is counted in both. It is counted in
absolute numbers: a few long contexts need as many agents as many short requests do, cached blocks need none,
and agents that were asked for and are still starting are not asked for twice. ``targetUsedPercent`` is the
share of an agent that should be in use.

Agents are added at once. They are removed when a lower number has been enough for ``scaleInDelaySeconds``
without interruption, down to the highest number that was wanted in that time, so that a steady load changes
the number only once. What must be remembered for that is in ``status.autoscaling``. While a report is missing
there may be more load than is known, so nothing is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from . import reasons
from .api import AutoscalingSpec, AutoscalingStatus
from .observed import Observed, Pod, seconds, stamp
from .replicas import gone, leaving, works


@dataclass(frozen=True, slots=True)
class Scale:
    """Write ``replicas`` to the LLMService's spec, as a HorizontalPodAutoscaler would."""

    replicas: int
    reason: str
    message: str


def plan(observed: Observed) -> Scale | None:
    """The change of replicas to make now; None if the number is right or the service is not to be scaled."""
    verdict, spec = _judge(observed), observed.service.spec
    if verdict is None or spec is None or verdict.replicas == spec.replicas:
        return None
    words = f"replicas from {spec.replicas} to {verdict.replicas}: {verdict.numbers}"
    return Scale(verdict.replicas, verdict.reason, words)


def state(observed: Observed) -> AutoscalingStatus | None:
    """What the status must remember for later rounds; None if the service is not to be scaled."""
    verdict = _judge(observed)
    if verdict is None:
        return None
    since = None if verdict.since is None else stamp(verdict.since)
    return AutoscalingStatus(wanted=verdict.wanted, reason=verdict.reason, since=since)


def due(observed: Observed) -> float | None:
    """Seconds until the delay of a scale-in ends, which changes the number; None if no delay runs."""
    verdict, spec = _judge(observed), observed.service.spec
    if verdict is None or verdict.since is None or spec is None or spec.autoscaling is None:
        return None
    return max(0.0, verdict.since + spec.autoscaling.scale_in_delay_seconds - observed.now)


# ── The verdict ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Verdict:
    """``wanted``: agents that the load asks for; while ``since`` is set, the most it has asked for since
    then. ``replicas``: what to write to the spec now.
    """

    wanted: int
    reason: str
    numbers: str
    replicas: int
    since: float | None = None


def _judge(observed: Observed) -> _Verdict | None:
    service, spec = observed.service, observed.service.spec
    if spec is None or spec.autoscaling is None or service.deleting or service.paused or spec.replicas == 0:
        return None
    scaling = spec.autoscaling
    current, bound = _bounded(spec.replicas, "", scaling)
    if bound:
        return _Verdict(current, bound, _range(scaling), replicas=current)
    wanted, reason, numbers = _asked(observed, scaling, current)
    if wanted >= current:
        return _Verdict(wanted, reason, numbers, replicas=wanted)
    before = service.status.get("autoscaling") or {}
    since, most = seconds(before.get("since")), before.get("wanted", current)
    if since is None or most >= current:  # the time in which fewer agents are enough begins now
        since = observed.now
    elif most > wanted:
        wanted, reason = most, before.get("reason", reason)
    over = observed.now >= since + scaling.scale_in_delay_seconds
    numbers += f"; no more were wanted for {scaling.scale_in_delay_seconds} s"
    return _Verdict(wanted, reason, numbers, wanted if over else current, since)


def _asked(observed: Observed, scaling: AutoscalingSpec, replicas: int) -> tuple[int, str, str]:
    """(agents needed, reason, numbers in words); at least ``replicas`` if an agent's report is missing."""
    serving = [pod for pod in observed.pods if _serves(pod, observed)]
    agents = [
        pod.agent
        for pod in serving
        if pod.agent is not None and pod.agent.device_tier.total and pod.agent.max_num_seqs
    ]
    if not agents:
        return replicas, reasons.NO_REPORTS, ""
    blocks = sum(agent.device_tier.total for agent in agents)
    active = sum(agent.device_tier.active for agent in agents)
    slots = sum(agent.max_num_seqs for agent in agents)
    running = sum(agent.running for agent in agents)
    requests = running + sum(agent.waiting for agent in agents)
    # A waiting request is taken to be as large as a running one; if none runs, only its slots count.
    needed = Fraction(active * requests, running) if running else Fraction(active)
    share = Fraction(scaling.target_used_percent, 100 * len(agents))  # of all, what one agent is to carry
    by_blocks, by_slots = ceil(needed / (blocks * share)), ceil(requests / (slots * share))
    cause = reasons.KV_LOAD if by_blocks >= by_slots else reasons.REQUEST_LOAD
    wanted, reason = _bounded(max(by_blocks, by_slots), cause, scaling)
    if len(agents) < len(serving) and wanted < replicas:
        return replicas, reasons.NO_REPORTS, ""
    words = (
        f"blocks ask for {by_blocks} ({active} of {blocks} are active), slots for {by_slots} "
        f"({requests} requests on {slots}, {requests - running} of them waiting); agents that serve: "
        f"{len(agents)}, target: {scaling.target_used_percent} %, {_range(scaling)}"
    )
    return wanted, reason, words


def _serves(pod: Pod, observed: Observed) -> bool:
    """It takes requests and is not leaving. Its own report counts while the pod's readiness changes."""
    return not (gone(pod, observed) or leaving(pod)) and (pod.ready or works(pod))


def _bounded(wanted: int, reason: str, scaling: AutoscalingSpec) -> tuple[int, str]:
    if wanted > scaling.max_replicas:
        return scaling.max_replicas, reasons.MAX_REPLICAS
    if wanted < scaling.min_replicas:
        return scaling.min_replicas, reasons.MIN_REPLICAS
    return wanted, reason


def _range(scaling: AutoscalingSpec) -> str:
    return f"between {scaling.min_replicas} and {scaling.max_replicas}"
