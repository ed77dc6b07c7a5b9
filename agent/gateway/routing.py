"""Which agent a request goes to: a pure function, so that gateways agree without talking to each other.

An agent's cost is the load that the request would find and add there, counted in requests: one for every
request it holds, one more for each that waits, the share of its KV pool in use, and the part of the prompt
that it would have to compute because it is not in its cache. The cheapest agent is asked first.

A prefix that everybody uses would draw all requests to one agent. So no agent takes more than a quarter above
the mean (consistent hashing with bounded loads, Mirrokni et al., SODA 2018): agents over that bound come
after all others, however much they have cached. Equal costs are decided by rendezvous hashing of the prompt's
beginning, so that a new prefix goes to the same agent from every gateway.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from ..prefix_sketch import CHARACTERS_PER_TOKEN, Prefix
from .prefix_mirror import PrefixMirror

TOKENS_PER_REQUEST = 64  # computing so many prompt tokens costs as much as one more request
FULL_POOL = 16.0  # a full pool costs as much as so many requests
OVER_MEAN = 1.25  # the bound: so many times the mean load ...
SLACK = 2.0  # ... and so many requests, so that nearly idle agents may differ
TIE_HASH = 7  # ties are decided by the first 512 characters: later text is different for each user


@dataclass(frozen=True, slots=True)
class AgentView:
    """One agent as a gateway sees it. ``key`` identifies one incarnation of it."""

    name: str
    incarnation: str = ""
    ready: bool = True
    in_flight: int = 0  # requests that it holds
    waiting: int = 0  # of those, requests that are not computed yet
    capacity: int = 1 << 30  # requests that it holds at most
    used: float = 0.0  # share of its KV blocks in use, 0 to 1
    prefixes: PrefixMirror | frozenset[int] = field(default=frozenset(), compare=False)

    @property
    def key(self) -> str:
        return f"{self.name}/{self.incarnation}"

    @property
    def load(self) -> int:
        return self.in_flight + self.waiting


@dataclass(frozen=True, slots=True)
class Choice:
    """An agent in the order in which it should be asked, and the numbers that put it there."""

    agent: AgentView
    standing: Literal["open", "over_bound", "full"]
    cost: float
    shared: int  # characters of the prompt that it has served
    length: int  # characters of the prompt
    bound: float

    @property
    def why(self) -> str:
        """For a header and the log: ASCII, one line."""
        standing = {
            "open": "",
            "over_bound": f", over the bound {self.bound:.1f}",
            "full": f", full at {self.agent.capacity}",
        }[self.standing]
        return (
            f"prefix {self.shared}/{self.length}, load {self.agent.load}{standing}, "
            f"pool {self.agent.used:.0%}, cost {self.cost:.2f}"
        )


def choose(prefix: Prefix, agents: Sequence[AgentView], excluded: Collection[str] = ()) -> list[Choice]:
    """The agents that may be asked, the best first; none that is not ready or whose key is excluded."""
    able = [agent for agent in agents if agent.ready and agent.key not in excluded]
    if not able:
        return []
    bound = OVER_MEAN * sum(agent.load for agent in able) / len(able) + SLACK
    beginning = prefix.hashes[min(TIE_HASH, len(prefix.hashes) - 1)] if prefix.hashes else 0
    ranked = [_weigh(prefix, agent, bound) for agent in able]
    order = {"open": 0, "over_bound": 1, "full": 2}
    ranked.sort(
        key=lambda choice: (order[choice.standing], choice.cost, -_rendezvous(beginning, choice.agent))
    )
    return ranked


def _weigh(prefix: Prefix, agent: AgentView, bound: float) -> Choice:
    shared = prefix.shared_with(agent.prefixes)
    computed = (prefix.length - shared) / CHARACTERS_PER_TOKEN / TOKENS_PER_REQUEST
    standing: Literal["open", "over_bound", "full"] = (
        "full" if agent.in_flight >= agent.capacity else "over_bound" if agent.load > bound else "open"
    )
    cost = computed + agent.load + FULL_POOL * agent.used
    # Over the bound only the load counts: cached prefixes must not attract more requests.
    cost = cost if standing == "open" else agent.load + FULL_POOL * agent.used
    return Choice(agent, standing, cost, shared, prefix.length, bound)


def _rendezvous(beginning: int, agent: AgentView) -> int:
    """Hashed by name, so that a restarted agent attracts the same prefixes as before."""
    digest = blake2b(f"{beginning:x} {agent.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
