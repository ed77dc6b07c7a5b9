"""FairQueue: which waiting request is served next, by priority, then fairly among tenants, then by age.

Fairness is the virtual token counter of Sheng et al. ("Fairness in Serving Large Language Models", OSDI '24):
each tenant has a counter of the tokens it was served, and the waiting tenant with the smallest counter goes
next. The counter of a tenant that was idle is raised to the smallest one of those present, so that no tenant
gains credit by being idle.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

OUTPUT_WEIGHT = 2  # an output token costs a whole pass over the weights; the paper's weights are 1 and 2
MAX_IDLE_TENANTS = 4096


class Queued(Protocol):
    """The attributes that a queued request must have. ``arrival`` is unique, and smaller for older ones."""

    @property
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> int: ...


R = TypeVar("R", bound=Queued)


def order(request: Queued) -> tuple[int, int]:
    """Sort key of service within one tenant: lower ``priority`` first, then earlier ``arrival`` first."""
    return request.priority, request.arrival


class FairQueue(Generic[R]):
    """Waiting requests and the tenants' counters.

    A tenant is *present* while it has a request in the engine, waiting or running: from the first ``arrive``
    to the last ``leave``.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, list[R]] = {}  # tenant -> requests in service order
        self._present: dict[str, int] = {}  # tenant -> requests waiting or running
        self._served: OrderedDict[str, int] = OrderedDict()  # tenant -> counter; the oldest are dropped
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[R]:
        for requests in self._waiting.values():
            yield from requests

    def arrive(self, tenant: str) -> None:
        """A request of this tenant enters the engine."""
        if tenant not in self._present:
            floor = min((self._served[t] for t in self._present), default=0)
            self._served[tenant] = max(self._served.pop(tenant, 0), floor)
        self._present[tenant] = self._present.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """A request of this tenant has left the engine, whatever the reason."""
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            self._served.move_to_end(tenant)
            if len(self._served) > len(self._present) + MAX_IDLE_TENANTS:
                del self._served[next(t for t in self._served if t not in self._present)]

    def charge(self, tenant: str, tokens: int) -> None:
        """Add served tokens (weighted by the caller) to the counter of a present tenant."""
        self._served[tenant] += tokens

    def push(self, request: R) -> None:
        insort(self._waiting.setdefault(request.tenant, []), request, key=order)
        self._size += 1

    def peek(self) -> R | None:
        """The request to serve next: lowest ``priority``, then least served tenant, then oldest."""
        heads = [requests[0] for requests in self._waiting.values()]
        return min(heads, key=lambda r: (r.priority, self._served[r.tenant], r.arrival), default=None)

    def remove(self, request: R) -> None:
        requests = self._waiting[request.tenant]
        requests.remove(request)
        if not requests:
            del self._waiting[request.tenant]
        self._size -= 1

    def check(self) -> None:
        """Raise AssertionError if counters and queues disagree."""
        assert self._size == sum(map(len, self._waiting.values())), "the queue's size is wrong"
        for tenant, requests in self._waiting.items():
            assert requests, f"an empty queue is kept for tenant {tenant!r}"
            assert requests == sorted(requests, key=order), f"tenant {tenant!r}'s queue is out of order"
            assert self._present.get(tenant, 0) >= len(requests), (
                f"tenant {tenant!r} waits but is not present"
            )
        assert all(n > 0 for n in self._present.values()), "a tenant is present without a request"
        assert self._present.keys() <= self._served.keys(), "a present tenant has no counter"
