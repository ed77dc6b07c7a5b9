"""FairQueue: who is served next: by priority, then the tenant that was served least, then the oldest request.

The order is that of Sheng et al. ("Fairness in Serving Large Language Models", OSDI '24): each tenant has a
counter of the tokens it was served, and of the tenants that wait the one with the smallest counter goes next.

A request *waits* until its known tokens are computed, in the queue or as a prompt in progress. When a tenant
starts to wait, its counter is brought between the smallest and the largest of those who wait already: time
without a wish earns no credit, and what a tenant was served while nobody else wanted it is no debt.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection, Iterator
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
    """The queued requests, and the counters of their tenants and of those whose requests left the queue."""

    def __init__(self) -> None:
        self._queued: dict[str, list[R]] = {}  # tenant -> requests in service order
        self._waiting: dict[str, set[R]] = {}  # tenant -> requests queued, or served and not yet settled
        self._served: OrderedDict[str, int] = OrderedDict()  # tenant -> counter; the oldest are dropped
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[R]:
        for requests in self._queued.values():
            yield from requests

    def push(self, request: R) -> None:
        """Queue a request; one that comes back has its old place among those of its tenant."""
        tenant = request.tenant
        if tenant not in self._waiting:
            served = self._served.pop(tenant, 0)
            others = [self._served[t] for t in self._waiting]
            self._served[tenant] = max(min(others), min(served, max(others))) if others else served
        self._waiting.setdefault(tenant, set()).add(request)
        insort(self._queued.setdefault(tenant, []), request, key=order)
        self._size += 1

    def peek(self) -> R | None:
        """The request to serve next."""
        return min((requests[0] for requests in self._queued.values()), key=self.rank, default=None)

    def rank(self, request: R) -> tuple[int, int, int]:
        """Sort key of service among all requests that wait."""
        return request.priority, self._served[request.tenant], request.arrival

    def lead(self, request: R, other: R) -> int:
        """How many tokens more the first one's tenant was served than the other's."""
        return self._served[request.tenant] - self._served[other.tenant]

    def remove(self, request: R) -> None:
        """Take a request out of the queue; until it is settled, its tenant still waits."""
        requests = self._queued[request.tenant]
        requests.remove(request)
        if not requests:
            del self._queued[request.tenant]
        self._size -= 1

    def settle(self, request: R) -> None:
        """A request that is not in the queue waits no longer: its tokens are computed, or it has left."""
        tenant = request.tenant
        waiting = self._waiting.get(tenant)
        if waiting is None or request not in waiting:
            return
        waiting.remove(request)
        if not waiting:
            del self._waiting[tenant]
            self._served.move_to_end(tenant)
            if len(self._served) > len(self._waiting) + MAX_IDLE_TENANTS:
                del self._served[next(t for t in self._served if t not in self._waiting)]

    def charge(self, tenant: str, tokens: int) -> None:
        """Add served tokens (weighted by the caller) to a tenant's counter."""
        self._served[tenant] = self._served.get(tenant, 0) + tokens

    def check(self, served: Collection[R]) -> None:
        """Raise AssertionError if counters and queues disagree. ``served``: the requests being served."""
        assert self._size == sum(map(len, self._queued.values())), "the queue's size is wrong"
        for tenant, requests in self._queued.items():
            assert requests, f"an empty queue is kept for tenant {tenant!r}"
            assert requests == sorted(requests, key=order), f"tenant {tenant!r}'s queue is out of order"
            assert self._waiting.get(tenant, set()).issuperset(requests), (
                f"tenant {tenant!r} is queued but does not wait"
            )
            assert not set(requests) & set(served), f"tenant {tenant!r} has a request in two places"
        waiting = {request for requests in self._waiting.values() for request in requests}
        assert waiting <= {*self, *served}, "a request that has left still waits"
        assert all(self._waiting.values()), "a tenant waits without a request"
        assert self._waiting.keys() <= self._served.keys(), "a waiting tenant has no counter"
