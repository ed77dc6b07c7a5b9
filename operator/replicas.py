"""Which agents come and which go: one pure function from what is there to what is done next.

Level-triggered: everything that a decision needs is in ``Observed`` (a drain that has begun is in the pod's
annotations, the back-off after failures in the status' decisions), so that the operator may be killed between
any two steps, and may see the same state twice. Applying one plan twice changes nothing: new pods have names
that follow from the service, the revision and a free slot, so that a second creation meets the first pod.
"""

from __future__ import annotations

from dataclasses import dataclass

from .observed import Observed, Pod


@dataclass(frozen=True, slots=True)
class Create:
    """Make a pod of this name. Use a plain create: "already exists" means that it is done."""

    name: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Write DRAINING_SINCE (unless it is there) and DRAIN_REASON to the pod, then POST /drain to its agent.

    Planned again, with the time that is left, while the agent answers and does not drain.
    """

    pod: Pod
    reason: str
    message: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Release:
    """Take the label UNDRAINED off: the PodDisruptionBudget lets the pod go."""

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
    raise NotImplementedError


def due(observed: Observed) -> float | None:
    """Seconds until time alone changes the plan (a deadline, the end of a back-off); None if never."""
    raise NotImplementedError
