"""BlockPool: the only place that allocates, shares, finds and releases the blocks of one tier.

A block is in exactly one of three states. *Active*: it has references. *Cached*: it has none, but its content
is known by its key and can be revived. *Free*: it has neither references nor known content. Cached and free
blocks are in one list, in the order in which they will be taken: free blocks first, then cached ones, the
least recently used first. The list is intrusive (links inside the block objects), because reviving a cached
block takes it out of the middle, and that must be O(1).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nlargest
from itertools import islice

from ..outputs import HotPrefix, TierUsage

MAX_HOT_PREFIXES = 1024


class Block:
    """One slab of the tier's tensor. ``depth`` is its place in its chain of blocks, counted from 1."""

    __slots__ = ("depth", "id", "key", "next", "previous", "references")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.references = 0
        self.key: bytes | None = None
        self.depth = 0
        self.previous: Block | None = None  # both links are set exactly while the block is idle
        self.next: Block | None = None


class _IdleList:
    """Blocks without references, in the order in which they are taken; a ring with a sentinel."""

    __slots__ = ("_sentinel", "size")

    def __init__(self) -> None:
        self._sentinel = Block(-1)
        self._sentinel.previous = self._sentinel.next = self._sentinel
        self.size = 0

    def _insert(self, block: Block, before: Block) -> None:
        previous = before.previous
        assert previous is not None and block.next is None
        block.previous, block.next = previous, before
        previous.next = before.previous = block
        self.size += 1

    def append(self, block: Block) -> None:
        self._insert(block, self._sentinel)

    def prepend(self, block: Block) -> None:
        first = self._sentinel.next
        assert first is not None
        self._insert(block, first)

    def remove(self, block: Block) -> None:
        previous, following = block.previous, block.next
        assert previous is not None and following is not None
        previous.next, following.previous = following, previous
        block.previous = block.next = None
        self.size -= 1

    def pop(self) -> Block:
        block = self._sentinel.next
        assert block is not None and block is not self._sentinel
        self.remove(block)
        return block

    def __iter__(self) -> Iterator[Block]:
        block = self._sentinel.next
        while block is not None and block is not self._sentinel:
            yield block
            block = block.next


class BlockPool:
    """All blocks of one tier of one engine.

    Callers use block ids. Taking more than ``available`` raises ``ValueError``: the scheduler counts before
    it takes, so this is a bug in the scheduler and not a consequence of load.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, not {num_blocks}")
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._idle = _IdleList()
        for block in self._blocks:
            self._idle.append(block)
        self._by_key: dict[bytes, Block] = {}
        self._num_cached = 0
        self._hits: OrderedDict[bytes, int] = OrderedDict()  # chain end -> hits, least recent first

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def available(self) -> int:
        """How many blocks ``take`` can hand out: free and cached ones."""
        return self._idle.size

    def references(self, block_id: int) -> int:
        return self._blocks[block_id].references

    def take(self, count: int) -> list[int]:
        """Allocate blocks with one reference each. Cached blocks are evicted, least recently used first."""
        if count > self._idle.size:
            raise ValueError(f"{count} blocks wanted, {self._idle.size} of {len(self)} available")
        taken = []
        for _ in range(count):
            block = self._idle.pop()
            if block.key is not None:
                self._forget(block)
            block.references = 1
            taken.append(block.id)
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block. A cached block becomes active again."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.references == 0:
                if block.key is None:
                    raise ValueError(f"block {block_id} is free: there is nothing in it to share")
                self._idle.remove(block)
                self._num_cached -= 1
            block.references += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Remove one reference from each block of a chain; ids are given from the chain's start.

        The chain's end becomes idle first and so is evicted first, because a block can only be reused
        together with all blocks before it.
        """
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.references < 1:
                raise ValueError(f"block {block_id} is released more often than it was taken")
            block.references -= 1
            if block.references == 0:
                if block.key is None:
                    self._idle.prepend(block)
                else:
                    self._idle.append(block)
                    self._num_cached += 1

    def publish(self, block_id: int, key: bytes, depth: int) -> None:
        """Make a full active block findable by its key.

        If another block has the key already, that one stays the one to be found. Publishing the same again
        changes nothing; publishing other content is a bug, because a published block is immutable.
        """
        block = self._blocks[block_id]
        if block.references < 1:
            raise ValueError(f"block {block_id} is idle: its content may be overwritten at any time")
        if block.key is not None and block.key != key:
            raise ValueError(f"block {block_id} is published already, with other content")
        if key not in self._by_key:
            block.key, block.depth = key, depth
            self._by_key[key] = block

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Ids of the longest run of known keys, from the first key on. Takes no references."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block.id)
        return found

    def count_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks would leave ``available`` if they were shared."""
        return sum(self._blocks[i].references == 0 for i in block_ids)

    def record_hit(self, block_id: int) -> None:
        """Count a prefix-cache hit that ends with this block (for the hottest prefixes in the status)."""
        key = self._blocks[block_id].key
        if key is not None:
            self._hits[key] = self._hits.pop(key, 0) + 1
            if len(self._hits) > MAX_HOT_PREFIXES:
                self._hits.popitem(last=False)

    def hottest(self, count: int, *, block_tokens: int) -> list[HotPrefix]:
        """The chains with the most hits whose last block is still in the pool."""
        best = nlargest(count, self._hits.items(), key=lambda item: item[1])
        return [HotPrefix(key.hex(), self._by_key[key].depth * block_tokens, hits) for key, hits in best]

    def clear_cache(self) -> None:
        """Forget the content of all cached blocks. Active blocks stay published."""
        for block in list(self._idle):
            if block.key is not None:
                self._forget(block)

    def _forget(self, block: Block) -> None:
        assert block.key is not None and block.references == 0
        del self._by_key[block.key]
        self._hits.pop(block.key, None)
        block.key = None
        self._num_cached -= 1

    def usage(self, block_bytes: int = 0) -> TierUsage:
        total, idle = len(self._blocks), self._idle.size
        return TierUsage(
            total=total,
            free=idle - self._num_cached,
            cached=self._num_cached,
            active=total - idle,
            block_bytes=block_bytes,
        )

    def check(self, owners: Mapping[int, int]) -> None:
        """Check that no block is lost, leaked or in a wrong state; AssertionError names the problem.

        ``owners`` is the number of references that the caller counted for each block id. O(blocks).
        """
        idle = [block.id for block in islice(self._idle, len(self) + 1)]  # a broken list may be a cycle
        twice = [i for i, n in Counter(idle).items() if n > 1]
        assert not twice, f"blocks {twice} are in the idle list twice"
        assert len(idle) == self._idle.size, (
            f"idle list holds {len(idle)} blocks but counts {self._idle.size}"
        )
        in_list = set(idle)
        cached = 0
        for block in self._blocks:
            wanted = owners.get(block.id, 0)
            assert block.references == wanted, (
                f"block {block.id} has {block.references} references but {wanted} owners"
            )
            is_idle = block.id in in_list
            assert is_idle == (block.references == 0), (
                f"block {block.id} has {block.references} references and is "
                f"{'' if is_idle else 'not '}in the idle list"
            )
            if block.key is not None:
                assert self._by_key.get(block.key) is block, f"block {block.id}'s key leads to another block"
                cached += is_idle
        stray = [i for i in owners if not 0 <= i < len(self._blocks)]
        assert not stray, f"owners name blocks {stray} outside the pool"
        keyed = sum(block.key is not None for block in self._blocks)
        assert keyed == len(self._by_key), f"{len(self._by_key)} keys lead to {keyed} published blocks"
        assert cached == self._num_cached, f"{cached} blocks are cached but {self._num_cached} are counted"
        lost = [key.hex()[:8] for key in self._hits if key not in self._by_key]
        assert not lost, f"hits are kept for evicted prefixes {lost}"
