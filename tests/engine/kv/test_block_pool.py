"""BlockPool: any sequence of operations keeps its invariants, and each broken invariant is noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from blockyard.engine.kv.block_pool import BlockPool

BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Holders of chains of blocks against a pool, with the plainest possible model of who owns what."""

    chains = Bundle("chains")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.owners: Counter[int] = Counter()
        self.content: dict[int, bytes] = {}  # block id -> key published for it, while it must be intact
        self.published: dict[bytes, int] = {}

    @rule(target=chains, count=st.integers(0, BLOCKS))
    def take(self, count: int) -> object:
        if count > self.pool.available:
            with pytest.raises(ValueError, match="available"):
                self.pool.take(count)
            return multiple()
        worthless = [i for i in range(BLOCKS) if not self.owners[i] and i not in self.content]
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert all(self.owners[i] == 0 for i in taken), "a block in use was handed out"
        expected = set(worthless) if count >= len(worthless) else set()
        assert expected <= set(taken), "cached content was dropped while worthless blocks were there"
        for block in taken:
            key = self.content.pop(block, None)
            if key is not None:
                del self.published[key]
        self.owners.update(taken)
        return tuple(taken)

    @rule(target=chains, chain=chains)
    def share(self, chain: tuple[int, ...]) -> object:
        live = tuple(i for i in chain if self.owners[i])
        self.pool.share(live)
        self.owners.update(live)
        return live

    @rule(chain=consumes(chains))
    def release(self, chain: tuple[int, ...]) -> None:
        self.pool.release(chain)
        self.owners.subtract(chain)

    @rule(chain=chains, name=st.integers(0, 5))
    def publish(self, chain: tuple[int, ...], name: int) -> None:
        for depth, block in enumerate(chain, 1):
            key = b"%d.%d" % (name, depth)
            if block in self.content:
                if self.content[block] != key:
                    with pytest.raises(ValueError, match="published already"):
                        self.pool.publish(block, key, depth)
                continue
            self.pool.publish(block, key, depth)
            if key not in self.published:
                self.published[key], self.content[block] = block, key

    @rule(target=chains, name=st.integers(0, 5))
    def find(self, name: int) -> object:
        keys = [b"%d.%d" % (name, depth) for depth in range(1, BLOCKS + 1)]
        expected = []
        for key in keys:
            if key not in self.published:
                break
            expected.append(self.published[key])
        found = self.pool.find(keys)
        assert found == expected
        idle = sum(not self.owners[i] for i in set(found))
        assert self.pool.count_idle(found) == idle
        before = self.pool.available
        self.pool.share(found)
        assert before - self.pool.available == idle
        if found:
            self.pool.record_hit(found[-1])
        self.owners.update(found)
        return tuple(found)

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()
        for block in [i for i in self.content if not self.owners[i]]:
            del self.published[self.content.pop(block)]

    @invariant()
    def sound(self) -> None:
        self.pool.check({i: n for i, n in self.owners.items() if n})
        usage = self.pool.usage()
        assert usage.active == sum(n > 0 for n in self.owners.values())
        assert usage.cached == sum(not self.owners[i] for i in self.content)
        for prefix in self.pool.hottest(3, block_tokens=16):
            assert bytes.fromhex(prefix.key) in self.published


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_eviction_takes_worthless_blocks_then_the_least_recently_used_chain_end_first() -> None:
    pool = BlockPool(5)
    old, young = pool.take(2), pool.take(2)
    for chain, name in ((old, b"old"), (young, b"young")):
        for depth, block in enumerate(chain, 1):
            pool.publish(block, name + b"%d" % depth, depth)
    pool.release(old)
    pool.release(young)
    order = [pool.take(1)[0] for _ in range(5)]
    assert order == [4, old[1], old[0], young[1], young[0]]


def test_a_revived_block_is_not_evicted() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.publish(block, b"key", 1)
    pool.release([block])
    pool.share(pool.find([b"key"]))
    assert pool.take(1) != [block]
    with pytest.raises(ValueError, match="0 of 2 available"):
        pool.take(1)


def test_misuse_is_refused() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.release([block])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([block])
    with pytest.raises(ValueError, match="nothing in it to share"):
        pool.share([block])
    with pytest.raises(ValueError, match="idle"):
        pool.publish(block, b"key", 1)
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def _lose_from_idle_list(pool: BlockPool) -> None:
    pool._idle.pop()


def _tie_a_knot(pool: BlockPool) -> None:
    first, second, *_ = pool._idle
    second.next = first


def _take_silently(pool: BlockPool) -> None:
    pool._idle.append(pool._blocks[0])


def _count_wrong(pool: BlockPool) -> None:
    pool._num_cached += 1


def _size_wrong(pool: BlockPool) -> None:
    pool._idle.size += 1


def _leak_reference(pool: BlockPool) -> None:
    pool._blocks[0].references += 1


def _swap_keys(pool: BlockPool) -> None:
    first, second = list(pool._by_key)[:2]
    pool._by_key[first], pool._by_key[second] = pool._by_key[second], pool._by_key[first]


def _dangling_key(pool: BlockPool) -> None:
    pool._by_key[b"dangling"] = pool._blocks[-1]


def _stale_hit(pool: BlockPool) -> None:
    pool._hits[b"evicted"] = 1


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_lose_from_idle_list, "has 0 references and is not in the idle list"),
        (_tie_a_knot, "in the idle list twice"),
        (_take_silently, "has 1 references and is in the idle list"),
        (_count_wrong, "2 blocks are cached but 3 are counted"),
        (_size_wrong, "idle list holds 4 blocks but counts 5"),
        (_leak_reference, "block 0 has 2 references but 1 owners"),
        (_swap_keys, "key leads to another block"),
        (_dangling_key, "5 keys lead to 4 published blocks"),
        (_stale_hit, "hits are kept for evicted prefixes"),
    ],
)
def test_check_notices(corrupt: Callable[[BlockPool], None], message: str) -> None:
    pool = BlockPool(6)
    held, cached = pool.take(2), pool.take(2)
    for depth, block in enumerate([*held, *cached], 1):
        pool.publish(block, b"%d" % depth, depth)
    pool.release(cached)
    owners = dict.fromkeys(held, 1)
    pool.check(owners)
    corrupt(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check(owners)


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ({}, "block 0 has 1 references but 0 owners"),
        ({0: 2, 1: 1}, "block 0 has 1 references but 2 owners"),
        ({0: 1, 1: 1, 5: 1}, "block 5 has 0 references but 1 owners"),
        ({0: 1, 1: 1, 99: 1}, "outside the pool"),
    ],
)
def test_check_notices_wrong_owners(owners: dict[int, int], message: str) -> None:
    pool = BlockPool(6)
    assert pool.take(2) == [0, 1]
    with pytest.raises(AssertionError, match=message):
        pool.check(owners)
