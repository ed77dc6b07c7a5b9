"""The Lease: never two holders, whatever is late, lost or killed; and always one again soon."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from blockyard.operator.kube import LEASE, Conflict, Kind, Kube, Raw, Unreachable
from blockyard.operator.lease import DEADLINE, DURATION, RENEW, Lease

from .api_server import ApiServer, Fault


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Store:
    """One Lease with versions and conflicts. Each call waits at gates, before and after it is carried out."""

    def __init__(self) -> None:
        self.lease: Raw | None = None
        self.version = 0
        self.waiting: list[tuple[str, asyncio.Future[None]]] = []

    def client(self, name: str) -> StoreClient:
        return StoreClient(self, name)


class StoreClient:
    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    async def _gate(self) -> None:
        gate = asyncio.get_running_loop().create_future()
        self.store.waiting.append((self.name, gate))
        await gate

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Raw | None:
        assert (kind, namespace, name) == (LEASE, "home", "operator")
        await self._gate()
        found = copy.deepcopy(self.store.lease)
        await self._gate()
        return found

    async def create(self, body: Raw) -> Raw:
        await self._gate()
        if self.store.lease is not None:
            raise Conflict(409, "AlreadyExists", "exists")
        return await self._keep(body)

    async def replace(self, body: Raw) -> Raw:
        await self._gate()
        if self.store.lease is None or body["metadata"]["resourceVersion"] != str(self.store.version):
            raise Conflict(409, "Conflict", "modified")
        return await self._keep(body)

    async def _keep(self, body: Raw) -> Raw:
        self.store.version += 1
        body = copy.deepcopy(body)
        body["metadata"]["resourceVersion"] = str(self.store.version)
        self.store.lease = body
        await self._gate()
        return body


@pytest.mark.parametrize("seed", range(40))
def test_two_contenders_never_hold_it_together_and_one_always_takes_over(seed: int) -> None:
    """Calls interleave, take any time, fail before or after they are carried out; processes sleep and die."""

    async def scenario() -> None:
        dice, clock, store = random.Random(seed), Clock(), Store()
        names = ("a", "b")
        leases = {name: Lease(store.client(name), "home", "operator", name, clock=clock) for name in names}
        tasks: dict[str, asyncio.Task[Any]] = {}
        sleeping_until = dict.fromkeys(names, 0.0)
        holders: set[str] = set()

        async def step() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            held = [name for name in names if leases[name].held]
            assert len(held) < 2, f"both at {clock.now}"
            holders.update(held)

        for _ in range(1500):
            clock.now += dice.choice((0.0, 0.0, 0.1, 0.5, 1.0, 3.0))
            await step()
            for name in names:
                task = tasks.get(name)
                if (task is None or task.done()) and clock.now >= sleeping_until[name]:
                    if task is not None and not task.cancelled():
                        task.result()
                    chosen = leases[name].release if dice.random() < 0.02 else leases[name].attempt
                    tasks[name] = asyncio.create_task(chosen())
                    sleeping_until[name] = clock.now + dice.choice((0.5, RENEW, RENEW, RENEW, 30.0))
            await step()
            if store.waiting:
                name, gate = store.waiting.pop(dice.randrange(len(store.waiting)))
                fate = dice.random()
                if not gate.done():
                    if fate < 0.05:
                        gate.set_exception(Unreachable("lost"))
                    else:
                        gate.set_result(None)
                if fate > 0.98:  # the process starts anew, as after kill -9, under another name
                    tasks[name].cancel()
                    await asyncio.gather(tasks[name], return_exceptions=True)
                    fresh = f"{name}{clock.now}"
                    leases[name] = Lease(store.client(name), "home", "operator", fresh, clock=clock)
            await step()
        assert holders == {"a", "b"}, "the test has seen no change of holder"

    run(scenario())


def test_after_kill_9_the_other_takes_over_between_its_duration_and_two_tries_later() -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            kube, clock = Kube(server.credentials()), Clock()
            dead = Lease(kube, "home", "operator", "dead", clock=clock)
            heir = Lease(kube, "home", "operator", "heir", clock=clock)
            assert await dead.attempt()
            assert not await heir.attempt()
            for _ in range(int(DURATION // RENEW) - 1):
                clock.now += RENEW
                assert not await heir.attempt()
            assert not dead.held, "a holder that does not renew has stopped before others may take over"
            clock.now += RENEW
            assert await heir.attempt()
            spec = server.get(LEASE, "operator", "home")["spec"]
            assert spec["holderIdentity"] == "heir" and spec["leaseTransitions"] == 1
            await kube.close()

    run(scenario())


def test_a_late_answer_shortens_the_claim_and_never_lengthens_it() -> None:
    async def scenario() -> None:
        clock, store = Clock(), Store()
        lease = Lease(store.client("a"), "home", "operator", "a", clock=clock)
        attempt = asyncio.create_task(lease.attempt())
        while not attempt.done():
            await asyncio.sleep(0)
            if store.waiting:
                clock.now += 2.0  # four gates: 8 s from the request to the last answer
                store.waiting.pop()[1].set_result(None)
        assert lease.held
        assert lease.remaining == DEADLINE - 8.0

    run(scenario())


def test_a_holder_that_cannot_renew_stops_before_others_may_take_over() -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            kube, clock = Kube(server.credentials()), Clock()
            lease = Lease(kube, "home", "operator", "a", clock=clock)
            assert await lease.attempt()
            clock.now += DEADLINE - 0.1
            assert lease.held
            server.faults.append(Fault(lambda method, _: method == "PUT", times=99, code=403))
            assert await lease.attempt(), "the old claim still holds for a moment"
            clock.now += 0.2
            assert not lease.held
            await kube.close()

    run(scenario())


def test_released_it_is_free_at_once() -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            kube, clock = Kube(server.credentials()), Clock()
            first = Lease(kube, "home", "operator", "a", clock=clock)
            second = Lease(kube, "home", "operator", "b", clock=clock)
            assert await first.attempt()
            await first.release()
            assert not first.held
            assert await second.attempt()
            await first.release()
            assert server.get(LEASE, "operator", "home")["spec"]["holderIdentity"] == "b"
            await kube.close()

    run(scenario())


def test_work_is_cancelled_when_the_lease_is_lost_and_begins_again_when_it_is_back() -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            kube, clock = Kube(server.credentials()), Clock()
            lease = Lease(kube, "home", "operator", "a", clock=clock)
            events: asyncio.Queue[str] = asyncio.Queue()

            async def work() -> None:
                events.put_nowait("begun")
                try:
                    await asyncio.Event().wait()
                finally:
                    events.put_nowait("ended")

            leading = asyncio.create_task(lease.lead(work))
            assert await events.get() == "begun"
            server.faults.append(Fault(lambda method, _: method == "PUT", times=1, code=403))
            clock.now += DEADLINE + 1
            assert await events.get() == "ended", "it went on without the Lease"
            assert await events.get() == "begun"
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
            assert await events.get() == "ended"
            assert server.get(LEASE, "operator", "home")["spec"]["holderIdentity"] == ""
            await kube.close()

    run(scenario())


def test_what_the_work_raises_comes_out_and_the_lease_is_given_back() -> None:
    async def scenario() -> None:
        async with ApiServer() as server:
            kube = Kube(server.credentials())
            lease = Lease(kube, "home", "operator", "a")

            async def work() -> None:
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await lease.lead(work)
            assert server.get(LEASE, "operator", "home")["spec"]["holderIdentity"] == ""
            await kube.close()

    run(scenario())
