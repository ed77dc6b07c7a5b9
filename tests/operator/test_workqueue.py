"""The work queue: keys coalesce, no key is in two hands, failures back off, nothing is lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from blockyard.operator.workqueue import FIRST_RETRY, LONGEST_RETRY, Key, WorkQueue


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def key(number: int) -> Key:
    return ("default", str(number))


def test_a_key_added_many_times_while_it_waits_is_taken_once() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        for _ in range(100):
            queue.add(key(1))
            queue.check()
        assert (await queue.take())[0] == key(1)
        queue.done(key(1))
        assert len(queue) == 0

    run(scenario())


def test_a_key_added_while_it_is_worked_on_comes_back_once_when_that_ends() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add(key(1))
        await queue.take()
        queue.add(key(1))
        queue.add(key(1))
        queue.check()
        assert len(queue) == 0, "two workers could have it"
        queue.done(key(1))
        queue.check()
        assert (await queue.take())[0] == key(1)
        queue.done(key(1))
        assert len(queue) == 0

    run(scenario())


def test_keys_come_in_the_order_in_which_they_became_due() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        for number in (3, 1, 2, 1, 3):
            queue.add(key(number))
        assert [(await queue.take())[0] for _ in range(3)] == [key(3), key(1), key(2)]

    run(scenario())


def test_a_delayed_key_comes_at_its_earliest_time_and_add_overrides_the_delay() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add_after(key(1), 3600)
        queue.add_after(key(2), 3600)
        queue.add_after(key(1), 0.01)
        queue.add_after(key(1), 1800)
        assert (await queue.take())[0] == key(1)
        queue.add(key(2))
        queue.check()
        assert (await queue.take())[0] == key(2)
        queue.close()

    run(scenario())


def test_failures_back_off_exponentially_up_to_a_limit_and_success_forgets_them() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        pauses = [queue.failed(key(1)) for _ in range(12)]
        assert pauses[:3] == [FIRST_RETRY, 2 * FIRST_RETRY, 4 * FIRST_RETRY]
        assert pauses[-1] == LONGEST_RETRY
        queue.succeeded(key(1))
        assert queue.failed(key(1)) == FIRST_RETRY
        assert queue.failed(key(2)) == FIRST_RETRY, "one key's failures are not another's"
        queue.close()

    run(scenario())


def test_oldest_tells_of_waiting_and_of_working_keys() -> None:
    async def scenario() -> None:
        now = [0.0]
        queue = WorkQueue(clock=lambda: now[0])
        assert queue.oldest() == 0
        queue.add(key(1))
        now[0] = 5.0
        queue.add(key(2))
        assert queue.oldest() == 5.0
        assert await queue.take() == (key(1), 5.0)
        now[0] = 9.0
        assert queue.oldest() == 4.0, "the worker has had it for 4 s, and the other one waits as long"
        queue.done(key(1))
        await queue.take()
        queue.done(key(2))
        assert queue.oldest() == 0

    run(scenario())


def test_close_leaves_no_timer_behind() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add_after(key(1), 0.001)
        queue.add(key(2))
        queue.close()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 0.05)

    run(scenario())


@pytest.mark.parametrize("seed", range(5))
def test_under_random_use_no_key_is_in_two_hands_and_every_add_is_followed_by_a_round(seed: int) -> None:
    async def scenario() -> None:
        dice = random.Random(seed)
        queue = WorkQueue()
        added, seen = Counter[Key](), dict.fromkeys(map(key, range(10)), 0)
        working: set[Key] = set()

        async def worker() -> None:
            while True:
                taken, _ = await queue.take()
                assert taken not in working
                working.add(taken)
                covered = added[taken]
                for _ in range(dice.randrange(4)):
                    await asyncio.sleep(0)
                seen[taken] = max(seen[taken], covered)
                working.discard(taken)
                if dice.random() < 0.1:
                    queue.add_after(taken, 0)
                queue.done(taken)
                queue.check()

        workers = [asyncio.create_task(worker()) for _ in range(3)]
        for _ in range(2000):
            chosen = key(dice.randrange(10))
            added[chosen] += 1
            queue.add(chosen)
            queue.check()
            if dice.random() < 0.3:
                await asyncio.sleep(0)
        while len(queue) or working:
            for task in workers:
                assert not task.done(), task.exception()
            await asyncio.sleep(0)
        assert all(seen[each] == count for each, count in added.items())
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        queue.close()

    run(scenario())
